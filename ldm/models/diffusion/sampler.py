"""The one loop of sampling, from noise or from a noised picture to a picture. A sampler is what its `step` does.

A new sampler is a class with two methods: `make_schedule` chooses the steps (`StepTable`), and `step` goes from one to the next. It
gets the model's guided prediction and noise from a `Denoiser`, and the numbers of the step from a `Step`.

Shapes: B batch, C h w the latent, S number of sampling steps.
"""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ldm.models.diffusion.guidance import (
    Conditioning,
    CorrectedGuidance,
    DiffusionModel,
    Guidance,
    Scale,
    ScoreCorrector,
    check_batch,
    make_guidance,
    start_guidance,
)
from ldm.models.diffusion.noise import Noise
from ldm.models.diffusion.process import add_noise, eps_and_x0
from ldm.modules.precision import first_broken_module, half_precision, in_float32, is_finite

logger = logging.getLogger(__name__)

Intermediates = dict[str, list[Tensor]]


@dataclass(frozen=True)
class Step:
    """One step of a run: from x at `t` to x at `t_next`. Factors are as in `ldm.models.diffusion.process`."""

    number: int  # of the run's steps, from 0
    count: int  # steps of the run
    index: int  # in the sampler's table, which ascends, so that a run goes down to 0
    t: Tensor  # (B,)
    t_next: Tensor  # (B,); t itself in the last step
    signal: float
    noise_level: float
    next_signal: float
    next_noise_level: float
    sigma: float  # standard deviation of the noise that the step adds
    direction: float  # factor of eps beside it: sqrt(next_noise_level^2 - sigma^2)


@dataclass(frozen=True)
class StepTable:
    """The steps that a sampler visits, by rising timestep; (S,) each."""

    timesteps: np.ndarray
    alphas: Tensor  # alpha-bar where a step starts, float32 on the CPU
    previous: Tensor  # alpha-bar where it ends
    sigmas: Tensor

    @classmethod
    def of(cls, timesteps: np.ndarray, alphas: np.ndarray, previous: np.ndarray, sigmas: np.ndarray) -> "StepTable":
        return cls(timesteps, *(torch.as_tensor(a, dtype=torch.float32) for a in (alphas, previous, sigmas)))

    def __len__(self) -> int:
        return len(self.timesteps)

    # Roots are taken in float32, as in the public code. As numbers they need no transfer from the accelerator in a step.
    @cached_property
    def _factors(self) -> list[tuple[float, ...]]:
        columns = (
            self.alphas.sqrt(),
            (1 - self.alphas).sqrt(),
            self.previous.sqrt(),
            (1 - self.previous).sqrt(),
            self.sigmas,
            (1 - self.previous - self.sigmas**2).clamp(min=0).sqrt(),
        )
        return list(zip(*(column.tolist() for column in columns), strict=True))

    def factors(self, index: int) -> tuple[float, float]:
        """Signal and noise level where a step starts."""
        signal, noise_level, *_ = self._factors[index]
        return signal, noise_level

    def step(self, number: int, count: int, batch_size: int, device: torch.device) -> Step:
        """The `number`-th step of a run over the first `count` entries, which begins with the last of them."""
        index = count - 1 - number
        t, t_next = (
            torch.full((batch_size,), self.timesteps[i].item(), device=device) for i in (index, max(index - 1, 0))
        )
        return Step(number, count, index, t, t_next, *self._factors[index])

    def single(self, index: int, t: Tensor) -> Step:
        """One step by itself, at t (B,)."""
        return Step(0, 1, index, t, t, *self._factors[index])


class Denoiser:
    """What a step may ask for: what the model predicts under guidance, and noise.

    Args:
        model: says what it predicts.
        guidance: see `ldm.models.diffusion.guidance`.
        noise: of the steps.
        quantize: replace a predicted x_0 by entries of the first stage's codebook.
        conditionings: conditional, unconditional and scale that the guidance was made of, where a caller gave them.
    """

    def __init__(
        self,
        model: DiffusionModel,
        guidance: Guidance,
        noise: Noise,
        quantize: bool = False,
        conditionings: tuple[Conditioning, Conditioning, Scale] | None = None,
    ) -> None:
        self.model = model
        self.guidance = guidance
        self.noise = noise
        self.quantize = quantize
        self.conditionings = conditionings

    def output(self, x: Tensor, t: Tensor, at: Step) -> Tensor:
        """The network's guided output for x (B, C, h, w) at t (B,), as the sampler works."""
        return self.guidance(x, t, at.number, at.count)

    def predict(self, x: Tensor, t: Tensor, at: Step, signal: float, noise_level: float) -> tuple[Tensor, Tensor]:
        """eps and x_0 that the model sees in x (B, C, h, w) at t (B,), where the factors are these."""
        return eps_and_x0(self.output(x, t, at), x, signal, noise_level, self.model.parameterization)

    def settle(self, x0: Tensor) -> Tensor:
        """The x_0 that a step goes on with, for the one that it has predicted."""
        if not self.quantize:
            return x0
        first_stage: Any = getattr(self.model, "first_stage_model", None)  # only some models have one
        return first_stage.quantize(x0)[0]


