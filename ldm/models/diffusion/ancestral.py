"""Ancestral sampling: all steps of the process in reverse (Ho et al. 2020, "DDPM", algorithm 2).

`AncestralSampler` is the sampler. The two classes after it give DDPM and LatentDiffusion the public methods for it.

Shapes: B batch, C h w the diffused picture or latent.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.models.diffusion.guidance import Conditioning, CorrectedGuidance, Guidance, ScoreCorrector, Unguided
from ldm.models.diffusion.noise import Noise
from ldm.models.diffusion.process import DiffusionProcess
from ldm.models.diffusion.sampler import Denoiser, Sampler, Step, StepTable
from ldm.util import default

Posterior = tuple[Tensor, Tensor, Tensor, Tensor]


class AncestralSampler(Sampler):
    """DDPM's sampler, for models that are a `DiffusionProcess`.

    Args:
        model: see Sampler.
        clip_denoised: clip the predicted x_0 to [-1, 1].
        device: see Sampler.
    """

    model: "AncestralSampling"
    adds_noise = True
    mask_before_step = False  # as published: a run ends with what the mask keeps

    def __init__(
        self, model: "AncestralSampling", clip_denoised: bool = False, device: torch.device | str | None = None
    ) -> None:
        super().__init__(model, device=device)
        self.clip_denoised = clip_denoised

    def make_schedule(
        self,
        ddim_num_steps: int | None = None,
        ddim_discretize: str = "uniform",
        ddim_eta: float = 0.0,
        verbose: bool = True,
    ) -> None:
        """All timesteps of the model, which are the only number of steps that this sampler has."""
        if ddim_num_steps not in (None, self.ddpm_num_timesteps):
            raise ValueError(
                f"ancestral sampling takes the model's {self.ddpm_num_timesteps} steps, found {ddim_num_steps}"
            )
        alphas = self.alphas_cumprod_array()
        sigmas = torch.exp(0.5 * self.model.posterior_log_variance_clipped).cpu().numpy().copy()
        sigmas[0] = 0.0  # the last step adds none
        self.use_table(StepTable.of(np.arange(len(alphas)), alphas, np.append(1.0, alphas[:-1]), sigmas))

    def posterior(self, x: Tensor, t: Tensor, output: Tensor, denoiser: Denoiser) -> Posterior:
        """Mean, variance and log-variance of p(x_{t-1} | x_t), and the predicted x_0, from the network's output."""
        x_start = self.model.predict_x0(x, t, output)
        if self.clip_denoised:
            x_start = x_start.clamp(-1, 1)
        x_start = denoiser.settle(x_start)
        return *self.model.q_posterior(x_start, x, t), x_start

    def step(self, x: Tensor, at: Step, denoiser: Denoiser) -> tuple[Tensor, Tensor]:
        """x_t (B, C, h, w) -> x_{t-1} and the predicted x_0."""
        mean, _, _, x_start = self.posterior(x, at.t, denoiser.output(x, at.t, at), denoiser)
        noise = denoiser.noise.of_step(x, at.sigma)
        return (mean if noise is None else mean + noise), x_start

    def step_at(self, x: Tensor, t: Tensor, denoiser: Denoiser, repeat_noise: bool = False) -> tuple[Tensor, Tensor]:
        """As `step`, where t (B,) may differ from picture to picture."""
        mean, _, log_variance, x_start = self.posterior(x, t, denoiser.guidance(x, t), denoiser)
        noise = denoiser.noise.of_step(x, 1.0, repeat_noise)
        assert noise is not None  # as it is at sigma 0 alone
        return mean + (t > 0).reshape(log_variance.shape) * torch.exp(0.5 * log_variance) * noise, x_start

    def run(
        self,
        shape: Sequence[int],
        guidance: Guidance,
        x_T: Tensor | None = None,
        timesteps: int | None = None,
        verbose: bool = True,
        callback: Callable[[int], None] | None = None,
        img_callback: Callable[[Tensor, int], None] | None = None,
        mask: Tensor | None = None,
        x0: Tensor | None = None,
        log_every_t: int = 100,
        quantize: bool = False,
    ) -> tuple[Tensor, list[Tensor]]:
        """All steps, or the last `timesteps`, from noise of `shape` (B, C, h, w): the last x, and those kept on the way.

        `callback` gets the timestep, `img_callback` x and the timestep.

        Raises:
            FloatingPointError: NaN in float32; in half precision the run is repeated in float32, with a warning.
        """
        self.make_schedule()
        count = default(timesteps, self.ddpm_num_timesteps)
        if not 1 <= count <= self.ddpm_num_timesteps:
            raise ValueError(f"timesteps must be 1 to {self.ddpm_num_timesteps}, found {count}")

        def on_step(at: Step, x: Tensor, pred_x0: Tensor) -> None:
            if callback:
                callback(at.index)
            if img_callback:
                img_callback(x, at.index)

        noise = Noise()
        x = noise.normal(shape, self.device) if x_T is None else self._fitted(x_T, shape, "x_T", exact=True)
        denoiser = Denoiser(self.model, guidance, noise, quantize)
        run = partial(self.loop, x, denoiser, self.table, count, mask, x0, log_every_t=log_every_t)
        x, kept = self._finite(run, noise, on_step=on_step, verbose=verbose)
        return x, kept["x_inter"]


