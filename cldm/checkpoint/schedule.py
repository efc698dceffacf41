"""What a checkpoint holds beside the networks' weights, where a file of another layout leaves it out: above all the noise
schedule, as a list of betas."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from cldm.checkpoint.expected import Config, expected_entries, model_params, zeros
from cldm.checkpoint.names import CONTROL_PREFIX, TEXT_PREFIX, is_open_clip, part
from cldm.checkpoint.opening import ModelWeights
from cldm.checkpoint.recognising import SCHEDULE_KEYS
from ldm.files import CheckpointError, LazyTensor
from ldm.files.errors import about
from ldm.files.tensors import Tensors

PREDICTIONS = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
_COSINE_S = 8e-3  # the offset that diffusers' cosine schedule always has
# diffusers calls linear what is linear in beta
_BETA_SCHEDULES = {"scaled_linear": "linear", "linear": "sqrt_linear", "squaredcos_cap_v2": "cosine"}
_OPTIONS = {"beta_start": "linear_start", "beta_end": "linear_end", "num_train_timesteps": "timesteps"}
_MAX_STEPS = 100_000
_SENSELESS = f"the betas of the noise schedule must be a list of 1 to {_MAX_STEPS} numbers in (0, 1)"
_PRECISION = 1e-5  # relative difference of betas that are the same, in float32


def completed(tensors: Tensors, source: ModelWeights, config: Config | None) -> tuple[Tensors, list[str]]:
    """The tensors of a model with what a checkpoint holds beside them, and notes on that.

    It is the noise schedule of `source`, whose UNet it is, and zeros for the weights of SD 2.x's text encoder that nothing
    reads: its last layer and its projection, which diffusers leaves out. `config` is None for an unknown family.

    Raises:
        CheckpointError: `source` tells a schedule that makes no sense, or cannot be expressed here.
    """
    schedule = {key: tensor for key, tensor in source.tensors.items() if key in SCHEDULE_KEYS}
    if config is None:
        return {**schedule, **tensors}, []
    if not schedule.keys() >= SCHEDULE_KEYS - {"logvar"}:
        schedule = schedule_tensors(model_params(config), source) | schedule
    if any(key.startswith(CONTROL_PREFIX) for key in tensors):
        value = float(model_params(config).get("logvar_init", 0.0))
        logvar = torch.full(schedule["betas"].shape, value, device="cpu")
        schedule.setdefault("logvar", LazyTensor.of(logvar))
    else:
        schedule.pop("logvar", None)  # as published base models
    unused: Tensors = {}
    if is_open_clip(part(tensors, TEXT_PREFIX)):
        expected = part(expected_entries(config), TEXT_PREFIX)
        last = max((int(m[1]) for key in expected if (m := re.search(r"resblocks\.(\d+)\.", key))), default=0)
        pattern = re.compile(rf"model\.(transformer\.resblocks\.{last}\..+|text_projection|logit_scale)")
        lacking = (key for key in expected if TEXT_PREFIX + key not in tensors and pattern.fullmatch(key))
        unused = {TEXT_PREFIX + key: zeros(expected[key].shape, expected[key].dtype) for key in lacking}
    notes = [f"{len(unused)} entries of the text encoder that the model does not use are zeros"] if unused else []
    return {**schedule, **tensors, **unused}, notes


def schedule_tensors(params: Mapping[str, Any], source: ModelWeights | None = None) -> Tensors:
    """The noise schedule's entries but for `logvar`, as a model with these parameters has them, or that of `source`."""
    from ldm.models.diffusion.schedule import diffusion_quantities

    betas = model_betas(params, source)
    with np.errstate(over="ignore", invalid="ignore"):  # where nothing of the image is left, reciprocals are infinite
        quantities = diffusion_quantities(betas, params.get("v_posterior", 0.0))
        return {key: LazyTensor.of(torch.from_numpy(values.astype(np.float32))) for key, values in quantities.items()}


def scheduler_config(params: Mapping[str, Any], source: ModelWeights, prediction: str) -> dict[str, Any]:
    """`scheduler_config.json` of a `DDIMScheduler` that steps with the schedule of `source` as the sampler here does."""
    betas = model_betas(params, source)
    named = params.get("given_betas") is None and params.get("beta_schedule", "linear") == "linear"
    if named and np.array_equal(betas, schedule_betas(params)):
        ends = {"beta_start": params.get("linear_start", 1e-4), "beta_end": params.get("linear_end", 2e-2)}
        schedule = {**ends, "beta_schedule": "scaled_linear"}
    else:
        schedule = {"trained_betas": betas.tolist()}
    return {
        "_class_name": "DDIMScheduler",
        **schedule,
        "clip_sample": False,
        "num_train_timesteps": len(betas),
        "prediction_type": PREDICTIONS[prediction],
        "set_alpha_to_one": False,
        "steps_offset": 1,
    }


