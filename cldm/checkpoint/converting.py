"""From any layout to any other: every file is brought under this library's names first, and written from there.

`_READERS` and `TARGETS` are the tables of what can be read and written; a further layout is a further row. Entries stay
lazy throughout, so neither the file nor the model is ever in memory whole.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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
    CONTROL_LAYERS,
    CONTROL_PREFIX,
    DIFFERENCE,
    EMA_PREFIX,
    PREDICTION_METADATA,
    SCHEDULE_KEYS,
    TEXT_PREFIX,
    UNET_PREFIX,
    VAE_PREFIX,
    Report,
    gap_lines,
    identify,
    layout_of,
)
from cldm.checkpoint.lazy import Entries, LazyEntries, LazyTensor, computed, constant, lazy_entries, zeros
from cldm.checkpoint.names import (
    NETWORKS,
    is_open_clip,
    text_from_diffusers,
    text_to_diffusers,
)
from cldm.checkpoint.reading import Checkpoint, open_checkpoint
from cldm.checkpoint.schedule import PREDICTIONS, schedule_entries, scheduler_config, with_scheduler, with_stored
from cldm.checkpoint.writing import TORCH_SUFFIXES, Output, check_target, is_weights_file, write_all
from cldm.config import load_config, model_section
from ldm.util import ConfigError

logger = logging.getLogger(__name__)

POOLING = "global_average_pooling"  # also its name in a file's metadata
POOLING_NOTE = f"the ControlNet averages its outputs: set {POOLING}: true in the configuration that loads it"
_EMA_UNET = EMA_PREFIX + "diffusion_model"
_BASE_PARTS = {"UNet": UNET_PREFIX, "VAE": VAE_PREFIX, "text encoder": TEXT_PREFIX}
_UNET_FILE = "diffusion_pytorch_model.safetensors"
_TEXT_FILE = "model.safetensors"


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
        if layout in ("full", "base", "control") or layout not in _READERS:
            yield LazyEntries(lazy_entries(checkpoint), path), checkpoint
            return
        model = opened.enter_context(open_model(path))
        config = model.report.config
        if layout == "diffusers-pipeline" and config is not None:
            model.entries = {**_unconverted(model, model.entries, model, config), **model.entries}
        for note in model.notes:
            logger.info("%s", note)
        yield model.state_dict(), checkpoint


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
            _note_unknown(model, component, unknown)
    text = below(entries, "text_encoder/")
    if text:
        activation = checkpoint.configs.get("text_encoder", {}).get("hidden_act")
        open_clip = activation == "gelu" if activation else model.report.family == "sd2"
        converted, unknown = text_from_diffusers(text, open_clip)
        made |= under(converted, TEXT_PREFIX)
        _note_unknown(model, "text_encoder", unknown)
    return made


def _note_unknown(model: Model, component: str, unknown: list[str]) -> None:
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


# What a checkpoint needs and no other layout keeps: the noise schedule, and weights that are never used.


def model_params(config: str | Path) -> Mapping[str, Any]:
    """The parameters of the model that a configuration names.

    Raises:
        ConfigError: there is no such configuration, or it is none of a model.
    """
    params = model_section(load_config(config), config).get("params") or {}
    if not isinstance(params, Mapping):
        raise ConfigError(f"{config}: `params` of its model must be a mapping")
    return params


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
    return {**_unconverted(model, made, source, options.config), **made}


def _unconverted(model: Model, made: Entries, source: Model, config: str) -> Entries:
    """The entries of a checkpoint that other layouts do not keep: its noise schedule, and zeros for unused weights."""
    schedule = told_schedule_entries(model_params(config), source)
    if not model.has(CONTROL_PREFIX):
        schedule.pop("logvar", None)  # as published base models
    unused = unused_text_entries(below(made, TEXT_PREFIX), config)
    if unused:
        model.notes.append(f"{len(unused)} entries of the text encoder that the model does not use are zeros")
    return {**schedule, **under(unused, TEXT_PREFIX)}


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
        _note_unknown(model, name, unknown)
        files |= {f"{name}/config.json": config, f"{name}/{_UNET_FILE}": converted}
    converted, unknown = text_to_diffusers(text)
    _note_unknown(model, "text_encoder", unknown)
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


def note_gaps(model: Model, *parts: str) -> None:
    """Note what a model lacks, or has in another shape than its family, in these parts or in all that it has."""
    gaps = set(model.report.gaps(*parts))
    missing, mismatched = ([k for k in keys if k in gaps] for keys in (model.report.missing, model.report.mismatched))
    model.notes += [f"{model.path}: {line}" for line in gap_lines(missing, mismatched)]


# What a file says of its model beside the weights: what the UNet predicts, and whether the ControlNet averages.


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