class AncestralSampling(DiffusionProcess):
    """The public methods of ancestral sampling for models without conditioning."""

    clip_denoised: bool
    log_every_t: int
    image_size: int | Sequence[int]
    channels: int

    def apply_model(self, x_noisy: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        """The network's output (B, C, h, w) for x_noisy (B, C, h, w) at t (B,)."""
        raise NotImplementedError

    def p_mean_variance(self, x: Tensor, t: Tensor, clip_denoised: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and log-variance of p(x_{t-1} | x_t)."""
        sampler, denoiser = self._ancestral(None, clip_denoised)
        return sampler.posterior(x, t, denoiser.guidance(x, t), denoiser)[:3]

    @torch.no_grad()
    def p_sample(self, x: Tensor, t: Tensor, clip_denoised: bool = True, repeat_noise: bool = False) -> Tensor:
        """One step of ancestral sampling: x_t (B, C, h, w) at t (B,) -> x_{t-1}."""
        sampler, denoiser = self._ancestral(None, clip_denoised)
        return sampler.step_at(x, t, denoiser, repeat_noise)[0]

    @torch.no_grad()
    def p_sample_loop(
        self, shape: Sequence[int], return_intermediates: bool = False, verbose: bool = True
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Ancestral sampling over all steps, from noise of `shape` (B, C, h, w)."""
        sampler = AncestralSampler(self, self.clip_denoised)
        img, kept = sampler.run(shape, Unguided(self, None), verbose=verbose, log_every_t=self.log_every_t)
        return (img, kept) if return_intermediates else img

    @torch.no_grad()
    def sample(self, batch_size: int = 16, return_intermediates: bool = False) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Unconditional ancestral samples (batch_size, C, h, w)."""
        return self.p_sample_loop((batch_size, *self.sample_shape()), return_intermediates)

    def sample_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of what is diffused, by the configuration."""
        size = self.image_size
        height, width = (size, size) if isinstance(size, int) else size
        return self.channels, height, width

    def _ancestral(
        self,
        cond: Conditioning,
        clip_denoised: bool,
        quantize: bool = False,
        score_corrector: ScoreCorrector | None = None,
        corrector_kwargs: Mapping[str, Any] | None = None,
        temperature: float = 1.0,
        noise_dropout: float = 0.0,
    ) -> tuple[AncestralSampler, Denoiser]:
        """What a single step needs."""
        sampler = AncestralSampler(self, clip_denoised)
        guidance = sampler.guidance_for(cond, None, 1.0)
        if score_corrector is not None:
            guidance = CorrectedGuidance(guidance, self, cond, score_corrector, corrector_kwargs)
        return sampler, Denoiser(self, guidance, Noise(None, temperature, noise_dropout), quantize)


class ConditionalAncestralSampling(AncestralSampling):
    """The public methods of ancestral sampling for models with conditioning; c is what `apply_model` takes."""

    def p_mean_variance(
        self,
        x: Tensor,
        c: Conditioning,
        t: Tensor,
        clip_denoised: bool,
        quantize_denoised: bool = False,
        return_x0: bool = False,
        score_corrector: ScoreCorrector | None = None,
        corrector_kwargs: Mapping[str, Any] | None = None,
    ) -> tuple[Tensor, ...]:
        """Mean, variance and log-variance of p(x_{t-1} | x_t, c) and, if asked for, the predicted x_0."""
        sampler, denoiser = self._ancestral(c, clip_denoised, quantize_denoised, score_corrector, corrector_kwargs)
        found = sampler.posterior(x, t, denoiser.guidance(x, t), denoiser)
        return found if return_x0 else found[:3]

    @torch.no_grad()
    def p_sample(
        self,
        x: Tensor,
        c: Conditioning,
        t: Tensor,
        clip_denoised: bool = False,
        repeat_noise: bool = False,
        quantize_denoised: bool = False,
        return_x0: bool = False,
        temperature: float = 1.0,
        noise_dropout: float = 0.0,
        score_corrector: ScoreCorrector | None = None,
        corrector_kwargs: Mapping[str, Any] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """One step of ancestral sampling: x_t (B, C, h, w) at t (B,) -> x_{t-1} and, if asked for, the predicted x_0."""
        sampler, denoiser = self._ancestral(
            c, clip_denoised, quantize_denoised, score_corrector, corrector_kwargs, temperature, noise_dropout
        )
        found = sampler.step_at(x, t, denoiser, repeat_noise)
        return found if return_x0 else found[0]

    @torch.no_grad()
    def p_sample_loop(
        self,
        cond: Conditioning,
        shape: Sequence[int],
        return_intermediates: bool = False,
        x_T: Tensor | None = None,
        verbose: bool = True,
        callback: Callable[[int], None] | None = None,
        timesteps: int | None = None,
        quantize_denoised: bool = False,
        mask: Tensor | None = None,
        x0: Tensor | None = None,
        img_callback: Callable[[Tensor, int], None] | None = None,
        start_T: int | None = None,
        log_every_t: int | None = None,
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Ancestral sampling of latents of `shape` (B, C, h, w) over all steps or the last `timesteps`.

        Args:
            x_T: noise to start from.
            callback: called with each timestep; `img_callback` with x and the timestep.
            mask, x0: where the mask (B, 1, h, w) is 1, latents follow x0 (B, C, h, w).
            start_T: an upper limit of `timesteps`.
            log_every_t: keep intermediate results every so many steps.
        """
        sampler = AncestralSampler(self, self.clip_denoised)
        count = default(timesteps, self.num_timesteps)
        img, kept = sampler.run(
            shape,
            sampler.guidance_for(cond, None, 1.0, shape[0]),
            x_T,
            min(count, default(start_T, count)),
            verbose,
            callback,
            img_callback,
            mask,
            x0,
            log_every_t or self.log_every_t,
            quantize_denoised,
        )
        return (img, kept) if return_intermediates else img

    @torch.no_grad()
    def sample(
        self,
        cond: Conditioning,
        batch_size: int = 16,
        return_intermediates: bool = False,
        x_T: Tensor | None = None,
        verbose: bool = True,
        timesteps: int | None = None,
        quantize_denoised: bool = False,
        mask: Tensor | None = None,
        x0: Tensor | None = None,
        shape: Sequence[int] | None = None,
        **options: Any,
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Ancestral samples of latents (batch_size, C, h, w) over all steps; a longer conditioning is cut to the batch.

        Further options are those of `p_sample_loop`.
        """
        return self.p_sample_loop(
            first_of(cond, batch_size),
            tuple(shape) if shape is not None else (batch_size, *self.sample_shape()),
            return_intermediates,
            x_T,
            verbose,
            timesteps=timesteps,
            quantize_denoised=quantize_denoised,
            mask=mask,
            x0=x0,
            **options,
        )


def first_of(cond: Conditioning, count: int) -> Any:
    """The first `count` entries of a conditioning: of a tensor, a list of tensors, or a dict of lists of them."""
    if isinstance(cond, Mapping):
        return {k: first_of(v, count) for k, v in cond.items()}
    if isinstance(cond, (list, tuple)):
        return [first_of(c, count) for c in cond]
    return cond if cond is None else cond[:count]
