"""The names of the same weights here and in diffusers: UNet, ControlNet, VAE and both text encoders.

A network's two naming schemes differ in how its blocks are counted (here flat, there by level) and in a few module
names. The count of blocks is read from the keys themselves, so any width and depth converts. Where a tensor differs too
(a 1x1 convolution that is a linear layer there, three projections stored as one), it is reshaped, split or joined;
nothing is computed, so that every conversion can be undone bit by bit.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Container, Iterable

import torch

from ldm.files import CheckpointError, LazyTensor
from ldm.files.tensors import Tensors

CONTROL_PREFIX = "control_model."
UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
TEXT_PREFIX = "cond_stage_model."
CONTROL_LAYERS = ("input_hint_block.", "zero_convs.", "middle_block_out.")  # of a ControlNet, which no UNet has

BASE_PARTS = {"UNet": UNET_PREFIX, "VAE": VAE_PREFIX, "text encoder": TEXT_PREFIX}

# What diffusers keeps in a folder of its own, and the prefix of its keys here.
COMPONENTS = {"unet": UNET_PREFIX, "controlnet": CONTROL_PREFIX, "vae": VAE_PREFIX, "text_encoder": TEXT_PREFIX}

Converted = tuple[Tensors, list[str]]  # the tensors under their new names, and the keys that have none
Pairs = list[tuple[str, str]]  # module names here and in diffusers


def part(tensors: Tensors, prefix: str) -> Tensors:
    """The tensors whose keys begin with a prefix, without it."""
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def with_prefix(tensors: Tensors, prefix: str) -> Tensors:
    """The tensors with a prefix before their keys."""
    return {prefix + key: tensor for key, tensor in tensors.items()}


def to_diffusers(component: str, tensors: Tensors) -> Converted:
    """The tensors of a component (one of `COMPONENTS`), keys without prefix, under diffusers' names.

    Raises:
        CheckpointError: a UNet or ControlNet has a layer that diffusers' have not, or blocks are missing.
    """
    return _text_to_diffusers(tensors) if component == "text_encoder" else _network(component, tensors, reverse=False)


def from_diffusers(component: str, tensors: Tensors, open_clip: bool = False) -> Converted:
    """The contrary; a text encoder's names become OpenCLIP's or CLIP's."""
    if component == "text_encoder":
        return _text_from_diffusers(tensors, open_clip)
    return _network(component, tensors, reverse=True)


def _network(component: str, tensors: Tensors, reverse: bool) -> Converted:
    """A UNet, ControlNet or VAE under the names of the other side."""
    if component == "vae":
        tensors = _change_keys(lambda key: _OLD_VAE_ATTENTION.sub(lambda m: f".to_{_NEW_NAMES[m[1]]}.", key), tensors)
        converted, unknown = _renamed(tensors, _vae_pairs(tensors), reverse)
        for key, tensor in converted.items():  # 1x1 convolutions here are linear layers there
            if ".attentions." in key and tensor.shape[2:] == (1, 1):
                converted[key] = tensor.then(lambda value: value.flatten(1), tensor.shape[:2])
            elif ".attn_1." in key and len(tensor.shape) == 2:
                converted[key] = tensor.then(lambda value: value[:, :, None, None], (*tensor.shape, 1, 1))
        return converted, unknown
    if reverse:
        found = count_blocks(tensors, r"down_blocks\.(\d{1,4})\.resnets\.\d+\.conv1\.weight")
        levels = [found[level] for level in range(len(found))]
    else:
        levels = _encoder_levels(tensors)
    converted, unknown = _renamed(tensors, _unet_pairs(levels, tensors), reverse)
    if unknown:
        raise CheckpointError(f"{unknown[0]!r} has no counterpart on the other side: it is of another architecture")
    return converted, []


def _pairs(table: str) -> Pairs:
    """A table of module names, written as `ours theirs, ours theirs`."""
    return [(ours, theirs) for ours, theirs in (row.split() for row in table.split(","))]


