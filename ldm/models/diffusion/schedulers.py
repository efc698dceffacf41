"""Any scheduler of the library diffusers as a sampler: `SchedulerSampler(model, "euler")`, or with a scheduler object or class.

A scheduler does what a step does. It may keep x in units of its own: `scale_model_input` gives what the network takes, which is
x_t as everywhere here, and `add_noise` what a run starts from.

Shapes: B batch, C h w the latent, S number of sampling steps.
"""

import copy
import inspect
import logging
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.models.diffusion.guidance import DiffusionModel
from ldm.models.diffusion.process import eps_and_x0, v_from
from ldm.models.diffusion.sampler import Denoiser, Sampler, Step, StepTable
from ldm.util import ConfigError

logger = logging.getLogger(__name__)

# Name -> class in diffusers, and its settings.
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_karras": ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "deis": ("DEISMultistepScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "dpmpp_2s": ("DPMSolverSinglestepScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}),
    "dpmpp_2m_karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "dpmpp_2m_sde_karras": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True},
    ),
    "ddpm": ("DDPMScheduler", {}),
}
# What diffusers calls the things that a network can predict.
PREDICTION_TYPES = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}


def scheduler_settings(model: DiffusionModel) -> dict[str, Any]:
    """What a scheduler of diffusers needs to know of a model; each class takes some of these."""
    return {
        "num_train_timesteps": model.num_timesteps,
        "trained_betas": model.betas.detach().cpu().tolist(),
        "prediction_type": "epsilon" if model.parameterization == "x0" else PREDICTION_TYPES[model.parameterization],
        "steps_offset": 1,  # as Stable Diffusion's
        "clip_sample": False,  # latents are not confined to [-1, 1]
        "set_alpha_to_one": False,
    }


def make_scheduler(scheduler: Any, model: DiffusionModel) -> Any:
    """A scheduler for this model, of a name in SCHEDULERS or of a class; or a copy of the object that is given.

    Raises:
        ConfigError: diffusers is not installed, or this is no scheduler that samples a diffusion model.
    """
    settings: dict[str, Any] = {}
    if isinstance(scheduler, str):
        name, settings = SCHEDULERS[scheduler]
        try:
            import diffusers
        except ImportError as error:
            raise ConfigError(
                f"sampler {scheduler!r} needs the library diffusers; install this package with its extra: controlnet[samplers]"
            ) from error
        scheduler = getattr(diffusers, name)
    if isinstance(scheduler, type):
        settings = scheduler_settings(model) | settings
        accepted = inspect.signature(scheduler).parameters
        scheduler = scheduler(**{key: value for key, value in settings.items() if key in accepted})
    made = copy.deepcopy(scheduler)
    expected = getattr(getattr(made, "config", None), "prediction_type", None)
    if expected not in PREDICTION_TYPES.values() or not hasattr(made, "set_timesteps") or not hasattr(made, "step"):
        raise ConfigError(
            f"{type(made).__name__} is no scheduler for models that predict eps, v or x0: it has no such prediction_type"
        )
    return made