def model_betas(params: Mapping[str, Any], source: ModelWeights | None) -> np.ndarray:
    """The betas that a file stores or tells by its scheduler, float64 (T,); else, or where these are the same, those of `params`.

    Raises:
        CheckpointError: what it tells makes no sense, or cannot be expressed here.
    """
    own, precision = schedule_betas(params), _PRECISION
    if source is None:
        return own
    with about(source.path):
        if "betas" in source.tensors:
            if source.tensors["betas"].numel > _MAX_STEPS:  # as a list it would be many times larger than in the file
                raise CheckpointError(_SENSELESS)
            stored = source.tensors["betas"].read()
            betas = schedule_betas({"given_betas": stored.tolist()})
            precision = max(precision, 4 * torch.finfo(stored.dtype).eps if stored.dtype.is_floating_point else 0)
        else:
            betas = _scheduler_betas(params, source.configs.get("scheduler", {}))
    same = own.shape == betas.shape and np.allclose(own, betas, rtol=precision, atol=0)
    return own if same else betas


def _scheduler_betas(params: Mapping[str, Any], config: Mapping[str, Any]) -> np.ndarray:
    """The betas of a diffusers scheduler; `params` supply what its configuration leaves out."""
    told = {ours: config[theirs] for theirs, ours in _OPTIONS.items() if config.get(theirs) is not None}
    name = config.get("beta_schedule")
    try:
        if config.get("trained_betas") is not None:
            told["given_betas"] = config["trained_betas"]
        elif name is not None:
            if not isinstance(name, str) or name not in _BETA_SCHEDULES:
                raise CheckpointError(f"beta_schedule must be one of {', '.join(_BETA_SCHEDULES)}, not {name!r}")
            told |= {"given_betas": None, "beta_schedule": _BETA_SCHEDULES[name], "cosine_s": _COSINE_S}
        betas = schedule_betas({**params, **told})
    except CheckpointError as error:
        raise CheckpointError(f"scheduler_config.json: {error.problem}") from error
    if config.get("rescale_betas_zero_snr") is True and len(betas) > 1:
        # alpha-bar, and with it the signal-to-noise ratio, then ends at zero (Lin et al. 2023, algorithm 1)
        roots = np.sqrt(np.cumprod(1 - betas))
        alphas_cumprod = ((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])) ** 2
        betas = schedule_betas({"given_betas": 1 - alphas_cumprod / np.append(1.0, alphas_cumprod[:-1])})
    return betas


def schedule_betas(params: Mapping[str, Any]) -> np.ndarray:
    """The betas that a model with these parameters has, float64 (T,).

    Raises:
        CheckpointError: the parameters are of a wrong type, out of range, or name an unknown schedule.
    """
    from ldm.models.diffusion.schedule import make_beta_schedule

    steps = params.get("timesteps", 1000)
    start, end = params.get("linear_start", 1e-4), params.get("linear_end", 2e-2)
    try:
        if params.get("given_betas") is not None:
            betas = np.array(params["given_betas"], dtype=np.float64)
        elif type(steps) is not int or not 1 <= steps <= _MAX_STEPS:
            raise ValueError(f"the number of timesteps must be a whole number to {_MAX_STEPS}, not {steps!r}")
        elif not all(type(beta) in (int, float) and 0 < beta < 1 for beta in (start, end)):
            raise ValueError(f"the first and last beta must be numbers between 0 and 1, not {start!r} and {end!r}")
        else:
            name = params.get("beta_schedule", "linear")
            betas = make_beta_schedule(name, steps, start, end, params.get("cosine_s", _COSINE_S))
    except (TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"the noise schedule cannot be made: {error}") from error
    # The last beta is 1 where nothing of the image is left at the end.
    plain = betas.ndim == 1 and 1 <= len(betas) <= _MAX_STEPS
    if not plain or not ((betas > 0) & (betas <= 1)).all() or 1 in betas[:-1]:
        raise CheckpointError(_SENSELESS)
    return betas
