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

import torch

from ldm.files import CheckpointError, LazyTensor
from ldm.files.tensors import Tensors

CONTROL_PREFIX = "control_model."
UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
TEXT_PREFIX = "cond_stage_model."
CONTROL_LAYERS = ("input_hint_block.", "zero_convs.", "middle_block_out.")  # of a ControlNet, which no UNet has

Converted = tuple[Tensors, list[str]]  # the tensors under their new names, and the keys that have none
Pairs = list[tuple[str, str]]  # module names here and in diffusers


@dataclass(frozen=True)
class Network:
    """A part of a model that diffusers keeps in a folder of its own.

    Attributes:
        prefix: of its keys here.
        to_diffusers, from_diffusers: rename tensors (keys without any prefix).
    """

    prefix: str
    to_diffusers: Callable[[Tensors], Converted]
    from_diffusers: Callable[[Tensors], Converted]


def part(tensors: Tensors, prefix: str) -> Tensors:
    """The tensors whose keys begin with a prefix, without it."""
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def with_prefix(tensors: Tensors, prefix: str) -> Tensors:
    """The tensors with a prefix before their keys."""
    return {prefix + key: tensor for key, tensor in tensors.items()}


def _pairs(table: str) -> Pairs:
    """A table of module names, written as `ours theirs, ours theirs`."""
    return [(ours, theirs) for ours, theirs in (row.split() for row in table.split(","))]


def _renamed(tensors: Tensors, pairs: Pairs, reverse: bool = False) -> Converted:
    """Tensors under the names of the other side: a key changes by the longest module name that it begins with."""
    table = {there: here for here, there in pairs} if reverse else dict(pairs)
    longest = max(map(len, table), default=0)
    made: Tensors = {}
    unknown = []
    for key, tensor in tensors.items():
        end = len(key) if len(key) <= longest else key.rfind(".", 0, longest + 1)
        while end > 0 and key[:end] not in table:
            end = key.rfind(".", 0, end)
        if end > 0:
            made[table[key[:end]] + key[end:]] = tensor
        else:
            unknown.append(key)
    return made, unknown


# UNet and ControlNet

_RESNET = _pairs("""
    in_layers.0 norm1, in_layers.2 conv1, emb_layers.1 time_emb_proj,
    out_layers.0 norm2, out_layers.3 conv2, skip_connection conv_shortcut
""")
HINT_ENCODER = (
    ("input_hint_block.0", "controlnet_cond_embedding.conv_in"),
    *((f"input_hint_block.{2 * i + 2}", f"controlnet_cond_embedding.blocks.{i}") for i in range(6)),
    ("input_hint_block.14", "controlnet_cond_embedding.conv_out"),
)
_UNET_ENDS = _pairs("""
    time_embed.0 time_embedding.linear_1, time_embed.2 time_embedding.linear_2, input_blocks.0.0 conv_in,
    middle_block.1 mid_block.attentions.0, middle_block_out.0 controlnet_mid_block, out.0 conv_norm_out, out.2 conv_out
""")


def _unet_pairs(resnets: list[int], attended: Callable[[int, int], bool]) -> Pairs:
    """Names of a UNet, and of a ControlNet.

    Args:
        resnets: number of residual blocks of each level of the encoder.
        attended: whether a level of the decoder, which ends with this output block, has attention.
    """
    pairs: Pairs = [*_UNET_ENDS, *HINT_ENCODER]

    def resnet(here: str, there: str) -> None:
        pairs.extend((f"{here}.{a}", f"{there}.{b}") for a, b in _RESNET)

    resnet("middle_block.0", "mid_block.resnets.0")
    resnet("middle_block.2", "mid_block.resnets.1")
    position, last = 1, len(resnets) - 1
    for level, count in enumerate(resnets):
        for i in range(count):
            resnet(f"input_blocks.{position}.0", f"down_blocks.{level}.resnets.{i}")
            pairs.append((f"input_blocks.{position}.1", f"down_blocks.{level}.attentions.{i}"))
            position += 1
        if level != last:
            pairs.append((f"input_blocks.{position}.0.op", f"down_blocks.{level}.downsamplers.0.conv"))
            position += 1
    pairs += [(f"zero_convs.{i}.0", f"controlnet_down_blocks.{i}") for i in range(position)]
    position = 0
    for level, count in enumerate(reversed(resnets)):
        for i in range(count + 1):
            resnet(f"output_blocks.{position}.0", f"up_blocks.{level}.resnets.{i}")
            pairs.append((f"output_blocks.{position}.1", f"up_blocks.{level}.attentions.{i}"))
            position += 1
        place = 2 if attended(level, position - 1) else 1
        pairs.append((f"output_blocks.{position - 1}.{place}.conv", f"up_blocks.{level}.upsamplers.0.conv"))
    return pairs


