"""From any layout to any other: every file is brought under this library's names first (`opening`), and written from there.

`TARGETS` is the table of what can be written; a further layout is a further row. Entries stay lazy throughout, so neither the
file nor the model is ever in memory whole.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from cldm.checkpoint.diffusers_config import (
    controlnet_config,
    model_index,
    text_config,
    tokenizer_files,
    unet_config,
    vae_config,
)
from cldm.checkpoint.errors import CheckpointError
from cldm.checkpoint.expected import expected_entries
from cldm.checkpoint.layout import (
    CONTROL_PREFIX,
    DIFFERENCE,
    SCHEDULE_KEYS,
    TEXT_PREFIX,
    UNET_PREFIX,
    VAE_PREFIX,
    layout_of,
)
from cldm.checkpoint.lazy import Entries, LazyEntries, LazyTensor, constant, lazy_entries
from cldm.checkpoint.names import NETWORKS, is_open_clip, text_to_diffusers
from cldm.checkpoint.opening import (
    Model,
    below,
    check_family,
    is_readable,
    note_gaps,
    note_unknown,
    open_model,
    under,
    with_twins,
)
from cldm.checkpoint.properties import (
    POOLING_NOTE,
    described,
    model_params,
    pools,
    told_prediction,
    told_schedule,
    unconverted,
    unsaid,
)
from cldm.checkpoint.reading import Checkpoint, open_checkpoint
from cldm.checkpoint.schedule import PREDICTIONS, scheduler_config
from cldm.checkpoint.writing import Output, check_target, is_weights_file, write_all

logger = logging.getLogger(__name__)

_BASE_PARTS = {"UNet": UNET_PREFIX, "VAE": VAE_PREFIX, "text encoder": TEXT_PREFIX}
_UNET_FILE = "diffusion_pytorch_model.safetensors"
_TEXT_FILE = "model.safetensors"


@contextmanager
def open_weights(path: str | Path) -> Iterator[tuple[LazyEntries, Checkpoint]]:
    """Open a weights file or folder to fill a model from: its entries under the keys that a model here has.

    Whole checkpoints and what is of no known layout come entry by entry as they are, averages included. A ControlNet
    alone gets its prefix; what diffusers wrote gets this library's names, and what its layout does not keep.

    Yields:
        the entries, and the checkpoint that they come from.

    Raises:
        CheckpointError: as `open_model`.
    """
    with ExitStack() as opened:
        checkpoint = opened.enter_context(open_checkpoint(path))
        layout = layout_of(checkpoint)
        if layout in ("full", "base", "control") or not is_readable(layout):
            yield LazyEntries(lazy_entries(checkpoint), path), checkpoint
            return
        model = opened.enter_context(open_model(path))
        config = model.report.config
        if layout == "diffusers-pipeline" and config is not None:
            model.entries = {**unconverted(model, model.entries, model, config), **model.entries}
        for note in model.notes:
            logger.info("%s", note)
        yield model.state_dict(), checkpoint


# Writing: one function a target, from a model to the content of a file, or of a folder's files.


@dataclass(frozen=True)
class Options:
    """What the targets need to know beside the weights.

    Attributes:
        base: the model that the control belongs to, if it was named.
        config: name or path of the configuration; None if the family is unknown and none was named.
        pooling: whether the ControlNet's outputs are averaged over height and width.
        prediction: "eps", "v" or "x0", where it was told.
    """

    base: Model | None
    config: str | None
    pooling: bool
    prediction: str | None

    def params(self, model: Model) -> Mapping[str, Any]:
        """The parameters of the configuration."""
        if self.config is None:
            raise CheckpointError(f"{model.path}: of no known family; name its configuration with --config")
        return model_params(self.config)

    def unet_source(self, model: Model) -> Model:
        """The model whose UNet the result has, and so its noise schedule and what it predicts."""
        return self.base if self.base is not None and not model.has(UNET_PREFIX) else model


@dataclass(frozen=True)
class Target:
    """A layout that can be written.

    Attributes:
        help: what it is, for people.
        needs: prefix of the entries that it is made of; "" if it takes what there is.
        build: the entries of one file, or of a folder its files by name.
        folder: whether OUTPUT is a folder; None where its suffix decides.
    """

    help: str
    needs: str
    build: Callable[[Model, Options, bool], dict[str, Any]]
    folder: bool | None = False


def _build_full(model: Model, options: Options, _folder: bool) -> Entries:
    if not model.has(CONTROL_PREFIX):
        model.notes.append(f"{model.path} holds no ControlNet, so this is a base model; tool_add_control.py adds one")
    return _completed(model, options)


def _build_base(model: Model, options: Options, _folder: bool) -> Entries:
    return _completed(_without_control(model), options)


def _without_control(model: Model) -> Model:
    """The base model in a full one; both write their notes into the same list."""
    entries = {k: e for k, e in model.entries.items() if not k.startswith(CONTROL_PREFIX) and k != "logvar"}
    return replace(model, entries=entries)


def _completed(model: Model, options: Options) -> Entries:
    """The model's entries, with those that a checkpoint has and other layouts lack."""
    made = dict(model.entries)
    for name, prefix in _BASE_PARTS.items():
        if model.has(prefix):
            continue
        if options.base is not None and options.base.has(prefix):
            check_family(model, options.base)
            made |= under(options.base.part(prefix), prefix)
            model.notes.append(f"the {name} is that of {options.base.path}")
        else:
            where = f"{model.path} and {options.base.path} have" if options.base else f"{model.path} has"
            raise CheckpointError(f"{where} no {name}; name a base model that has one with --base")
    source = options.unet_source(model)
    if options.config is None:
        return {**{key: entry for key, entry in source.entries.items() if key in SCHEDULE_KEYS}, **made}
    return {**unconverted(model, made, source, options.config), **made}


