"""DDIM sampling (Song et al. 2021) with classifier-free guidance (Ho and Salimans 2021).

`DDIMSampler` owns the loop; how guidance is computed is the one method `guided_output`, and how a step moves is `step`, so
that other samplers replace just those.

Shapes: B batch, C h w the latent, S number of sampling steps.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from ldm.models.diffusion.schedule import (
    extract_into_tensor,
    make_ddim_sampling_parameters,
    make_ddim_timesteps,
    noise_like,
)

Intermediates = dict[str, list[Tensor]]


class DDIMSampler:
    """Samples latents from a LatentDiffusion (or anything with its `apply_model`, schedule and conversions).

    Args:
        model: the diffusion model; it says what it predicts (eps, x0 or v).
        schedule: accepted for compatibility.
        device: where to sample; the model's own device by default.
    """

    inversion_takes_output_as_eps = False

    def __init__(
        self, model: Any, schedule: str = "linear", device: torch.device | str | None = None, **kwargs: Any
    ) -> None:
        self.model = model
        self.ddpm_num_timesteps = model.num_timesteps
        self.schedule = schedule
        self._device = device

    @property
    def device(self) -> torch.device:
        """Where latents are made."""
        return torch.device(self._device) if self._device is not None else self.model.betas.device

    @device.setter
    def device(self, device: torch.device | str | None) -> None:
        self._device = device

    def make_schedule(
        self, ddim_num_steps: int, ddim_discretize: str = "uniform", ddim_eta: float = 0.0, verbose: bool = True
    ) -> None:
        """Choose the timesteps and compute alpha-bar and sigma at them, as float32 (S,) on the sampling device.

        Sets `ddim_timesteps` (numpy, ascending), `ddim_sigmas`, `ddim_alphas`, `ddim_alphas_prev`, `ddim_sqrt_one_minus_alphas`.
        """
        timesteps = make_ddim_timesteps(ddim_discretize, ddim_num_steps, self.ddpm_num_timesteps)
        sigmas, alphas, previous = make_ddim_sampling_parameters(self._alphas_cumprod(), timesteps, ddim_eta)
        self._keep_schedule(timesteps, sigmas, alphas, previous, ddim_eta)

    def _alphas_cumprod(self) -> np.ndarray:
        """The model's alpha-bar, (T,)."""
        alphas_cumprod = self.model.alphas_cumprod.detach().cpu().numpy()
        if len(alphas_cumprod) != self.ddpm_num_timesteps:
            raise ValueError(
                f"alphas_cumprod has {len(alphas_cumprod)} entries for {self.ddpm_num_timesteps} timesteps"
            )
        return alphas_cumprod

    def _keep_schedule(
        self, timesteps: np.ndarray, sigmas: np.ndarray, alphas: np.ndarray, previous: np.ndarray, eta: float
    ) -> None:
        """Set what the steps look up: arrays (S,) by rising timestep, alpha-bar before (`alphas`) and after a step."""
        self.ddim_timesteps = timesteps
        self.ddim_sigmas, self.ddim_alphas, self.ddim_alphas_prev, self.ddim_sqrt_one_minus_alphas = (
            torch.as_tensor(a, dtype=torch.float32, device=self.device)
            for a in (sigmas, alphas, previous, np.sqrt(1 - alphas))
        )
        # The model's own schedule (T,), for `use_original_steps`; the names are public in the reference.
        self.betas, self.alphas_cumprod = self.model.betas, self.model.alphas_cumprod
        self.alphas_cumprod_prev = self.model.alphas_cumprod_prev
        self.sqrt_alphas_cumprod = self.alphas_cumprod.sqrt()
        self.sqrt_one_minus_alphas_cumprod = (1 - self.alphas_cumprod).sqrt()
        self.ddim_sigmas_for_original_num_steps = eta * torch.sqrt(
            (1 - self.alphas_cumprod_prev)
            / (1 - self.alphas_cumprod)
            * (1 - self.alphas_cumprod / self.alphas_cumprod_prev)
        )

    # -- what a step is made of ---------------------------------------------------------------------

    def guided_output(self, x: Tensor, t: Tensor, c: Any, scale: float, uncond: Any) -> Tensor:
        """The network's output under guidance: uncond + scale * (cond - uncond), both halves in one call.

        x (B, C, h, w), t (B,); conditionings as `apply_model` takes them -> (B, C, h, w). Without `uncond`, or at scale 1, one half.
        """
        if uncond is None or scale == 1.0:
            return self.model.apply_model(x, t, c)
        both = self.model.apply_model(torch.cat([x, x]), torch.cat([t, t]), join_conditioning(uncond, c))
        out_uncond, out_cond = both.chunk(2)
        return out_uncond + scale * (out_cond - out_uncond)

    def _alphas(self, index: int, use_original_steps: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """alpha-bar, previous alpha-bar and sigma at a step, as 0-dimensional tensors."""
        if not use_original_steps:
            return self.ddim_alphas[index], self.ddim_alphas_prev[index], self.ddim_sigmas[index]
        sigma = self.ddim_sigmas_for_original_num_steps[index]
        return self.alphas_cumprod[index], self.alphas_cumprod_prev[index], sigma

    def _eps_and_x0(self, output: Tensor, x: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
        """eps and x_0 from the network's output at alpha-bar `alpha`, by the parameterisation of the model."""
        signal, noise = alpha.sqrt(), (1 - alpha).sqrt()
        if self.model.parameterization == "v":
            return signal * output + noise * x, signal * x - noise * output
        if self.model.parameterization == "x0":
            return (x - signal * output) / noise, output
        return output, (x - noise * output) / signal

    def predict(
        self,
        x: Tensor,
        c: Any,
        t: Tensor,
        alpha: Tensor,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Any = None,
        score_corrector: Any = None,
        corrector_kwargs: Mapping[str, Any] | None = None,
        **other_options: Any,
    ) -> tuple[Tensor, Tensor]:
        """eps and x_0 that the model sees in x (B, C, h, w) at t (B,), where alpha-bar is `alpha`; guided and corrected.

        Takes all options of a step and uses those that concern the prediction, as `adjust_x0` uses those for x_0.
        """
        output = self.guided_output(x, t, c, unconditional_guidance_scale, unconditional_conditioning)
        if score_corrector is not None:
            output = correct_score(score_corrector, self.model, output, x, t, c, corrector_kwargs)
        return self._eps_and_x0(output, x, alpha)

    def adjust_x0(
        self, x0: Tensor, quantize_denoised: bool = False, dynamic_threshold: float | None = None, **other_options: Any
    ) -> Tensor:
        """What a step goes on with, of the x_0 (B, C, h, w) that it predicts."""
        if dynamic_threshold is not None:
            raise NotImplementedError(
                "dynamic thresholding is for pixels, not latents; leave dynamic_threshold at None"
            )
        return self.model.first_stage_model.quantize(x0)[0] if quantize_denoised else x0

    @torch.no_grad()
    def p_sample_ddim(
        self,
        x: Tensor,
        c: Any,
        t: Tensor,
        index: int,
        repeat_noise: bool = False,
        use_original_steps: bool = False,
        quantize_denoised: bool = False,
        temperature: float = 1.0,
        noise_dropout: float = 0.0,
        score_corrector: Any = None,
        corrector_kwargs: Mapping[str, Any] | None = None,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Any = None,
        dynamic_threshold: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One step (DDIM, eq. 12): x_t (B, C, h, w) at t (B,) -> x_{t-1} and the predicted x_0.

        Args:
            index: of the step in the sampler's schedule.
            repeat_noise: the same noise for every image.
            use_original_steps: index into the model's own schedule.
            quantize_denoised: quantise x_0 with the first stage's codebook.
            temperature: multiplies the noise.
            noise_dropout: drops elements of the noise.
            score_corrector, corrector_kwargs: an object with `modify_score(model, eps, x, t, c, **kwargs)`; eps models only.
            dynamic_threshold: not supported; must be None.
        """
        alpha, previous, sigma = self._alphas(index, use_original_steps)
        eps, pred_x0 = self.predict(
            x,
            c,
            t,
            alpha,
            unconditional_guidance_scale,
            unconditional_conditioning,
            score_corrector,
            corrector_kwargs,
        )
        pred_x0 = self.adjust_x0(pred_x0, quantize_denoised, dynamic_threshold)
        # Drawn at eta 0 too: the published samples depend on how often the generator was asked.
        noise = sigma * noise_like(x.shape, x.device, repeat_noise).to(x.dtype) * temperature
        if noise_dropout > 0.0:
            noise = F.dropout(noise, p=noise_dropout)
        return previous.sqrt() * pred_x0 + (1 - previous - sigma**2).sqrt() * eps + noise, pred_x0

    # -- sampling ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(
        self,
        S: int | None = None,
        batch_size: int | None = None,
        shape: Sequence[int] | None = None,
        conditioning: Any = None,
        callback: Callable[[int], None] | None = None,
        normals_sequence: Any = None,
        img_callback: Callable[[Tensor, int], None] | None = None,
        quantize_x0: bool = False,
        eta: float = 0.0,
        mask: Tensor | None = None,
        x0: Tensor | None = None,
        temperature: float = 1.0,
        noise_dropout: float = 0.0,
        score_corrector: Any = None,
        corrector_kwargs: Mapping[str, Any] | None = None,
        verbose: bool = True,
        x_T: Tensor | None = None,
        log_every_t: int = 100,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Any = None,
        dynamic_threshold: float | None = None,
        ucg_schedule: Sequence[float] | None = None,
        ddim_steps: int | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Intermediates]:
        """Latents (batch_size, *shape) from noise.

        Args:
            S, ddim_steps: number of steps, under either name.
            batch_size: B.
            shape: (C, h, w).
            conditioning: as `apply_model` takes it; its batch must be B.
            callback: called with the step's number; `img_callback` with the predicted x_0 and the step's number.
            eta: 0 deterministic, 1 as noisy as DDPM.
            mask, x0: inpainting: where the mask (B, 1, h, w) is 1, latents follow x0.
            verbose: show a progress bar.
            x_T: noise to start from, (B, C, h, w).
            log_every_t: keep intermediate results every so many steps, at least 1.
            unconditional_guidance_scale, unconditional_conditioning: guidance, see `guided_output`.
            ucg_schedule: one guidance scale for each step instead.
            normals_sequence: accepted for compatibility. Others: see `p_sample_ddim`.

        Returns:
            the latents, and `{"x_inter": [...], "pred_x0": [...]}`, the first of each being the initial noise.
        """
        if (S is None) == (ddim_steps is None):
            raise TypeError("give the number of steps once, as S or as ddim_steps")
        if batch_size is None or shape is None:
            raise TypeError("sample() needs batch_size and shape (channels, height, width)")
        if not eta >= 0:
            raise ValueError(f"eta must not be negative, found {eta}")
        if len(shape) != 3:
            raise ValueError(f"shape must be (channels, height, width), found {tuple(shape)}")
        check_batch(conditioning, batch_size)
        self.make_schedule(S if S is not None else ddim_steps, ddim_eta=eta, verbose=verbose)
        return self.ddim_sampling(
            conditioning,
            (batch_size, *shape),
            callback=callback,
            img_callback=img_callback,
            quantize_denoised=quantize_x0,
            mask=mask,
            x0=x0,
            noise_dropout=noise_dropout,
            temperature=temperature,
            score_corrector=score_corrector,
            corrector_kwargs=corrector_kwargs,
            x_T=x_T,
            log_every_t=log_every_t,
            unconditional_guidance_scale=unconditional_guidance_scale,
            unconditional_conditioning=unconditional_conditioning,
            dynamic_threshold=dynamic_threshold,
            ucg_schedule=ucg_schedule,
            verbose=verbose,
        )

    @torch.no_grad()
    def ddim_sampling(
        self,
        cond: Any,
        shape: Sequence[int],
        x_T: Tensor | None = None,
        ddim_use_original_steps: bool = False,
        callback: Callable[[int], None] | None = None,
        timesteps: int | None = None,
        quantize_denoised: bool = False,
        mask: Tensor | None = None,
        x0: Tensor | None = None,
        img_callback: Callable[[Tensor, int], None] | None = None,
        log_every_t: int = 100,
        temperature: float = 1.0,
        noise_dropout: float = 0.0,
        score_corrector: Any = None,
        corrector_kwargs: Mapping[str, Any] | None = None,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Any = None,
        dynamic_threshold: float | None = None,
        ucg_schedule: Sequence[float] | None = None,
        verbose: bool = True,
    ) -> tuple[Tensor, Intermediates]:
        """The loop of `sample`, over the schedule that `make_schedule` chose, or over its first `timesteps` steps.

        (The reference takes one step fewer than `timesteps`.)
        """
        if mask is not None and x0 is None:
            raise ValueError("a mask needs x0, the latents to keep where it is 1")
        if x_T is not None and tuple(x_T.shape) != tuple(shape):
            raise ValueError(f"x_T has shape {tuple(x_T.shape)}, but batch_size and shape say {tuple(shape)}")
        if log_every_t < 1:
            raise ValueError(f"log_every_t must be at least 1, found {log_every_t}")
        steps = self._steps(ddim_use_original_steps, timesteps)
        if ucg_schedule is not None and len(ucg_schedule) != len(steps):
            raise ValueError(f"ucg_schedule has {len(ucg_schedule)} scales for {len(steps)} steps")
        img = noise_like(tuple(shape), self.device) if x_T is None else x_T.to(self.device)
        intermediates: Intermediates = {"x_inter": [img], "pred_x0": [img]}
        self.start()
        for i, step in enumerate(tqdm(np.flip(steps), desc=type(self).__name__, disable=not verbose)):
            index = len(steps) - i - 1
            t = torch.full((shape[0],), step.item(), device=self.device)
            if mask is not None:
                alpha = self._alphas(index, ddim_use_original_steps)[0]
                noised = alpha.sqrt() * x0 + (1 - alpha).sqrt() * torch.randn_like(x0)
                img = noised * mask + (1.0 - mask) * img
            scale = unconditional_guidance_scale if ucg_schedule is None else ucg_schedule[i]
            img, pred_x0 = self.step(
                img,
                cond,
                t,
                index=index,
                t_next=t if index == 0 else torch.full_like(t, steps[index - 1].item()),
                use_original_steps=ddim_use_original_steps,
                quantize_denoised=quantize_denoised,
                temperature=temperature,
                noise_dropout=noise_dropout,
                score_corrector=score_corrector,
                corrector_kwargs=corrector_kwargs,
                unconditional_guidance_scale=scale,
                unconditional_conditioning=unconditional_conditioning,
                dynamic_threshold=dynamic_threshold,
            )
            if callback:
                callback(i)
            if img_callback:
                img_callback(pred_x0, i)
            if index % log_every_t == 0 or index == len(steps) - 1:
                intermediates["x_inter"].append(img)
                intermediates["pred_x0"].append(pred_x0)
        return img, intermediates

    def start(self) -> None:
        """Called before the first step of a run; multistep samplers forget the last run here."""

    def step(self, x: Tensor, c: Any, t: Tensor, index: int, t_next: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """One step of the loop: x_t -> x at `t_next` and the predicted x_0. `kwargs` are p_sample_ddim's."""
        return self.p_sample_ddim(x, c, t, index=index, **kwargs)

    def _steps(self, use_original_steps: bool, count: int | None) -> np.ndarray:
        steps = np.arange(self.ddpm_num_timesteps) if use_original_steps else self.ddim_timesteps
        if count is not None and not 0 <= count <= len(steps):
            raise ValueError(f"{count} steps of a schedule of {len(steps)}")
        return steps if count is None else steps[:count]

    # -- between pictures and noise -----------------------------------------------------------------------

    @torch.no_grad()
    def encode(
        self,
        x0: Tensor,
        c: Any,
        t_enc: int,
        use_original_steps: bool = False,
        return_intermediates: int | None = None,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Any = None,
        callback: Callable[[int], None] | None = None,
        verbose: bool = True,
        output_is_eps: bool | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        """DDIM inversion: the noise from which `decode` with as many steps returns x0 (DDIM, eq. 13 forward in time).

        Args:
            x0: latents (B, C, h, w).
            t_enc: number of steps.
            return_intermediates: keep so many intermediate results.
            output_is_eps: take the network's output for eps whatever the model predicts; by default `inversion_takes_output_as_eps`.

        Returns:
            the noised latents, and a dict with `x_encoded` and, if asked for, `intermediates` and `intermediate_steps`.
        """
        steps = self._steps(use_original_steps, t_enc)
        as_is = self.inversion_takes_output_as_eps if output_is_eps is None else output_is_eps
        x = x0
        kept, kept_steps = [], []
        for i, step in enumerate(tqdm(steps, desc="DDIM inversion", disable=not verbose)):
            t = torch.full((x0.shape[0],), step.item(), device=x0.device)
            # Inversion runs from the previous alpha-bar (at first the cleanest one) to this step's.
            alpha_next, alpha, _ = self._alphas(i, use_original_steps)
            output = self.guided_output(x, t, c, unconditional_guidance_scale, unconditional_conditioning)
            eps = output if as_is else self._eps_and_x0(output, x, alpha_next)[0]
            x = (alpha_next / alpha).sqrt() * x + alpha_next.sqrt() * (
                (1 / alpha_next - 1).sqrt() - (1 / alpha - 1).sqrt()
            ) * eps
            due = return_intermediates and i % max(t_enc // return_intermediates, 1) == 0
            if due or (return_intermediates and i >= t_enc - 2):
                kept.append(x)
                kept_steps.append(i)
            if callback:
                callback(i)
        out: dict[str, Any] = {"x_encoded": x, "intermediate_steps": kept_steps}
        if return_intermediates:
            out["intermediates"] = kept
        return x, out

    @torch.no_grad()
    def stochastic_encode(
        self, x0: Tensor, t: Tensor, use_original_steps: bool = False, noise: Tensor | None = None
    ) -> Tensor:
        """x0 (B, C, h, w) noised to the schedule's indices t (B,), for image-to-image."""
        alphas = self.alphas_cumprod if use_original_steps else self.ddim_alphas
        noise = torch.randn_like(x0) if noise is None else noise
        return (
            extract_into_tensor(alphas.sqrt(), t, x0.shape) * x0
            + extract_into_tensor((1 - alphas).sqrt(), t, x0.shape) * noise
        )

    @torch.no_grad()
    def decode(
        self,
        x_latent: Tensor,
        cond: Any,
        t_start: int,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Any = None,
        use_original_steps: bool = False,
        callback: Callable[[int], None] | None = None,
        verbose: bool = True,
    ) -> Tensor:
        """Denoise latents (B, C, h, w) over the first `t_start` steps of the schedule."""
        x, _ = self.ddim_sampling(
            cond,
            x_latent.shape,
            x_T=x_latent,
            ddim_use_original_steps=use_original_steps,
            timesteps=t_start,
            callback=callback,
            unconditional_guidance_scale=unconditional_guidance_scale,
            unconditional_conditioning=unconditional_conditioning,
            verbose=verbose,
        )
        return x


def correct_score(
    corrector: Any,
    model: Any,
    eps: Tensor,
    x: Tensor,
    t: Tensor,
    c: Any,
    corrector_kwargs: Mapping[str, Any] | None = None,
) -> Tensor:
    """What `corrector.modify_score` makes of the eps (B, C, h, w) that a model predicts for x at t (B,).

    Raises:
        ValueError: the model predicts something else.
    """
    if model.parameterization != "eps":
        raise ValueError(
            f"a score corrector needs a model that predicts eps; this one predicts {model.parameterization}"
        )
    return corrector.modify_score(model, eps, x, t, c, **(corrector_kwargs or {}))


def join_conditioning(uncond: Any, cond: Any) -> Any:
    """Both conditionings in one batch, unconditional first; tensors, lists of tensors, or dicts of either.

    Raises:
        ValueError: they are not made alike, so that they cannot share a call.
    """
    if isinstance(cond, Mapping) and isinstance(uncond, Mapping):
        if set(cond) != set(uncond):
            raise ValueError(
                f"conditionings hold {sorted(cond)} and {sorted(uncond)}; one batch needs the same entries in both"
            )
        return {k: join_conditioning(uncond[k], cond[k]) for k in cond}
    if isinstance(cond, (list, tuple)) and isinstance(uncond, (list, tuple)) and len(cond) == len(uncond):
        return [join_conditioning(u, c) for u, c in zip(uncond, cond, strict=True)]
    if isinstance(cond, Tensor) and isinstance(uncond, Tensor):
        return torch.cat([uncond, cond])
    if cond is None and uncond is None:
        return None
    raise ValueError(
        f"conditionings of kinds {type(cond).__name__} and {type(uncond).__name__} cannot share one batch; "
        "cldm.ddim_hacked.DDIMSampler evaluates them in two calls"
    )


def check_batch(conditioning: Any, batch_size: int) -> None:
    """Raise ValueError if a tensor in `conditioning` is not for `batch_size` images."""
    if isinstance(conditioning, Mapping):
        conditioning = list(conditioning.values())
    if isinstance(conditioning, (list, tuple)):
        for entry in conditioning:
            check_batch(entry, batch_size)
    elif isinstance(conditioning, Tensor) and conditioning.dim() and conditioning.shape[0] != batch_size:
        raise ValueError(f"a conditioning of {conditioning.shape[0]} entries for a batch of {batch_size}")
