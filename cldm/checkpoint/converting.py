"""The one way out: a model's weights written in any layout, tensor by tensor. `TARGETS` is the table of what can be written."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from cldm.checkpoint import diffusers_config as theirs
from cldm.checkpoint.expected import expected_entries
from cldm.checkpoint.names import (
    CONTROL_PREFIX,
    NETWORKS,
    TEXT_PREFIX,
    UNET_PREFIX,
    VAE_PREFIX,
    is_open_clip,
    part,
    text_to_diffusers,
    with_prefix,
)
from cldm.checkpoint.opening import (
    ModelWeights,
    check_same_kind,
    combined,
    completed,
    model_params,
    note_gaps,
    open_model,
    schedule_params,
)
from cldm.checkpoint.recognising import DIFFERENCE, POOLING, PREDICTION_METADATA, SCHEDULE_KEYS
from cldm.checkpoint.schedule import PREDICTIONS, scheduler_config
from ldm.files import CheckpointError, LazyTensor, check_output, write_folder, write_weights
from ldm.files.errors import about
from ldm.files.locating import SUFFIXES
from ldm.files.tensors import Tensors
from ldm.files.writing import TORCH_SUFFIXES

_UNET_FILE = "diffusion_pytorch_model.safetensors"
_TEXT_FILE = "model.safetensors"
_STALE = re.compile(
    r"sshs_.*|modelspec\.hash.*|(model_)?hash|sha256|md5"
)  # metadata about the bytes of the file they were in


@dataclass(frozen=True)
class Options:
    """What the targets need to know beside the weights.

    Attributes:
        base: the model that the control belongs to, if it was named.
        config: name or path of the configuration; None if the family is unknown and none was named.
        pooling: whether the ControlNet's outputs are averaged over height and width.
        prediction: "eps", "v" or "x0", where it was told.
    """

    base: ModelWeights | None
    config: str | None
    pooling: bool
    prediction: str | None

    def params(self, model: ModelWeights) -> Mapping[str, Any]:
        """The parameters of the configuration."""
        if self.config is None:
            raise CheckpointError("of no known family; name its configuration with --config", model.path)
        return model_params(self.config)

    def unet_source(self, model: ModelWeights) -> ModelWeights:
        """The model whose UNet the result has, and so its noise schedule and what it predicts."""
        return self.base if self.base is not None and not model.has(UNET_PREFIX) else model


@dataclass(frozen=True)
class Target:
    """A layout that can be written.

    Attributes:
        help: what it is, for people.
        file: makes the tensors of a file; None if it is always a folder.
        folder: makes the content of a folder's files by name; None if it is always a file.
        control_alone: whether it is made of the ControlNet, and leaves the base out.
    """

    help: str
    file: Callable[[ModelWeights, Options], Tensors] | None = None
    folder: Callable[[ModelWeights, Options], dict[str, Any]] | None = None
    control_alone: bool = False


def _build_full(model: ModelWeights, options: Options) -> Tensors:
    if not model.has(CONTROL_PREFIX):
        model.notes.append(f"{model.path} holds no ControlNet, so this is a base model; tool_add_control.py adds one")
    return _whole(model, options)


def _build_base(model: ModelWeights, options: Options) -> Tensors:
    return _whole(_without_control(model), options)


def _without_control(model: ModelWeights) -> ModelWeights:
    """The base model in a full one; both write their notes into the same list."""
    base = {key: t for key, t in model.tensors.items() if not key.startswith(CONTROL_PREFIX) and key != "logvar"}
    return replace(model, tensors=base)


def _whole(model: ModelWeights, options: Options) -> Tensors:
    """The model's tensors, with those that a checkpoint has and other layouts lack."""
    made = dict(model.tensors)
    for name, prefix in (("UNet", UNET_PREFIX), ("VAE", VAE_PREFIX), ("text encoder", TEXT_PREFIX)):
        if model.has(prefix):
            continue
        if options.base is None or not options.base.has(prefix):
            beside = f", nor has {options.base.path}" if options.base else ""
            raise CheckpointError(f"has no {name}{beside}; name a base model that has one with --base")
        check_same_kind(model, options.base)
        made |= with_prefix(options.base.part(prefix), prefix)
        model.notes.append(f"the {name} is that of {options.base.path}")
    return completed(model, made, options.unet_source(model), options.config)


