"""From a hint and a prompt to pictures: what scripts, demos and notebooks call.

    from cldm.model import create_model
    from cldm.pipeline import ControlPipeline

    pipeline = ControlPipeline(create_model("cldm_v15", weights="control_sd15_canny.safetensors", device=device))
    pictures = pipeline(hint, "a bird", steps=20, seed=1)  # uint8 (N, H, W, 3)

Shapes: N pictures, H W pixels, h w the latent.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from cldm.cldm import ControlLDM
from cldm.guidance import Control, strength_scales
from cldm.pictures import to_uint8
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.dpm_solver import DPMSolverSampler
from ldm.models.diffusion.plms import PLMSSampler
from ldm.models.diffusion.sampler import Sampler

ADDED_PROMPT = "best quality, extremely detailed"
NEGATIVE_PROMPT = (
    "longbody, lowres, bad anatomy, bad hands, missing fingers, extra digit, fewer digits, cropped, "
    "worst quality, low quality"
)


SAMPLERS: dict[str, type[Sampler]] = {"ddim": DDIMSampler, "plms": PLMSSampler, "dpm_solver": DPMSolverSampler}


class ControlPipeline:
    """Samples pictures from a ControlLDM; holds no state but the model and the sampler's class.

    Args:
        model: on the device where sampling should run.
        sampler: one of `SAMPLERS`, or a sampler's class; made anew for each call.

    Raises:
        ValueError: there is no sampler of that name.
    """

    def __init__(self, model: ControlLDM, sampler: str | type[Sampler] = "ddim") -> None:
        if isinstance(sampler, str) and sampler not in SAMPLERS:
            raise ValueError(f"unknown sampler {sampler!r}; known are {', '.join(SAMPLERS)}")
        self.model = model
        self.sampler = SAMPLERS[sampler] if isinstance(sampler, str) else sampler

    @torch.no_grad()
    def __call__(
        self,
        hint: np.ndarray | Tensor | None,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | Sequence[str] = "",
        num_samples: int = 1,
        steps: int = 20,
        guidance_scale: float = 9.0,
        strength: float = 1.0,
        guess_mode: bool = False,
        eta: float = 0.0,
        seed: int | None = None,
        size: tuple[int, int] | None = None,
        x_T: Tensor | None = None,
        callback: Callable[[int], None] | None = None,
        progress: bool = False,
    ) -> np.ndarray:
        """Pictures, uint8 (N, H, W, 3) RGB.

        Args:
            hint: what steers: uint8 (H, W, 3) for all pictures or (N, H, W, 3), or a float tensor (N, 3, H, W) in [0, 1]; None for
                no control. Sides must be multiples of 64.
            prompt: one for all pictures, or N of them.
            negative_prompt: likewise.
            num_samples: N, where neither hints nor prompts say so.
            steps: of the sampler. DPM-Solver needs fewest; 20 of DDIM's are usual.
            eta: of DDIM, 0 deterministic to 1 as noisy as DDPM; the others take 0 alone.
            guidance_scale: 1 for no guidance.
            strength: factor of the control; takes the place of `model.control_scales` for this call.
            guess_mode: the hint steers the conditional half only, more weakly in the early blocks; for sampling without a prompt.
            seed: of the initial noise, and of the noise that eta above 0 adds. The global generators are left as they were;
                with None they are used and go on.
            size: (H, W) where there is no hint.
            x_T: noise to start from, (N, 4, h, w).
            callback: called with the number of each step.
            progress: show a progress bar.

        Raises:
            ValueError: sizes, counts or ranges that do not fit.
        """
        if steps < 1:
            raise ValueError(f"steps must be at least 1, found {steps}")
        model = self.model
        hint_tensor = None if hint is None else _hint_tensor(hint).to(model.device)
        prompts, negatives, hint_tensor = _as_many(prompt, negative_prompt, hint_tensor, num_samples)
        height, width = hint_tensor.shape[2:] if hint_tensor is not None else size or _default_size(model)
        if height % 64 or width % 64:
            raise ValueError(
                f"height and width must be multiples of 64, found {height} and {width}; annotator.util.resize_image makes them so"
            )

        cond = {"c_crossattn": [model.get_learned_conditioning(prompts)]}
        uncond = None
        if guidance_scale != 1.0:
            uncond = {"c_crossattn": [model.get_learned_conditioning(negatives)]}
        scales = strength_scales(strength, guess_mode, getattr(model.control_model, "output_count", 13))
        controls = [] if hint_tensor is None else [Control(hint_tensor, scales=scales, conditional_only=guess_mode)]
        was_training = model.training
        model.eval()
        try:
            with seeded(seed, model.device):
                latents, _ = self.sampler(model).sample(
                    steps,
                    len(prompts),
                    (model.channels, height // 8, width // 8),
                    guidance=model.make_guidance(cond, uncond, guidance_scale, controls),
                    eta=eta,
                    x_T=x_T,
                    callback=callback,
                    verbose=progress,
                )
        finally:
            model.train(was_training)
        return to_uint8(model.decode_first_stage(latents))


@contextmanager
def seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Torch's generators start from `seed` inside, and go on as if nothing had been drawn after; None changes nothing."""
    if seed is None:
        yield
        return
    # Torch keeps a random state for each accelerator, and always that of the CPU.
    accelerator = {"devices": []} if device.type == "cpu" else {"devices": [device], "device_type": device.type}
    with torch.random.fork_rng(**accelerator):
        torch.manual_seed(seed)
        yield