def _build_control(model: Model, _options: Options, _folder: bool) -> Entries:
    return under(model.part(CONTROL_PREFIX), CONTROL_PREFIX)


def _build_plain(model: Model, _options: Options, _folder: bool) -> Entries:
    return model.part(CONTROL_PREFIX)


def _build_difference(model: Model, options: Options, _folder: bool) -> Entries:
    unet = (options.base or model).part(UNET_PREFIX)
    if not unet:
        raise CheckpointError(f"{model.path}: holds no base model to take the difference to; name one with --base")
    control = model.part(CONTROL_PREFIX)
    return {**under(with_twins(torch.sub, control, unet), CONTROL_PREFIX), DIFFERENCE: constant(torch.ones(1))}


def _build_controlnet(model: Model, options: Options, folder: bool) -> dict[str, Any]:
    control = model.part(CONTROL_PREFIX)
    converted, _ = NETWORKS["controlnet"].to_diffusers(control)
    if not folder:
        return converted
    return {"config.json": controlnet_config(control, options.params(model), options.pooling), _UNET_FILE: converted}


def _build_pipeline(model: Model, options: Options, _folder: bool) -> dict[str, Any]:
    params, source = options.params(model), options.unet_source(model)
    entries = _completed(model, options)
    prediction = options.prediction or params.get("parameterization", "eps")
    if options.prediction is None and source.report.family == "sd2":
        model.notes.append(
            f"SD 2.x weights do not tell what they predict: {prediction} is assumed (--prediction v for 768 pixels)"
        )
    parts = {name: below(entries, network.prefix) for name, network in NETWORKS.items()}
    text = below(entries, TEXT_PREFIX)
    configs = {"unet": unet_config(parts["unet"], params, prediction), "vae": vae_config(parts["vae"], params)}
    if parts["controlnet"]:
        configs["controlnet"] = controlnet_config(parts["controlnet"], params, options.pooling)
    files: dict[str, Any] = {"model_index.json": model_index([name for name, part in parts.items() if part])}
    for name, config in configs.items():
        converted, unknown = NETWORKS[name].to_diffusers(parts[name])
        note_unknown(model, name, unknown)
        files |= {f"{name}/config.json": config, f"{name}/{_UNET_FILE}": converted}
    converted, unknown = text_to_diffusers(text)
    note_unknown(model, "text_encoder", unknown)
    files |= {"text_encoder/config.json": text_config(text, converted, params), f"text_encoder/{_TEXT_FILE}": converted}
    files["scheduler/scheduler_config.json"] = scheduler_config(told_schedule(params, source), prediction)
    return files | under(tokenizer_files(is_open_clip(text)), "tokenizer/")


TARGETS = {
    "full": Target("one file with base and ControlNet, for training and the scripts here", "", _build_full),
    "base": Target("one file with the base model alone", "", _build_base),
    "control": Target("the ControlNet alone, keys with the prefix control_model.", CONTROL_PREFIX, _build_control),
    "control-plain": Target("the ControlNet alone, keys without a prefix, for web UIs", CONTROL_PREFIX, _build_plain),
    "difference": Target(
        "the ControlNet less its base's encoder (rounded, not exact)", CONTROL_PREFIX, _build_difference
    ),
    "diffusers": Target(
        "the ControlNet for ControlNetModel.from_pretrained; one file if OUTPUT ends in .safetensors or .bin",
        CONTROL_PREFIX,
        _build_controlnet,
        None,
    ),
    "diffusers-pipeline": Target("a pipeline folder of diffusers, ControlNet included", "", _build_pipeline, True),
}


