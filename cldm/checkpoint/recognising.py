"""Recognising what a weights file is: its layout, the family of models it belongs to, what it tells, and what it lacks."""

from __future__ import annotations

import math
import shlex
from collections import Counter
from collections.abc import Callable, Container, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cldm.checkpoint.expected import expected_entries
from cldm.checkpoint.names import BASE_PARTS, COMPONENTS, CONTROL_PREFIX, TEXT_PREFIX, UNET_PREFIX, VAE_PREFIX, text_key
from ldm.files import WeightsFile
from ldm.files.tensors import Tensors

EMA_PREFIX = "model_ema."
DIFFERENCE = "difference"
LAYOUTS = {
    "full": "base model and ControlNet in one file",
    "base": "base model without a ControlNet",
    "control": "ControlNet alone, keys with the prefix control_model.",
    "control-plain": "ControlNet alone, keys without a prefix, as web UIs take it",
    DIFFERENCE: "ControlNet as the difference to its base (rounded, not exact)",
    "diffusers-controlnet": "ControlNet of diffusers",
    "diffusers-unet": "UNet of diffusers",
    "diffusers-pipeline": "pipeline folder of diffusers",
    "unknown": "unknown",
}
CONTROL_LAYOUTS = ("control", "control-plain", DIFFERENCE, "diffusers-controlnet")
SCHEDULE_KEYS = frozenset(
    ("betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod")
    + ("log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod")
    + ("posterior_variance", "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2", "logvar")
)
PREDICTION_METADATA = ("modelspec.prediction_type", "modelspec.predict_key", "ss_v_parameterization")
POOLING = "global_average_pooling"  # in metadata and in configurations
SCALE_FACTOR = "scale_factor"  # of the VAE's latents, in metadata and in configurations
CONFIGS = {"sd1": "cldm_v15", "sd2": "cldm_v21", "tiny": "cldm_tiny"}

_PREDICTIONS = {"epsilon": "eps", "eps": "eps", "v": "v", "v_prediction": "v", "x0": "x0", "sample": "x0"}
_PREDICTIONS |= {"true": "v", "false": "eps"}  # of `ss_v_parameterization`
_PREFIXES = {UNET_PREFIX: "unet", CONTROL_PREFIX: "control", VAE_PREFIX: "vae", TEXT_PREFIX: "text", EMA_PREFIX: "ema"}
PARTS = (*_PREFIXES.values(), "schedule", "other")
# By width of the first convolution and of the text which cross-attention takes.
_FAMILIES = {(320, 768): "sd1", (320, 1024): "sd2", (64, 40): "tiny"}
_OPTIONAL_ENDINGS = ("position_ids", "logit_scale", "attn_mask", "text_projection")
_UNUSED_LAYER = TEXT_PREFIX + "model.transformer.resblocks.23."  # of SD 2.x, which reads the layer before
_FLAGS = (DIFFERENCE, "v_pred", "ztsnr")  # entries that say something about the others


@dataclass(frozen=True)
class Report:
    """What a weights file is. Keys are those that its entries have in this library.

    Attributes:
        path, format, wrapping, foreign: as of `WeightsFile`.
        layout: "full", "base", "control", "control-plain", "difference", "diffusers-controlnet", "diffusers-unet",
            "diffusers-pipeline" or "unknown"; `LAYOUTS` says what they are.
        lightning: whether a Lightning trainer wrote it.
        family: "sd1", "sd2", "tiny" (the packaged small model) or "unknown", by the widths of network and text.
        config: the packaged configuration of the family, e.g. "cldm_v15", or None.
        told: what the file itself says: `prediction` ("eps", "v" or "x0"), `global_average_pooling`, `scale_factor`.
        prediction: the same where it is told or all of the family are alike; SD 2.x weights alone do not tell.
        ema: whether EMA weights are in it.
        parts, dtypes: entries by part (one of `PARTS`) and by dtype.
        parameters, bytes: sums over all entries.
        missing, extra, mismatched: keys that the layout should have in this family, that it should not have, and whose
            shape is another. Schedule buffers and `position_ids` are never missed.
        suggestions: what can be done with it or about it, a line each.
    """

    path: Path
    format: str
    layout: str
    lightning: bool
    family: str
    config: str | None
    told: dict[str, Any]
    prediction: str | None
    ema: bool
    parts: dict[str, int]
    dtypes: dict[str, int]
    parameters: int
    bytes: int
    wrapping: tuple[str, ...]
    foreign: tuple[str, ...]
    missing: tuple[str, ...]
    extra: tuple[str, ...]
    mismatched: tuple[str, ...]
    suggestions: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """The report in plain types, for JSON."""
        return {**asdict(self), "path": str(self.path)}


