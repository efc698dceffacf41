"""The one way out: a model's weights written in any layout, tensor by tensor. `TARGETS` is the table of what can be written."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from cldm.checkpoint.diffusers_config import component_config, model_index, tokenizer_files
from cldm.checkpoint.expected import check_fits, model_params
from cldm.checkpoint.names import (
    COMPONENTS,
    CONTROL_PREFIX,
    UNET_PREFIX,
    VAE_PREFIX,
    is_open_clip,
    part,
    to_diffusers,
    with_prefix,
)
from cldm.checkpoint.opening import ModelWeights, combined, open_model, take_parts
from cldm.checkpoint.recognising import DIFFERENCE, LAYOUTS, POOLING, PREDICTION_METADATA, SCALE_FACTOR, SCHEDULE_KEYS
from cldm.checkpoint.schedule import PREDICTIONS, completed, scheduler_config
from ldm.files import CheckpointError, LazyTensor, check_output, write_folder, write_weights
from ldm.files.errors import about
from ldm.files.locating import SUFFIXES
from ldm.files.tensors import Tensors, cast
from ldm.files.writing import TORCH_SUFFIXES, check_room

logger = logging.getLogger(__name__)

_UNET_FILE, _TEXT_FILE = "diffusion_pytorch_model.safetensors", "model.safetensors"
# Metadata that another file must not inherit: about the bytes of the file they were in, or said anew.
_OUTDATED = re.compile(
    rf"sshs_.*|modelspec\.hash.*|(model_)?hash|sha256|md5|format|{'|'.join((*PREDICTION_METADATA, POOLING, SCALE_FACTOR))}"
)
# What can be written, and what it is, for people.
TARGETS = {name: LAYOUTS[name] for name in ("full", "base", "control", "control-plain", DIFFERENCE)} | {
    "diffusers": "the ControlNet for ControlNetModel.from_pretrained; one file if OUTPUT ends in .safetensors or .bin",
    "diffusers-pipeline": "a pipeline folder of diffusers, ControlNet included",
}
_CONTROL_ALONE = ("control", "control-plain", "difference", "diffusers")  # these leave the base out


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
            Where `source` leaves its base out and that is another by now (`sd_locked=False`), it is written beside `output`.
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
    if with_base and to not in _CONTROL_ALONE:
        raise CheckpointError(f"--with-base is for layouts that leave the base out, which {to!r} does not")
    if prediction not in (None, *PREDICTIONS):
        raise CheckpointError(f"unknown prediction {prediction!r}; known are {', '.join(PREDICTIONS)}")
    folder = to == "diffusers-pipeline" or (to == "diffusers" and output.suffix.lower() not in SUFFIXES)
    if not output.name:
        raise CheckpointError("is the name of no file or folder to be written", str(output))
    beside = output.with_name(f"{output.name}_base" if folder else f"{output.stem}_base{output.suffix}")
    inputs = [path for path in (source, base) if path is not None]
    check_output(output, overwrite, () if folder else None, inputs)
    with ExitStack() as opened:
        base_model = opened.enter_context(open_model(base)) if base is not None else None
        model = opened.enter_context(open_model(source, base_model.tensors if base_model else None, ema))
        models = [model, base_model] if base_model else [model]
        if to in _CONTROL_ALONE and not model.has(CONTROL_PREFIX):
            advice = "add one with controlnet add-control"
            raise CheckpointError(f"holds no ControlNet, which {to!r} is made of; {advice}", model.path)
        if config is not None:
            check_fits(model.tensors, config, model.path)
        for each in models:
            each.note_gaps()
        pooling = pooling_of(model, config) if global_average_pooling is None else global_average_pooling
        known = config or next((each.report.config for each in models if each.report.config), None)
        job = _Conversion(model, base_model, known, pooling and model.has(CONTROL_PREFIX), prediction)
        job = replace(job, prediction=prediction or prediction_of(job.unet_source, config))
        with about(model.path):
            outputs = [(output, job, job.content(to, folder))]
        if to in _CONTROL_ALONE and model.has(UNET_PREFIX) and _base_is_wanted(model, base_model, with_base, beside):
            check_output(beside, overwrite, () if folder else None, inputs)
            job = job.without_control()
            outputs.append((beside, job, job.content("diffusers-pipeline" if folder else "base", folder)))
        options: dict[str, Any] = {"dtype": dtype, "overwrite": overwrite, "progress": progress}
        contents = [content for _, _, content in outputs]
        if folder:
            contents = [files[name] for files in contents for name in files if name.endswith(SUFFIXES)]
        check_room(output, [cast(tensors, dtype, SCHEDULE_KEYS) for tensors in contents])
        for path, job, content in outputs:
            try:
                pooling = job.pooling and to != "base"
                model.notes += write_model(path, content, model, job.prediction, pooling, folder, **options)
            except BaseException:
                if path == beside:
                    logger.warning("%s was written, and %s was not", output, beside)
                raise
            model.notes.append(f"wrote {path}")
        return [*(base_model.notes if base_model else ()), *model.notes]


@dataclass(frozen=True)
class _Conversion:
    """What is converted: the source, the model that its ControlNet belongs to (if it was named), the configuration (None for an
    unknown family), whether the ControlNet's outputs are averaged, and what the UNet predicts (where that was told)."""

    model: ModelWeights
    base: ModelWeights | None
    config: str | Path | None
    pooling: bool
    prediction: str | None

    @property
    def params(self) -> Mapping[str, Any]:
        """The parameters of the configuration."""
        if self.config is None:
            raise CheckpointError("of no known family; name its configuration with --config", self.model.path)
        return model_params(self.config)

    @property
    def unet_source(self) -> ModelWeights:
        """The model whose UNet the result has, and so its noise schedule and what it predicts."""
        return self.model if self.base is None or self.model.has(UNET_PREFIX) else self.base

    def without_control(self) -> _Conversion:
        """That of the base model in a full one; both write their notes into the same list."""
        base = {k: t for k, t in self.model.tensors.items() if not k.startswith(CONTROL_PREFIX) and k != "logvar"}
        return replace(self, model=replace(self.model, tensors=base), pooling=False)

    def content(self, to: str, folder: bool) -> dict[str, Any]:
        """The tensors of a file in one of the layouts, or the content of a folder's files by name."""
        model, control = self.model, self.model.part(CONTROL_PREFIX)
        match to:
            case "control":
                return with_prefix(control, CONTROL_PREFIX)
            case "control-plain":
                return control
            case "difference":
                unet = (self.base or model).part(UNET_PREFIX)
                if not unet:
                    raise CheckpointError("holds no base model to take the difference to; name one with --base")
                difference = with_prefix(combined(torch.sub, control, unet), CONTROL_PREFIX)
                return {**difference, DIFFERENCE: LazyTensor.of(torch.ones(1, device="cpu"))}
            case "diffusers":
                converted, _ = to_diffusers("controlnet", control)
                if not folder:
                    return converted
                config = component_config("controlnet", converted, self.params, pooling=self.pooling)
                return {"config.json": config, _UNET_FILE: converted}
            case "diffusers-pipeline":
                return self._pipeline()
            case "base":
                return self.without_control()._whole()
            case "full" if not control:
                advice = "controlnet add-control adds one"
                model.notes.append(f"{model.path} holds no ControlNet, so this is a base model; {advice}")
        return self._whole()

    def _whole(self) -> Tensors:
        """The model's tensors, with those that a checkpoint has and other layouts lack."""
        made, taken, lacking = take_parts(self.model.tensors, (self.model, self.base))
        if lacking:
            beside = f", nor has {self.base.path}" if self.base else ""
            raise CheckpointError(f"has no {lacking[0]}{beside}; name a base model that has one with --base")
        if taken and self.base:
            self.model.check_same_kind(self.base)
        made, notes = completed(made, self.unet_source, self.config)
        self.model.notes += taken + notes
        return made

    def _pipeline(self) -> dict[str, Any]:
        """The files of a pipeline folder."""
        tensors = self._whole()
        told = self.model.report.told
        params = {**self.params, **({SCALE_FACTOR: told[SCALE_FACTOR]} if SCALE_FACTOR in told else {})}
        prediction = self.prediction or params.get("parameterization", "eps")
        if self.prediction is None and self.unet_source.report.family == "sd2":
            assumed = f"{prediction} is assumed (--prediction v for 768 pixels)"
            self.model.notes.append(f"SD 2.x weights do not tell what they predict: {assumed}")
        parts = {name: network for name, prefix in COMPONENTS.items() if (network := part(tensors, prefix))}
        open_clip = is_open_clip(parts["text_encoder"])
        schedule = scheduler_config(params, self.unet_source, prediction)
        files = {"model_index.json": model_index(parts), "scheduler/scheduler_config.json": schedule}
        for name, network in parts.items():
            converted, unknown = to_diffusers(name, network)
            config = component_config(name, converted, params, prediction, self.pooling, open_clip)
            files[f"{name}/config.json"] = config
            files[f"{name}/{_TEXT_FILE if name == 'text_encoder' else _UNET_FILE}"] = converted
            if unknown:
                problem = f"{len(unknown)} entries of {name} have no counterpart: {', '.join(unknown[:3])}"
                self.model.notes.append(f"{self.model.path}: {problem}")
        return files | with_prefix(tokenizer_files(open_clip), "tokenizer/")


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
    ours, theirs = model.part(UNET_PREFIX), base.part(UNET_PREFIX)
    if ours.keys() != theirs.keys():
        raise CheckpointError(f"its UNet has other entries than that of {model.path}; it is not its base", base.path)
    changed = sum(not _same_values(ours[key], theirs[key]) for key in ours)
    note = f"{changed} entries of the UNet differ from {base.path}: exported to {path}"
    model.notes.append(note if changed else f"the UNet in {model.path} is that of {base.path}")
    return changed > 0


