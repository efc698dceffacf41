"""The noise schedule, as pure functions: betas, the quantities derived from them, timesteps of a sampler, conversions.

Notation: alpha-bar (`alphas_cumprod`) as in Ho et al. 2020 ("DDPM"), section 2; eta as in Song et al. 2021 ("DDIM"), eq. 16;
v as in Salimans and Ho 2022, section 2.4.
"""

import numpy as np
import torch
from torch import Tensor


def make_beta_schedule(
    schedule: str, n_timestep: int, linear_start: float = 1e-4, linear_end: float = 2e-2, cosine_s: float = 8e-3
) -> np.ndarray:
    """The variances beta_1 ... beta_T as float64 (n_timestep,).

    Args:
        schedule: `linear` (linear in the square root of beta, as Stable Diffusion does), `sqrt_linear` (linear in beta),
            `sqrt` (square root of a linear one) or `cosine` (Nichol and Dhariwal 2021, eq. 17).
        n_timestep: number of steps T.
        linear_start, linear_end: first and last beta.
        cosine_s: the cosine schedule's offset.
    """
    if schedule == "linear":
        return np.linspace(linear_start**0.5, linear_end**0.5, n_timestep, dtype=np.float64) ** 2
    if schedule == "sqrt_linear":
        return np.linspace(linear_start, linear_end, n_timestep, dtype=np.float64)
    if schedule == "sqrt":
        return np.linspace(linear_start, linear_end, n_timestep, dtype=np.float64) ** 0.5
    if schedule == "cosine":
        phase = (np.arange(n_timestep + 1, dtype=np.float64) / n_timestep + cosine_s) / (1 + cosine_s)
        alphas_cumprod = np.cos(phase * np.pi / 2) ** 2
        return np.clip(1 - alphas_cumprod[1:] / alphas_cumprod[:-1], 0, 0.999)
    raise ValueError(f"unknown beta schedule {schedule!r}; known are linear, sqrt_linear, sqrt and cosine")


def diffusion_quantities(betas: np.ndarray, v_posterior: float = 0.0) -> dict[str, np.ndarray]:
    """Everything that training and ancestral sampling look up by timestep, float64 (T,) each.

    Args:
        betas: float64 (T,).
        v_posterior: weight of beta against beta-tilde in the posterior's variance (DDPM, section 3.2).
    """
    alphas = 1.0 - betas
    alphas_cumprod = np.cumprod(alphas)
    previous = np.append(1.0, alphas_cumprod[:-1])
    # With a last beta of exactly one, alpha-bar is zero: the reciprocals are infinite there and never used.
    with np.errstate(divide="ignore"):
        posterior_variance = (1 - v_posterior) * betas * (1 - previous) / (1 - alphas_cumprod) + v_posterior * betas
        return {
            "betas": betas,
            "alphas_cumprod": alphas_cumprod,
            "alphas_cumprod_prev": previous,
            "sqrt_alphas_cumprod": np.sqrt(alphas_cumprod),
            "sqrt_one_minus_alphas_cumprod": np.sqrt(1 - alphas_cumprod),
            "log_one_minus_alphas_cumprod": np.log(1 - alphas_cumprod),
            "sqrt_recip_alphas_cumprod": np.sqrt(1 / alphas_cumprod),
            "sqrt_recipm1_alphas_cumprod": np.sqrt(1 / alphas_cumprod - 1),
            "posterior_variance": posterior_variance,
            # The first posterior variance is zero, so its logarithm is clipped.
            "posterior_log_variance_clipped": np.log(np.maximum(posterior_variance, 1e-20)),
            "posterior_mean_coef1": betas * np.sqrt(previous) / (1 - alphas_cumprod),  # DDPM, eq. 7
            "posterior_mean_coef2": (1 - previous) * np.sqrt(alphas) / (1 - alphas_cumprod),
        }


