"""A weights file or folder of any layout, opened as a `Model`: its entries under this library's names, lazy throughout.

`_READERS` is the table of what can be read; a further layout is a further row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cldm.checkpoint.errors import CheckpointError
from cldm.checkpoint.layout import (
    CONTROL_LAYERS,
    CONTROL_PREFIX,
    DIFFERENCE,
    EMA_PREFIX,
    TEXT_PREFIX,
    UNET_PREFIX,
    Report,
    gap_lines,
    identify,
)
from cldm.checkpoint.lazy import Entries, LazyEntries, LazyTensor, computed, lazy_entries
from cldm.checkpoint.names import NETWORKS, text_from_diffusers
from cldm.checkpoint.reading import Checkpoint, open_checkpoint

_EMA_UNET = EMA_PREFIX + "diffusion_model"


@dataclass
class Model:
    """The weights of one file or folder under this library's names, whatever its layout.

    Attributes:
        path: where they lie.
        report: what `identify` said.
        entries: lazy, under the keys of a full checkpoint.
        metadata, configs: as of `Checkpoint`.
        notes: what was left out, filled in or taken from elsewhere, a line each.
    """

    path: Path
    report: Report
    entries: Entries
    metadata: Mapping[str, str] = field(default_factory=dict)
    configs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def part(self, prefix: str) -> Entries:
        """The entries below a prefix, under their keys without it."""
        return below(self.entries, prefix)

    def has(self, prefix: str) -> bool:
        """Whether any entry lies below the prefix."""
        return any(key.startswith(prefix) for key in self.entries)

    def state_dict(self, prefix: str = "") -> LazyEntries:
        """The entries (below a prefix, without it) as a mapping from key to tensor, each read when asked for."""
        return LazyEntries(self.part(prefix), self.path)


@contextmanager
def open_model(path: str | Path, base: Entries | None = None, ema: bool = False) -> Iterator[Model]:
    """Open a weights file or folder of any known layout.

    Args:
        path: what to open.
        base: entries of the model that a difference was taken from; only differences need them.
        ema: give the UNet its averaged weights. They are left out otherwise, and in any case as entries of their own.

    Raises:
        CheckpointError: it cannot be read, is of no known layout, or lacks what was asked for.
    """
    with open_checkpoint(path) as checkpoint:
        report = identify(checkpoint)
        reader = _READERS.get(report.layout)
        if reader is None:
            raise CheckpointError(f"{path}: no layout known here. {'; '.join(report.suggestions)}")
        model = Model(
            checkpoint.path,
            report,
            {},
            {k: v for k, v in checkpoint.metadata.items() if k != "format"},
            checkpoint.configs,
        )
        try:
            model.entries = reader(model, checkpoint, base)
            _settle_averages(model, ema)
        except CheckpointError as error:
            raise CheckpointError(str(error) if str(path) in str(error) else f"{path}: {error}") from error
        yield model


def below(entries: Entries, prefix: str) -> Entries:
    """The entries whose keys begin with a prefix, without it."""
    return {key.removeprefix(prefix): entry for key, entry in entries.items() if key.startswith(prefix)}


def under(entries: Entries, prefix: str) -> Entries:
    """The entries with a prefix before their keys."""
    return {prefix + key: entry for key, entry in entries.items()}


# Reading: one function a layout, from the entries as they lie in the file to those of a full checkpoint.


def _read_flat(model: Model, checkpoint: Checkpoint, _base: Entries | None) -> Entries:
    return lazy_entries(checkpoint)


def _read_control(model: Model, checkpoint: Checkpoint, _base: Entries | None) -> Entries:
    entries = lazy_entries(checkpoint)
    control = under(below(entries, model.report.prefix), CONTROL_PREFIX)
    if len(control) < len(entries):
        model.notes.append(f"{model.path}: {len(entries) - len(control)} entries beside the ControlNet are left out")
    return control


def _read_difference(model: Model, checkpoint: Checkpoint, base: Entries | None) -> Entries:
    if base is None:
        raise CheckpointError(
            "a ControlNet stored as the difference to its base: tool_convert_control.py takes that base with --base, "
            "and cldm.model.load_control(model, path) adds it to the model's own"
        )
    stored = {key: entry for key, entry in lazy_entries(checkpoint).items() if key != DIFFERENCE}
    unet = below(base, UNET_PREFIX)
    if not unet:
        raise CheckpointError(f"{model.path}: stored as the difference to a base model, and no UNet was given as that")
    return under(with_twins(torch.add, below(stored, model.report.prefix), unet), CONTROL_PREFIX)


def with_twins(formula: Callable[..., Tensor], entries: Entries, *unets: Entries) -> Entries:
    """A formula of a ControlNet's (or UNet's) entries and their twins in UNets; a ControlNet's own layers stay.

    Raises:
        CheckpointError: a twin is missing or has another shape, so that these are not of one kind.
    """

    def combined(key: str, entry: LazyTensor) -> LazyTensor:
        if key.startswith(CONTROL_LAYERS):
            return entry
        for unet in unets:
            if key not in unet:
                raise CheckpointError(f"{key!r} is not in the base model: it is incomplete or of another kind")
            if unet[key].info.shape != entry.info.shape:
                raise CheckpointError(
                    f"{key!r} has shape {list(entry.info.shape)}, in the base {list(unet[key].info.shape)}: "
                    "these do not belong to one kind of model"
                )
        return computed(formula, entry, *(unet[key] for unet in unets))

    return {key: combined(key, entry) for key, entry in entries.items()}


def _read_diffusers(component: str) -> Callable[[Model, Checkpoint, Entries | None], Entries]:
    def read(_model: Model, checkpoint: Checkpoint, _base: Entries | None) -> Entries:
        network = NETWORKS[component]
        return under(network.from_diffusers(lazy_entries(checkpoint))[0], network.prefix)

    return read


def _read_pipeline(model: Model, checkpoint: Checkpoint, _base: Entries | None) -> Entries:
    entries = lazy_entries(checkpoint)
    made: Entries = {}
    for component, network in NETWORKS.items():
        part = below(entries, f"{component}/")
        if part:
            converted, unknown = network.from_diffusers(part)
            made |= under(converted, network.prefix)
            note_unknown(model, component, unknown)
    text = below(entries, "text_encoder/")
    if text:
        activation = checkpoint.configs.get("text_encoder", {}).get("hidden_act")
        open_clip = activation == "gelu" if activation else model.report.family == "sd2"
        converted, unknown = text_from_diffusers(text, open_clip)
        made |= under(converted, TEXT_PREFIX)
        note_unknown(model, "text_encoder", unknown)
    return made


def note_unknown(model: Model, component: str, unknown: list[str]) -> None:
    """Note the entries of a part of a diffusers folder, or for one, that the other side has no name for."""
    if unknown:
        model.notes.append(
            f"{model.path}: {len(unknown)} entries of {component} have no counterpart: {', '.join(unknown[:3])}"
        )


_READERS: dict[str, Callable[[Model, Checkpoint, Entries | None], Entries]] = {
    "full": _read_flat,
    "base": _read_flat,
    "control": _read_control,
    "control-plain": _read_control,
    "difference": _read_difference,
    "diffusers-controlnet": _read_diffusers("controlnet"),
    "diffusers-unet": _read_diffusers("unet"),
    "diffusers-pipeline": _read_pipeline,
}


def is_readable(layout: str) -> bool:
    """Whether files of a layout, as `layout_of` names it, can be opened."""
    return layout in _READERS


def _settle_averages(model: Model, ema: bool) -> None:
    """Drop the averaged weights, or put them in the place of those they are averages of."""
    averages = {key: entry for key, entry in model.entries.items() if key.startswith(EMA_PREFIX)}
    if ema and not averages:
        raise CheckpointError("holds no averaged weights (model_ema.*); convert it without --ema")
    kept = {key: entry for key, entry in model.entries.items() if key not in averages}
    if ema:
        names = {
            key: _EMA_UNET + key.removeprefix(UNET_PREFIX).replace(".", "")
            for key in kept
            if key.startswith(UNET_PREFIX)
        }
        replaced = {key: averages[name] for key, name in names.items() if name in averages}
        wrong = next((key for key, entry in replaced.items() if entry.info.shape != kept[key].info.shape), None)
        if wrong is not None:
            raise CheckpointError(
                f"the average of {wrong!r} has shape {list(replaced[wrong].info.shape)}, the entry itself "
                f"{list(kept[wrong].info.shape)}; convert it without --ema"
            )
        kept |= replaced
        model.notes.append(
            f"{model.path}: the UNet takes its averaged weights, {len(replaced)} of {len(names)} entries"
        )
    elif averages:
        model.notes.append(f"{model.path}: {len(averages)} averaged entries ({EMA_PREFIX}*) are left out")
    model.entries = kept


# Checks of opened models.


def check_family(one: Model, other: Model) -> None:
    """Raise unless the UNets of two models, or the ControlNet's copy of an encoder that there is instead, are of one kind."""
    first, second = _backbone(one), _backbone(other)
    shared = [key for key in first if key in second]
    differing = next((key for key in shared if first[key].info.shape != second[key].info.shape), None)
    if one.has(UNET_PREFIX) and other.has(UNET_PREFIX):
        differing = differing or next(iter(first.keys() ^ second.keys()), None)
    if differing is not None or not shared:
        what = f"differ in {differing!r}" if shared else "have nothing in common"
        raise CheckpointError(f"{one.path} and {other.path} are models of different kinds: they {what}")


def _backbone(model: Model) -> Entries:
    """The UNet's entries, or those of the ControlNet that a UNet of its kind has too."""
    if model.has(UNET_PREFIX):
        return model.part(UNET_PREFIX)
    return {key: entry for key, entry in model.part(CONTROL_PREFIX).items() if not key.startswith(CONTROL_LAYERS)}


def note_gaps(model: Model, *parts: str) -> None:
    """Note what a model lacks, or has in another shape than its family, in these parts or in all that it has."""
    gaps = set(model.report.gaps(*parts))
    missing, mismatched = ([k for k in keys if k in gaps] for keys in (model.report.missing, model.report.mismatched))
    model.notes += [f"{model.path}: {line}" for line in gap_lines(missing, mismatched)]