def _below(here: str, there: str, pairs: Pairs) -> Pairs:
    """The pairs of a module's own parts."""
    return [(f"{here}.{ours}", f"{there}.{theirs}") for ours, theirs in pairs]


def _renamed(tensors: Tensors, pairs: Pairs, reverse: bool = False) -> Converted:
    """Tensors under the names of the other side: a key changes by the longest module name that it begins with."""
    table = {there: here for here, there in pairs} if reverse else dict(pairs)
    longest = max(map(len, table), default=0)
    names: dict[str, str] = {}
    for key in tensors:
        end = len(key) if len(key) <= longest else key.rfind(".", 0, longest + 1)
        while end > 0 and key[:end] not in table:
            end = key.rfind(".", 0, end)
        if end > 0:
            names[key] = table[key[:end]] + key[end:]
    return _change_keys(names.__getitem__, {key: tensors[key] for key in names}), [
        key for key in tensors if key not in names
    ]


def _change_keys(change: Callable[[str], str], tensors: Tensors) -> Tensors:
    """The tensors under changed keys.

    Raises:
        CheckpointError: two of them would have the same key.
    """
    made: Tensors = {}
    for key, tensor in tensors.items():
        if made.setdefault(change(key), tensor) is not tensor:
            raise CheckpointError(f"{key!r} is there a second time, under another name for the same entry")
    return made


def count_blocks(keys: Iterable[str], pattern: str) -> Counter[int]:
    """How many keys match a pattern, by the number that its group finds."""
    return Counter(int(match[1]) for match in (re.match(pattern, key) for key in keys) if match)


# UNet and ControlNet

_RESNET = _pairs("""
    in_layers.0 norm1, in_layers.2 conv1, emb_layers.1 time_emb_proj,
    out_layers.0 norm2, out_layers.3 conv2, skip_connection conv_shortcut
""")
_HINT_ENCODER = (
    ("input_hint_block.0", "controlnet_cond_embedding.conv_in"),
    *((f"input_hint_block.{2 * i + 2}", f"controlnet_cond_embedding.blocks.{i}") for i in range(6)),
    ("input_hint_block.14", "controlnet_cond_embedding.conv_out"),
)
_UNET_ENDS = _pairs("""
    time_embed.0 time_embedding.linear_1, time_embed.2 time_embedding.linear_2, input_blocks.0.0 conv_in,
    middle_block.1 mid_block.attentions.0, middle_block_out.0 controlnet_mid_block, out.0 conv_norm_out, out.2 conv_out
""")


def _unet_pairs(resnets: list[int], keys: Container[str]) -> Pairs:
    """Names of a UNet or ControlNet, given the number of residual blocks of each level of its encoder and its keys."""
    pairs = [*_UNET_ENDS, *_HINT_ENCODER]
    for i, middle in enumerate(("middle_block.0", "middle_block.2")):
        pairs += _below(middle, f"mid_block.resnets.{i}", _RESNET)
    position = 1
    for level, count in enumerate(resnets):
        for i in range(count):
            pairs += _below(f"input_blocks.{position}.0", f"down_blocks.{level}.resnets.{i}", _RESNET)
            pairs.append((f"input_blocks.{position}.1", f"down_blocks.{level}.attentions.{i}"))
            position += 1
        if level != len(resnets) - 1:
            pairs.append((f"input_blocks.{position}.0.op", f"down_blocks.{level}.downsamplers.0.conv"))
            position += 1
    pairs += [(f"zero_convs.{i}.0", f"controlnet_down_blocks.{i}") for i in range(position)]
    position = 0
    for level, count in enumerate(reversed(resnets)):
        for i in range(count + 1):
            pairs += _below(f"output_blocks.{position}.0", f"up_blocks.{level}.resnets.{i}", _RESNET)
            pairs.append((f"output_blocks.{position}.1", f"up_blocks.{level}.attentions.{i}"))
            position += 1
        # An upsampler stands after the attention, where the level has one.
        last = f"output_blocks.{position - 1}"
        attended = f"{last}.2.conv.weight" in keys or f"up_blocks.{level}.attentions.0.norm.weight" in keys
        pairs.append((f"{last}.{2 if attended else 1}.conv", f"up_blocks.{level}.upsamplers.0.conv"))
    return pairs


