"""The names of the same weights here and in diffusers: UNet, ControlNet, VAE and both text encoders.

A network's two naming schemes differ in how its blocks are counted (here flat, there by level) and in a few module
names. The count of blocks is read from the keys themselves, so any width and depth converts. Where a tensor differs too
(a 1x1 convolution that is a linear layer there, three projections stored as one), it is reshaped, split or joined;
nothing is computed, so that every conversion can be undone bit by bit.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from cldm.checkpoint.errors import CheckpointError
from cldm.checkpoint.lazy import Entries, LazyTensor
from cldm.checkpoint.reading import TensorInfo

CONTROL_PREFIX = "control_model."
UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
TEXT_PREFIX = "cond_stage_model."

Converted = tuple[Entries, list[str]]  # the entries under their new names, and the keys that have none


@dataclass(frozen=True)
class Network:
    """A part of a model that diffusers keeps in a folder of its own.

    Attributes:
        prefix: of its keys here.
        to_diffusers, from_diffusers: change entries (keys without any prefix) to the other names.
    """

    prefix: str
    to_diffusers: Callable[[Entries], Converted]
    from_diffusers: Callable[[Entries], Converted]


class NameMap:
    """A two-way table of module names; a key is renamed by the longest module name that it begins with."""

    def __init__(self, pairs: Iterable[tuple[str, str]]) -> None:
        pairs = list(pairs)
        self._there = dict(pairs)
        self._here = {there: here for here, there in pairs}
        self._longest = max((len(name) for pair in pairs for name in pair), default=0)

    def to_diffusers(self, key: str) -> str | None:
        """diffusers' name of a key; None if it has none."""
        return self._rename(key, self._there)

    def from_diffusers(self, key: str) -> str | None:
        """Our name of diffusers' key; None if there is none."""
        return self._rename(key, self._here)

    def _rename(self, key: str, table: dict[str, str]) -> str | None:
        end = len(key) if len(key) <= self._longest else key.rfind(".", 0, self._longest + 1)
        while end > 0:
            if key[:end] in table:
                return table[key[:end]] + key[end:]
            end = key.rfind(".", 0, end)
        return None


def _renamed(entries: Entries, rename: Callable[[str], str | None]) -> Converted:
    names = {key: rename(key) for key in entries}
    return (
        {name: entries[key] for key, name in names.items() if name is not None},
        [key for key, name in names.items() if name is None],
    )


# UNet and ControlNet

_RESNET = (
    ("in_layers.0", "norm1"),
    ("in_layers.2", "conv1"),
    ("emb_layers.1", "time_emb_proj"),
    ("out_layers.0", "norm2"),
    ("out_layers.3", "conv2"),
    ("skip_connection", "conv_shortcut"),
)
_UNET_ENDS = (
    ("time_embed.0", "time_embedding.linear_1"),
    ("time_embed.2", "time_embedding.linear_2"),
    ("input_blocks.0.0", "conv_in"),
    ("out.0", "conv_norm_out"),
    ("out.2", "conv_out"),
)
HINT_ENCODER = (
    ("input_hint_block.0", "controlnet_cond_embedding.conv_in"),
    *((f"input_hint_block.{2 * i + 2}", f"controlnet_cond_embedding.blocks.{i}") for i in range(6)),
    ("input_hint_block.14", "controlnet_cond_embedding.conv_out"),
)
_UNSUPPORTED_UNET = re.compile(r"^(label_emb|class_embedding|id_predictor|add_embedding)\.")