def convert(
    source: str | Path,
    output: str | Path,
    to: str,
    *,
    base: str | Path | None = None,
    with_base: bool = False,
    config: str | Path | None = None,
    ema: bool = False,
    dtype: torch.dtype | str | None = None,
    global_average_pooling: bool | None = None,
    prediction: str | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> list[str]:
    """Convert a weights file or folder of any known layout.

    Args:
        source: the file or folder to convert.
        output: where to write; the suffix of a file chooses its format.
        to: a key of `TARGETS`.
        base: the model that the ControlNet belongs to. It supplies what `source` lacks, and a difference is taken to it.
            Where a ControlNet is taken out of a full checkpoint whose base is not this one any more (trained with
            `sd_locked=False`), the changed base is written beside `output`.
        with_base: write the base beside `output` in any case.
        config: name or path of the configuration, for models of no known family.
        ema: give the UNet its averaged weights.
        dtype: of floating-point entries; as they are by default.
        global_average_pooling: of the ControlNet; read from the source or the configuration by default.
        prediction: "eps", "v" or "x0"; by default as a named configuration, the file that the UNet comes from, or its
            family's configuration says.
        overwrite: replace existing files.
        progress: show a bar on stderr.

    Returns:
        what was done and what deserves notice, a line each.

    Raises:
        CheckpointError: the source cannot be read or lacks what the target needs, or the output cannot be written.
    """
    output = Path(output)
    if to not in TARGETS:
        raise CheckpointError(f"unknown layout {to!r}; known are {', '.join(TARGETS)}")
    target = TARGETS[to]
    folder = not is_weights_file(output) if target.folder is None else target.folder
    check_target(output, overwrite, folder)
    with ExitStack() as opened:
        base_model = opened.enter_context(open_model(base)) if base is not None else None
        model = opened.enter_context(open_model(source, base_model.entries if base_model else None, ema))
        if target.needs and not model.has(target.needs):
            raise CheckpointError(
                f"{source}: holds no ControlNet, which {to!r} is made of; add one with tool_add_control.py"
            )
        models = [opened_model for opened_model in (model, base_model) if opened_model is not None]
        known = (opened_model.report.config for opened_model in models)
        options = Options(
            base_model,
            str(config) if config is not None else next(filter(None, known), None),
            pools(model, config) if global_average_pooling is None else global_average_pooling,
            prediction,
        )
        options = replace(options, prediction=prediction or told_prediction(options.unet_source(model), config))
        if options.prediction not in (None, *PREDICTIONS):
            raise CheckpointError(f"unknown prediction {options.prediction!r}; known are {', '.join(PREDICTIONS)}")
        if config is not None:
            _check_config(model, config)
        controlled = to != "base" and model.has(CONTROL_PREFIX)
        if controlled and options.pooling:
            model.notes.append(POOLING_NOTE)
        for opened_model in models:
            note_gaps(opened_model)
        metadata = described(model.metadata, options.prediction, controlled and options.pooling)
        outputs = [Output(output, target.build(model, options, folder), metadata, folder)]
        if target.needs and model.has(UNET_PREFIX):
            outputs += _base_beside(model, options, output, folder, with_base, overwrite)
        write_all(map(_lazily, outputs), dtype, overwrite, progress)
        for made in outputs:
            if not folder:
                model.notes += unsaid(made.path, made.metadata, model.report.family)
            model.notes.append(f"wrote {made.path}")
        return [*(base_model.notes if base_model else ()), *model.notes]


def _lazily(output: Output) -> Output:
    """The same, with entries as the writer takes them."""
    if not output.folder:
        return replace(output, content=LazyEntries(output.content))
    content = {name: LazyEntries(part) if is_weights_file(name) else part for name, part in output.content.items()}
    return replace(output, content=content)


def _base_beside(
    model: Model, options: Options, output: Path, folder: bool, with_base: bool, overwrite: bool
) -> list[Output]:
    """The base to be written beside an extracted ControlNet, if it is asked for or has changed."""
    path = output.with_name(f"{output.stem}_base{output.suffix}" if not folder else f"{output.name}_base")
    if not with_base:
        if options.base is None:
            model.notes.append(
                f"the base model in {model.path} is left out; if it was trained too (sd_locked=False), name the "
                "original with --base, or export it with --with-base"
            )
            return []
        changed = changed_entries(model, options.base)
        if not changed:
            model.notes.append(f"the UNet in {model.path} is that of {options.base.path}")
            return []
        model.notes.append(f"{len(changed)} entries of the UNet differ from {options.base.path}: exported to {path}")
    check_target(path, overwrite, folder)
    content = (_build_pipeline if folder else _build_base)(_without_control(model), options, folder)
    return [Output(path, content, described(model.metadata, options.prediction, False), folder)]


def changed_entries(model: Model, base: Model) -> list[str]:
    """Keys of the UNet whose values differ between two models, beyond what the narrower dtype of the two can tell."""
    ours, theirs = model.part(UNET_PREFIX), base.part(UNET_PREFIX)
    if ours.keys() != theirs.keys():
        raise CheckpointError(f"{base.path}: its UNet has other entries than that of {model.path}; it is not its base")
    return [key for key in ours if not _equal(ours[key], theirs[key])]


def _equal(a: LazyTensor, b: LazyTensor) -> bool:
    dtype = min(a.info.dtype, b.info.dtype, key=lambda dtype: dtype.itemsize)
    return a.info.shape == b.info.shape and torch.equal(a.read().to(dtype), b.read().to(dtype))


def _check_config(model: Model, config: str | Path) -> None:
    """Raise if a model of a known family is none of the configuration's."""
    if model.report.config is None:
        return
    expected = expected_entries(config)
    wrong = next((k for k, e in model.entries.items() if k in expected and e.info.shape != expected[k].shape), None)
    if wrong is not None:
        raise CheckpointError(
            f"{model.path}: does not fit {config}: {wrong!r} has shape {list(model.entries[wrong].info.shape)}, "
            f"expected {list(expected[wrong].shape)}"
        )
