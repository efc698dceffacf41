"""The diffusion process: noising a picture, its reverse, and the conversions between eps, x_0 and v.

`DiffusionProcess` is usable alone, without a network:

    process = DiffusionProcess(linear_start=0.00085, linear_end=0.012)
    x_t = process.q_sample(x_0, t, eps)
    x_0 = process.predict_start_from_noise(x_t, t, eps)

At a timestep, `signal` is sqrt(alpha-bar) and `noise_level` is sqrt(1 - alpha-bar), so that x_t = signal x_0 + noise_level eps
(Ho et al. 2020, "DDPM", eq. 4) and v = signal eps - noise_level x_0 (Salimans and Ho 2022, section 2.4). The functions at the top
take these two as numbers or tensors, for any schedule; the class looks them up by timestep.

Shapes: B batch, C h w the diffused picture or latent, T timesteps.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ldm.models.diffusion.schedule import (
    diffusion_quantities,
    extract_into_tensor,
    make_beta_schedule,
    variational_weights,
)
from ldm.util import ConfigError

PARAMETERIZATIONS = ("eps", "x0", "v")
Factor = Tensor | float


def add_noise(x0: Tensor, eps: Tensor, signal: Factor, noise_level: Factor) -> Tensor:
    """x_t from x_0 and eps (DDPM, eq. 4)."""
    return signal * x0 + noise_level * eps


def v_from(x0: Tensor, eps: Tensor, signal: Factor, noise_level: Factor) -> Tensor:
    """v from x_0 and eps."""
    return signal * eps - noise_level * x0


def x0_from_eps(x: Tensor, eps: Tensor, signal: Factor, noise_level: Factor) -> Tensor:
    """x_0 from x_t and eps."""
    return (x - noise_level * eps) / signal


def eps_from_x0(x: Tensor, x0: Tensor, signal: Factor, noise_level: Factor) -> Tensor:
    """eps from x_t and x_0."""
    return (x - signal * x0) / noise_level


def x0_from_v(x: Tensor, v: Tensor, signal: Factor, noise_level: Factor) -> Tensor:
    """x_0 from x_t and v."""
    return signal * x - noise_level * v


def eps_from_v(x: Tensor, v: Tensor, signal: Factor, noise_level: Factor) -> Tensor:
    """eps from x_t and v."""
    return signal * v + noise_level * x


def eps_and_x0(
    output: Tensor, x: Tensor, signal: Factor, noise_level: Factor, parameterization: str
) -> tuple[Tensor, Tensor]:
    """eps and x_0 from the output (B, C, h, w) of a network that predicts `eps`, `x0` or `v`, at x_t."""
    if parameterization == "v":
        return eps_from_v(x, output, signal, noise_level), x0_from_v(x, output, signal, noise_level)
    if parameterization == "x0":
        return eps_from_x0(x, output, signal, noise_level), output
    return output, x0_from_eps(x, output, signal, noise_level)


def rounded_schedule(stored: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> set[str]:
    """Keys under which `stored` has less than float32's digits, where all of these are the values of `own`, rounded.

    bfloat16 turns the first of alpha-bar into 1, with which no step can be computed.
    """
    keys = {
        key for key in stored.keys() & own.keys() if stored[key].is_floating_point() and stored[key].dtype.itemsize < 4
    }

    def is_own(key: str) -> bool:
        values, exact = stored[key], own[key]
        if exact.is_meta or values.shape != exact.shape:
            return False
        exact = exact.to(values.device)
        tolerance = 2 * torch.finfo(values.dtype).eps
        return torch.allclose(values.float(), exact.to(values.dtype).float(), rtol=tolerance, equal_nan=True)

    return keys if all(map(is_own, keys)) else set()


class DiffusionProcess(nn.Module):
    """The schedule as float32 buffers (T,), and everything that follows from it.

    The buffers stay in float32 when the module is converted to half precision: bfloat16 has too few digits for alpha-bar.

    Args:
        beta_schedule, timesteps, linear_start, linear_end, cosine_s: see `make_beta_schedule`.
        given_betas: the betas themselves, instead.
        parameterization: what a network predicts, `eps`, `x0` or `v`.
        v_posterior: see `diffusion_quantities`.
    """

    betas: Tensor
    alphas_cumprod: Tensor
    sqrt_alphas_cumprod: Tensor
    sqrt_one_minus_alphas_cumprod: Tensor
    log_one_minus_alphas_cumprod: Tensor
    posterior_variance: Tensor
    posterior_log_variance_clipped: Tensor
    posterior_mean_coef1: Tensor
    posterior_mean_coef2: Tensor
    lvlb_weights: Tensor

    def __init__(
        self,
        beta_schedule: str = "linear",
        timesteps: int = 1000,
        linear_start: float = 1e-4,
        linear_end: float = 2e-2,
        cosine_s: float = 8e-3,
        given_betas: Sequence[float] | None = None,
        parameterization: str = "eps",
        v_posterior: float = 0.0,
    ) -> None:
        super().__init__()
        if parameterization not in PARAMETERIZATIONS:
            raise ConfigError(f"parameterization must be eps, x0 or v, found {parameterization!r}")
        self.parameterization = parameterization
        self.v_posterior = v_posterior
        self._float32_buffers: set[str] = set()
        self.register_schedule(given_betas, beta_schedule, timesteps, linear_start, linear_end, cosine_s)

    def register_schedule(
        self,
        given_betas: Sequence[float] | None = None,
        beta_schedule: str = "linear",
        timesteps: int = 1000,
        linear_start: float = 1e-4,
        linear_end: float = 2e-2,
        cosine_s: float = 8e-3,
    ) -> None:
        """Compute the schedule and keep it as buffers, which are part of the state dict."""
        if given_betas is not None:
            betas = np.asarray(given_betas, dtype=np.float64)
        else:
            betas = make_beta_schedule(beta_schedule, timesteps, linear_start, linear_end, cosine_s)
        if betas.ndim != 1 or not len(betas) or not ((betas > 0) & (betas <= 1)).all():
            raise ConfigError("a noise schedule needs at least one beta, each above 0 and at most 1")
        quantities = diffusion_quantities(betas, self.v_posterior)
        self.num_timesteps = len(betas)
        self.linear_start = linear_start
        self.linear_end = linear_end
        for name, values in quantities.items():
            self.register_float32(name, values)
        self.register_float32("lvlb_weights", variational_weights(quantities, self.parameterization), persistent=False)

    # -- buffers that keep their digits -----------------------------------------------------------

    def register_float32(self, name: str, values: np.ndarray | float, persistent: bool = True) -> None:
        """A buffer that stays float32 in half precision, with values also while a model is made on the meta device."""
        device = torch.get_default_device()
        tensor = torch.from_numpy(np.asarray(values, dtype=np.float32))
        # On the device where everything else is made; a schedule on the meta device would be lost, as files need not have it.
        tensor = tensor.to("cpu" if device.type == "meta" else device)
        self.register_buffer(name, tensor, persistent=persistent)
        self._float32_buffers.add(name)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        """As any module's, but that the schedule keeps the digits that a file in half precision has not."""
        own = {prefix + name: getattr(self, name) for name in self._float32_buffers}
        state_dict |= {key: own[key] for key in rounded_schedule(state_dict, own)}
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "DiffusionProcess":
        """What `to`, `half`, `cuda`, `to_empty` and others do: the schedule follows to another device and keeps its values."""
        exact = {name: values for name, values in self._buffers.items() if name in self._float32_buffers}
        super()._apply(fn, recurse)
        for name, values in exact.items():
            moved = self._buffers[name]
            if values is not None and moved is not None and not values.is_meta:
                self._buffers[name] = values.to(moved.device)
        return self

    def _at(self, quantity: Tensor, t: Tensor, like: Tensor) -> Tensor:
        return extract_into_tensor(quantity, t, like.shape)

    def _factors(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Signal and noise level at t, (B, 1, 1, 1) each."""
        return self._at(self.sqrt_alphas_cumprod, t, like), self._at(self.sqrt_one_minus_alphas_cumprod, t, like)

    # -- the forward process --------------------------------------------------------------------------

    def q_mean_variance(self, x_start: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and log-variance of q(x_t | x_0) (DDPM, eq. 4)."""
        return (
            self._at(self.sqrt_alphas_cumprod, t, x_start) * x_start,
            self._at(1.0 - self.alphas_cumprod, t, x_start),
            self._at(self.log_one_minus_alphas_cumprod, t, x_start),
        )

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """x_t for x_start (B, C, h, w) at t (B,), with noise from torch's generator where none is given (DDPM, eq. 4)."""
        noise = torch.randn_like(x_start) if noise is None else noise
        return add_noise(x_start, noise, *self._factors(t, x_start))

    # -- conversions; x_t (B, C, h, w), t (B,) ----------------------------------------------------------

    def predict_start_from_noise(self, x_t: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_0 from x_t and eps."""
        return x0_from_eps(x_t, noise, *self._factors(t, x_t))

    def predict_noise_from_start(self, x_t: Tensor, t: Tensor, x_start: Tensor) -> Tensor:
        """eps from x_t and x_0."""
        return eps_from_x0(x_t, x_start, *self._factors(t, x_t))

    def get_v(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """v from x_0 and eps."""
        return v_from(x, noise, *self._factors(t, x))

    def predict_start_from_z_and_v(self, x_t: Tensor, t: Tensor, v: Tensor) -> Tensor:
        """x_0 from x_t and v."""
        return x0_from_v(x_t, v, *self._factors(t, x_t))

    def predict_eps_from_z_and_v(self, x_t: Tensor, t: Tensor, v: Tensor) -> Tensor:
        """eps from x_t and v."""
        return eps_from_v(x_t, v, *self._factors(t, x_t))

    def predict_x0(self, x_t: Tensor, t: Tensor, output: Tensor) -> Tensor:
        """x_0 from whatever the network predicts."""
        return eps_and_x0(output, x_t, *self._factors(t, x_t), self.parameterization)[1]

    def loss_target(self, x_start: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network should predict."""
        if self.parameterization == "v":
            return self.get_v(x_start, noise, t)
        return noise if self.parameterization == "eps" else x_start

    # -- the reverse process --------------------------------------------------------------------------

    def q_posterior(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and clipped log-variance of q(x_{t-1} | x_t, x_0) (DDPM, eq. 7)."""
        mean = self._at(self.posterior_mean_coef1, t, x_t) * x_start + self._at(self.posterior_mean_coef2, t, x_t) * x_t
        return mean, self._at(self.posterior_variance, t, x_t), self._at(self.posterior_log_variance_clipped, t, x_t)
