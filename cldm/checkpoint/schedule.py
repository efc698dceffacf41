"""The noise schedule: read from a configuration, a scheduler of diffusers or stored betas, and written as entries or as a scheduler."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cldm.checkpoint.errors import CheckpointError
from cldm.checkpoint.lazy import Entries, constant

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
    made = dict(params)
    made |= {ours: config[theirs] for theirs, ours in _OPTIONS.items() if config.get(theirs) is not None}
    name, ours = config.get("beta_schedule"), {theirs: ours for ours, theirs in _BETA_SCHEDULES.items()}
    if config.get("trained_betas") is not None:
        made["given_betas"] = config["trained_betas"]
    elif name is not None:
        if not isinstance(name, str) or name not in ours:
            raise CheckpointError(
                f"scheduler_config.json: beta_schedule must be one of {', '.join(ours)}, not {name!r}"
            )
        made |= {"given_betas": None, "beta_schedule": ours[name], "cosine_s": _COSINE_S}
    try:
        betas = schedule_betas(made)
    except CheckpointError as error:
        raise CheckpointError(f"scheduler_config.json: {error}") from error
    if config.get("rescale_betas_zero_snr") is True:
        made["given_betas"] = _without_signal_at_the_end(betas)
    return made


def with_stored(params: Mapping[str, Any], stored: Tensor) -> dict[str, Any]:
    """A model's parameters with the noise schedule whose betas a file stores, in the simplest form that gives them.

    Raises:
        CheckpointError: these cannot be betas.
    """
    precision = max(_PRECISION, 4 * torch.finfo(stored.dtype).eps if stored.dtype.is_floating_point else 0)
    betas = schedule_betas({"given_betas": stored.tolist()})

    def fits(candidate: Mapping[str, Any]) -> bool:
        made = schedule_betas(candidate)
        return made.shape == betas.shape and np.allclose(made, betas, rtol=precision, atol=0)

    ends = {"linear_start": _short(betas[0]), "linear_end": _short(betas[-1]), "timesteps": len(betas)}
    plain = {**params, "given_betas": None, "cosine_s": _COSINE_S, **ends}
    forms = [{**plain, "beta_schedule": name} for name in _BETA_SCHEDULES]
    given = {**params, "given_betas": betas.tolist()}
    return next((dict(form) for form in (params, *forms) if fits(form)), given)


def _short(beta: float) -> float:
    """Without the digits that storing in float32 has added."""
    return min(float(f"{beta:.6g}"), 1 - 1e-6)


def schedule_betas(params: Mapping[str, Any]) -> np.ndarray:
    """The betas that a model with these parameters has, float64 (T,).

    Raises:
        CheckpointError: the parameters are of a wrong type, out of range, or name an unknown schedule.
    """
    from ldm.models.diffusion.schedule import make_beta_schedule

    given = params.get("given_betas")
    try:
        if given is not None:
            betas = np.array(given, dtype=np.float64)
        else:
            name = params.get("beta_schedule", "linear")
            steps, ends = (
                params.get("timesteps", 1000),
                [params.get("linear_start", 1e-4), params.get("linear_end", 2e-2)],
            )
            if type(steps) is not int or not 1 <= steps <= _MAX_STEPS:
                raise CheckpointError(f"the number of timesteps must be a whole number to {_MAX_STEPS}, not {steps!r}")
            if not all(type(end) in (int, float) and math.isfinite(end) and 0 < end < 1 for end in ends):
                raise CheckpointError(f"the first and last beta must be numbers between 0 and 1, not {ends}")
            betas = make_beta_schedule(name, steps, *ends, params.get("cosine_s", _COSINE_S))
    except CheckpointError:
        raise
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the noise schedule cannot be made: {error}") from error
    # The last beta is 1 where nothing of the image is left at the end.
    if (
        betas.ndim != 1
        or not 1 <= len(betas) <= _MAX_STEPS
        or not ((betas > 0) & (betas <= 1)).all()
        or 1 in betas[:-1]
    ):
        raise CheckpointError(f"the betas of the noise schedule must be a list of 1 to {_MAX_STEPS} numbers in (0, 1)")
    return betas


def _without_signal_at_the_end(betas: np.ndarray) -> list[float]:
    """Betas rescaled so that alpha-bar ends at zero (Lin et al. 2023, algorithm 1)."""
    roots = np.sqrt(np.cumprod(1 - betas))
    roots = (roots - roots[-1]) * roots[0] / (roots[0] - roots[-1]) if len(roots) > 1 else roots
    alphas_cumprod = roots**2
    return (1 - alphas_cumprod / np.append(1.0, alphas_cumprod[:-1])).tolist()


def schedule_entries(params: Mapping[str, Any]) -> Entries:
    """The noise schedule's entries, as a model with these parameters has them, `logvar` among them.

    Raises:
        CheckpointError: as `schedule_betas`.
    """
    from ldm.models.diffusion.schedule import diffusion_quantities

    betas = schedule_betas(params)
    with np.errstate(over="ignore", invalid="ignore"):  # where nothing of the image is left, reciprocals are infinite
        quantities = diffusion_quantities(betas, params.get("v_posterior", 0.0))
        quantities["logvar"] = np.full(len(betas), params.get("logvar_init", 0.0))
        return {key: constant(torch.from_numpy(values.astype(np.float32))) for key, values in quantities.items()}


def scheduler_config(params: Mapping[str, Any], prediction: str) -> dict[str, Any]:
    """`scheduler_config.json` of a `DDIMScheduler` that steps as the sampler here does.

    Raises:
        CheckpointError: as `schedule_betas`.
    """
    betas = schedule_betas(params)
    schedule = params.get("beta_schedule", "linear")
    named = params.get("given_betas") is None and schedule in _BETA_SCHEDULES
    if schedule == "cosine" and params.get("cosine_s", _COSINE_S) != _COSINE_S:
        named = False
    form = {
        "beta_start": params.get("linear_start", 1e-4),
        "beta_end": params.get("linear_end", 2e-2),
        "beta_schedule": _BETA_SCHEDULES.get(schedule),
    }
    return {
        "_class_name": "DDIMScheduler",
        **(form if named else {"trained_betas": betas.tolist()}),
        "clip_sample": False,
        "num_train_timesteps": len(betas),
        "prediction_type": PREDICTIONS[prediction],
        "set_alpha_to_one": False,
        "steps_offset": 1,
    }
