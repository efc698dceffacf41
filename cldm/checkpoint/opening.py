"""The one way in: a weights file or folder of any layout, opened as `ModelWeights` under this library's names, lazy."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cldm.checkpoint.expected import expected_entries, zeros
from cldm.checkpoint.names import (
    CONTROL_LAYERS,
    CONTROL_PREFIX,
    NETWORKS,
    TEXT_PREFIX,
    UNET_PREFIX,
    is_open_clip,
    part,
    text_from_diffusers,
    with_prefix,
)
from cldm.checkpoint.recognising import (
    CONTROL_LAYOUTS,
    DIFFERENCE,
    EMA_PREFIX,
    SCHEDULE_KEYS,
    Report,
    gap_lines,
    layout_of,
    make_report,
    part_of,
)
from cldm.checkpoint.schedule import schedule_tensors, with_scheduler, with_stored
from cldm.config import load_config, model_section
from ldm.files import CheckpointError, WeightsFile, open_weights
from ldm.files.errors import about
from ldm.files.tensors import Tensors, computed
from ldm.util import ConfigError


@dataclass
class ModelWeights:
    """The weights of one file or folder under this library's names, whatever its layout.

    Attributes:
        path: where they lie.
        report: what `identify` said.
        tensors: under the keys of a full checkpoint, without EMA entries; of an unknown layout as they are.
        ema: the EMA entries (`model_ema.*`).
        metadata, configs: as of `WeightsFile`.
        left_out: keys of the file that are in neither.
        notes: what was left out, filled in or taken from elsewhere, a line each.
    """

    path: Path
    report: Report
    tensors: Tensors
    ema: Tensors = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    configs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def part(self, prefix: str) -> Tensors:
        """The tensors below a prefix, under their keys without it."""
        return part(self.tensors, prefix)

    def has(self, prefix: str) -> bool:
        """Whether any key begins with the prefix."""
        return any(key.startswith(prefix) for key in self.tensors)


@contextmanager
def open_model(
    path: str | Path, base: Tensors | None = None, ema: bool = False, any_layout: bool = False
) -> Iterator[ModelWeights]:
    """Open a weights file or folder.

    Args:
        path: what to open (see `ldm.files.open_weights`).
        base: tensors of the model that a difference was taken from; only differences need them.
        ema: give the weights their EMA values.
        any_layout: open what is of no known layout too.

    Raises:
        CheckpointError: it cannot be read, is of no known layout, or lacks what was asked for.
    """
    with open_weights(path) as file:
        with about(file.path):
            layout, left_out = layout_of(file), []
            tensors = _renamed(file, layout, left_out)
            report = make_report(file, layout, tensors, left_out)
            if layout == "unknown" and not any_layout:
                raise CheckpointError(f"no layout known here. {'; '.join(report.suggestions)}")
            if layout == DIFFERENCE:
                tensors = with_prefix(_added_to_base(part(tensors, CONTROL_PREFIX), base), CONTROL_PREFIX)
            averages = {key: tensor for key, tensor in tensors.items() if key.startswith(EMA_PREFIX)}
            tensors = {key: tensor for key, tensor in tensors.items() if key not in averages}
            model = ModelWeights(file.path, report, tensors, averages, file.metadata, file.configs, left_out)
            if left_out:
                model.notes.append(
                    f"{len(left_out)} entries have no place here and are left out: {', '.join(left_out[:3])}"
                )
            if ema:
                _apply_ema(model)
            elif averages and not any_layout:
                model.notes.append(f"{len(averages)} EMA entries ({EMA_PREFIX}*) are left out")
            model.notes = [f"{model.path}: {note}" for note in model.notes]
        yield model


def identify(path: str | Path) -> Report:
    """Recognise a weights file or folder; no tensor is read.

    Raises:
        CheckpointError: the file cannot be read.
    """
    with open_weights(path) as file, about(file.path):
        layout, left_out = layout_of(file), []
        try:
            return make_report(file, layout, _renamed(file, layout, left_out), left_out)
        except CheckpointError as error:  # of its layout, but not convertible
            report = make_report(file, layout, {}, ())
            return replace(report, suggestions=(*report.suggestions, error.problem))


def _renamed(file: WeightsFile, layout: str, left_out: list[str]) -> Tensors:
    """The file's tensors under the keys of a full checkpoint; `left_out` receives the keys that have no place there."""
    if layout in CONTROL_LAYOUTS[:3]:
        prefix = CONTROL_PREFIX if any(key.startswith(CONTROL_PREFIX) for key in file) else ""
        left_out += [key for key in file if not key.startswith(prefix) and key != DIFFERENCE]
        control = part(file.tensors, prefix)
        control.pop(DIFFERENCE, None)
        return with_prefix(control, CONTROL_PREFIX)
    if not layout.startswith("diffusers-"):
        return dict(file)
    made: Tensors = {}
    for component, network in NETWORKS.items():
        if layout == "diffusers-pipeline":
            tensors = part(file.tensors, f"{component}/")
        else:
            tensors = file.tensors if layout == f"diffusers-{component}" else {}
        if tensors:
            converted, unknown = network.from_diffusers(tensors)
            made |= with_prefix(converted, network.prefix)
            left_out += [f"{component}/{key}" for key in unknown]
    if text := part(file.tensors, "text_encoder/"):
        activation = file.configs.get("text_encoder", {}).get("hidden_act")
        wide = any(tensor.shape[-1:] == (1024,) for tensor in text.values())  # SD 2.x's, where no configuration tells
        converted, unknown = text_from_diffusers(text, activation == "gelu" if activation else wide)
        made |= with_prefix(converted, TEXT_PREFIX)
        left_out += [f"text_encoder/{key}" for key in unknown]
    return made