def unet_map(resnets: list[int]) -> NameMap:
    """Names of a UNet, and of a ControlNet, whose encoder has these numbers of residual blocks a level."""
    pairs = [*_UNET_ENDS, *HINT_ENCODER, ("middle_block_out.0", "controlnet_mid_block")]
    pairs += _resnet_pairs("middle_block.0", "mid_block.resnets.0")
    pairs += [("middle_block.1", "mid_block.attentions.0")]
    pairs += _resnet_pairs("middle_block.2", "mid_block.resnets.1")
    position, last = 1, len(resnets) - 1
    for level, count in enumerate(resnets):
        for i in range(count):
            pairs += _resnet_pairs(f"input_blocks.{position}.0", f"down_blocks.{level}.resnets.{i}")
            pairs.append((f"input_blocks.{position}.1", f"down_blocks.{level}.attentions.{i}"))
            position += 1
        if level != last:
            pairs.append((f"input_blocks.{position}.0.op", f"down_blocks.{level}.downsamplers.0.conv"))
            position += 1
    pairs += [(f"zero_convs.{i}.0", f"controlnet_down_blocks.{i}") for i in range(position)]
    position = 0
    for level, count in enumerate(reversed(resnets)):
        for i in range(count + 1):
            pairs += _resnet_pairs(f"output_blocks.{position}.0", f"up_blocks.{level}.resnets.{i}")
            pairs.append((f"output_blocks.{position}.1", f"up_blocks.{level}.attentions.{i}"))
            position += 1
    return NameMap(pairs)


def _resnet_pairs(here: str, there: str) -> list[tuple[str, str]]:
    return [(f"{here}.{a}", f"{there}.{b}") for a, b in _RESNET]


def unet_to_diffusers(entries: Entries) -> Converted:
    """diffusers' names of a UNet or a ControlNet.

    Raises:
        CheckpointError: it has a layer that diffusers' networks have not.
    """
    resnets = encoder_levels(entries)
    names = unet_map(resnets)
    upsamplers = _upsamplers(entries, resnets)

    def rename(key: str) -> str | None:
        module = key.rpartition(".conv.")[0]
        return upsamplers[module] + key.removeprefix(module) if module in upsamplers else names.to_diffusers(key)

    return _all_renamed(entries, rename, "diffusers")


def unet_from_diffusers(entries: Entries) -> Converted:
    """Our names of diffusers' UNet or ControlNet.

    Raises:
        CheckpointError: it has a layer that the networks here have not.
    """
    found = Counter(_levels(entries, r"down_blocks\.(\d+)\.resnets\.(\d+)\.conv1\.weight"))
    resnets = [found[level] for level in range(len(found))]
    names = unet_map(resnets)
    ends = [end - 1 for end in accumulate(count + 1 for count in reversed(resnets))]
    attended = set(_levels(entries, r"up_blocks\.(\d+)\.attentions\.0\.norm\.(weight)"))

    def rename(key: str) -> str | None:
        up = re.match(r"up_blocks\.(\d+)\.upsamplers\.0\.(conv\..+)", key)
        if up is None:
            return names.from_diffusers(key)
        level = int(up[1])
        if level >= len(ends):
            return None
        return f"output_blocks.{ends[level]}.{2 if level in attended else 1}.{up[2]}"

    return _all_renamed(entries, rename, "this library")


def encoder_levels(entries: Iterable[str]) -> list[int]:
    """How many residual blocks each level of an encoder has, told from the keys of its `input_blocks`."""
    kinds = {}
    for key in entries:
        match = re.match(r"input_blocks\.(\d+)\.0\.(op|in_layers)\.", key)
        if match:
            kinds[int(match[1])] = match[2]
    levels = [0]
    for position in sorted(kinds):
        if kinds[position] == "op":
            levels.append(0)
        else:
            levels[-1] += 1
    if len(kinds) < 2 or sorted(kinds) != list(range(1, len(kinds) + 1)) or 0 in levels:
        raise CheckpointError(
            "its UNet encoder is incomplete or of another kind; only convolutional downsampling converts"
        )
    return levels


def _upsamplers(entries: Iterable[str], resnets: list[int]) -> dict[str, str]:
    """Our upsampling modules, which follow a level's last block, with diffusers' names."""
    ends, position = {}, -1
    for level, count in enumerate(reversed(resnets)):
        position += count + 1
        ends[position] = level
    found = {}
    for key in entries:
        match = re.match(r"output_blocks\.(\d+)\.[12](?=\.conv\.)", key)
        if match and int(match[1]) in ends:
            found[match[0]] = f"up_blocks.{ends[int(match[1])]}.upsamplers.0"
    return found


