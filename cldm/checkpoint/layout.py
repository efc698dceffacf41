"""Recognising what a weights file is: its layout, the family of models it belongs to, and what it lacks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from cldm.checkpoint.errors import CheckpointError
from cldm.checkpoint.expected import expected_entries
from cldm.checkpoint.lazy import Entries, LazyTensor
from cldm.checkpoint.names import (
    CONTROL_PREFIX,
    NETWORKS,
    TEXT_PREFIX,
    UNET_PREFIX,
    VAE_PREFIX,
    text_key,
    text_to_diffusers,
)
from cldm.checkpoint.reading import COMPONENTS, Checkpoint, TensorInfo, open_checkpoint

EMA_PREFIX = "model_ema."
CONTROL_LAYERS = ("input_hint_block.", "zero_convs.", "middle_block_out.")  # of a ControlNet, which no UNet has
DIFFERENCE = "difference"
SCHEDULE_KEYS = frozenset(
    ("betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod")
    + ("log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod")
    + ("posterior_variance", "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2", "logvar")
)
PREDICTION_METADATA = ("modelspec.prediction_type", "modelspec.predict_key", "ss_v_parameterization")
CONFIGS = {"sd1": "cldm_v15", "sd2": "cldm_v21", "tiny": "cldm_tiny"}
PARTS = ("unet", "control", "vae", "text", "ema", "schedule", "other")

_PART_PREFIXES = {
    UNET_PREFIX: "unet",
    CONTROL_PREFIX: "control",
    VAE_PREFIX: "vae",
    TEXT_PREFIX: "text",
    EMA_PREFIX: "ema",
    **dict(zip((f"{name}/" for name in COMPONENTS), ("unet", "vae", "text", "control"), strict=True)),
}
_FAMILIES = {(320, 768): "sd1", (320, 1024): "sd2"}  # by width of the first convolution and of the text
_OPTIONAL_ENDINGS = ("position_ids", "logit_scale", "attn_mask", "text_projection", "text_projection.weight")
_TEXT_FOLDER = "text_encoder/"
_UNUSED_LAYER = "text_encoder/text_model.encoder.layers.23."  # SD 2.x reads the layer before; diffusers leaves it out
_V_FLAG = "v_pred"
_FLAGS = (DIFFERENCE, _V_FLAG, "ztsnr")  # entries that say something about the others
_OLD_VAE_NAME = ".proj_attn.weight"  # of diffusers before 0.16


@dataclass(frozen=True)
class Report:
    """What a weights file is.

    Attributes:
        path, format, wrapping, foreign: as of `Checkpoint`.
        layout: "full" (base and ControlNet), "base", "control" (keys begin with `control_model.`), "control-plain"
            (they do not), "difference" (a ControlNet less its base), "diffusers-controlnet", "diffusers-unet",
            "diffusers-pipeline", or "unknown".
        prefix: what stands before a ControlNet's keys: "control_model.", "controlnet/" or "".
        lightning: whether a Lightning trainer wrote it.
        family: "sd1", "sd2", "tiny" (the packaged small model) or "unknown", by the widths of network and text.
        config: the packaged configuration of the family, e.g. "cldm_v15"; None for an unknown family.
        prediction: "eps", "v" or "x0" where the file or the family tells; SD 2.x weights alone do not.
        ema: whether averaged weights are in it.
        parts: entries by part: unet, control, vae, text, ema, schedule, other.
        dtypes: entries by dtype.
        parameters, bytes: sums over all entries.
        missing: keys that the layout should have in this family; schedule buffers and `position_ids` are never missed.
        extra: keys that it should not have.
        mismatched: keys whose shape is another than the family's.
        suggestions: what can be done with it or about it, a line each.
    """

    path: Path
    format: str
    layout: str
    prefix: str
    lightning: bool
    family: str
    config: str | None
    prediction: str | None
    ema: bool
    parts: dict[str, int]
    dtypes: dict[str, int]
    parameters: int
    bytes: int
    wrapping: tuple[str, ...] = ()
    foreign: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    mismatched: tuple[str, ...] = ()
    suggestions: tuple[str, ...] = ()

    def gaps(self, *parts: str) -> tuple[str, ...]:
        """Keys that are missing or of another shape: of these parts, or of all parts of which the file has something."""
        keys = (*self.missing, *self.mismatched)
        return tuple(key for key in keys if part_of(key, self.layout) in (parts or self.parts))

    def as_dict(self) -> dict[str, Any]:
        """The report in plain types, for JSON."""
        return {**asdict(self), "path": str(self.path)}


def identify(source: Checkpoint | str | Path) -> Report:
    """Recognise an open checkpoint, or the file or folder at a path, by its keys and shapes; no tensor is read.

    Raises:
        CheckpointError: the file cannot be read.
    """
    if not isinstance(source, Checkpoint):
        with open_checkpoint(source) as checkpoint:
            return identify(checkpoint)
    infos = {key: source.info(key) for key in source}
    layout = layout_of(source)
    family = _family(infos)
    prefix = next((p for p in (CONTROL_PREFIX, "controlnet/") if any(key.startswith(p) for key in infos)), "")
    parts = Counter(part_of(key, layout) for key in infos)
    config = CONFIGS.get(family)
    missing, extra, mismatched = _compare(infos, layout, prefix, config)
    report = Report(
        path=source.path,
        format=source.format,
        layout=layout,
        prefix=prefix,
        lightning="pytorch-lightning_version" in source.extras,
        family=family,
        config=config,
        prediction=_prediction(source, family),
        ema=parts["ema"] > 0,
        parts={part: parts[part] for part in PARTS if parts[part]},
        dtypes=dict(Counter(str(info.dtype).removeprefix("torch.") for info in infos.values()).most_common()),
        parameters=sum(info.numel for info in infos.values()),
        bytes=sum(info.nbytes for info in infos.values()),
        wrapping=source.wrapping,
        foreign=source.foreign,
        missing=missing,
        extra=extra,
        mismatched=mismatched,
    )
    return replace(report, suggestions=tuple(_suggestions(source, infos, report)))


def part_of(key: str, layout: str = "full") -> str:
    """Which part of a model an entry belongs to, one of `PARTS`."""
    if layout in ("control-plain", "diffusers-controlnet"):
        return "control"
    if layout == "diffusers-unet":
        return "unet"
    if key in SCHEDULE_KEYS:
        return "schedule"
    if layout == DIFFERENCE and key != DIFFERENCE:
        return "control"
    return next((part for prefix, part in _PART_PREFIXES.items() if key.startswith(prefix)), "other")


def layout_of(source: Checkpoint) -> str:
    """The layout of an open checkpoint, as `Report.layout` has it, by its keys alone."""

    def has(prefix: str) -> bool:
        return any(key.startswith(prefix) for key in source)

    control, base = has(CONTROL_PREFIX), has(UNET_PREFIX)
    if source.format == "folder" and any(has(f"{name}/") for name in COMPONENTS):
        return "diffusers-pipeline"
    if (DIFFERENCE in source or DIFFERENCE in source.extras) and (control or "input_hint_block.0.weight" in source):
        return DIFFERENCE
    if base:
        return "full" if control else "base"
    if control:
        return "control"
    if "input_hint_block.0.weight" in source:
        return "control-plain"
    if "controlnet_cond_embedding.conv_in.weight" in source:
        return "diffusers-controlnet"
    if "conv_in.weight" in source and "time_embedding.linear_1.weight" in source and has("up_blocks."):
        return "diffusers-unet"
    return "unknown"


def _family(infos: Mapping[str, TensorInfo]) -> str:
    """From the width of the first convolution and that of the text which cross-attention takes."""
    widths = _widths(infos)
    if widths is None or widths in _FAMILIES or widths[1] > min(width for _, width in _FAMILIES):
        return _FAMILIES.get(widths, "unknown")
    return "tiny" if widths == _widths(expected_entries(CONFIGS["tiny"])) else "unknown"


def _widths(infos: Mapping[str, TensorInfo]) -> tuple[int, int] | None:
    for prefix in (UNET_PREFIX, CONTROL_PREFIX, "unet/", "controlnet/", ""):
        first = infos.get(f"{prefix}input_blocks.0.0.weight", infos.get(f"{prefix}conv_in.weight"))
        context = next(
            (info for key, info in infos.items() if key.startswith(prefix) and key.endswith("attn2.to_k.weight")), None
        )
        if first is not None and context is not None and len(first.shape) == 4 and len(context.shape) == 2:
            return first.shape[0], context.shape[1]
    return None


def _prediction(source: Checkpoint, family: str) -> str | None:
    """What the network predicts, from what the file says; of SD 1.x it is known."""
    told = {
        "epsilon": "eps",
        "eps": "eps",
        "v": "v",
        "v_prediction": "v",
        "x0": "x0",
        "sample": "x0",
        **{"true": "v", "false": "eps"},  # of `ss_v_parameterization`
    }
    candidates = [
        source.configs.get("scheduler", {}).get("prediction_type"),
        *(source.metadata.get(name) for name in PREDICTION_METADATA),
        "v" if _V_FLAG in source else None,
    ]
    for candidate in candidates:
        if isinstance(candidate, str) and candidate.lower() in told:
            return told[candidate.lower()]
    return "eps" if family == "sd1" else None


def _compare(
    infos: Mapping[str, TensorInfo], layout: str, prefix: str, config: str | None
) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Missing, extra and differently shaped keys against the family's own model."""
    if config is None or layout == "unknown":
        return (), (), ()
    if any(key.startswith("vae/") and key.endswith(_OLD_VAE_NAME) for key in infos):
        infos = _with_modern_vae(infos)
    infos = {_with_text_module(key): info for key, info in infos.items()}
    expected = _expected(infos, layout, prefix, config)
    missing = tuple(key for key in expected if key not in infos and not _is_optional(key))
    extra = tuple(key for key in infos if key not in expected and not _is_optional(key) and key not in _FLAGS)
    extra = tuple(key for key in extra if not key.startswith(EMA_PREFIX))
    mismatched = tuple(key for key in expected if key in infos and infos[key].shape != expected[key].shape)
    return missing, extra, mismatched