def variational_weights(quantities: dict[str, np.ndarray], parameterization: str) -> np.ndarray:
    """Weights of the variational bound by timestep, (T,), relative to the simple loss (DDPM, eq. 12).

    For x0 the divisor is `2 - alpha-bar`, which is what published models were trained with, where DDPM's would be
    `2 * (1 - alpha-bar)`. v is weighted evenly. The first weight is infinite (its posterior variance is zero) and takes the second's value.
    """
    betas, alphas_cumprod = quantities["betas"], quantities["alphas_cumprod"]
    if parameterization == "eps":
        with np.errstate(divide="ignore"):
            weights = betas**2 / (2 * quantities["posterior_variance"] * (1 - betas) * (1 - alphas_cumprod))
    elif parameterization == "x0":
        weights = 0.5 * np.sqrt(alphas_cumprod) / (2 - alphas_cumprod)
    elif parameterization == "v":
        weights = np.ones_like(betas)
    else:
        raise ValueError(f"parameterization must be eps, x0 or v, found {parameterization!r}")
    if len(weights) > 1:
        weights[0] = weights[1]
    return weights


def make_ddim_timesteps(
    ddim_discr_method: str, num_ddim_timesteps: int, num_ddpm_timesteps: int, verbose: bool = False
) -> np.ndarray:
    """The timesteps that a sampler of `num_ddim_timesteps` steps visits, ascending, int64.

    `uniform` takes every (T // S)-th step plus one, so that numbers which do not divide T give a few steps more (S=7 gives 8,
    S=30 gives 31 of 1000). Where this runs past the last timestep (S=3, 9, 27, ..., and T itself), that step is T - 1; the
    reference fails there.
    `quad` spaces them quadratically. `verbose` is accepted for compatibility.

    Raises:
        ValueError: an unknown method, or a number of steps outside 1..T.
    """
    if not 1 <= num_ddim_timesteps <= num_ddpm_timesteps:
        raise ValueError(f"the number of sampling steps must be 1 to {num_ddpm_timesteps}, found {num_ddim_timesteps}")
    if ddim_discr_method == "uniform":
        steps = np.arange(0, num_ddpm_timesteps, num_ddpm_timesteps // num_ddim_timesteps)
    elif ddim_discr_method == "quad":
        steps = (np.linspace(0, np.sqrt(num_ddpm_timesteps * 0.8), num_ddim_timesteps) ** 2).astype(np.int64)
    else:
        raise ValueError(f"unknown way to choose timesteps {ddim_discr_method!r}; known are uniform and quad")
    # One is added so that the last step of sampling lands on the first alpha-bar rather than on a noise-free picture.
    return (
        np.unique(np.minimum(steps + 1, num_ddpm_timesteps - 1)) if steps[-1] + 1 >= num_ddpm_timesteps else steps + 1
    )


def make_ddim_sampling_parameters(
    alphacums: Tensor | np.ndarray, ddim_timesteps: np.ndarray, eta: float, verbose: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """sigma (DDIM, eq. 16), alpha-bar and the previous alpha-bar at the sampler's timesteps, (S,) each.

    Args:
        alphacums: alpha-bar, (T,).
        ddim_timesteps: (S,), ascending.
        eta: 0 is deterministic, 1 is as noisy as DDPM.
        verbose: accepted for compatibility.
    """
    alphacums = np.asarray(alphacums)
    alphas = alphacums[ddim_timesteps]
    previous = np.append(alphacums[0], alphacums[ddim_timesteps[:-1]])
    sigmas = eta * np.sqrt((1 - previous) / (1 - alphas) * (1 - alphas / previous))
    return sigmas, alphas, previous


def extract_into_tensor(a: Tensor, t: Tensor, x_shape: torch.Size | tuple[int, ...]) -> Tensor:
    """a[t], shaped (B, 1, 1, ...) to multiply something of shape `x_shape`; `a` is (T,), `t` is (B,) of integers."""
    return a.gather(-1, t).reshape(t.shape[0], *((1,) * (len(x_shape) - 1)))
