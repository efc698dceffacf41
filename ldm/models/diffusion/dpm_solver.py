"""DPM-Solver++ sampling (Lu et al. 2022, "DPM-Solver++"): second order, multistep, on predictions of x_0.

About 15 to 20 steps give what DDIM needs 50 for. With lambda the logarithm of signal over noise level, a step from s to t,
h = lambda_t - lambda_s, is (algorithm 2)

    x_t = noise_level_t / noise_level_s * x_s + signal_t * (1 - exp(-h)) * D,

where D extrapolates the newest two predictions of x_0 to the middle of the step.
"""

import math

import numpy as np
import torch
from torch import Tensor

from ldm.models.diffusion.sampler import Denoiser, Sampler, Step, StepTable

# In shorter runs the last step is of first order, which is steadier where lambda changes most.
_FIRST_ORDER_END_BELOW = 15


class DPMSolverSampler(Sampler):
    """DPM-Solver++(2M); eta must be 0.

    S steps lie at equal distances between the last timestep and 0, so they may be fractions; alpha-bar between two timesteps is
    interpolated, linearly in its logarithm. A run evaluates the model S times and ends at timestep 0, as published, where noise of
    1 - alpha-bar_0 is left.
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
        alphas = self.alphas_between(times)
        with np.errstate(divide="ignore"):  # a schedule may end without signal: lambda is -infinity there
            self._lambda = (np.log(alphas) - np.log1p(-alphas)) / 2  # (S + 1,), at `times`
        self.use_table(StepTable.of(times[1:], alphas[1:], alphas[:-1], np.zeros(ddim_num_steps)))

    def start(self, count: int) -> None:
        self._older: tuple[Tensor, float] | None = None  # the last step's x_0, and its h

    @torch.no_grad()
    def step(self, x: Tensor, at: Step, denoiser: Denoiser) -> tuple[Tensor, Tensor]:
        """x at `at.t` (B, C, h, w) -> x at `at.t_next`, and the predicted x_0."""
        h = float(self._lambda[at.index] - self._lambda[at.index + 1])
        pred_x0 = denoiser.settle(denoiser.predict(x, at.t, at, at.signal, at.noise_level)[1])
        extrapolated = pred_x0
        first_order = at.index == 0 and len(self.table) < _FIRST_ORDER_END_BELOW
        if self._older is not None and not first_order:
            older_x0, older_h = self._older
            extrapolated = pred_x0 + h / (2 * older_h) * (pred_x0 - older_x0)
        self._older = pred_x0, h
        x = at.next_noise_level / at.noise_level * x - at.next_signal * math.expm1(-h) * extrapolated
        return x, pred_x0
