"""DDIM sampling and inversion (Song et al. 2021, "Denoising diffusion implicit models").

A step predicts x_0 and eps, and goes to the next noise level along them (eq. 12):

    x_next = next_signal * x_0 + sqrt(next_noise_level^2 - sigma^2) * eps + sigma * noise,

where eta scales sigma from 0, deterministic, to that of DDPM at 1 (eq. 16).

Shapes: B batch, C h w the latent, S number of sampling steps.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ldm.models.diffusion.guidance import Conditioning, CorrectedGuidance, ScoreCorrector, scale_at
from ldm.models.diffusion.noise import Noise
from ldm.models.diffusion.process import eps_and_x0
from ldm.models.diffusion.sampler import Denoiser, Sampler, Step, StepTable
from ldm.models.diffusion.schedule import make_ddim_sampling_parameters, make_ddim_timesteps


class DDIMSampler(Sampler):
    """Samples latents from a LatentDiffusion, or anything with its `apply_model` and schedule."""

    adds_noise = True
    inversion_takes_output_as_eps = False

    def make_schedule(
        self, ddim_num_steps: int, ddim_discretize: str = "uniform", ddim_eta: float = 0.0, verbose: bool = True
    ) -> None:
        """Choose the timesteps, and compute alpha-bar and sigma at them.

        Sets `ddim_timesteps` (numpy, ascending), `ddim_sigmas`, `ddim_alphas`, `ddim_alphas_prev`, `ddim_sqrt_one_minus_alphas`.
        """
        if not 0 <= ddim_eta <= 1:
            raise ValueError(f"eta must be 0 to 1, found {ddim_eta}")
        timesteps = make_ddim_timesteps(ddim_discretize, ddim_num_steps, self.ddpm_num_timesteps)
        sigmas, alphas, previous = make_ddim_sampling_parameters(self.alphas_cumprod_array(), timesteps, ddim_eta)
        self._eta = ddim_eta
        self.use_table(StepTable.of(timesteps, alphas, previous, sigmas))

    def original_table(self) -> StepTable:
        alphas = self.alphas_cumprod_array()
        previous = np.append(1.0, alphas[:-1]).astype(alphas.dtype)
        sigmas = self._eta * np.sqrt((1 - previous) / (1 - alphas) * (1 - alphas / previous))
        return StepTable.of(np.arange(self.ddpm_num_timesteps), alphas, previous, sigmas)

    def step(self, x: Tensor, at: Step, denoiser: Denoiser) -> tuple[Tensor, Tensor]:
        if type(self).p_sample_ddim is DDIMSampler.p_sample_ddim or denoiser.conditionings is None:
            return self.ddim_step(x, at, denoiser)
        cond, uncond, scale = denoiser.conditionings  # a class of a user's, with a published step of its own
        return self.p_sample_ddim(
            x,
            cond,
            at.t,
            index=at.index,
            quantize_denoised=denoiser.quantize,
            temperature=denoiser.noise.temperature,
            noise_dropout=denoiser.noise.dropout,
            unconditional_guidance_scale=scale_at(scale, at.number),
            unconditional_conditioning=uncond,
        )

    def ddim_step(self, x: Tensor, at: Step, denoiser: Denoiser, repeat_noise: bool = False) -> tuple[Tensor, Tensor]:
        """x at `at.t` (B, C, h, w) -> x at the next level (eq. 12), and the predicted x_0."""
        eps, pred_x0 = denoiser.predict(x, at.t, at, at.signal, at.noise_level)
        pred_x0 = denoiser.settle(pred_x0)
        x = at.next_signal * pred_x0 + at.direction * eps
        noise = denoiser.noise.of_step(x, at.sigma, repeat_noise)
        return (x if noise is None else x + noise), pred_x0

    @torch.no_grad()
    def p_sample_ddim(
        self,
        x: Tensor,
        c: Conditioning,
        t: Tensor,
        index: int,
        repeat_noise: bool = False,
        use_original_steps: bool = False,
        quantize_denoised: bool = False,
        temperature: float = 1.0,
        noise_dropout: float = 0.0,
        score_corrector: ScoreCorrector | None = None,
        corrector_kwargs: Mapping[str, Any] | None = None,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Conditioning = None,
        dynamic_threshold: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One step for a loop of one's own: x_t (B, C, h, w) at t (B,) -> x at the next level and the predicted x_0.

        Args:
            index: of the step in the sampler's schedule.
            repeat_noise: the same noise for every picture.
            use_original_steps: index into the model's own schedule.
            dynamic_threshold: must be None. Others: see `sample`.
        """
        if dynamic_threshold is not None:
            raise NotImplementedError(
                "dynamic thresholding is for pixels, not latents; leave dynamic_threshold at None"
            )
        guidance = self.guidance_for(c, unconditional_conditioning, unconditional_guidance_scale)
        if score_corrector is not None:
            guidance = CorrectedGuidance(guidance, self.model, c, score_corrector, corrector_kwargs)
        denoiser = Denoiser(self.model, guidance, Noise(None, temperature, noise_dropout), quantize_denoised)
        table = self.original_table() if use_original_steps else self.table
        return self.ddim_step(x, table.single(index, t), denoiser, repeat_noise)

    @torch.no_grad()
    def encode(
        self,
        x0: Tensor,
        c: Conditioning,
        t_enc: int,
        use_original_steps: bool = False,
        return_intermediates: int | None = None,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Conditioning = None,
        callback: Callable[[int], None] | None = None,
        verbose: bool = True,
        output_is_eps: bool | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        """DDIM inversion: the noise from which `decode` with as many steps returns x0 (eq. 13 forward in time).

        Args:
            x0: latents (B, C, h, w).
            t_enc: number of steps.
            return_intermediates: keep so many intermediate results.
            output_is_eps: take the network's output for eps whatever the model predicts; by default
                `inversion_takes_output_as_eps`.

        Returns:
            the noised latents, and a dict with `x_encoded` and, if asked for, `intermediates` and `intermediate_steps`.
        """
        table = self.original_table() if use_original_steps else self.table
        if not 0 <= t_enc <= len(table):
            raise ValueError(f"{t_enc} steps of a schedule of {len(table)}")
        guidance = self.guidance_for(c, unconditional_conditioning, unconditional_guidance_scale, len(x0))
        output_is_eps = self.inversion_takes_output_as_eps if output_is_eps is None else output_is_eps
        x = x0.to(self.device)
        kept, kept_steps = [], []
        for i in tqdm(range(t_enc), desc="DDIM inversion", disable=not verbose):
            t = torch.full((len(x),), table.timesteps[i].item(), device=x.device)
            # Inversion runs from the previous alpha-bar (at first the cleanest one) to this step's.
            alpha, alpha_next = table.previous[i], table.alphas[i]
            eps = guidance(x, t, i, t_enc)
            if not output_is_eps:
                eps, _ = eps_and_x0(eps, x, *table.factors(i), self.model.parameterization)
            change = alpha_next.sqrt() * ((1 / alpha_next - 1).sqrt() - (1 / alpha - 1).sqrt())
            x = (alpha_next / alpha).sqrt().item() * x + change.item() * eps
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