def unet_to_diffusers(tensors: Tensors) -> Converted:
    """diffusers' names of a UNet or a ControlNet.

    Raises:
        CheckpointError: it has a layer that diffusers' networks have not.
    """
    pairs = _unet_pairs(encoder_levels(tensors), lambda _, end: f"output_blocks.{end}.2.conv.weight" in tensors)
    return _all_known(_renamed(tensors, pairs), "diffusers")


def unet_from_diffusers(tensors: Tensors) -> Converted:
    """Our names of diffusers' UNet or ControlNet.

    Raises:
        CheckpointError: it has a layer that the networks here have not.
    """
    found = Counter(_levels(tensors, r"down_blocks\.(\d+)\.resnets\.(\d+)\.conv1\.weight"))
    resnets = [found[level] for level in range(len(found))]
    pairs = _unet_pairs(resnets, lambda level, _: f"up_blocks.{level}.attentions.0.norm.weight" in tensors)
    return _all_known(_renamed(tensors, pairs, reverse=True), "this library")


def encoder_levels(keys: Iterable[str]) -> list[int]:
    """How many residual blocks each level of an encoder has, told from the keys of its `input_blocks`."""
    matches = (re.match(r"input_blocks\.(\d+)\.0\.(op|in_layers)\.", key) for key in keys)
    kinds = {int(match[1]): match[2] for match in matches if match}
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


def _levels(keys: Iterable[str], pattern: str) -> list[int]:
    """The level (first group) of every key that matches."""
    return [int(match[1]) for match in (re.match(pattern, key) for key in keys) if match]


def _all_known(converted: Converted, where: str) -> Converted:
    _, unknown = converted
    if unknown:
        classes = unknown[0].startswith(("label_emb.", "class_embedding.", "id_predictor.", "add_embedding."))
        hint = "class-conditional networks are not converted" if classes else "another architecture"
        raise CheckpointError(f"{unknown[0]!r} has no counterpart in {where}: {hint}")
    return converted


# The VAE

_VAE_ATTENTION = _pairs("norm group_norm, q to_q, k to_k, v to_v, proj_out to_out.0")
_OLD_VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # before 0.16


def _vae_pairs(blocks: list[int]) -> Pairs:
    """Names of a VAE, given the level of each residual block of its encoder; the decoder has one more a level."""
    counts = Counter(blocks)
    if not counts or len(set(counts.values())) != 1:
        raise CheckpointError("its VAE is incomplete or of another kind: the levels of its encoder differ in depth")
    levels, resnets = len(counts), counts[0]
    pairs: Pairs = [("quant_conv", "quant_conv"), ("post_quant_conv", "post_quant_conv")]
    for coder, way, count in (("encoder", "down", resnets), ("decoder", "up", resnets + 1)):
        pairs += [(f"{coder}.{a}", f"{coder}.{b}") for a, b in (("conv_in", "conv_in"), ("norm_out", "conv_norm_out"))]
        pairs.append((f"{coder}.conv_out", f"{coder}.conv_out"))
        pairs += [(f"{coder}.mid.block_{i + 1}", f"{coder}.mid_block.resnets.{i}") for i in range(2)]
        pairs += [(f"{coder}.mid.attn_1.{a}", f"{coder}.mid_block.attentions.0.{b}") for a, b in _VAE_ATTENTION]
        for level in range(levels):
            ours = f"{coder}.{way}.{level}"
            theirs = f"{coder}.{way}_blocks.{level if way == 'down' else levels - 1 - level}"
            pairs += [(f"{ours}.block.{i}", f"{theirs}.resnets.{i}") for i in range(count)]
            pairs += [(f"{ours}.block.{i}.nin_shortcut", f"{theirs}.resnets.{i}.conv_shortcut") for i in range(count)]
            pairs.append((f"{ours}.{way}sample.conv", f"{theirs}.{way}samplers.0.conv"))
    return pairs