def _build_control(model: ModelWeights, _: Options) -> Tensors:
    return with_prefix(model.part(CONTROL_PREFIX), CONTROL_PREFIX)


def _build_plain(model: ModelWeights, _: Options) -> Tensors:
    return model.part(CONTROL_PREFIX)


def _build_difference(model: ModelWeights, options: Options) -> Tensors:
    unet = (options.base or model).part(UNET_PREFIX)
    if not unet:
        raise CheckpointError("holds no base model to take the difference to; name one with --base", model.path)
    difference = with_prefix(combined(torch.sub, model.part(CONTROL_PREFIX), unet), CONTROL_PREFIX)
    return {**difference, DIFFERENCE: LazyTensor.of(torch.ones(1))}


def _build_controlnet(model: ModelWeights, options: Options) -> dict[str, Any]:
    control = model.part(CONTROL_PREFIX)
    config = theirs.controlnet_config(control, options.params(model), options.pooling)
    return {"config.json": config, _UNET_FILE: NETWORKS["controlnet"].to_diffusers(control)[0]}


def _build_controlnet_file(model: ModelWeights, _: Options) -> Tensors:
    return NETWORKS["controlnet"].to_diffusers(model.part(CONTROL_PREFIX))[0]


def _build_pipeline(model: ModelWeights, options: Options) -> dict[str, Any]:
    params, source = options.params(model), options.unet_source(model)
    tensors = _whole(model, options)
    prediction = options.prediction or params.get("parameterization", "eps")
    if options.prediction is None and source.report.family == "sd2":
        model.notes.append(
            f"SD 2.x weights do not tell what they predict: {prediction} is assumed (--prediction v for 768 pixels)"
        )
    parts = {name: part(tensors, network.prefix) for name, network in NETWORKS.items()}
    parts = {name: network for name, network in parts.items() if network}
    configs = {
        "unet": theirs.unet_config(parts["unet"], params, prediction),
        "vae": theirs.vae_config(parts["vae"], params),
    }
    if "controlnet" in parts:
        configs["controlnet"] = theirs.controlnet_config(parts["controlnet"], params, options.pooling)
    files: dict[str, Any] = {"model_index.json": theirs.model_index(parts)}
    for name, network in parts.items():
        converted, unknown = NETWORKS[name].to_diffusers(network)
        _note_unknown(model, name, unknown)
        files |= {f"{name}/config.json": configs[name], f"{name}/{_UNET_FILE}": converted}
    text = part(tensors, TEXT_PREFIX)
    converted, unknown = text_to_diffusers(text)
    _note_unknown(model, "text_encoder", unknown)
    files |= {
        "text_encoder/config.json": theirs.text_config(text, converted, params),
        f"text_encoder/{_TEXT_FILE}": converted,
    }
    files["scheduler/scheduler_config.json"] = scheduler_config(schedule_params(params, source), prediction)
    return files | with_prefix(theirs.tokenizer_files(is_open_clip(text)), "tokenizer/")


def _note_unknown(model: ModelWeights, component: str, unknown: list[str]) -> None:
    if unknown:
        names = ", ".join(unknown[:3])
        model.notes.append(f"{model.path}: {len(unknown)} entries of {component} have no counterpart: {names}")