class Sampler:
    """The loop, and the public interface of the samplers.

    Args:
        model: a LatentDiffusion, or anything with its `apply_model` and schedule; see `DiffusionModel`.
        schedule: accepted for compatibility.
        device: where to sample; the model's own device by default.
    """

    adds_noise = False  # whether the steps add noise, so that eta, temperature and noise_dropout mean something
    mask_before_step = True

    def __init__(
        self, model: DiffusionModel, schedule: str = "linear", device: torch.device | str | None = None
    ) -> None:
        self.model = model
        self.ddpm_num_timesteps = model.num_timesteps
        self._device = device

    @property
    def device(self) -> torch.device:
        """Where latents are made."""
        return torch.device(self._device) if self._device is not None else self.model.betas.device

    @device.setter
    def device(self, device: torch.device | str | None) -> None:
        self._device = device

    # -- what makes a sampler -------------------------------------------------------------------------

    def make_schedule(
        self, ddim_num_steps: int, ddim_discretize: str = "uniform", ddim_eta: float = 0.0, verbose: bool = True
    ) -> None:
        """Choose the steps, and call `use_table` with them. (The names of the arguments are public.)"""
        raise NotImplementedError

    def start(self, count: int) -> None:
        """Called before a run over the first `count` steps; samplers that remember earlier steps forget them here."""

    def step(self, x: Tensor, at: Step, denoiser: Denoiser) -> tuple[Tensor, Tensor]:
        """x at `at.t` (B, C, h, w) -> x at `at.t_next`, and the predicted x_0."""
        raise NotImplementedError

    def first_x(self, noise: Tensor) -> Tensor:
        """Where a run starts, from standard normal noise."""
        return noise

    def noised(self, x0: Tensor, noise: Tensor, index: int, table: StepTable) -> Tensor:
        """x_0 with noise, as x is at the beginning of the table's step `index`."""
        return add_noise(x0, noise, *table.factors(index))

    def image_start(self, steps: int, strength: float) -> tuple[int, int]:
        """For image to image: how many steps to take, and the index of the step for which the picture is noised.

        As published, the picture gets the noise of one step more than are taken.
        """
        count = min(int(strength * steps), steps - 1, len(self.table) - 1)
        return count, count

    # -- steps ----------------------------------------------------------------------------------------

    def use_table(self, table: StepTable) -> None:
        """Take these steps from now on; also under the names by which public scripts read them, (S,) on the device."""
        self.table = table
        self.ddim_timesteps = table.timesteps
        self.ddim_alphas, self.ddim_alphas_prev, self.ddim_sigmas, self.ddim_sqrt_one_minus_alphas = (
            values.to(self.device) for values in (table.alphas, table.previous, table.sigmas, (1 - table.alphas).sqrt())
        )

    def alphas_cumprod_array(self) -> np.ndarray:
        """The model's alpha-bar, (T,)."""
        alphas_cumprod = self.model.alphas_cumprod.detach().cpu().numpy()
        if len(alphas_cumprod) != self.ddpm_num_timesteps:
            raise ValueError(
                f"alphas_cumprod has {len(alphas_cumprod)} entries for {self.ddpm_num_timesteps} timesteps"
            )
        return alphas_cumprod

    def alphas_between(self, times: np.ndarray) -> np.ndarray:
        """alpha-bar at any times (S,), fractions too, float64: interpolated linearly in its logarithm."""
        with np.errstate(divide="ignore"):  # a schedule may end without signal
            logarithms = np.log(self.alphas_cumprod_array().astype(np.float64))
        return np.exp(np.interp(times, np.arange(self.ddpm_num_timesteps), logarithms))

    # -- sampling ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(
        self,
        S: int | None = None,
        batch_size: int | None = None,
        shape: Sequence[int] | None = None,
        conditioning: Conditioning = None,
        callback: Callable[[int], None] | None = None,
        normals_sequence: Any = None,
        img_callback: Callable[[Tensor, int], None] | None = None,
        quantize_x0: bool = False,
        eta: float = 0.0,
        mask: Tensor | None = None,
        x0: Tensor | None = None,
        temperature: float = 1.0,
        noise_dropout: float = 0.0,
        score_corrector: ScoreCorrector | None = None,
        corrector_kwargs: dict[str, Any] | None = None,
        verbose: bool = True,
        x_T: Tensor | None = None,
        log_every_t: int = 100,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Conditioning = None,
        dynamic_threshold: float | None = None,
        ucg_schedule: Sequence[float] | None = None,
        *,
        ddim_steps: int | None = None,
        guidance: Guidance | None = None,
        generators: Sequence[torch.Generator] | None = None,
        init_latents: Tensor | None = None,
        strength: float = 0.75,
    ) -> tuple[Tensor, Intermediates]:
        """Latents (batch_size, *shape), float32, from noise.

        Args:
            S, ddim_steps: number of steps, under either name.
            batch_size: B.
            shape: (C, h, w).
            conditioning: as `apply_model` takes it; its batch must be B.
            callback: called with the step's number; `img_callback` with the predicted x_0 and the step's number.
            quantize_x0: quantise the predicted x_0 with the first stage's codebook.
            eta: of DDIM, 0 deterministic to 1 as noisy as DDPM.
            mask, x0: inpainting: where the mask (B or 1, 1 or C, h, w) is 1, latents follow x0 (B or 1, C, h, w).
            temperature, noise_dropout: of the noise that the steps add, see `Noise`.
            score_corrector, corrector_kwargs: an object with `modify_score(model, eps, x, t, c, **kwargs)`; eps models only.
            verbose: show a progress bar.
            x_T: noise to start from, (B, C, h, w).
            log_every_t: keep intermediate results every so many steps, at least 1.
            unconditional_guidance_scale, unconditional_conditioning: guidance, see `make_guidance`.
            ucg_schedule: one guidance scale for each step instead.
            normals_sequence, dynamic_threshold: part of the public signature, without use there; must be None.
            guidance: takes the place of the conditionings and the scale.
            generators: one for each picture, see `picture_generators`; by default the global one, as published.
            init_latents, strength: image to image: start from these latents (B or 1, C, h, w) under the noise of the last
                `strength` (0 to 1) of the steps, and take only these.

        Returns:
            the latents, and `{"x_inter": [...], "pred_x0": [...]}`, the first of each being the initial noise.

        Raises:
            ValueError, TypeError: options that do not fit, or that this sampler does not have.
            FloatingPointError: NaN in float32; in half precision the run is repeated in float32, with a warning.
        """
        given = [number for number in (S, ddim_steps) if number is not None]
        if len(given) != 1:
            raise TypeError("give the number of steps once, as S or as ddim_steps")
        steps = given[0]
        if batch_size is None or shape is None:
            raise TypeError("sample() needs batch_size and shape (channels, height, width)")
        if len(shape) != 3:
            raise ValueError(f"shape must be (channels, height, width), found {tuple(shape)}")
        self._check_options(eta=eta, temperature=temperature, noise_dropout=noise_dropout)
        if dynamic_threshold is not None:
            raise NotImplementedError(
                "dynamic thresholding is for pixels, not latents; leave dynamic_threshold at None"
            )
        if normals_sequence is not None:
            logger.warning("normals_sequence has no effect; give initial noise as x_T, or generators")
        if steps != int(steps):
            raise ValueError(f"the number of steps must be a whole number, found {steps}")
        self.make_schedule(steps, ddim_eta=eta, verbose=verbose)
        count = index = len(self.table)
        if init_latents is not None:
            if not 0 < strength <= 1:
                raise ValueError(f"strength must be above 0 and at most 1, found {strength}")
            count, index = self.image_start(steps, strength)
            if count < 1:
                raise ValueError(f"strength {strength} leaves none of {steps} steps; take more, or a greater strength")
        if ucg_schedule is not None and len(ucg_schedule) != count:
            raise ValueError(f"ucg_schedule has {len(ucg_schedule)} scales for {count} steps")

        scale = unconditional_guidance_scale if ucg_schedule is None else [float(s) for s in ucg_schedule]
        conditionings = None
        if guidance is None:
            conditionings = conditioning, unconditional_conditioning, scale
            guidance = self.guidance_for(conditioning, unconditional_conditioning, scale, batch_size)
        if score_corrector is not None:
            guidance = CorrectedGuidance(guidance, self.model, conditioning, score_corrector, corrector_kwargs)
        noise = Noise(generators, temperature, noise_dropout)
        full_shape = (batch_size, *shape)
        if x_T is not None:
            x = self._fitted(x_T, full_shape, "x_T", exact=True)
        else:
            x = noise.normal(full_shape, self.device)
        if init_latents is not None:
            x = self.noised(self._fitted(init_latents, full_shape, "init_latents"), x, index, self.table)
        else:
            x = self.first_x(x)

        def on_step(at: Step, x: Tensor, pred_x0: Tensor) -> None:
            if callback:
                callback(at.number)
            if img_callback:
                img_callback(pred_x0, at.number)

        denoiser = Denoiser(self.model, guidance, noise, quantize_x0, conditionings)
        run = partial(self.loop, x, denoiser, self.table, count, mask, x0, log_every_t=log_every_t)
        return self._finite(run, noise, on_step=on_step, verbose=verbose)

    def _finite(
        self, run: Callable[..., tuple[Tensor, Intermediates]], noise: Noise, **shown: Any
    ) -> tuple[Tensor, Intermediates]:
        """run(**shown); if that gives NaN in half precision, once more in float32, with a warning.

        Latents are looked at once, at the end: to do it in each step would let the processor wait for the accelerator. The module
        where NaN begins is found in a second run.

        Raises:
            FloatingPointError: NaN or infinity in float32.
        """
        begin = noise.state(self.device)
        result = run(**shown)
        if is_finite(result[0]):
            return result
        model = self.model if isinstance(self.model, nn.Module) else nn.Module()
        noise.restore(begin, self.device)
        began = first_broken_module(model, partial(run, verbose=False))
        half = half_precision(model, self.device)
        if half is not None:
            logger.warning(
                "sampling in %s is not finite from %s on; it is repeated in float32, which takes longer. bfloat16 has a wider range "
                "than float16, and a lower guidance scale asks for less",
                half,
                began,
            )
            noise.restore(begin, self.device)
            with in_float32(model, self.device):
                result = run(**shown)
            if is_finite(result[0]):
                return result
        raise FloatingPointError(
            f"sampling gives NaN or infinite latents in float32, from {began} on: weights, prompts or latents given are not finite, or "
            "too large; check the weights, or lower the guidance scale"
        )

    def _check_options(self, **given: float) -> None:
        """Raise ValueError for an option of `sample` that is out of range, or that this sampler does not have."""
        if not 0 <= given["eta"] <= 1:
            raise ValueError(f"eta must be 0 to 1, found {given['eta']}")
        without_effect = {"eta": 0.0, "temperature": 1.0, "noise_dropout": 0.0}
        for name, value in given.items():
            if not self.adds_noise and value != without_effect[name]:
                raise ValueError(
                    f"the steps of {type(self).__name__} add no noise of that kind: {name} must be {without_effect[name]:g}, found {value}"
                )

    def guidance_for(
        self, cond: Conditioning, uncond: Conditioning, scale: Scale, batch_size: int | None = None
    ) -> Guidance:
        """The guidance that the model makes of its conditionings; see `make_guidance`.

        Raises:
            ValueError: the scale is no number, or a conditioning is not for `batch_size` pictures.
        """
        for number in scale if isinstance(scale, Sequence) else [scale]:
            if not math.isfinite(number):
                raise ValueError(f"the guidance scale must be a finite number, found {number}")
        if batch_size is not None:
            check_batch(cond, batch_size)
            check_batch(uncond, batch_size, "an unconditional conditioning")
        of_the_model = getattr(self.model, "make_guidance", None)
        return of_the_model(cond, uncond, scale) if of_the_model else make_guidance(self.model, cond, uncond, scale)

    def _fitted(self, given: Tensor, shape: Sequence[int], name: str, exact: bool = False) -> Tensor:
        """`given` on the device, in float32 at least, for the whole batch.

        Raises:
            ValueError: its shape does not fit `shape` (B, C, h, w); with `exact`, if it is not this shape.
        """
        batch, *rest = shape
        fits = tuple(given.shape) == tuple(shape) or (not exact and tuple(given.shape) == (1, *rest))
        if not fits:
            raise ValueError(f"{name} has shape {tuple(given.shape)}, but batch_size and shape say {tuple(shape)}")
        given = given.to(self.device)
        given = given.float() if given.dtype in (torch.float16, torch.bfloat16) else given
        return given if len(given) == batch else given.expand(batch, *rest)

    @torch.no_grad()
    def loop(
        self,
        x: Tensor,
        denoiser: Denoiser,
        table: StepTable,
        count: int,
        mask: Tensor | None = None,
        x0: Tensor | None = None,
        on_step: Callable[[Step, Tensor, Tensor], None] | None = None,
        log_every_t: int = 100,
        verbose: bool = True,
    ) -> tuple[Tensor, Intermediates]:
        """From x (B, C, h, w) down the first `count` steps of a table.

        Args:
            on_step: called after each step with the step, x and the predicted x_0.
            mask, x0, log_every_t, verbose, and what is returned: see `sample`.
        """
        if not 0 <= count <= len(table):
            raise ValueError(f"{count} steps of a schedule of {len(table)}")
        if log_every_t < 1:
            raise ValueError(f"log_every_t must be at least 1, found {log_every_t}")
        keep = None if mask is None else self._mask(mask, x0, x)
        kept: Intermediates = {"x_inter": [x], "pred_x0": [x]}
        self.start(count)
        start_guidance(denoiser.guidance)
        for number in tqdm(range(count), desc=type(self).__name__, disable=not verbose):
            at = table.step(number, count, len(x), x.device)
            if keep is not None and self.mask_before_step:
                x = self._blend(x, *keep, at, table, denoiser.noise)
            x, pred_x0 = self.step(x, at, denoiser)
            if keep is not None and not self.mask_before_step:
                x = self._blend(x, *keep, at, table, denoiser.noise)
            if on_step:
                on_step(at, x, pred_x0)
            if at.index % log_every_t == 0 or number == 0:
                kept["x_inter"].append(x)
                kept["pred_x0"].append(pred_x0)
        return x, kept

    def _mask(self, mask: Tensor, x0: Tensor | None, x: Tensor) -> tuple[Tensor, Tensor]:
        """mask and x0 on the device and of the type of x (B, C, h, w).

        Raises:
            ValueError: x0 is missing, or a shape does not fit.
        """
        if x0 is None:
            raise ValueError("a mask needs x0, the latents to keep where it is 1")
        batch, channels, *size = x.shape
        if (
            mask.dim() != x.dim()
            or mask.shape[0] not in (1, batch)
            or mask.shape[1] not in (1, channels)
            or list(mask.shape[2:]) != size
        ):
            raise ValueError(
                f"a mask for latents of {tuple(x.shape)} must have shape {(batch, 1, *size)}, found {tuple(mask.shape)}"
            )
        return mask.to(x), self._fitted(x0, x.shape, "x0").to(x)

    def _blend(self, x: Tensor, mask: Tensor, x0: Tensor, at: Step, table: StepTable, noise: Noise) -> Tensor:
        """x where the mask is 0, and x_0 with the noise of this step where it is 1."""
        noised = self.noised(x0, noise.normal(x0.shape, x.device).to(x.dtype), at.index, table)
        return noised * mask + (1.0 - mask) * x

    # -- from a picture -----------------------------------------------------------------------------------

    @torch.no_grad()
    def stochastic_encode(
        self, x0: Tensor, t: Tensor, use_original_steps: bool = False, noise: Tensor | None = None
    ) -> Tensor:
        """x0 (B, C, h, w) noised to the schedule's indices t (B,), for image to image."""
        alphas = (self.original_table() if use_original_steps else self.table).alphas.to(x0.device)[t.to(x0.device)]
        alphas = alphas.reshape(-1, *((1,) * (x0.dim() - 1)))  # (B, 1, 1, 1)
        noise = torch.randn_like(x0) if noise is None else noise
        return add_noise(x0, noise, alphas.sqrt(), (1 - alphas).sqrt())

    @torch.no_grad()
    def decode(
        self,
        x_latent: Tensor,
        cond: Conditioning,
        t_start: int,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Conditioning = None,
        use_original_steps: bool = False,
        callback: Callable[[int], None] | None = None,
        verbose: bool = True,
    ) -> Tensor:
        """Denoise latents (B, C, h, w) over the first `t_start` steps of the schedule."""
        guidance = self.guidance_for(cond, unconditional_conditioning, unconditional_guidance_scale, len(x_latent))
        table = self.original_table() if use_original_steps else self.table
        conditionings = cond, unconditional_conditioning, unconditional_guidance_scale
        denoiser = Denoiser(self.model, guidance, Noise(), conditionings=conditionings)
        x = self._fitted(x_latent, x_latent.shape, "x_latent")
        on_step = None if callback is None else lambda at, x, pred_x0: callback(at.number)
        run = partial(self.loop, x, denoiser, table, t_start)
        return self._finite(run, denoiser.noise, on_step=on_step, verbose=verbose)[0]

    def original_table(self) -> StepTable:
        """Every timestep of the model as a step.

        Raises:
            ValueError: this sampler chooses its own timesteps.
        """
        raise ValueError(f"{type(self).__name__} chooses its own timesteps: use_original_steps must be False")