def _same_values(a: LazyTensor, b: LazyTensor) -> bool:
    """Whether two tensors are equal, beyond what the coarser dtype of the two can tell."""
    if not (a.dtype.is_floating_point and b.dtype.is_floating_point):
        return a.dtype == b.dtype and torch.equal(a.read(), b.read())
    if a.shape != b.shape:
        return False
    fine, coarse = sorted((a.dtype, b.dtype), key=lambda dtype: torch.finfo(dtype).eps)
    x, y = a.read().to(coarse), b.read().to(coarse)
    if torch.equal(x, y) or fine.itemsize > coarse.itemsize or fine == coarse:
        return torch.equal(x, y)
    # bfloat16 against float16: each has rounded the same number once, to its own digits or smallest step
    return torch.allclose(x.float(), y.float(), torch.finfo(coarse).eps, torch.finfo(fine).smallest_normal)


def prediction_of(source: ModelWeights, config: str | Path | None = None) -> str | None:
    """What a UNet predicts, as a named configuration says, else its own file or family."""
    named = model_params(config).get("parameterization") if config is not None else None
    return named or source.report.prediction


def pooling_of(source: ModelWeights, config: str | Path | None = None) -> bool:
    """Whether a file's ControlNet averages its outputs, as the file says, else a named configuration."""
    named = model_params(config).get(POOLING) if config is not None else None
    return source.report.told.get(POOLING, named) is True