def _levels(keys: Iterable[str], pattern: str) -> list[int]:
    """The level (first group) of every key that matches."""
    return [int(match[1]) for match in (re.match(pattern, key) for key in keys) if match]


def _all_renamed(entries: Entries, rename: Callable[[str], str | None], where: str) -> Converted:
    renamed, unknown = _renamed(entries, rename)
    if unknown:
        hint = (
            "class-conditional networks are not converted"
            if _UNSUPPORTED_UNET.match(unknown[0])
            else "another architecture"
        )
        raise CheckpointError(f"{unknown[0]!r} has no counterpart in {where}: {hint}")
    return renamed, []


# The VAE

_VAE_ATTENTION = (("norm", "group_norm"), ("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0"))
_OLD_VAE_ATTENTION = {
    "query": "to_q",
    "key": "to_k",
    "value": "to_v",
    "proj_attn": "to_out.0",
}  # of diffusers before 0.16


def vae_map(levels: int, resnets: int) -> NameMap:
    """Names of a VAE with `levels` resolutions and `resnets` blocks a level in the encoder, one more in the decoder."""
    pairs: list[tuple[str, str]] = [("quant_conv", "quant_conv"), ("post_quant_conv", "post_quant_conv")]
    for coder, here, there, count in (("encoder", "down", "down", resnets), ("decoder", "up", "up", resnets + 1)):
        pairs += [(f"{coder}.{a}", f"{coder}.{b}") for a, b in (("conv_in", "conv_in"), ("norm_out", "conv_norm_out"))]
        pairs.append((f"{coder}.conv_out", f"{coder}.conv_out"))
        for i in range(2):
            pairs.append((f"{coder}.mid.block_{i + 1}", f"{coder}.mid_block.resnets.{i}"))
        pairs += [(f"{coder}.mid.attn_1.{a}", f"{coder}.mid_block.attentions.0.{b}") for a, b in _VAE_ATTENTION]
        for level in range(levels):
            ours = f"{coder}.{here}.{level}"
            theirs = f"{coder}.{there}_blocks.{level if here == 'down' else levels - 1 - level}"
            pairs += [(f"{ours}.block.{i}", f"{theirs}.resnets.{i}") for i in range(count)]
            pairs += [(f"{ours}.block.{i}.nin_shortcut", f"{theirs}.resnets.{i}.conv_shortcut") for i in range(count)]
            pairs.append((f"{ours}.{here}sample.conv", f"{theirs}.{there}samplers.0.conv"))
    return NameMap(pairs)


def vae_to_diffusers(entries: Entries) -> Converted:
    """diffusers' names of a VAE; the attention's 1x1 convolutions become linear layers."""
    blocks = _levels(entries, r"encoder\.down\.(\d+)\.block\.(\d+)\.conv1\.weight")
    converted, unknown = _renamed(entries, vae_map(*_vae_size(blocks)).to_diffusers)
    return {key: _flattened(entry) if ".attentions." in key else entry for key, entry in converted.items()}, unknown


def vae_from_diffusers(entries: Entries) -> Converted:
    """Our names of diffusers' VAE; the attention's linear layers become 1x1 convolutions."""
    modern = {_modern_vae_key(key): entry for key, entry in entries.items()}
    blocks = _levels(modern, r"encoder\.down_blocks\.(\d+)\.resnets\.(\d+)\.conv1\.weight")
    converted, unknown = _renamed(modern, vae_map(*_vae_size(blocks)).from_diffusers)
    return {key: _as_convolution(entry) if ".attn_1." in key else entry for key, entry in converted.items()}, unknown