def _added_to_base(difference: Tensors, base: Tensors | None) -> Tensors:
    if base is None:
        raise CheckpointError(
            "a ControlNet stored as the difference to its base: tool_convert_control.py takes that base with --base, "
            "and cldm.model.load_control(model, path) adds it to the model's own"
        )
    unet = part(base, UNET_PREFIX)
    if not unet:
        raise CheckpointError("stored as the difference to a base model, and no UNet was given as that")
    return combined(torch.add, difference, unet)


def combined(formula: Callable[..., Tensor], tensors: Tensors, *unets: Tensors) -> Tensors:
    """A formula of the tensors of a ControlNet (or UNet) and those of the same keys in UNets; its own layers stay.

    Raises:
        CheckpointError: a key is missing or of another shape in a UNet, so that these are not of one kind.
    """
    made = {}
    for key, tensor in tensors.items():
        if key.startswith(CONTROL_LAYERS):
            made[key] = tensor
            continue
        for unet in unets:
            if key not in unet:
                raise CheckpointError(f"{key!r} is not in the base model: it is incomplete or of another kind")
            if unet[key].shape != tensor.shape:
                raise CheckpointError(
                    f"{key!r} has shape {list(tensor.shape)}, in the base {list(unet[key].shape)}: "
                    "these do not belong to one kind of model"
                )
        made[key] = computed(formula, tensor, *(unet[key] for unet in unets))
    return made


def _apply_ema(model: ModelWeights) -> None:
    """Put the EMA values in the place of the weights that they are averages of."""
    places = [key for key in model.tensors if key.startswith((UNET_PREFIX, CONTROL_PREFIX))]
    names = {key: EMA_PREFIX + key.removeprefix("model.").replace(".", "") for key in places}
    replaced = {key: model.ema[name] for key, name in names.items() if name in model.ema}
    if not replaced:
        raise CheckpointError(f"holds no EMA weights ({EMA_PREFIX}* of its UNet or ControlNet); leave out --ema")
    for key, tensor in replaced.items():
        if tensor.shape != model.tensors[key].shape:
            raise CheckpointError(
                f"the EMA of {key!r} has shape {list(tensor.shape)}, the entry itself "
                f"{list(model.tensors[key].shape)}; leave out --ema"
            )
    model.tensors |= replaced
    model.ema = {}
    model.notes.append(f"{len(replaced)} of {len(names)} weights of UNet and ControlNet are their EMA")