def _encoder_levels(keys: Iterable[str]) -> list[int]:
    """How many residual blocks each level of an encoder has, told from the keys of its `input_blocks`."""
    matches = (re.match(r"input_blocks\.(\d{1,4})\.0\.(op|in_layers)\.", key) for key in keys)
    kinds = {int(match[1]): match[2] for match in matches if match}
    levels = [0]
    for position in sorted(kinds):
        if kinds[position] == "op":
            levels.append(0)
        else:
            levels[-1] += 1
    if len(kinds) < 2 or sorted(kinds) != list(range(1, len(kinds) + 1)) or 0 in levels:
        raise CheckpointError(
            "its UNet encoder is incomplete, or of another kind than those with convolutions between levels"
        )
    return levels


# The VAE

_CODER = _pairs("""
    conv_in conv_in, norm_out conv_norm_out, conv_out conv_out,
    mid.block_1 mid_block.resnets.0, mid.block_2 mid_block.resnets.1, mid.attn_1.norm mid_block.attentions.0.group_norm,
    mid.attn_1.q mid_block.attentions.0.to_q, mid.attn_1.k mid_block.attentions.0.to_k,
    mid.attn_1.v mid_block.attentions.0.to_v, mid.attn_1.proj_out mid_block.attentions.0.to_out.0
""")
_OLD_VAE_ATTENTION = re.compile(r"\.(query|key|value|proj_attn)\.(?=\w+$)")  # of diffusers before 0.16
_NEW_NAMES = {"query": "q", "key": "k", "value": "v", "proj_attn": "out.0"}


def _vae_pairs(keys: Iterable[str]) -> Pairs:
    """Names of a VAE with these keys, of either side; its decoder has one residual block more a level than its encoder."""
    counts = count_blocks(keys, r"encoder\.down(?:_blocks)?\.(\d{1,4})\.(?:block|resnets)\.\d+\.conv1\.weight")
    if not counts or len(set(counts.values())) != 1:
        raise CheckpointError("its VAE is incomplete or of another kind: the levels of its encoder differ in depth")
    last, resnets = len(counts) - 1, counts[0]
    pairs = _pairs("quant_conv quant_conv, post_quant_conv post_quant_conv")
    for coder, way, count in (("encoder", "down", resnets), ("decoder", "up", resnets + 1)):
        pairs += _below(coder, coder, _CODER)
        for level in range(last + 1):
            here, there = f"{coder}.{way}.{level}", f"{coder}.{way}_blocks.{level if way == 'down' else last - level}"
            for i in range(count):
                pairs.append((f"{here}.block.{i}", f"{there}.resnets.{i}"))
                pairs.append((f"{here}.block.{i}.nin_shortcut", f"{there}.resnets.{i}.conv_shortcut"))
            pairs.append((f"{here}.{way}sample.conv", f"{there}.{way}samplers.0.conv"))
    return pairs


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
_JOINT = re.compile(r"transformer\.resblocks\.(\d{1,4})\.attn\.in_proj_(weight|bias)")
_SPLIT = re.compile(r"text_model\.encoder\.layers\.(\d{1,4})\.self_attn\.[qkv]_proj\.(weight|bias)")
_PROJECTION = "text_projection.weight"


def is_open_clip(keys: Iterable[str]) -> bool:
    """Whether a text encoder's keys (below `cond_stage_model.`) are OpenCLIP's rather than CLIP's."""
    return any(key.startswith(f"{_OPEN_CLIP_PREFIX}transformer.resblocks.") for key in keys)


def text_key(key: str) -> str:
    """The name that every version of transformers knows of an entry of a text encoder, of whichever version it is."""
    return _TEXT_MODULE + key if key.startswith(_TEXT_PARTS) else key


