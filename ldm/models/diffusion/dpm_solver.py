"""DPM-Solver++ sampling (Lu et al. 2022, "DPM-Solver++"): second order, multistep, on predictions of x_0.

About 15 to 20 steps give what DDIM needs 50 for. With lambda half the logarithm of the signal-to-noise ratio, a step from s to t,
h = lambda_t - lambda_s, is (algorithm 2, with alpha and sigma the factors of signal and noise)

    x_t = sigma_t / sigma_s * x_s + alpha_t * (1 - exp(-h)) * D,

where D extrapolates the newest two predictions of x_0 to the middle of the step.
"""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.models.diffusion.ddim import DDIMSampler

# In shorter runs the last step is of first order, which is steadier where lambda changes most.
_FIRST_ORDER_END_BELOW = 15


class DPMSolverSampler(DDIMSampler):
    """As DDIMSampler, with the steps of DPM-Solver++(2M); eta must be 0.

    S steps lie at equal distances between the last timestep and 0, so they may be fractions; alpha-bar between two timesteps is
    interpolated, linearly in its logarithm. A run evaluates the model S times and ends at timestep 0, as published, where noise of
    1 - alpha-bar_0 is left. Takes every conditioning that DDIMSampler takes, dicts of lists included (the reference's cannot).
    """

    def make_schedule(
        self, ddim_num_steps: int, ddim_discretize: str = "uniform", ddim_eta: float = 0.0, verbose: bool = True
    ) -> None:
        """Choose the timesteps, float64 (S,), ascending, and what is looked up at them."""
        if ddim_eta != 0:
            raise ValueError(f"DPM-Solver is deterministic: eta must be 0, found {ddim_eta}")
        if ddim_discretize != "uniform":
            raise ValueError(f"DPM-Solver's timesteps are uniform, found ddim_discretize={ddim_discretize!r}")
        if not 1 <= ddim_num_steps < self.ddpm_num_timesteps:
            raise ValueError(f"the number of steps must be 1 to {self.ddpm_num_timesteps - 1}, found {ddim_num_steps}")
        times = np.linspace(0, self.ddpm_num_timesteps - 1, ddim_num_steps + 1)  # where steps end and start
        with np.errstate(divide="ignore"):  # a schedule may end without signal: lambda is -infinity there
            log_alphas = np.interp(
                times, np.arange(self.ddpm_num_timesteps), np.log(self._alphas_cumprod().astype(np.float64))
            )
        alphas = np.exp(log_alphas)
        self._half_log_snr = (log_alphas - np.log1p(-alphas)) / 2  # (S + 1,), lambda at `times`
        self._keep_schedule(times[1:], np.zeros(ddim_num_steps), alphas[1:], alphas[:-1], eta=0.0)

    def start(self) -> None:
        self._older: tuple[Tensor, float] | None = None  # the last step's x_0, and its h

    @torch.no_grad()
    def step(self, x: Tensor, c: Any, t: Tensor, index: int, t_next: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """x_t (B, C, h, w) -> x at `t_next` and the predicted x_0."""
        if kwargs.get("use_original_steps", False):
            raise ValueError("DPM-Solver chooses its own timesteps: use_original_steps must be False")
        alpha, previous, _ = self._alphas(index)
        h = float(self._half_log_snr[index] - self._half_log_snr[index + 1])
        pred_x0 = self.adjust_x0(self.predict(x, c, t, alpha, **kwargs)[1], **kwargs)
        extrapolated = pred_x0
        first_order = index == 0 and len(self.ddim_timesteps) < _FIRST_ORDER_END_BELOW
        if self._older is not None and not first_order:
            older_x0, older_h = self._older
            extrapolated = pred_x0 + h / (2 * older_h) * (pred_x0 - older_x0)
        self._older = pred_x0, h
        x = ((1 - previous) / (1 - alpha)).sqrt() * x - previous.sqrt() * math.expm1(-h) * extrapolated
        return x, pred_x0
