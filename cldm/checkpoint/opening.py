"""The one way in: a weights file or folder of any layout, opened as `ModelWeights` under this library's names, lazy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cldm.checkpoint.names import (
    BASE_PARTS,
    COMPONENTS,
    CONTROL_LAYERS,
    CONTROL_PREFIX,
    UNET_PREFIX,
    from_diffusers,
    part,
    with_prefix,
)
from cldm.checkpoint.recognising import DIFFERENCE, EMA_PREFIX, Report, gap_lines, layout_of, make_report
from ldm.files import CheckpointError, LazyTensor, WeightsFile, open_weights
from ldm.files.errors import about
from ldm.files.tensors import Tensors


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

    def note_gaps(self) -> None:
        """Note what the model lacks, or has in another shape than its family, in the parts of which it has something."""
        report = self.report
        self.notes += [f"{self.path}: {line}" for line in gap_lines(report.missing, report.mismatched, report.parts)]

    def check_same_kind(self, other: ModelWeights) -> None:
        """Raise unless the UNets of both, or a ControlNet's copy of an encoder where there is no UNet, are of one kind."""
        first, second = (model.part(UNET_PREFIX) or model.part(CONTROL_PREFIX) for model in (self, other))
        shared = [key for key in first if key in second]
        differing = [key for key in shared if first[key].shape != second[key].shape]
        if self.has(UNET_PREFIX) and other.has(UNET_PREFIX):
            differing += first.keys() ^ second.keys()
        if differing or not shared:
            what = f"differ in {differing[0]!r}" if shared else "have nothing in common"
            raise CheckpointError(f"is a model of another kind than {other.path}: they {what}", self.path)


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
            layout = layout_of(file)
            tensors, left_out = _renamed(file, layout)
            report = make_report(file, layout, tensors, left_out)
            if layout == "unknown" and not any_layout:
                raise CheckpointError(f"no layout known here. {'; '.join(report.suggestions)}")
            if layout == DIFFERENCE:
                if base is None:
                    ways = "controlnet convert takes that base with --base, and cldm.model.load_control the model's own"
                    raise CheckpointError(f"a ControlNet stored as the difference to its base: {ways}")
                if not (unet := part(base, UNET_PREFIX)):
                    raise CheckpointError("stored as the difference to a base model, and no UNet was given as that")
                tensors = with_prefix(combined(torch.add, part(tensors, CONTROL_PREFIX), unet), CONTROL_PREFIX)
            averages = {key: tensor for key, tensor in tensors.items() if key.startswith(EMA_PREFIX)}
            tensors = {key: tensor for key, tensor in tensors.items() if key not in averages}
            model = ModelWeights(file.path, report, tensors, averages, file.metadata, file.configs, left_out)
            if left_out:
                first = ", ".join(left_out[:3])
                model.notes.append(f"{len(left_out)} entries have no place here and are left out: {first}")
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
        layout = layout_of(file)
        try:
            return make_report(file, layout, *_renamed(file, layout))
        except CheckpointError as error:  # of its layout, but not convertible
            report = make_report(file, layout, {}, ())
            return replace(report, suggestions=(*report.suggestions, error.problem))


def _renamed(file: WeightsFile, layout: str) -> tuple[Tensors, list[str]]:
    """The file's tensors under the keys of a full checkpoint, and the keys that have no place there."""
    if layout in ("control", "control-plain", DIFFERENCE):
        prefix = CONTROL_PREFIX if any(key.startswith(CONTROL_PREFIX) for key in file) else ""
        control = {key: tensor for key, tensor in part(file.data, prefix).items() if key != DIFFERENCE}
        outside = [key for key in file if not key.startswith(prefix) and key != DIFFERENCE]
        return with_prefix(control, CONTROL_PREFIX), outside
    if not layout.startswith("diffusers-"):
        return dict(file), []
    made: Tensors = {}
    left_out: list[str] = []
    for component, prefix in COMPONENTS.items():
        whole = layout == f"diffusers-{component}"
        tensors = file.data if whole else part(file.data, f"{component}/")
        if tensors and (whole or layout == "diffusers-pipeline"):
            activation = file.configs.get(component, {}).get("hidden_act")
            wide = any(tensor.shape[-1:] == (1024,) for tensor in tensors.values())  # where no configuration tells
            converted, unknown = from_diffusers(component, tensors, activation == "gelu" if activation else wide)
            made |= with_prefix(converted, prefix)
            left_out += [f"{component}/{key}" for key in unknown]
    return made, left_out


def combined(formula: Callable[..., Tensor], tensors: Tensors, *unets: Tensors) -> Tensors:
    """A formula of the tensors of a ControlNet (or UNet) and those of the same keys in UNets; its own layers stay.

    It is computed in float32, or in float64 if one of the tensors is. The result has the tensors' dtype; where theirs differ, the one
    that it was computed in.

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
                shapes = f"{list(tensor.shape)}, in the base {list(unet[key].shape)}"
                raise CheckpointError(f"{key!r} has shape {shapes}: these do not belong to one kind of model")
        operands = [tensor, *(unet[key] for unet in unets)]
        dtypes = {operand.dtype for operand in operands}
        wide = torch.float64 if torch.float64 in dtypes else torch.float32
        dtype = tensor.dtype if len(dtypes) == 1 else wide

        def read(operands: list[LazyTensor] = operands, wide: torch.dtype = wide, dtype: torch.dtype = dtype) -> Tensor:
            return formula(*(operand.read().to(wide) for operand in operands)).to(dtype)

        made[key] = LazyTensor(tensor.shape, dtype, read)
    return made


def take_parts(tensors: Tensors, givers: Iterable[ModelWeights | None]) -> tuple[Tensors, list[str], list[str]]:
    """A model's tensors with the parts of a base that it lacks from the first of `givers` that has them.

    Returns:
        the tensors, a note on each part that was taken from another than the first, and the names of parts that none has.
    """
    made, notes, lacking = dict(tensors), list[str](), list[str]()
    first, *others = (giver for giver in givers if giver is not None)
    for name, prefix in BASE_PARTS.items():
        if any(key.startswith(prefix) for key in tensors):
            continue
        giver = next((giver for giver in (first, *others) if giver.has(prefix)), None)
        if giver is None:
            lacking.append(name)
            continue
        made |= with_prefix(giver.part(prefix), prefix)
        if giver is not first:
            notes.append(f"{first.path} has no {name}: it is taken from {giver.path}")
    return made, notes, lacking


def _apply_ema(model: ModelWeights) -> None:
    """Put the EMA values in the place of the weights that they are averages of."""
    places = [key for key in model.tensors if key.startswith((UNET_PREFIX, CONTROL_PREFIX))]
    names = {key: EMA_PREFIX + key.removeprefix("model.").replace(".", "") for key in places}
    replaced = {key: model.ema[name] for key, name in names.items() if name in model.ema}
    if not replaced:
        raise CheckpointError(f"holds no EMA weights ({EMA_PREFIX}* of its UNet or ControlNet); leave out --ema")
    for key, tensor in replaced.items():
        if tensor.shape != model.tensors[key].shape:
            shapes = f"{list(tensor.shape)}, the entry itself {list(model.tensors[key].shape)}"
            raise CheckpointError(f"the EMA of {key!r} has shape {shapes}; leave out --ema")
    model.tensors |= replaced
    model.ema = {}
    model.notes.append(f"{len(replaced)} of {len(names)} weights of UNet and ControlNet are their EMA")