def make_report(file: WeightsFile, layout: str, tensors: Tensors, unknown: Sequence[str]) -> Report:
    """What a file is, given its tensors under this library's names, and the keys that have none."""
    family = _family(tensors)
    config, told = CONFIGS.get(family), _told(file)
    counts = Counter(map(part_of, tensors))
    missing, extra, mismatched = _compare(tensors, layout, counts, config)
    return Report(
        path=file.path,
        format=file.format,
        layout=layout,
        lightning="pytorch-lightning_version" in file.extras,
        family=family,
        config=config,
        told=told,
        prediction=told.get("prediction", "eps" if family == "sd1" else None),
        ema=counts["ema"] > 0,
        parts={name: counts[name] for name in PARTS if counts[name]},
        dtypes=dict(Counter(str(tensor.dtype).removeprefix("torch.") for tensor in file.values()).most_common()),
        parameters=sum(tensor.numel for tensor in file.values()),
        bytes=sum(tensor.nbytes for tensor in file.values()),
        wrapping=file.wrapping,
        foreign=file.foreign,
        missing=tuple(missing),
        extra=(*extra, *unknown),
        mismatched=tuple(mismatched),
        suggestions=tuple(_suggestions(file, layout, family, tensors, missing, mismatched)),
    )


def part_of(key: str) -> str:
    """Which part of a model an entry belongs to, one of `PARTS`."""
    if key in SCHEDULE_KEYS:
        return "schedule"
    return next((name for prefix, name in _PREFIXES.items() if key.startswith(prefix)), "other")


def layout_of(file: WeightsFile) -> str:
    """The layout of an open file, as `Report.layout` has it, by its keys alone."""

    def has(*prefixes: str) -> bool:
        return any(key.startswith(prefixes) for key in file)

    control, plain = has(CONTROL_PREFIX), "input_hint_block.0.weight" in file
    if file.format == "folder" and has(*(f"{name}/" for name in COMPONENTS)):
        return "diffusers-pipeline"
    if (DIFFERENCE in file or DIFFERENCE in file.extras) and (control or plain):
        return DIFFERENCE
    if has(UNET_PREFIX):
        return "full" if control else "base"
    if control or plain:
        return "control" if control else "control-plain"
    if "controlnet_cond_embedding.conv_in.weight" in file:
        return "diffusers-controlnet"
    if "conv_in.weight" in file and "time_embedding.linear_1.weight" in file and has("up_blocks."):
        return "diffusers-unet"
    return "unknown"


def _family(tensors: Tensors) -> str:
    for prefix in (UNET_PREFIX, CONTROL_PREFIX):
        first = tensors.get(f"{prefix}input_blocks.0.0.weight")
        keys = (key for key in tensors if key.startswith(prefix) and key.endswith("attn2.to_k.weight"))
        context = tensors.get(next(keys, ""))
        if first is not None and context is not None and len(first.shape) == 4 and len(context.shape) == 2:
            return _FAMILIES.get((first.shape[0], context.shape[1]), "unknown")
    return "unknown"


def _told(file: WeightsFile) -> dict[str, Any]:
    """What the file says of its model, in its metadata, its configurations or by a flag among its entries."""
    told: dict[str, Any] = {}
    says = [file.configs.get("scheduler", {}).get("prediction_type"), *map(file.metadata.get, PREDICTION_METADATA)]
    for text in (*says, "v" if "v_pred" in file else None):
        if isinstance(text, str) and text.lower() in _PREDICTIONS:
            told.setdefault("prediction", _PREDICTIONS[text.lower()])
    pooling = file.configs.get("controlnet", file.configs.get("", {})).get("global_pool_conditions")
    if pooling is None and POOLING in file.metadata:
        pooling = file.metadata[POOLING] == "true"
    if isinstance(pooling, bool):
        told[POOLING] = pooling
    scale: Any = file.configs.get("vae", {}).get("scaling_factor")
    if scale is None and any(key.startswith(VAE_PREFIX) for key in file):
        scale = file.metadata.get(SCALE_FACTOR)
    with suppress(TypeError, ValueError, OverflowError):  # there is none, or it is no number of ordinary size
        if 0 < float(scale) < math.inf:
            told[SCALE_FACTOR] = float(scale)
    return told