def _hint_tensor(hint: np.ndarray | Tensor) -> Tensor:
    """A hint in any accepted form -> float32 (N, 3, H, W) in [0, 1]."""
    if isinstance(hint, Tensor):
        if hint.dim() != 4 or hint.shape[1] != 3 or not hint.is_floating_point():
            raise ValueError(f"a hint tensor must be float (N, 3, H, W), found {hint.dtype} {tuple(hint.shape)}")
        if hint.numel() and not (0 <= float(hint.min()) and float(hint.max()) <= 1):
            raise ValueError("a hint tensor must lie in [0, 1]")
        return hint.contiguous()  # the memory's layout would decide between kernels that differ in the last digits
    hint = np.asarray(hint)
    if hint.dtype != np.uint8 or hint.ndim not in (3, 4) or hint.shape[-1] != 3:
        raise ValueError(
            f"a hint must be uint8 (H, W, 3) or (N, H, W, 3), found {hint.dtype} {hint.shape}; annotator.util.HWC3 makes it so"
        )
    hint = hint[None] if hint.ndim == 3 else hint
    return torch.from_numpy(hint.astype(np.float32) / 255).permute(0, 3, 1, 2).contiguous()


def _as_many(
    prompt: str | Sequence[str], negative: str | Sequence[str], hint: Tensor | None, num_samples: int
) -> tuple[list[str], list[str], Tensor | None]:
    """Prompts, negative prompts and hints, each repeated where it is one for all."""
    given = {
        "prompts": 1 if isinstance(prompt, str) else len(prompt),
        "negative prompts": 1 if isinstance(negative, str) else len(negative),
        "hints": 1 if hint is None else len(hint),
        "num_samples": num_samples,
    }
    count = max(given.values())
    if count < 1 or any(n not in (1, count) for n in given.values()):
        raise ValueError(f"counts do not fit together: {', '.join(f'{n} {what}' for what, n in given.items())}")
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    negatives = [negative] if isinstance(negative, str) else list(negative)
    return (
        prompts * (count // len(prompts)),
        negatives * (count // len(negatives)),
        hint if hint is None else hint.expand(count, -1, -1, -1),
    )


def _default_size(model: ControlLDM) -> tuple[int, int]:
    size = model.image_size
    height, width = (size, size) if isinstance(size, int) else size
    return height * 8, width * 8