def _is_optional(key: str) -> bool:
    return key in SCHEDULE_KEYS or key.endswith(_OPTIONAL_ENDINGS) or key.startswith(_UNUSED_LAYER)


def _expected(infos: Mapping[str, TensorInfo], layout: str, prefix: str, config: str) -> dict[str, TensorInfo]:
    """The entries that a file of this layout holds when it is complete."""
    own = expected_entries(config)
    control = {key.removeprefix(CONTROL_PREFIX): info for key, info in own.items() if key.startswith(CONTROL_PREFIX)}
    if layout == "full":
        return own
    if layout == "base":
        return {key: info for key, info in own.items() if not key.startswith(CONTROL_PREFIX)}
    if layout in ("control", "control-plain", DIFFERENCE):
        return {prefix + key: info for key, info in control.items()}
    if layout == "diffusers-pipeline":
        controlled = any(key.startswith("controlnet/") for key in infos)
        present = [name for name in COMPONENTS if name != "controlnet" or controlled]
        return {f"{name}/{key}": info for name in present for key, info in _in_diffusers(own, name).items()}
    return _in_diffusers(own, "controlnet" if layout == "diffusers-controlnet" else "unet")


def _in_diffusers(own: Mapping[str, TensorInfo], component: str) -> dict[str, TensorInfo]:
    """What a component of a pipeline holds, given what the whole model holds here."""
    if component in NETWORKS:
        prefix, rename = NETWORKS[component].prefix, NETWORKS[component].to_diffusers
    else:
        prefix, rename = TEXT_PREFIX, text_to_diffusers
    converted, _ = rename(_described({k.removeprefix(prefix): v for k, v in own.items() if k.startswith(prefix)}))
    return {key: entry.info for key, entry in converted.items()}


