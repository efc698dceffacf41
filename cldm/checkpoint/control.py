"""Giving a base model a ControlNet: a fresh one, one from a file, or one that was trained on another base."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from cldm.checkpoint.converting import pooling_of, prediction_of, write_model
from cldm.checkpoint.expected import check_fits, expected_entries, model_params, zeros
from cldm.checkpoint.names import CONTROL_PREFIX, TEXT_PREFIX, UNET_PREFIX, with_prefix
from cldm.checkpoint.opening import ModelWeights, combined, open_model, take_parts
from cldm.checkpoint.recognising import EMA_PREFIX, POOLING, part_of
from cldm.checkpoint.schedule import completed
from ldm.files import CheckpointError, LazyTensor, check_output
from ldm.files.errors import about
from ldm.files.tensors import Tensors
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
        tensors: of the whole model, in its order.
        copied, kept, new: keys whose values are copies of the UNet's, keys of the ControlNet that were there already, and
            keys that have their initial values.
        dropped: keys that the model does not have.
        notes: what else deserves notice, a line each.
    """

    tensors: Tensors
    copied: list[str]
    kept: list[str]
    new: list[str]
    dropped: list[str]
    notes: list[str]


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

    A ControlNet that the source has is kept (the reference's tool loses it). EMA weights are left out.

    Args:
        source: the base model, of any layout.
        output: the file to write; its suffix chooses the format.
        config: name or path of the configuration; recognised from the weights by default.
        control_from: any file with a ControlNet, to be used instead of a fresh one.
        dtype, overwrite, progress: as of `convert`.

    Raises:
        CheckpointError: a file cannot be read or does not fit the configuration, or the output cannot be written.
    """
    check_output(output, overwrite, inputs=[path for path in (source, control_from) if path is not None])
    with ExitStack() as opened:
        base = opened.enter_context(open_model(source))
        if not base.has(UNET_PREFIX):
            advice = "give one as INPUT, and this with --control-from"
            raise CheckpointError(f"holds no base model ({base.report.layout}); {advice}", base.path)
        control = opened.enter_context(open_model(control_from, base.tensors)) if control_from is not None else None
        used = config if config is not None else base.report.config
        if used is None:
            raise CheckpointError("of no known family; name its configuration with --config", base.path)
        added = join_control(base, control, used)
        if control is not None or base.has(CONTROL_PREFIX):
            pooling = pooling_of(control or base, config)
        else:  # a fresh one is what the configuration makes
            pooling = model_params(used).get(POOLING) is True
        told = replace(base, metadata={**base.metadata, **(control.metadata if control else {})})
        options: dict[str, Any] = {"dtype": dtype, "overwrite": overwrite, "progress": progress}
        added.notes.extend(write_model(output, added.tensors, told, prediction_of(base, config), pooling, **options))
    return added


def join_control(base: ModelWeights, control: ModelWeights | None, config: str | Path) -> AddedControl:
    """The tensors of a whole model: the base's, the ControlNet's, copies of the base for it, and initial values.

    Args:
        base: with or without a ControlNet of its own.
        control: the model whose ControlNet is taken instead, or None.
        config: name or path of the whole model's configuration.

    Raises:
        CheckpointError: entries are missing or of another shape.
    """
    expected = {key: tensor for key, tensor in expected_entries(config).items() if not key.startswith(EMA_PREFIX)}
    given, notes = dict(base.tensors), list(base.notes)
    if control is not None:
        if not control.has(CONTROL_PREFIX):
            raise CheckpointError("holds no ControlNet", control.path)
        if base.has(CONTROL_PREFIX):
            notes.append(f"the ControlNet in {base.path} is replaced by that of {control.path}")
        given = {key: tensor for key, tensor in given.items() if not key.startswith(CONTROL_PREFIX)}
        given |= with_prefix(control.part(CONTROL_PREFIX), CONTROL_PREFIX)
        notes += control.notes
    lacking = [key for key in expected if key.startswith(CONTROL_PREFIX) and key not in given]
    if control is not None and lacking:
        raise CheckpointError(f"its ControlNet is incomplete: {lacking[0]!r} is missing", control.path)
    originals = {key: UNET_PREFIX + key.removeprefix(CONTROL_PREFIX) for key in lacking}
    copied = {key: given[original] for key, original in originals.items() if original in given}
    every, more = completed({**given, **copied}, base, config)
    every |= initial_values({key: expected[key] for key in expected if key not in every})
    if missing := [key for key in expected if key not in every]:
        problem = f"{len(missing)} of {len(expected)} entries are missing, first {missing[0]!r}"
        raise CheckpointError(f"does not fit {config}: {problem}; another --config may be the right one", base.path)
    check_fits(every, config, base.path)
    return AddedControl(
        tensors={key: every[key] for key in expected},
        copied=list(copied),
        kept=[key for key in expected if key.startswith(CONTROL_PREFIX) and key in given],
        new=[key for key in expected if key not in given and key not in copied],
        dropped=[key for key in given if key not in expected],
        notes=notes + more,
    )


def initial_values(wanted: Tensors) -> Tensors:
    """The values that entries have in a model that was just made, where those can be had without making the model.

    They are position numbers, zero convolutions, and the hint encoder, whose random values are always the same. Other
    entries of `wanted` are left out.
    """
    made = _fresh_hint_encoder({k: tensor.shape for k, tensor in wanted.items() if k.startswith(_HINT_ENCODER)})
    for key, tensor in wanted.items():
        if key.startswith(_ZEROS):
            made[key] = zeros(tensor.shape, tensor.dtype)
        elif key == _POSITION_IDS:
            made[key] = LazyTensor.of(
                torch.arange(tensor.shape[-1], dtype=tensor.dtype, device="cpu").expand(tensor.shape)
            )
    return made


def _fresh_hint_encoder(shapes: dict[str, tuple[int, ...]]) -> Tensors:
    """The values that the convolutions of a new hint encoder have, always the same; the last one's are zero."""
    weights = [key for key in shapes if key.endswith(".weight")]
    made: Tensors = {}
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(_SEED)
        for key in weights:
            out_channels, in_channels, *kernel = shapes[key]
            conv = conv_nd(len(kernel), in_channels, out_channels, tuple(kernel))
            layer = zero_module(conv) if key == weights[-1] else conv
            made |= {key.removesuffix("weight") + n: LazyTensor.of(value) for n, value in layer.state_dict().items()}
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
        dtype: of floating-point tensors; by default that of the files; where theirs differ, float32, or float64 if one has that.
        overwrite, progress: as of `add_control`.

    Returns:
        what was done and what deserves notice, a line each.

    Raises:
        CheckpointError: a file cannot be read, lacks what is needed or belongs to another family.
    """
    check_output(output, overwrite, inputs=(base, controlled, target))
    with ExitStack() as opened:
        old, new = opened.enter_context(open_model(base)), opened.enter_context(open_model(target))
        for model in (old, new):
            if not model.has(UNET_PREFIX):
                raise CheckpointError(f"holds no base model, only {model.report.layout}", model.path)
        control = opened.enter_context(open_model(controlled, old.tensors))
        if not control.has(CONTROL_PREFIX):
            raise CheckpointError("holds no ControlNet", control.path)
        for model, kind, name in ((old, "unet", "UNet"), (control, "control", "ControlNet"), (new, "unet", "UNet")):
            report = model.report
            missing = [key for key in report.missing if part_of(key) == kind]
            if missing and not any(part_of(key) == kind for key in (*report.extra, *report.mismatched)):
                problem = f"its {name} is incomplete: {len(missing)} entries are missing, first {missing[0]!r}"
                raise CheckpointError(problem, model.path)
            model.note_gaps()  # it may be of another architecture, as long as the three files agree
        old.check_same_kind(new)
        notes = [*old.notes, *new.notes, *control.notes]
        unets = new.part(UNET_PREFIX), old.part(UNET_PREFIX)
        tensors = with_prefix(unets[0], UNET_PREFIX)
        if control.has(UNET_PREFIX):
            control.check_same_kind(old)
        else:
            notes.append(f"{controlled} is a ControlNet alone: the UNet is that of {target}")
        with about(control.path):
            for prefix in (UNET_PREFIX, CONTROL_PREFIX):
                moved = combined(lambda tensor, n, o: tensor + (n - o), control.part(prefix), *unets)
                tensors |= with_prefix(moved, prefix)
        needed = [CONTROL_PREFIX + key for key in unets[1] if key.startswith(_ENCODER)]
        needed += [f"{_ZEROS[0]}{key.split('.')[1]}.0.weight" for key in unets[1] if key.startswith("input_blocks.")]
        # Of another architecture, nothing else tells whether the ControlNet is complete.
        if missing := [key for key in needed if key not in tensors]:
            raise CheckpointError(f"its ControlNet is incomplete: {missing[0]!r} is missing", control.path)
        tensors, taken, lacking = take_parts(tensors, (new, control, old))
        notes += taken + [f"none of the files has a {name}, nor has the output" for name in lacking]
        tensors, more = completed(tensors, new, new.report.config or control.report.config)
        told = replace(new, metadata=control.metadata)
        options: dict[str, Any] = {"dtype": dtype, "overwrite": overwrite, "progress": progress}
        more += write_model(output, tensors, told, prediction_of(new), pooling_of(control), **options)
        return [
            *notes,
            *more,
            f"wrote {output}: {len(control.part(CONTROL_PREFIX))} entries of the ControlNet, {len(tensors)} in all",
        ]