def _compare(
    tensors: Tensors, layout: str, counts: Counter[str], config: str | None
) -> tuple[list[str], list[str], list[str]]:
    """Missing, extra and differently shaped keys against the family's own model."""
    if config is None or layout == "unknown":
        return [], [], []
    wanted = {"control"} if counts["control"] else set()
    if layout not in CONTROL_LAYOUTS:
        wanted |= {"unet"} if layout == "diffusers-unet" else {"unet", "vae", "text"}
    expected = {key: tensor for key, tensor in expected_entries(config).items() if part_of(key) in wanted}
    optional = _UNUSED_LAYER if layout == "diffusers-pipeline" else ()

    def is_optional(key: str) -> bool:
        return key.endswith(_OPTIONAL_ENDINGS) or key.startswith(optional) or part_of(key) in ("schedule", "ema")

    missing = [key for key in expected if key not in tensors and not is_optional(key)]
    extra = [key for key in tensors if key not in expected and key not in _FLAGS and not is_optional(key)]
    mismatched = [key for key in expected if key in tensors and tensors[key].shape != expected[key].shape]
    return missing, extra, mismatched


_UNSUPPORTED: tuple[tuple[Callable[[str], bool], str], ...] = (
    (lambda key: "lora_" in key or ".lora_A." in key, "a LoRA: a patch for a model, not a model"),
    (lambda key: key.startswith("conditioner.embedders.") or "add_embedding." in key, "Stable Diffusion XL"),
    (lambda key: key.removeprefix(UNET_PREFIX).startswith(("joint_blocks.", "double_blocks.")), "a transformer"),
    (lambda key: key.startswith(("adapter.", "body.0.")), "a T2I-Adapter"),
    (lambda key: key.startswith("output_blocks."), f"a bare UNet without the prefix {UNET_PREFIX!r}"),
    (lambda key: key.startswith("decoder.up"), "a bare VAE"),
    (lambda key: text_key(key).startswith(("text_model.", "transformer.resblocks.")), "a bare text encoder"),
)


def _suggestions(
    file: WeightsFile, layout: str, family: str, tensors: Tensors, missing: Sequence[str], mismatched: Sequence[str]
) -> Iterable[str]:
    """What to do with the file, a line each."""
    path, quoted = str(file.path), shlex.quote(str(file.path))
    load_control = f"load it onto a base: cldm.model.load_control(model, {path!r})"
    by_layout = {
        "full": f"load it whole: model.load_state_dict(load_state_dict({path!r}))",
        "base": f"start training from it: controlnet add-control {quoted} OUTPUT",
        "control": load_control,
        "control-plain": load_control,
        DIFFERENCE: f"{load_control}, with the base that it was subtracted from",
        "diffusers-controlnet": f"{load_control}, or: controlnet convert {quoted} OUTPUT --to control",
        "diffusers-pipeline": f"convert it to one file: controlnet convert {quoted} OUTPUT --to full",
        "diffusers-unet": "only its UNet is here; name the folder of the whole pipeline",
    }
    if layout in by_layout and not mismatched:  # what has other shapes cannot be loaded into a model of its family
        yield by_layout[layout]
    unsupported = next((what for test, what in _UNSUPPORTED if any(map(test, file))), None)
    if layout == "unknown":
        yield f"this is {unsupported}" if unsupported else "none of its keys belong to a model known here"
    elif family == "unknown":
        yield f"its base is {unsupported or 'of an unknown kind'}: no packaged configuration fits"
    first = tensors.get(f"{UNET_PREFIX}input_blocks.0.0.weight")
    if first is not None and len(first.shape) == 4 and first.shape[1] != 4:
        yield f"its UNet takes {first.shape[1]} channels, as inpainting and depth models do; set in_channels"
    for name, prefix in BASE_PARTS.items():
        if layout in ("full", "base") and not any(key.startswith(prefix) for key in tensors):
            yield f"it has no {name}; take it from another checkpoint of its family"
    yield from gap_lines(missing, mismatched)
    if file.foreign:
        yield "its pickle refers to code, which was not executed: " + ", ".join(file.foreign[:5])


def gap_lines(missing: Iterable[str], mismatched: Iterable[str], parts: Container[str] = PARTS) -> Iterable[str]:
    """What a file lacks or has in another shape than its family, in some of the parts, a line each."""
    for problem, keys in (
        ("incomplete: {} entries are missing", missing),
        ("unfit: {} entries have another shape than its family's", mismatched),
    ):
        keys = [key for key in keys if part_of(key) in parts]
        if keys:
            yield f"{problem.format(len(keys))}, first {keys[0]!r}"
