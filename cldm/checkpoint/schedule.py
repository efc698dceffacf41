"""The noise schedule of a file's model: told by stored betas, a scheduler of diffusers or a configuration."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.files import CheckpointError, LazyTensor
from ldm.files.tensors import Tensors

PREDICTIONS = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
_COSINE_S = 8e-3  # the offset that diffusers' cosine schedule always has
# diffusers calls linear what is linear in beta
_BETA_SCHEDULES = {"linear": "scaled_linear", "sqrt_linear": "linear", "cosine": "squaredcos_cap_v2"}
_OPTIONS = {"beta_start": "linear_start", "beta_end": "linear_end", "num_train_timesteps": "timesteps"}
_MAX_STEPS = 100_000
_PRECISION = 1e-5  # relative difference of betas that are the same, in float32


def with_scheduler(params: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """A model's parameters with the noise schedule of a diffusers scheduler, as far as its configuration tells.

    Raises:
        CheckpointError: the schedule is none that can be expressed here, or its numbers make no sense.
    """
    made = dict(params) | {ours: config[theirs] for theirs, ours in _OPTIONS.items() if config.get(theirs) is not None}
    name, ours = config.get("beta_schedule"), {theirs: ours for ours, theirs in _BETA_SCHEDULES.items()}
    try:
        if config.get("trained_betas") is not None:
            made["given_betas"] = config["trained_betas"]
        elif name is not None:
            if not isinstance(name, str) or name not in ours:
                raise CheckpointError(f"beta_schedule must be one of {', '.join(ours)}, not {name!r}")
            made |= {"given_betas": None, "beta_schedule": ours[name], "cosine_s": _COSINE_S}
        betas = schedule_betas(made)
    except CheckpointError as error:
        raise CheckpointError(f"scheduler_config.json: {error.problem}") from error
    if config.get("rescale_betas_zero_snr") is True:
        made["given_betas"] = _with_zero_snr(betas)
    return made


def with_stored(params: Mapping[str, Any], stored: Tensor) -> Mapping[str, Any]:
    """A model's parameters with the betas that a file stores; as they are where they give the same betas.

    Raises:
        CheckpointError: these cannot be betas.
    """
    precision = max(_PRECISION, 4 * torch.finfo(stored.dtype).eps if stored.dtype.is_floating_point else 0)
    betas, own = schedule_betas({"given_betas": stored.tolist()}), schedule_betas(params)
    same = own.shape == betas.shape and np.allclose(own, betas, rtol=precision, atol=0)
    return params if same else {**params, "given_betas": betas.tolist()}


def schedule_betas(params: Mapping[str, Any]) -> np.ndarray:
    """The betas that a model with these parameters has, float64 (T,).

    Raises:
        CheckpointError: the parameters are of a wrong type, out of range, or name an unknown schedule.
    """
    from ldm.models.diffusion.schedule import make_beta_schedule

    steps = params.get("timesteps", 1000)
    ends = [params.get("linear_start", 1e-4), params.get("linear_end", 2e-2)]
    try:
        if params.get("given_betas") is not None:
            betas = np.array(params["given_betas"], dtype=np.float64)
        elif type(steps) is not int or not 1 <= steps <= _MAX_STEPS:
            raise ValueError(f"the number of timesteps must be a whole number to {_MAX_STEPS}, not {steps!r}")
        elif not all(type(end) in (int, float) and math.isfinite(end) and 0 < end < 1 for end in ends):
            raise ValueError(f"the first and last beta must be numbers between 0 and 1, not {ends}")
        else:
            name = params.get("beta_schedule", "linear")
            betas = make_beta_schedule(name, steps, *ends, params.get("cosine_s", _COSINE_S))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the noise schedule cannot be made: {error}") from error
    # The last beta is 1 where nothing of the image is left at the end.
    plain = betas.ndim == 1 and 1 <= len(betas) <= _MAX_STEPS
    if not plain or not ((betas > 0) & (betas <= 1)).all() or 1 in betas[:-1]:
        raise CheckpointError(f"the betas of the noise schedule must be a list of 1 to {_MAX_STEPS} numbers in (0, 1)")
    return betas


def _with_zero_snr(betas: np.ndarray) -> list[float]:
    """Betas rescaled so that alpha-bar, and with it the signal-to-noise ratio, ends at zero (Lin et al. 2023, algorithm 1)."""
    roots = np.sqrt(np.cumprod(1 - betas))
    roots = (roots - roots[-1]) * roots[0] / (roots[0] - roots[-1]) if len(roots) > 1 else roots
    alphas_cumprod = roots**2
    return (1 - alphas_cumprod / np.append(1.0, alphas_cumprod[:-1])).tolist()


def schedule_tensors(params: Mapping[str, Any]) -> Tensors:
    """The noise schedule's entries, as a model with these parameters has them, `logvar` among them.

    Raises:
        CheckpointError: as `schedule_betas`.
    """
    from ldm.models.diffusion.schedule import diffusion_quantities

    betas = schedule_betas(params)
    with np.errstate(over="ignore", invalid="ignore"):  # where nothing of the image is left, reciprocals are infinite
        quantities = diffusion_quantities(betas, params.get("v_posterior", 0.0))
        quantities["logvar"] = np.full(len(betas), params.get("logvar_init", 0.0))
        return {key: LazyTensor.of(torch.from_numpy(values.astype(np.float32))) for key, values in quantities.items()}


def scheduler_config(params: Mapping[str, Any], prediction: str) -> dict[str, Any]:
    """`scheduler_config.json` of a `DDIMScheduler` that steps as the sampler here does.

    Raises:
        CheckpointError: as `schedule_betas`.
    """
    betas = schedule_betas(params)
    name = _BETA_SCHEDULES.get(params.get("beta_schedule", "linear"))
    named = params.get("given_betas") is None and name and params.get("cosine_s", _COSINE_S) == _COSINE_S
    ends = {"beta_start": params.get("linear_start", 1e-4), "beta_end": params.get("linear_end", 2e-2)}
    return {
        "_class_name": "DDIMScheduler",
        **({**ends, "beta_schedule": name} if named else {"trained_betas": betas.tolist()}),
        "clip_sample": False,
        "num_train_timesteps": len(betas),
        "prediction_type": PREDICTIONS[prediction],
        "set_alpha_to_one": False,
        "steps_offset": 1,
    }