def _open_clip_pairs(layers: Iterable[str]) -> Pairs:
    """Names of OpenCLIP's text encoder here and of the same in transformers, but for the joint q, k and v."""
    pairs = list(_OPEN_CLIP_ENDS)
    for layer in set(layers):
        pairs += _below(f"transformer.resblocks.{layer}", f"text_model.encoder.layers.{layer}", _OPEN_CLIP_LAYER)
    return pairs


def _text_to_diffusers(tensors: Tensors) -> Converted:
    if not is_open_clip(tensors):
        return part(tensors, _CLIP_PREFIX), [key for key in tensors if not key.startswith(_CLIP_PREFIX)]
    inner = part(tensors, _OPEN_CLIP_PREFIX)
    joint = {key: match for key in inner if (match := _JOINT.fullmatch(key))}
    pairs = _open_clip_pairs(match[1] for match in joint.values())
    converted, unknown = _renamed({key: tensor for key, tensor in inner.items() if key not in joint}, pairs)
    for key, match in joint.items():  # q, k and v (D, D) of one (3D, D), or of biases
        tensor, attention = inner[key], f"text_model.encoder.layers.{match[1]}.self_attn"
        if not tensor.shape or tensor.shape[0] % 3:
            raise CheckpointError(f"{key!r} has shape {list(tensor.shape)}, which q, k and v cannot share")
        shape = (tensor.shape[0] // 3, *tensor.shape[1:])
        for i, name in enumerate("qkv"):
            third = tensor.then(lambda value, i=i: value.chunk(3)[i], shape)  # type: ignore[misc]
            converted[f"{attention}.{name}_proj.{match[2]}"] = third
    _transpose_projection(converted)
    outside = [key for key in tensors if not key.startswith(_OPEN_CLIP_PREFIX)]
    return converted, outside + [_OPEN_CLIP_PREFIX + key for key in unknown]


def _text_from_diffusers(tensors: Tensors, open_clip: bool) -> Converted:
    tensors = _change_keys(text_key, tensors)
    if not open_clip:
        known = {key: tensor for key, tensor in tensors.items() if key.startswith(_TEXT_MODULE)}
        return with_prefix(known, _CLIP_PREFIX), [key for key in tensors if key not in known]
    split = {key: match for key in tensors if (match := _SPLIT.fullmatch(key))}
    rest = {key: tensor for key, tensor in tensors.items() if key not in split}
    _transpose_projection(rest)
    pairs = _open_clip_pairs(match[1] for match in split.values())
    converted, unknown = _renamed(rest, pairs, reverse=True)
    for layer, kind in dict.fromkeys(match.groups() for match in split.values()):
        names = [f"text_model.encoder.layers.{layer}.self_attn.{which}_proj.{kind}" for which in "qkv"]
        missing = next((name for name in names if name not in tensors), None)
        if missing is not None:
            raise CheckpointError(f"its text encoder lacks {missing!r}")
        converted[f"transformer.resblocks.{layer}.attn.in_proj_{kind}"] = _joined([tensors[name] for name in names])
    return with_prefix(converted, _OPEN_CLIP_PREFIX), unknown


def _joined(parts: list[LazyTensor]) -> LazyTensor:
    shapes = [list(tensor.shape) for tensor in parts]
    if not shapes[0] or shapes != shapes[:1] * len(shapes):
        raise CheckpointError(f"its text encoder has q, k and v of shapes {shapes}, which should be equal")
    shape = (3 * parts[0].shape[0], *parts[0].shape[1:])
    return LazyTensor(shape, parts[0].dtype, lambda: torch.cat([tensor.read() for tensor in parts]))


def _transpose_projection(tensors: Tensors) -> None:
    """OpenCLIP multiplies by its projection from the other side."""
    if tensor := tensors.get(_PROJECTION):
        if len(tensor.shape) != 2:
            raise CheckpointError(f"its text projection has shape {list(tensor.shape)}, which is no matrix")
        tensors[_PROJECTION] = tensor.then(lambda value: value.t().contiguous(), tensor.shape[::-1])