def _modern_vae_key(key: str) -> str:
    parts = key.split(".")
    if len(parts) > 2 and parts[-2] in _OLD_VAE_ATTENTION:
        return ".".join([*parts[:-2], _OLD_VAE_ATTENTION[parts[-2]], parts[-1]])
    return key


def _vae_size(blocks: list[int]) -> tuple[int, int]:
    counts = Counter(blocks)
    if not counts or len(set(counts.values())) != 1:
        raise CheckpointError("its VAE is incomplete or of another kind: the levels of its encoder differ in depth")
    return len(counts), counts[0]


def _flattened(entry: LazyTensor) -> LazyTensor:
    """(O, I, 1, 1) as (O, I)."""
    if entry.info.shape[2:] != (1, 1):
        return entry
    return entry.then(lambda tensor: tensor.flatten(1), entry.info.shape[:2])


def _as_convolution(entry: LazyTensor) -> LazyTensor:
    """(O, I) as (O, I, 1, 1)."""
    if len(entry.info.shape) != 2:
        return entry
    return entry.then(lambda tensor: tensor[:, :, None, None], (*entry.info.shape, 1, 1))


# Text encoders: CLIP's names (SD 1.x) are transformers' own; OpenCLIP (SD 2.x) has others, and q, k and v in one.

_CLIP_PREFIX = "transformer."  # below `cond_stage_model.`
_TEXT_MODULE = "text_model."  # left out by transformers 5
_TEXT_PARTS = ("embeddings.", "encoder.layers.", "final_layer_norm.")
_OPEN_CLIP_PREFIX = "model."
_OPEN_CLIP_ENDS = (
    ("token_embedding", "text_model.embeddings.token_embedding"),
    ("positional_embedding", "text_model.embeddings.position_embedding.weight"),
    ("ln_final", "text_model.final_layer_norm"),
    ("text_projection", "text_projection.weight"),
    ("logit_scale", "logit_scale"),
)
_OPEN_CLIP_LAYER = (
    ("ln_1", "layer_norm1"),
    ("ln_2", "layer_norm2"),
    ("attn.out_proj", "self_attn.out_proj"),
    ("mlp.c_fc", "mlp.fc1"),
    ("mlp.c_proj", "mlp.fc2"),
)
_JOINT = re.compile(r"transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)")
_SPLIT = re.compile(r"text_model\.encoder\.layers\.(\d+)\.self_attn\.([qkv])_proj\.(weight|bias)")
_PROJECTION = "text_projection.weight"


def open_clip_map(layers: int) -> NameMap:
    """Names of OpenCLIP's text encoder here and of the same in transformers, but for the joint q, k and v."""
    pairs = list(_OPEN_CLIP_ENDS)
    for i in range(layers):
        here, there = f"transformer.resblocks.{i}", f"text_model.encoder.layers.{i}"
        pairs += [(f"{here}.{a}", f"{there}.{b}") for a, b in _OPEN_CLIP_LAYER]
    return NameMap(pairs)


def is_open_clip(entries: Iterable[str]) -> bool:
    """Whether a text encoder's keys (below `cond_stage_model.`) are OpenCLIP's rather than CLIP's."""
    return any(key.startswith(f"{_OPEN_CLIP_PREFIX}transformer.resblocks.") for key in entries)


def text_to_diffusers(entries: Entries) -> Converted:
    """transformers' names of either text encoder."""
    if not is_open_clip(entries):
        return _renamed(entries, lambda k: k.removeprefix(_CLIP_PREFIX) if k.startswith(_CLIP_PREFIX) else None)
    inner = {
        key.removeprefix(_OPEN_CLIP_PREFIX): entry
        for key, entry in entries.items()
        if key.startswith(_OPEN_CLIP_PREFIX)
    }
    outside = [key for key in entries if not key.startswith(_OPEN_CLIP_PREFIX)]
    joint = {key: match for key in inner if (match := _JOINT.fullmatch(key))}
    layers = len({match[1] for match in joint.values()})
    converted, unknown = _renamed(
        {k: e for k, e in inner.items() if k not in joint}, open_clip_map(layers).to_diffusers
    )
    for key, match in joint.items():
        converted |= _split(f"text_model.encoder.layers.{match[1]}.self_attn", match[2], inner[key])
    if _PROJECTION in converted:
        converted[_PROJECTION] = _transposed(converted[_PROJECTION])
    return converted, outside + [_OPEN_CLIP_PREFIX + key for key in unknown]


