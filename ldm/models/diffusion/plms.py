"""PLMS sampling: pseudo linear multistep (Liu et al. 2022, "Pseudo numerical methods for diffusion models on manifolds").

A step is DDIM's without noise, along a slope that extrapolates over the last four predictions of eps.
"""

import torch
from torch import Tensor

from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.process import x0_from_eps
from ldm.models.diffusion.sampler import Denoiser, Step

# Adams-Bashforth weights of the newest and the older predictions (eq. 12, and its lower orders).
_WEIGHTS = {1: (3 / 2, -1 / 2), 2: (23 / 12, -16 / 12, 5 / 12), 3: (55 / 24, -59 / 24, 37 / 24, -9 / 24)}


class PLMSSampler(DDIMSampler):
    """As DDIMSampler, with multistep slopes; eta must be 0."""

    adds_noise = False

    def make_schedule(
        self, ddim_num_steps: int, ddim_discretize: str = "uniform", ddim_eta: float = 0.0, verbose: bool = True
    ) -> None:
        if ddim_eta != 0:
            raise ValueError(f"PLMS is deterministic: eta must be 0, found {ddim_eta}")
        super().make_schedule(ddim_num_steps, ddim_discretize, ddim_eta, verbose)

    def start(self, count: int) -> None:
        self._older: list[Tensor] = []  # eps of the last three steps, oldest first

    @torch.no_grad()
    def step(self, x: Tensor, at: Step, denoiser: Denoiser) -> tuple[Tensor, Tensor]:
        """x at `at.t` (B, C, h, w) -> x at `at.t_next`, and the predicted x_0."""

        def move(eps: Tensor) -> tuple[Tensor, Tensor]:
            pred_x0 = denoiser.settle(x0_from_eps(x, eps, at.signal, at.noise_level))
            denoiser.noise.of_step(x, 0.0)  # the global generator is asked as often as published
            return at.next_signal * pred_x0 + at.next_noise_level * eps, pred_x0

        eps, _ = denoiser.predict(x, at.t, at, at.signal, at.noise_level)
        if not self._older:  # the first step averages the slopes at both of its ends (improved Euler)
            ahead, _ = denoiser.predict(move(eps)[0], at.t_next, at, at.next_signal, at.next_noise_level)
            combined = (eps + ahead) / 2
        else:
            newest_first = [eps, *reversed(self._older)]
            weighted = (w * e for w, e in zip(_WEIGHTS[len(self._older)], newest_first, strict=True))
            combined = sum(weighted, torch.zeros_like(eps))
        self._older = [*self._older, eps][-3:]
        return move(combined)
