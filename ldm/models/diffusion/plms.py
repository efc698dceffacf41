"""PLMS sampling: pseudo linear multistep (Liu et al. 2022), with the loop, guidance and schedule of DDIM."""

from typing import Any

import torch
from torch import Tensor

from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.schedule import noise_like

# Adams-Bashforth weights for the newest and the older predictions (Liu et al. 2022, eq. 12, and its lower orders).
_WEIGHTS = {1: (3 / 2, -1 / 2), 2: (23 / 12, -16 / 12, 5 / 12), 3: (55 / 24, -59 / 24, 37 / 24, -9 / 24)}


class PLMSSampler(DDIMSampler):
    """Like DDIMSampler, but each step extrapolates over the last four noise predictions; eta must be 0.

    Takes every conditioning that DDIMSampler takes, dicts of lists included (the reference's cannot).
    """

    def make_schedule(
        self, ddim_num_steps: int, ddim_discretize: str = "uniform", ddim_eta: float = 0.0, verbose: bool = True
    ) -> None:
        if ddim_eta != 0:
            raise ValueError(f"PLMS is deterministic: eta must be 0, found {ddim_eta}")
        super().make_schedule(ddim_num_steps, ddim_discretize, ddim_eta, verbose)

    def start(self) -> None:
        self._older: list[Tensor] = []  # eps of the last three steps, oldest first

    @torch.no_grad()
    def step(self, x: Tensor, c: Any, t: Tensor, index: int, t_next: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """x_t (B, C, h, w) -> x at `t_next` and the predicted x_0."""
        alpha, previous, _ = self._alphas(index, kwargs.get("use_original_steps", False))

        def predict_eps(x: Tensor, t: Tensor, alpha: Tensor) -> Tensor:
            return self.predict(x, c, t, alpha, **kwargs)[0]

        def move(eps: Tensor) -> tuple[Tensor, Tensor]:
            pred_x0 = self.adjust_x0((x - (1 - alpha).sqrt() * eps) / alpha.sqrt(), **kwargs)
            # Drawn and not used: what else is drawn in a run, as for masks, is to come out as published.
            noise_like(x.shape, x.device)
            return previous.sqrt() * pred_x0 + (1 - previous).sqrt() * eps, pred_x0

        eps = predict_eps(x, t, alpha)
        if not self._older:  # the first step averages the slopes at both of its ends (improved Euler)
            combined = (eps + predict_eps(move(eps)[0], t_next, previous)) / 2
        else:
            newest_first = [eps, *reversed(self._older)]
            combined = sum(w * e for w, e in zip(_WEIGHTS[len(self._older)], newest_first, strict=True))
        self._older = [*self._older, eps][-3:]
        return move(combined)
