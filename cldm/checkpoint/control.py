"""Giving a base model a ControlNet: a fresh one, one from a file, or one that was trained on another base."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from cldm.checkpoint.errors import CheckpointError
from cldm.checkpoint.expected import expected_entries
from cldm.checkpoint.layout import CONTROL_PREFIX, SCHEDULE_KEYS, TEXT_PREFIX, UNET_PREFIX, VAE_PREFIX
from cldm.checkpoint.lazy import Entries, LazyEntries, LazyTensor, constant, zeros
from cldm.checkpoint.opening import Model, check_family, note_gaps, open_model, under, with_twins
from cldm.checkpoint.properties import (
    POOLING,
    POOLING_NOTE,
    described,
    model_params,
    pools,
    told_prediction,
    told_schedule,
    told_schedule_entries,
    unsaid,
)
from cldm.checkpoint.reading import TensorInfo
from cldm.checkpoint.schedule import schedule_entries
from cldm.checkpoint.writing import write_checkpoint
from ldm.modules.diffusionmodules.util import conv_nd, zero_module

_HINT_ENCODER = CONTROL_PREFIX + "input_hint_block."
_ENCODER = ("time_embed.", "input_blocks.", "middle_block.")  # what a ControlNet has a copy of
_ZEROS = (CONTROL_PREFIX + "zero_convs.", CONTROL_PREFIX + "middle_block_out.")
_POSITION_IDS = TEXT_PREFIX + "transformer.text_model.embeddings.position_ids"
_SEED = 0  # of a fresh hint encoder: the same input always gives the same output


@dataclass(frozen=True)
class AddedControl:
    """A base model joined with a ControlNet.

    Attributes:
        entries: of the whole model, in its order.
        copied: keys of the ControlNet that are copies of the base's.
        kept: keys of the ControlNet that were there already.
        new: keys that have their initial values.
        dropped: keys that the model does not have.
        notes: what else deserves notice, a line each.
    """

    entries: Entries
    copied: list[str]
    kept: list[str]
    new: list[str]
    dropped: list[str]
    notes: list[str] = field(default_factory=list)


def add_control(
    source: str | Path,
    output: str | Path,
    config: str | Path | None = None,
    control_from: str | Path | None = None,
    dtype: torch.dtype | str | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> AddedControl:
    """Write a base model with a ControlNet: a copy of its encoder, with new zero convolutions and hint encoder.

    A ControlNet that the source has is kept (the reference's tool loses it). Averaged weights are left out.

    Args:
        source: the base model, of any layout.
        output: the file to write; its suffix chooses the format.
        config: name or path of the configuration; recognised from the weights by default.
        control_from: any file with a ControlNet, to be used instead of a fresh one.
        dtype: of floating-point entries; as they are by default.
        overwrite, progress: as of `write_checkpoint`.

    Raises:
        CheckpointError: a file cannot be read or does not fit the configuration, or the output cannot be written.
    """
    with ExitStack() as opened:
        base = opened.enter_context(open_model(source))
        if not base.has(UNET_PREFIX):
            raise CheckpointError(
                f"{source}: holds no base model ({base.report.layout}); give one as INPUT, and this with --control-from"
            )
        named, config = config, config if config is not None else base.report.config
        if config is None:
            raise CheckpointError(f"{source}: of no known family; name its configuration with --config")
        control = opened.enter_context(open_model(control_from, base.entries)) if control_from is not None else None
        try:
            added = join_control(base, control, config, expected_entries(config))
        except CheckpointError as error:
            named_already = str(source) in str(error)
            raise CheckpointError(
                str(error) if named_already else f"{source}: does not fit {config}: {error}"
            ) from error
        prediction = told_prediction(base, named)
        pooling = pools(control or base, named) if control or base.has(CONTROL_PREFIX) else _fresh_pools(config)
        metadata = described({**base.metadata, **(control.metadata if control else {})}, prediction, pooling)
        if pooling:
            added.notes.append(POOLING_NOTE)
        write_checkpoint(output, LazyEntries(added.entries), metadata, dtype, overwrite, progress)
        added.notes.extend(unsaid(output, metadata, base.report.family))
    return added


def _fresh_pools(config: str | Path) -> bool:
    """Whether a ControlNet made by this configuration averages its outputs."""
    return model_params(config).get(POOLING) is True


def join_control(
    base: Model, control: Model | None, config: str | Path, expected: Mapping[str, TensorInfo]
) -> AddedControl:
    """The entries of a whole model: the base's, the ControlNet's, copies of the base for it, and initial values.

    Args:
        base: with or without a ControlNet of its own.
        control: the model whose ControlNet is taken instead, or None.
        config: name or path of the whole model's configuration.
        expected: the whole model's entries.

    Raises:
        CheckpointError: entries are missing or of another shape.
    """
    given, notes = dict(base.entries), list(base.notes)
    if control is not None:
        if not control.has(CONTROL_PREFIX):
            raise CheckpointError(f"{control.path} holds no ControlNet")
        if base.has(CONTROL_PREFIX):
            notes.append(f"the ControlNet in {base.path} is replaced by that of {control.path}")
        given = {key: entry for key, entry in given.items() if not key.startswith(CONTROL_PREFIX)}
        given |= under(control.part(CONTROL_PREFIX), CONTROL_PREFIX)
        notes += control.notes
    lacking = [key for key in expected if key not in given]
    if control is not None and (key := next((k for k in lacking if k.startswith(CONTROL_PREFIX)), None)):
        raise CheckpointError(f"the ControlNet in {control.path} is incomplete: {key!r} is missing")
    twins = {key: UNET_PREFIX + key.removeprefix(CONTROL_PREFIX) for key in lacking if key.startswith(CONTROL_PREFIX)}
    copied = {key: given[twin] for key, twin in twins.items() if twin in given}
    params = model_params(config)
    if SCHEDULE_KEYS.intersection(lacking) - {"logvar"}:  # logvar does not depend on the betas
        params = told_schedule(params, base)
    new = initial_entries(config, {key: expected[key] for key in lacking if key not in copied}, params)
    every = {**given, **copied, **new}
    missing = [key for key in expected if key not in every]
    if missing:
        raise CheckpointError(
            f"{len(missing)} of {len(expected)} entries are missing, first {missing[0]!r}; "
            "another --config may be the right one"
        )
    for key, info in expected.items():
        if every[key].info.shape != info.shape:
            raise CheckpointError(
                f"{key!r} has shape {list(every[key].info.shape)}, expected {list(info.shape)}; "
                "another --config may be the right one"
            )
    kept = [key for key in expected if key.startswith(CONTROL_PREFIX) and key in given]
    entries = {key: every[key] for key in expected}
    return AddedControl(entries, list(copied), kept, list(new), [key for key in given if key not in expected], notes)


def initial_entries(
    config: str | Path, wanted: Mapping[str, TensorInfo], params: Mapping[str, Any] | None = None
) -> Entries:
    """The values that entries have in a model that was just made, where those can be had without making the model.

    They are the noise schedule, position numbers, zero convolutions, and the hint encoder, whose random values are
    always the same. Other entries of `wanted` are left out. `params` are those of the model, if they are not just as the
    configuration has them.
    """
    schedule = schedule_entries(model_params(config) if params is None else params)
    hint = _fresh_hint_encoder({k: info.shape for k, info in wanted.items() if k.startswith(_HINT_ENCODER)})

    def initial(key: str, info: TensorInfo) -> LazyTensor | None:
        if key in SCHEDULE_KEYS:
            return schedule[key]
        if key.startswith(_HINT_ENCODER):
            return hint.get(key)
        if key.startswith(_ZEROS):
            return zeros(info)
        if key == _POSITION_IDS:
            return constant(torch.arange(info.shape[-1], dtype=info.dtype).expand(info.shape))
        return None

    made = {key: initial(key, info) for key, info in wanted.items()}
    return {key: entry for key, entry in made.items() if entry is not None}


def _fresh_hint_encoder(shapes: Mapping[str, tuple[int, ...]]) -> Entries:
    """The values that the convolutions of a new hint encoder have, always the same; the last one's are zero."""
    weights = [key for key in shapes if key.endswith(".weight")]
    made: Entries = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        for key in weights:
            out_channels, in_channels, *kernel = shapes[key]
            conv = conv_nd(len(kernel), in_channels, out_channels, tuple(kernel))
            layer = zero_module(conv) if key == weights[-1] else conv
            made |= {key.removesuffix("weight") + name: constant(value) for name, value in layer.state_dict().items()}
    return made


def transfer_control(
    base: str | Path,
    controlled: str | Path,
    target: str | Path,
    output: str | Path,
    dtype: torch.dtype | str | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> list[str]:
    """Move a ControlNet from the base model that it was trained on to another of the same family.

    What training added is added to the target, `controlled + (target - base)`, in the UNet and in the ControlNet's copy
    of its encoder; the ControlNet's own layers stay. VAE and text encoder are the target's, or, where it has none, the
    controlled file's or the base's. With a target equal to the base, the controlled model comes out unchanged.

    Args:
        base: the model that the ControlNet was trained on.
        controlled: the model with the ControlNet, or the ControlNet alone.
        target: the model that it shall control.
        output: the full checkpoint to write.
        dtype: of floating-point entries; the widest of the three files' by default.
        overwrite, progress: as of `write_checkpoint`.

    Returns:
        what was done and what deserves notice, a line each.

    Raises:
        CheckpointError: a file cannot be read, lacks what is needed or belongs to another family.
    """
    with ExitStack() as opened:
        base_model = opened.enter_context(open_model(base))
        target_model = opened.enter_context(open_model(target))
        for model in (base_model, target_model):
            if not model.has(UNET_PREFIX):
                raise CheckpointError(f"{model.path}: holds no base model, only {model.report.layout}")
        control = opened.enter_context(open_model(controlled, base_model.entries))
        if not control.has(CONTROL_PREFIX):
            raise CheckpointError(f"{controlled}: holds no ControlNet")
        for model, part, name in (
            (base_model, "unet", "UNet"),
            (control, "control", "ControlNet"),
            (target_model, "unet", "UNet"),
        ):
            missing = [key for key in model.report.gaps(part) if key in model.report.missing]
            if missing:
                raise CheckpointError(
                    f"{model.path}: its {name} is incomplete: {len(missing)} entries are missing, first {missing[0]!r}"
                )
            note_gaps(model)  # shapes may be another family's, as long as the three files agree
        check_family(base_model, target_model)
        old, new = base_model.part(UNET_PREFIX), target_model.part(UNET_PREFIX)
        moved = _moved(control, CONTROL_PREFIX, old, new)
        copies = {key for key in old if key.startswith(_ENCODER)}
        if lacking := sorted(copies - moved.keys()):
            raise CheckpointError(f"{controlled}: its ControlNet is incomplete: {lacking[0]!r} is missing")
        notes = [*base_model.notes, *target_model.notes, *control.notes]
        if control.has(UNET_PREFIX):
            check_family(control, base_model)
            unet = _moved(control, UNET_PREFIX, old, new)
        else:
            unet = new
            notes.append(f"{controlled} is a ControlNet alone: the UNet is that of {target}")
        entries = {**under(unet, UNET_PREFIX), **under(moved, CONTROL_PREFIX)}
        for name, prefix in (("VAE", VAE_PREFIX), ("text encoder", TEXT_PREFIX)):
            giver = next((model for model in (target_model, control, base_model) if model.has(prefix)), None)
            if giver is None:
                notes.append(f"none of the files has a {name}, nor has the output")
                continue
            if giver is not target_model:
                notes.append(f"{target} has no {name}: it is taken from {giver.path}")
            entries |= under(giver.part(prefix), prefix)
        config = target_model.report.config or control.report.config
        schedule = {key: entry for key, entry in target_model.entries.items() if key in SCHEDULE_KEYS}
        if config is not None:
            schedule = told_schedule_entries(model_params(config), target_model)
        pooling = pools(control)
        metadata = described(control.metadata, told_prediction(target_model), pooling)
        if pooling:
            notes.append(POOLING_NOTE)
        write_checkpoint(output, LazyEntries({**schedule, **entries}), metadata, dtype, overwrite, progress)
        return [
            *notes,
            *unsaid(output, metadata, target_model.report.family),
            f"wrote {output}: {len(moved)} entries of the ControlNet, {len(schedule) + len(entries)} in all",
        ]


def _moved(model: Model, prefix: str, old: Entries, new: Entries) -> Entries:
    """`entry + (new - old)` for the entries of a model below a prefix."""
    try:
        return with_twins(lambda entry, n, o: entry + (n - o), model.part(prefix), new, old)
    except CheckpointError as error:
        raise CheckpointError(f"{model.path}: {error}") from error