def note_gaps(model: ModelWeights) -> None:
    """Note what a model lacks, or has in another shape than its family, in the parts of which it has something."""
    missing, wrong = model.report.missing, model.report.mismatched
    gaps = ([key for key in keys if part_of(key) in model.report.parts] for keys in (missing, wrong))
    model.notes += [f"{model.path}: {line}" for line in gap_lines(*gaps)]


def check_same_kind(one: ModelWeights, other: ModelWeights) -> None:
    """Raise unless the UNets of two models, or a ControlNet's copy of an encoder where there is no UNet, are of one kind."""

    def backbone(model: ModelWeights) -> Tensors:
        if model.has(UNET_PREFIX):
            return model.part(UNET_PREFIX)
        return {key: t for key, t in model.part(CONTROL_PREFIX).items() if not key.startswith(CONTROL_LAYERS)}

    first, second = backbone(one), backbone(other)
    shared = [key for key in first if key in second]
    differing = next((key for key in shared if first[key].shape != second[key].shape), None)
    if one.has(UNET_PREFIX) and other.has(UNET_PREFIX):
        differing = differing or next(iter(first.keys() ^ second.keys()), None)
    if differing is not None or not shared:
        what = f"differ in {differing!r}" if shared else "have nothing in common"
        raise CheckpointError(f"is a model of another kind than {other.path}: they {what}", one.path)


# What a checkpoint holds beside the networks' weights, where a file of another layout leaves it out.


def model_params(config: str | Path) -> Mapping[str, Any]:
    """The parameters of the model that a configuration names.

    Raises:
        ConfigError: there is no such configuration, or it is none of a model.
    """
    params = model_section(load_config(config), config).get("params") or {}
    if not isinstance(params, Mapping):
        raise ConfigError(f"{config}: `params` of its model must be a mapping")
    return params


def schedule_params(params: Mapping[str, Any], source: ModelWeights) -> Mapping[str, Any]:
    """A model's parameters with the noise schedule that a file or folder tells: by its stored betas, or its scheduler.

    Raises:
        CheckpointError: what it tells makes no sense, or cannot be expressed here.
    """
    with about(source.path):
        if "betas" in source.tensors:
            return with_stored(params, source.tensors["betas"].read())
        scheduler = source.configs.get("scheduler")
        return with_scheduler(params, scheduler) if scheduler else params


def stored_schedule(source: ModelWeights) -> Tensors:
    """The entries of the noise schedule that a file holds."""
    return {key: tensor for key, tensor in source.tensors.items() if key in SCHEDULE_KEYS}


def completed(model: ModelWeights, tensors: Tensors, source: ModelWeights, config: str | Path | None) -> Tensors:
    """The tensors with the noise schedule of `source`, and zeros for weights of SD 2.x's text encoder that nothing reads.

    diffusers leaves out that encoder's last layer and its projection.
    """
    schedule = stored_schedule(source)
    if config is None:
        return {**schedule, **tensors}
    if not schedule.keys() >= SCHEDULE_KEYS:
        schedule = {**schedule_tensors(schedule_params(model_params(config), source)), **schedule}
    if not model.has(CONTROL_PREFIX):
        schedule.pop("logvar", None)  # as published base models
    unused: Tensors = {}
    if is_open_clip(part(tensors, TEXT_PREFIX)):
        expected = part(expected_entries(config), TEXT_PREFIX)
        last = max((int(m[1]) for key in expected if (m := re.search(r"resblocks\.(\d+)\.", key))), default=0)
        pattern = re.compile(rf"model\.(transformer\.resblocks\.{last}\..+|text_projection|logit_scale)")
        lacking = (key for key in expected if TEXT_PREFIX + key not in tensors and pattern.fullmatch(key))
        unused = {TEXT_PREFIX + key: zeros(expected[key].shape, expected[key].dtype) for key in lacking}
    if unused:
        model.notes.append(f"{len(unused)} entries of the text encoder that the model does not use are zeros")
    return {**schedule, **tensors, **unused}