def vae_to_diffusers(tensors: Tensors) -> Converted:
    """diffusers' names of a VAE; the attention's 1x1 convolutions become linear layers."""
    blocks = _levels(tensors, r"encoder\.down\.(\d+)\.block\.(\d+)\.conv1\.weight")
    converted, unknown = _renamed(tensors, _vae_pairs(blocks))
    for key, tensor in converted.items():
        if ".attentions." in key and tensor.shape[2:] == (1, 1):
            converted[key] = tensor.then(lambda value: value.flatten(1), tensor.shape[:2])
    return converted, unknown


def vae_from_diffusers(tensors: Tensors) -> Converted:
    """Our names of diffusers' VAE; the attention's linear layers become 1x1 convolutions."""
    modern = {modern_vae_key(key): tensor for key, tensor in tensors.items()}
    blocks = _levels(modern, r"encoder\.down_blocks\.(\d+)\.resnets\.(\d+)\.conv1\.weight")
    converted, unknown = _renamed(modern, _vae_pairs(blocks), reverse=True)
    for key, tensor in converted.items():
        if ".attn_1." in key and len(tensor.shape) == 2:
            converted[key] = tensor.then(lambda value: value[:, :, None, None], (*tensor.shape, 1, 1))
    return converted, unknown


def modern_vae_key(key: str) -> str:
    """The name that today's diffusers has for an entry of a VAE."""
    module, _, kind = key.rpartition(".")
    module, _, name = module.rpartition(".")
    return f"{module}.{_OLD_VAE_ATTENTION[name]}.{kind}" if name in _OLD_VAE_ATTENTION else key


# Text encoders: CLIP's names (SD 1.x) are transformers' own; OpenCLIP (SD 2.x) has others, and q, k and v in one.

_CLIP_PREFIX = "transformer."  # below `cond_stage_model.`
_TEXT_MODULE = "text_model."  # left out by transformers 5
_TEXT_PARTS = ("embeddings.", "encoder.layers.", "final_layer_norm.")
_OPEN_CLIP_PREFIX = "model."
_OPEN_CLIP_ENDS = _pairs("""
    token_embedding text_model.embeddings.token_embedding, ln_final text_model.final_layer_norm,
    positional_embedding text_model.embeddings.position_embedding.weight,
    text_projection text_projection.weight, logit_scale logit_scale
""")
_OPEN_CLIP_LAYER = _pairs("""
    ln_1 layer_norm1, ln_2 layer_norm2, attn.out_proj self_attn.out_proj, mlp.c_fc mlp.fc1, mlp.c_proj mlp.fc2
""")
_JOINT = re.compile(r"transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)")
_SPLIT = re.compile(r"text_model\.encoder\.layers\.(\d+)\.self_attn\.([qkv])_proj\.(weight|bias)")
_PROJECTION = "text_projection.weight"


def _open_clip_pairs(layers: int) -> Pairs:
    """Names of OpenCLIP's text encoder here and of the same in transformers, but for the joint q, k and v."""
    pairs = list(_OPEN_CLIP_ENDS)
    for i in range(layers):
        here, there = f"transformer.resblocks.{i}", f"text_model.encoder.layers.{i}"
        pairs += [(f"{here}.{a}", f"{there}.{b}") for a, b in _OPEN_CLIP_LAYER]
    return pairs


def is_open_clip(keys: Iterable[str]) -> bool:
    """Whether a text encoder's keys (below `cond_stage_model.`) are OpenCLIP's rather than CLIP's."""
    return any(key.startswith(f"{_OPEN_CLIP_PREFIX}transformer.resblocks.") for key in keys)


def text_key(key: str) -> str:
    """The name that every version of transformers knows of an entry of a text encoder, of whichever version it is."""
    return _TEXT_MODULE + key if key.startswith(_TEXT_PARTS) else key


