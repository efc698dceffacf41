"""What a file tells of its model beside the weights, and what other layouts leave out.

Told are what the UNet predicts, the noise schedule, and whether the ControlNet averages its outputs: in metadata, in the
configurations of a diffusers folder, or in the configuration that the user names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cldm.checkpoint.errors import CheckpointError
from cldm.checkpoint.expected import expected_entries
from cldm.checkpoint.layout import (
    CONTROL_PREFIX,
    PREDICTION_METADATA,
    SCHEDULE_KEYS,
    TEXT_PREFIX,
)
from cldm.checkpoint.lazy import Entries, zeros
from cldm.checkpoint.names import is_open_clip
from cldm.checkpoint.opening import Model, below, under
from cldm.checkpoint.schedule import schedule_entries, with_scheduler, with_stored
from cldm.checkpoint.writing import TORCH_SUFFIXES
from cldm.config import load_config, model_section
from ldm.util import ConfigError

POOLING = "global_average_pooling"  # also its name in a file's metadata
POOLING_NOTE = f"the ControlNet averages its outputs: set {POOLING}: true in the configuration that loads it"


def model_params(config: str | Path) -> Mapping[str, Any]:
    """The parameters of the model that a configuration names.

    Raises:
        ConfigError: there is no such configuration, or it is none of a model.
    """
    params = model_section(load_config(config), config).get("params") or {}
    if not isinstance(params, Mapping):
        raise ConfigError(f"{config}: `params` of its model must be a mapping")
    return params


def told_prediction(source: Model, config: str | Path | None = None) -> str | None:
    """What a UNet predicts, as a named configuration says, else its own file."""
    named = model_params(config).get("parameterization") if config is not None else None
    return named or source.report.prediction


def pools(source: Model, config: str | Path | None = None) -> bool:
    """Whether a file's ControlNet averages its outputs: told by a diffusers configuration, metadata, or a named configuration."""
    told = source.configs.get("controlnet", source.configs.get("", {})).get("global_pool_conditions")
    if told is None and POOLING in source.metadata:
        told = source.metadata[POOLING] == "true"
    if told is None and config is not None:
        told = model_params(config).get(POOLING)
    return told is True


def described(metadata: Mapping[str, str], prediction: str | None, pooling: bool) -> dict[str, str]:
    """A file's metadata, saying this of what the UNet predicts and of the ControlNet's averaging, and nothing else."""
    kept = {key: text for key, text in metadata.items() if key not in (*PREDICTION_METADATA, POOLING)}
    said = {POOLING: "true" if pooling else None, PREDICTION_METADATA[0]: prediction}
    return kept | {key: text for key, text in said.items() if text}


def unsaid(path: str | Path, metadata: Mapping[str, str], family: str) -> list[str]:
    """Notes on what torch's format has no place for and the weights do not show."""
    if Path(path).suffix.lower() not in TORCH_SUFFIXES:
        return []
    prediction = metadata.get(PREDICTION_METADATA[0])
    lost = []
    if prediction is not None and (prediction != "eps" or family == "sd2"):
        lost.append(f"that the model predicts {prediction}")
    if POOLING in metadata:
        lost.append("that the ControlNet averages its outputs")
    return [f"{path} cannot say {' and '.join(lost)}, as a .safetensors file does"] if lost else []


def told_schedule(params: Mapping[str, Any], source: Model) -> Mapping[str, Any]:
    """The parameters with the noise schedule that a file or folder tells: by its stored betas, or its scheduler.

    Raises:
        CheckpointError: what it tells makes no sense, or cannot be expressed here.
    """
    try:
        if "betas" in source.entries:
            return with_stored(params, source.entries["betas"].read())
        scheduler = source.configs.get("scheduler")
        return with_scheduler(params, scheduler) if scheduler else params
    except CheckpointError as error:
        raise CheckpointError(f"{source.path}: {error}") from error


def told_schedule_entries(params: Mapping[str, Any], source: Model) -> Entries:
    """The noise schedule's entries of a model: as they are stored, else made from what the file tells."""
    stored = {key: entry for key, entry in source.entries.items() if key in SCHEDULE_KEYS}
    if stored.keys() >= SCHEDULE_KEYS:
        return stored
    return {**schedule_entries(told_schedule(params, source)), **stored}


def unused_text_entries(text: Entries, config: str | Path) -> Entries:
    """Zeros for what diffusers leaves out of SD 2.x's text encoder, since nothing reads it: the last layer, the projection.

    Args:
        text: the entries that are there, under our names without prefix.
        config: of the model whose text encoder is to be complete.
    """
    if not is_open_clip(text):
        return {}
    every = expected_entries(config).items()
    expected = {key.removeprefix(TEXT_PREFIX): info for key, info in every if key.startswith(TEXT_PREFIX)}
    layers = [int(m[1]) for key in expected if (m := re.search(r"resblocks\.(\d+)\.", key))]
    unused = re.compile(rf"model\.(transformer\.resblocks\.{max(layers, default=0)}\..+|text_projection|logit_scale)")
    return {key: zeros(info) for key, info in expected.items() if key not in text and unused.fullmatch(key)}


def unconverted(model: Model, made: Entries, source: Model, config: str) -> Entries:
    """The entries of a checkpoint that other layouts do not keep: its noise schedule, and zeros for unused weights."""
    schedule = told_schedule_entries(model_params(config), source)
    if not model.has(CONTROL_PREFIX):
        schedule.pop("logvar", None)  # as published base models
    unused = unused_text_entries(below(made, TEXT_PREFIX), config)
    if unused:
        model.notes.append(f"{len(unused)} entries of the text encoder that the model does not use are zeros")
    return {**schedule, **under(unused, TEXT_PREFIX)}