class SchedulerSampler(Sampler):
    """Samples with a scheduler of diffusers.

    Args:
        model: see Sampler.
        scheduler: a name in SCHEDULERS, a class, which gets the model's schedule and prediction, or an object, which is taken
            as it is set up. The network's output is converted to what it expects.
        device: see Sampler.
    """

    def __init__(self, model: DiffusionModel, scheduler: Any, device: torch.device | str | None = None) -> None:
        super().__init__(model, device=device)
        self.scheduler = make_scheduler(scheduler, model)
        self._takes_generator = "generator" in inspect.signature(self.scheduler.step).parameters
        own = getattr(self.scheduler, "alphas_cumprod", None)
        alphas = self.alphas_cumprod_array()
        if own is not None and (len(own) != len(alphas) or not np.allclose(own.cpu().numpy(), alphas, atol=1e-3)):
            logger.warning(
                "the noise schedule of this %s is not the model's; ldm.models.diffusion.schedulers.scheduler_settings(model) "
                "has the model's settings",
                type(self.scheduler).__name__,
            )

    def make_schedule(
        self, ddim_num_steps: int, ddim_discretize: str = "uniform", ddim_eta: float = 0.0, verbose: bool = True
    ) -> None:
        """Let the scheduler choose its timesteps; those of second order evaluate the network twice a step."""
        if ddim_eta != 0 or ddim_discretize != "uniform":
            raise ValueError(
                "a scheduler of diffusers is set up when it is made: eta and ddim_discretize have no effect"
            )
        if not 1 <= ddim_num_steps <= self.ddpm_num_timesteps:
            raise ValueError(f"the number of steps must be 1 to {self.ddpm_num_timesteps}, found {ddim_num_steps}")
        # On the CPU, where looking up an index needs no synchronisation with an accelerator.
        self._steps = ddim_num_steps
        self.scheduler.set_timesteps(ddim_num_steps)
        self._timesteps = self.scheduler.timesteps.cpu()  # descending
        times = self._timesteps.flip(0).numpy()
        sigmas = getattr(self.scheduler, "sigmas", None)  # noise over signal
        if sigmas is not None and len(sigmas) == len(times) + 1:
            sigmas = torch.as_tensor(sigmas).cpu().double().flip(0).numpy()
            alphas = 1 / (1 + sigmas**2)
            alphas, previous = alphas[1:], alphas[:-1]
        else:
            alphas = self.alphas_between(times)
            previous = np.append(1.0, alphas[:-1])
        self.use_table(StepTable.of(times, alphas, previous, np.zeros(len(times))))

    def start(self, count: int) -> None:
        self.scheduler.set_timesteps(self._steps)  # it forgets a run before
        begin = len(self.table) - count
        if begin and hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(begin)

    def first_x(self, noise: Tensor) -> Tensor:
        return noise * self.scheduler.init_noise_sigma

    def noised(self, x0: Tensor, noise: Tensor, index: int, table: StepTable) -> Tensor:
        return self.scheduler.add_noise(x0, noise, self._timestep(index).expand(len(x0)))

    def image_start(self, steps: int, strength: float) -> tuple[int, int]:
        """As in diffusers: the picture gets the noise of the first step that is taken."""
        order = getattr(self.scheduler, "order", 1)
        count = len(self.table) - max(steps - min(int(steps * strength), steps), 0) * order
        self.start(count)
        return count, count - 1

    def _timestep(self, index: int) -> Tensor:
        return self._timesteps[len(self._timesteps) - 1 - index]

    def step(self, x: Tensor, at: Step, denoiser: Denoiser) -> tuple[Tensor, Tensor]:
        """x in the scheduler's units (B, C, h, w) -> the next x, and the predicted x_0."""
        if denoiser.quantize:
            raise ValueError(
                f"{type(self.scheduler).__name__} cannot quantise x_0 in its steps: quantize_x0 must be False"
            )
        timestep = self._timestep(at.index)
        x_t = self.scheduler.scale_model_input(x, timestep)
        output = denoiser.output(x_t, at.t, at)
        eps, pred_x0 = eps_and_x0(output, x_t, at.signal, at.noise_level, self.model.parameterization)
        expected = self.scheduler.config.prediction_type
        if expected != PREDICTION_TYPES[self.model.parameterization]:
            converted = {
                "epsilon": eps,
                "sample": pred_x0,
                "v_prediction": v_from(pred_x0, eps, at.signal, at.noise_level),
            }
            output = converted[expected]
        noise = {"generator": denoiser.noise.generators} if self._takes_generator else {}
        return self.scheduler.step(output, timestep, x, **noise).prev_sample, pred_x0

    @torch.no_grad()
    def stochastic_encode(
        self, x0: Tensor, t: Tensor, use_original_steps: bool = False, noise: Tensor | None = None
    ) -> Tensor:
        """x0 (B, C, h, w) noised to the schedule's index t (B,), which must be the same for all."""
        if use_original_steps or (t != t[0]).any():
            raise ValueError("a scheduler of diffusers noises all pictures to one of its own steps")
        return self.noised(x0, torch.randn_like(x0) if noise is None else noise, int(t[0]), self.table)