def text_to_diffusers(tensors: Tensors) -> Converted:
    """transformers' names of either text encoder."""
    if not is_open_clip(tensors):
        return part(tensors, _CLIP_PREFIX), [key for key in tensors if not key.startswith(_CLIP_PREFIX)]
    inner = part(tensors, _OPEN_CLIP_PREFIX)
    joint = {key: match for key in inner if (match := _JOINT.fullmatch(key))}
    pairs = _open_clip_pairs(len({match[1] for match in joint.values()}))
    converted, unknown = _renamed({key: tensor for key, tensor in inner.items() if key not in joint}, pairs)
    for key, match in joint.items():
        converted |= _split(f"text_model.encoder.layers.{match[1]}.self_attn", match[2], inner[key])
    if _PROJECTION in converted:
        converted[_PROJECTION] = _transposed(converted[_PROJECTION])
    outside = [key for key in tensors if not key.startswith(_OPEN_CLIP_PREFIX)]
    return converted, outside + [_OPEN_CLIP_PREFIX + key for key in unknown]


def text_from_diffusers(tensors: Tensors, open_clip: bool) -> Converted:
    """Our names of a text encoder of transformers: OpenCLIP's, or CLIP's.

    Raises:
        CheckpointError: q, k or v is missing somewhere, or has a shape of its own.
    """
    tensors = {text_key(key): tensor for key, tensor in tensors.items()}
    if not open_clip:
        known = {key: tensor for key, tensor in tensors.items() if key.startswith(_TEXT_MODULE)}
        return with_prefix(known, _CLIP_PREFIX), [key for key in tensors if key not in known]
    split = {key: match for key in tensors if (match := _SPLIT.fullmatch(key))}
    rest = {key: tensor for key, tensor in tensors.items() if key not in split}
    if _PROJECTION in rest:
        rest[_PROJECTION] = _transposed(rest[_PROJECTION])
    pairs = _open_clip_pairs(len({match[1] for match in split.values()}))
    converted, unknown = _renamed(rest, pairs, reverse=True)
    for layer, kind in sorted({(int(match[1]), match[3]) for match in split.values()}):
        names = [f"text_model.encoder.layers.{layer}.self_attn.{which}_proj.{kind}" for which in "qkv"]
        missing = next((name for name in names if name not in tensors), None)
        if missing is not None:
            raise CheckpointError(f"its text encoder lacks {missing!r}")
        converted[f"transformer.resblocks.{layer}.attn.in_proj_{kind}"] = _joined([tensors[name] for name in names])
    return with_prefix(converted, _OPEN_CLIP_PREFIX), unknown


def _split(prefix: str, kind: str, joint: LazyTensor) -> Tensors:
    """q, k and v (D, D) of one (3D, D), or of biases."""
    if not joint.shape or joint.shape[0] % 3:
        raise CheckpointError(f"its text encoder has q, k and v of shape {list(joint.shape)} in one {kind}")
    rows = joint.shape[0] // 3
    shape = (rows, *joint.shape[1:])
    return {
        f"{prefix}.{name}_proj.{kind}": joint.then(lambda value, i=i: value[i * rows : (i + 1) * rows], shape)
        for i, name in enumerate("qkv")
    }


def _joined(parts: list[LazyTensor]) -> LazyTensor:
    shapes = [list(tensor.shape) for tensor in parts]
    if not shapes[0] or shapes != shapes[:1] * len(shapes):
        raise CheckpointError(f"its text encoder has q, k and v of shapes {shapes}, which should be equal")
    shape = (3 * parts[0].shape[0], *parts[0].shape[1:])
    return LazyTensor(shape, parts[0].dtype, lambda: torch.cat([tensor.read() for tensor in parts]))


def _transposed(tensor: LazyTensor) -> LazyTensor:
    if len(tensor.shape) != 2:
        raise CheckpointError(f"its text projection has shape {list(tensor.shape)}, which is no matrix")
    return tensor.then(lambda value: value.t().contiguous(), tensor.shape[::-1])


NETWORKS = {
    "unet": Network(UNET_PREFIX, unet_to_diffusers, unet_from_diffusers),
    "controlnet": Network(CONTROL_PREFIX, unet_to_diffusers, unet_from_diffusers),
    "vae": Network(VAE_PREFIX, vae_to_diffusers, vae_from_diffusers),
}