def text_key(key: str) -> str:
    """The name that every version of transformers knows of an entry of a text encoder, of whichever version it is."""
    return _TEXT_MODULE + key if key.startswith(_TEXT_PARTS) else key


def text_from_diffusers(entries: Entries, open_clip: bool) -> Converted:
    """Our names of a text encoder of transformers: OpenCLIP's, or CLIP's.

    Raises:
        CheckpointError: q, k or v is missing somewhere, or has a shape of its own.
    """
    entries = {text_key(key): entry for key, entry in entries.items()}
    if not open_clip:
        return _renamed(entries, lambda key: _CLIP_PREFIX + key if key.startswith(_TEXT_MODULE) else None)
    split = {key: match for key in entries if (match := _SPLIT.fullmatch(key))}
    layers = len({match[1] for match in split.values()})
    rest = {key: entry for key, entry in entries.items() if key not in split}
    if _PROJECTION in rest:
        rest[_PROJECTION] = _transposed(rest[_PROJECTION])
    converted, unknown = _renamed(rest, open_clip_map(layers).from_diffusers)
    for layer, kind in sorted({(int(match[1]), match[3]) for match in split.values()}):
        names = [f"text_model.encoder.layers.{layer}.self_attn.{part}_proj.{kind}" for part in "qkv"]
        missing = next((name for name in names if name not in entries), None)
        if missing is not None:
            raise CheckpointError(f"its text encoder lacks {missing!r}")
        converted[f"transformer.resblocks.{layer}.attn.in_proj_{kind}"] = _joined([entries[name] for name in names])
    return {_OPEN_CLIP_PREFIX + key: entry for key, entry in converted.items()}, unknown


def _split(prefix: str, kind: str, joint: LazyTensor) -> Entries:
    """q, k and v (D, D) of one (3D, D), or of biases."""
    if not joint.info.shape or joint.info.shape[0] % 3:
        raise CheckpointError(f"its text encoder has q, k and v of shape {list(joint.info.shape)} in one {kind}")
    rows = joint.info.shape[0] // 3
    shape = (rows, *joint.info.shape[1:])

    def part(start: int) -> LazyTensor:
        return joint.then(lambda tensor: tensor[start : start + rows], shape)

    return {f"{prefix}.{name}_proj.{kind}": part(i * rows) for i, name in enumerate("qkv")}


def _joined(parts: list[LazyTensor]) -> LazyTensor:
    shapes = [list(part.info.shape) for part in parts]
    if not shapes[0] or shapes != shapes[:1] * len(shapes):
        raise CheckpointError(f"its text encoder has q, k and v of shapes {shapes}, which should be equal")
    info = TensorInfo((sum(part.info.shape[0] for part in parts), *parts[0].info.shape[1:]), parts[0].info.dtype)
    return LazyTensor(info, lambda: torch.cat([part.read() for part in parts]))


def _transposed(entry: LazyTensor) -> LazyTensor:
    if len(entry.info.shape) != 2:
        raise CheckpointError(f"its text projection has shape {list(entry.info.shape)}, which is no matrix")

    def transpose(tensor: Tensor) -> Tensor:
        return tensor.t().contiguous()

    return entry.then(transpose, entry.info.shape[::-1])


NETWORKS = {
    "unet": Network(UNET_PREFIX, unet_to_diffusers, unet_from_diffusers),
    "controlnet": Network(CONTROL_PREFIX, unet_to_diffusers, unet_from_diffusers),
    "vae": Network(VAE_PREFIX, vae_to_diffusers, vae_from_diffusers),
}