def _with_modern_vae(infos: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The entries of a pipeline, its VAE under the names of today's diffusers; as they are where that fails."""
    old = {key.removeprefix("vae/"): info for key, info in infos.items() if key.startswith("vae/")}
    try:
        ours, unknown = NETWORKS["vae"].from_diffusers(_described(old))
        modern, _ = NETWORKS["vae"].to_diffusers(ours)
    except CheckpointError:
        return dict(infos)
    renamed = {f"vae/{key}": entry.info for key, entry in modern.items()} | {f"vae/{key}": old[key] for key in unknown}
    return {key: info for key, info in infos.items() if not key.startswith("vae/")} | renamed


def _with_text_module(key: str) -> str:
    """A pipeline's key, of a text encoder as every version of transformers names it."""
    return _TEXT_FOLDER + text_key(key.removeprefix(_TEXT_FOLDER)) if key.startswith(_TEXT_FOLDER) else key


def _described(infos: Mapping[str, TensorInfo]) -> Entries:
    """Entries to rename, which are never read."""
    return {key: LazyTensor(info, lambda: torch.empty(0, device="meta")) for key, info in infos.items()}


_UNSUPPORTED: tuple[tuple[Callable[[str], bool], str], ...] = (
    (lambda key: "lora_" in key or ".lora_A." in key, "a LoRA: a patch for a model, not a model"),
    (lambda key: key.startswith("conditioner.embedders.") or "add_embedding." in key, "Stable Diffusion XL"),
    (lambda key: key.removeprefix(UNET_PREFIX).startswith(("joint_blocks.", "double_blocks.")), "a transformer"),
    (lambda key: key in ("emb_params", "string_to_param"), "a textual-inversion embedding"),
    (lambda key: key.startswith(("adapter.", "body.0.")), "a T2I-Adapter"),
    (lambda key: key.startswith("output_blocks."), f"a bare UNet without the prefix {UNET_PREFIX!r}"),
    (lambda key: key.startswith("decoder.up"), "a bare VAE"),
    (lambda key: text_key(key).startswith(("text_model.", "transformer.resblocks.")), "a bare text encoder"),
)


def _suggestions(source: Checkpoint, infos: Mapping[str, TensorInfo], report: Report) -> list[str]:
    """What to do with the file, a line each."""
    name, layout = source.path, report.layout
    load_control = f"load it onto a base: cldm.model.load_control(model, {str(name)!r})"
    by_layout = {
        "full": f"load it whole: model.load_state_dict(load_state_dict({str(name)!r}))",
        "base": f"start training from it: python tool_add_control.py {name} OUTPUT",
        "control": load_control,
        "control-plain": load_control,
        DIFFERENCE: f"{load_control}, with the base that it was subtracted from",
        "diffusers-controlnet": f"{load_control}, or: python tool_convert_control.py {name} OUTPUT --to control",
        "diffusers-pipeline": f"convert it to one file: python tool_convert_control.py {name} OUTPUT --to full",
        "diffusers-unet": "only its UNet is here; name the folder of the whole pipeline",
    }
    # What has another shape than its family's cannot be loaded into a model of that family.
    lines = [by_layout[layout]] if layout in by_layout and not report.mismatched else []
    unsupported = next((what for test, what in _UNSUPPORTED if any(map(test, infos))), None)
    if layout == "unknown":
        lines.append(f"this is {unsupported}" if unsupported else "none of its keys belong to a model known here")
    elif report.family == "unknown":
        lines.append(f"its base is {unsupported or 'of an unknown kind'}: no packaged configuration fits")
    if (channels := _input_channels(infos)) not in (None, 4):
        lines.append(f"its UNet takes {channels} channels, as inpainting and depth models do; set in_channels")
    if layout in ("full", "base"):
        for part, prefix in (("VAE", VAE_PREFIX), ("text encoder", TEXT_PREFIX)):
            if not any(key.startswith(prefix) for key in infos):
                lines.append(f"it has no {part}; take it from another checkpoint of its family")
    lines += gap_lines(report.missing, report.mismatched)
    if source.foreign:
        lines.append("its pickle refers to code, which was not executed: " + ", ".join(source.foreign[:5]))
    return lines


def gap_lines(missing: Sequence[str], mismatched: Sequence[str]) -> list[str]:
    """What a file lacks or has in another shape than its family, a line each."""
    lines = []
    if missing:
        lines.append(f"incomplete: {len(missing)} entries are missing, first {missing[0]!r}")
    if mismatched:
        lines.append(f"unfit: {len(mismatched)} entries have another shape than its family's, first {mismatched[0]!r}")
    return lines


def _input_channels(infos: Mapping[str, TensorInfo]) -> int | None:
    names = (f"{UNET_PREFIX}input_blocks.0.0.weight", "unet/conv_in.weight")
    info = next((infos[name] for name in names if name in infos), None)
    return info.shape[1] if info is not None and len(info.shape) == 4 else None