TARGETS = {
    "full": Target("one file with base and ControlNet, for training and the scripts here", _build_full),
    "base": Target("one file with the base model alone", _build_base),
    "control": Target("the ControlNet alone, keys with the prefix control_model.", _build_control, control_alone=True),
    "control-plain": Target(
        "the ControlNet alone, keys without a prefix, for web UIs", _build_plain, control_alone=True
    ),
    "difference": Target(
        "the ControlNet less its base's encoder (rounded, not exact)", _build_difference, control_alone=True
    ),
    "diffusers": Target(
        "the ControlNet for ControlNetModel.from_pretrained; one file if OUTPUT ends in .safetensors or .bin",
        _build_controlnet_file,
        _build_controlnet,
        control_alone=True,
    ),
    "diffusers-pipeline": Target("a pipeline folder of diffusers, ControlNet included", folder=_build_pipeline),
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
        ema: give the weights their EMA values.
        dtype: of floating-point tensors; as they are by default.
        global_average_pooling: of the ControlNet; read from the source or the configuration by default.
        prediction: "eps", "v" or "x0"; by default as a named configuration, the file that the UNet comes from, or its
            family's configuration says.
        overwrite: replace existing files; never `source` or `base`.
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
    if with_base and not target.control_alone:
        raise CheckpointError(f"--with-base is for layouts that leave the base out, which {to!r} does not")
    if prediction not in (None, *PREDICTIONS):
        raise CheckpointError(f"unknown prediction {prediction!r}; known are {', '.join(PREDICTIONS)}")
    folder = target.file is None or (target.folder is not None and output.suffix.lower() not in SUFFIXES)
    build, build_base = (target.folder, _build_pipeline) if folder else (target.file, _build_base)
    inputs = [path for path in (source, base) if path is not None]
    check_output(output, overwrite, () if folder else None, inputs)
    with ExitStack() as opened:
        base_model = opened.enter_context(open_model(base)) if base is not None else None
        model = opened.enter_context(open_model(source, base_model.tensors if base_model else None, ema))
        if target.control_alone and not model.has(CONTROL_PREFIX):
            raise CheckpointError(
                f"holds no ControlNet, which {to!r} is made of; add one with tool_add_control.py", model.path
            )
        models = [each for each in (model, base_model) if each is not None]
        if config is not None:
            _check_config(model, config)
        known = str(config) if config is not None else next(filter(None, (m.report.config for m in models)), None)
        pooling = pooling_of(model, config) if global_average_pooling is None else global_average_pooling
        options = Options(base_model, known, pooling, prediction)
        options = replace(options, prediction=prediction or prediction_of(options.unet_source(model), config))
        for each in models:
            note_gaps(each)
        pooling = pooling and to != "base" and model.has(CONTROL_PREFIX)
        with about(model.path):
            outputs = [(output, build(model, options), pooling)]
        if target.control_alone and model.has(UNET_PREFIX):
            beside = output.with_name(f"{output.name}_base" if folder else f"{output.stem}_base{output.suffix}")
            if _base_is_wanted(model, options.base, with_base, beside):
                check_output(beside, overwrite, () if folder else None, inputs)
                outputs.append((beside, build_base(_without_control(model), options), False))
        for path, content, pools in outputs:
            metadata = described(model.metadata, options.prediction, pools)
            if folder:
                write_folder(path, content, dtype, SCHEDULE_KEYS, overwrite, progress)
            else:
                write_weights(path, content, metadata, dtype, SCHEDULE_KEYS, overwrite, progress)
            model.notes += told_notes(None if folder else path, metadata, model.report.family)
            model.notes.append(f"wrote {path}")
        return [*(base_model.notes if base_model else ()), *model.notes]


def _base_is_wanted(model: ModelWeights, base: ModelWeights | None, with_base: bool, path: Path) -> bool:
    """Whether the base in a full model is to be written beside its ControlNet: asked for, or changed."""
    if with_base:
        return True
    if base is None:
        model.notes.append(
            f"the base model in {model.path} is left out; if it was trained too (sd_locked=False), name the "
            "original with --base, or export it with --with-base"
        )
        return False
    changed = _changed_keys(model, base)
    if changed:
        model.notes.append(f"{len(changed)} entries of the UNet differ from {base.path}: exported to {path}")
    else:
        model.notes.append(f"the UNet in {model.path} is that of {base.path}")
    return bool(changed)


def _changed_keys(model: ModelWeights, base: ModelWeights) -> list[str]:
    """Keys of the UNet whose values differ between two models, beyond what the coarser dtype of the two can tell."""
    ours, theirs = model.part(UNET_PREFIX), base.part(UNET_PREFIX)
    if ours.keys() != theirs.keys():
        raise CheckpointError(f"its UNet has other entries than that of {model.path}; it is not its base", base.path)
    return [key for key in ours if not _same_values(ours[key], theirs[key])]


def _same_values(a: LazyTensor, b: LazyTensor) -> bool:
    if a.shape != b.shape:
        return False
    coarse, fine = sorted((a.dtype, b.dtype), key=lambda t: torch.finfo(t).eps if t.is_floating_point else 0)[::-1]
    x, y = a.read().to(coarse), b.read().to(coarse)
    if torch.equal(x, y) or fine.itemsize > coarse.itemsize or fine == coarse:
        return torch.equal(x, y)
    # bfloat16 against float16: each has rounded the same number once, to its own digits or smallest step
    tolerance = {"rtol": torch.finfo(coarse).eps, "atol": torch.finfo(fine).smallest_normal}
    return torch.allclose(x.float(), y.float(), **tolerance)


def _check_config(model: ModelWeights, config: str | Path) -> None:
    """Raise if a model of a known family is none of the configuration's."""
    if model.report.config is None:
        return
    expected = expected_entries(config)
    for key, tensor in model.tensors.items():
        if key in expected and tensor.shape != expected[key].shape:
            raise CheckpointError(
                f"does not fit {config}: {key!r} has shape {list(tensor.shape)}, expected {list(expected[key].shape)}",
                model.path,
            )


# What a file tells of its model beside the weights: what the UNet predicts, and whether the ControlNet's outputs are averaged.


def prediction_of(source: ModelWeights, config: str | Path | None = None) -> str | None:
    """What a UNet predicts, as a named configuration says, else its own file or family."""
    named = model_params(config).get("parameterization") if config is not None else None
    return named or source.report.prediction


def pooling_of(source: ModelWeights, config: str | Path | None = None) -> bool:
    """Whether a file's ControlNet averages its outputs, as the file says, else a named configuration."""
    named = model_params(config).get(POOLING) if config is not None else None
    return source.report.told.get(POOLING, named) is True


def described(metadata: Mapping[str, str], prediction: str | None, pooling: bool) -> dict[str, str]:
    """A file's metadata for another file: what the UNet predicts and the ControlNet's averaging are said anew."""
    anew = (*PREDICTION_METADATA, POOLING, "format")
    kept = {key: text for key, text in metadata.items() if key not in anew and not _STALE.fullmatch(key)}
    says = {POOLING: "true" if pooling else None, PREDICTION_METADATA[0]: prediction}
    return kept | {key: text for key, text in says.items() if text}


def told_notes(path: str | Path | None, metadata: Mapping[str, str], family: str) -> list[str]:
    """Notes on what whoever loads a file must know, above all where torch's format has no place for it."""
    notes = [f"the ControlNet averages its outputs: set {POOLING}: true in the configuration that loads it"]
    notes = notes if POOLING in metadata else []
    if path is None or Path(path).suffix.lower() not in TORCH_SUFFIXES:
        return notes
    prediction = metadata.get(PREDICTION_METADATA[0])
    lost = ["that the ControlNet averages its outputs"] if notes else []
    if prediction is not None and (prediction != "eps" or family == "sd2"):
        lost.insert(0, f"that the model predicts {prediction}")
    return notes + ([f"{path} cannot say {' and '.join(lost)}, as a .safetensors file does"] if lost else [])