def write_model(
    path: str | Path,
    content: dict[str, Any],
    source: ModelWeights,
    prediction: str | None,
    pooling: bool,
    folder: bool = False,
    **options: Any,
) -> list[str]:
    """Write a file or folder with what it tells of its model; `source` gives the metadata to carry along, and the family.

    Returns:
        what whoever loads it must know, a line each, above all where torch's format has no place for it.
    """
    averages = "the ControlNet averages its outputs"
    notes = [f"{averages}: set {POOLING}: true in the configuration that loads it"] if pooling else []
    if folder:
        write_folder(path, content, keep=SCHEDULE_KEYS, **options)
        return notes
    metadata = {key: text for key, text in source.metadata.items() if not _OUTDATED.fullmatch(key)}
    metadata |= {PREDICTION_METADATA[0]: prediction} if prediction else {}
    metadata |= {POOLING: "true"} if pooling else {}
    scale = source.report.told.get(SCALE_FACTOR)
    metadata |= {SCALE_FACTOR: f"{scale:g}"} if scale and any(key.startswith(VAE_PREFIX) for key in content) else {}
    write_weights(path, content, metadata, keep=SCHEDULE_KEYS, **options)
    unusual = prediction is not None and (prediction != "eps" or source.report.family == "sd2")
    lost = [f"that the model predicts {prediction}"] if unusual else []
    lost += [f"that {averages}"] if pooling else []
    if lost and Path(path).suffix.lower() in TORCH_SUFFIXES:
        notes.append(f"{path} cannot say {' and '.join(lost)}, as a .safetensors file does")
    return notes
