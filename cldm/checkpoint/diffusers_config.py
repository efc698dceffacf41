"""The configuration files that diffusers and transformers need beside the weights.

Widths, depths and channels are read from the weights' shapes; from our configuration comes what shapes do not show:
attention heads, the latents' scale and size, and what the network predicts. Tensors are named as here, without prefix;
what does not fit is a `CheckpointError`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from cldm.checkpoint.names import HINT_ENCODER, encoder_levels, is_open_clip
from ldm.files import CheckpointError
from ldm.files.tensors import Tensors

_GROUPS = 32  # of every group normalisation
_START_TOKEN, _END_TOKEN = 49406, 49407
_START, _END = "<|startoftext|>", "<|endoftext|>"


def unet_config(tensors: Tensors, params: Mapping[str, Any], prediction: str) -> dict[str, Any]:
    """`config.json` of a `UNet2DConditionModel`; `params` are the whole model's, `prediction` is "eps", "v" or "x0"."""
    encoder = _encoder_config(tensors, _section(params, "unet_config"))
    up = [name.replace("Down", "Up") for name in reversed(encoder["down_block_types"])]
    return {
        "_class_name": "UNet2DConditionModel",
        **encoder,
        "up_block_types": up,
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "out_channels": _shape(tensors, "out.2.weight", 4)[0],
        "sample_size": _image_size(params),
        "center_input_sample": False,
        "mid_block_scale_factor": 1,
        "upcast_attention": prediction == "v",  # as of SD 2.1: in half precision its attention overflows
    }


def controlnet_config(tensors: Tensors, params: Mapping[str, Any], pooling: bool) -> dict[str, Any]:
    """`config.json` of a `ControlNetModel`; `pooling` is `global_average_pooling`."""
    hint = [_shape(tensors, f"{ours}.weight", 4) for ours, _ in HINT_ENCODER]
    return {
        "_class_name": "ControlNetModel",
        **_encoder_config(tensors, _section(params, "control_stage_config")),
        "conditioning_channels": hint[0][1],
        "conditioning_embedding_out_channels": [shape[0] for shape in hint[0:-1:2]],
        "controlnet_conditioning_channel_order": "rgb",
        "global_pool_conditions": pooling,
    }


def _encoder_config(tensors: Tensors, options: Mapping[str, Any]) -> dict[str, Any]:
    """What UNet and ControlNet have in common; `options` are those of our network."""
    counts = encoder_levels(tensors)
    configured = options.get("num_res_blocks", 2)
    expected = (
        [configured] * len(options.get("channel_mult", (1, 2, 4, 8))) if isinstance(configured, int) else configured
    )
    if counts != list(expected):
        raise CheckpointError(
            f"the weights have {counts} blocks a level, the configuration {list(expected)}; name the right --config"
        )
    if len(set(counts)) != 1:
        raise CheckpointError(f"levels of different depth, {counts}, which diffusers cannot express")
    channels, kinds, position = [], [], 1
    for count in counts:
        having = {f"input_blocks.{i}.1.norm.weight" in tensors for i in range(position, position + count)}
        if len(having) > 1:
            raise CheckpointError("some but not all blocks of a level have attention, which diffusers cannot express")
        channels.append(_shape(tensors, f"input_blocks.{position}.0.out_layers.3.weight", 4)[0])
        kinds.append("CrossAttnDownBlock2D" if having.pop() else "DownBlock2D")
        position += count + 1
    text_key = next((key for key in tensors if key.endswith("attn2.to_k.weight")), None)
    if text_key is None:
        raise CheckpointError("a UNet without attention to a text, which diffusers keeps in other classes")
    heads, width = options.get("num_heads", -1), options.get("num_head_channels", -1)
    return {
        "act_fn": "silu",
        "attention_head_dim": heads if width == -1 else [max(c // width, 1) for c in channels],  # a count of heads
        "block_out_channels": channels,
        "cross_attention_dim": _shape(tensors, text_key, 2)[1],
        "down_block_types": kinds,
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": _shape(tensors, "input_blocks.0.0.weight", 4)[1],
        "layers_per_block": counts[0],
        "norm_eps": 1e-05,
        "norm_num_groups": _GROUPS,
        "only_cross_attention": False,
        "transformer_layers_per_block": _count(tensors, r"middle_block\.1\.transformer_blocks\.(\d+)\."),
        "use_linear_projection": len(_shape(tensors, "middle_block.1.proj_in.weight", 2, 4)) == 2,
    }


def vae_config(tensors: Tensors, params: Mapping[str, Any]) -> dict[str, Any]:
    """`config.json` of an `AutoencoderKL`."""
    levels = _count(tensors, r"encoder\.down\.(\d+)\.block\.")
    options = _section(params, "first_stage_config").get("ddconfig")  # narrow autoencoders have fewer groups
    return {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": [
            _shape(tensors, f"encoder.down.{level}.block.0.conv1.weight", 4)[0] for level in range(levels)
        ],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "in_channels": _shape(tensors, "encoder.conv_in.weight", 4)[1],
        "out_channels": _shape(tensors, "decoder.conv_out.weight", 4)[0],
        "latent_channels": _shape(tensors, "decoder.conv_in.weight", 4)[1],
        "layers_per_block": _count(tensors, r"encoder\.down\.0\.block\.(\d+)\."),
        "norm_num_groups": options.get("num_groups", _GROUPS) if isinstance(options, Mapping) else _GROUPS,
        "sample_size": _image_size(params) * 2 ** (levels - 1),
        "scaling_factor": float(params.get("scale_factor", 1.0)),
    }


def text_config(tensors: Tensors, converted: Tensors, params: Mapping[str, Any]) -> dict[str, Any]:
    """`config.json` of a `CLIPTextModel`; `converted` are the tensors under the names of transformers.

    SD 2.x uses the output of OpenCLIP's next-to-last layer, so the configuration counts one layer less than the file holds.
    """
    options = _section(params, "cond_stage_config")
    open_clip = is_open_clip(tensors)
    vocabulary, width = _shape(converted, "text_model.embeddings.token_embedding.weight", 2)
    unused = 1 if open_clip and options.get("layer", "last") == "penultimate" else 0
    projection = converted.get("text_projection.weight")
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "bos_token_id": _START_TOKEN,
        "eos_token_id": _END_TOKEN,
        "pad_token_id": 0 if open_clip else _END_TOKEN,
        "hidden_act": "gelu" if open_clip else "quick_gelu",
        "hidden_size": width,
        "intermediate_size": _shape(converted, "text_model.encoder.layers.0.mlp.fc1.weight", 2)[0],
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": _shape(converted, "text_model.embeddings.position_embedding.weight", 2)[0],
        "num_attention_heads": options.get("heads") or max(width // 64, 1),
        "num_hidden_layers": _count(converted, r"text_model\.encoder\.layers\.(\d+)\.") - unused,
        "projection_dim": width if projection is None else projection.shape[0],
        "vocab_size": vocabulary,
    }


def model_index(components: Iterable[str]) -> dict[str, Any]:
    """`model_index.json` of a Stable Diffusion pipeline, with a ControlNet if that is among the components."""
    control = {"controlnet": ["diffusers", "ControlNetModel"]} if "controlnet" in components else {}
    return {
        "_class_name": f"StableDiffusion{'ControlNet' if control else ''}Pipeline",
        **control,
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }


def tokenizer_files(open_clip: bool) -> dict[str, Any]:
    """The files of a `CLIPTokenizer`, made from the vocabulary inside open_clip.

    SD 1.x pads with the end token, SD 2.x with token 0, "!". (As in the published pipelines, transformers then takes an
    exclamation mark in a prompt for padding.)
    """
    from open_clip.tokenizer import SimpleTokenizer  # heavy, and needed for whole pipelines alone

    tokenizer = SimpleTokenizer()
    special = {_START_TOKEN: _START, _END_TOKEN: _END}
    merges = sorted(tokenizer.bpe_ranks, key=tokenizer.bpe_ranks.__getitem__)
    tokens = {"bos_token": _START, "eos_token": _END, "pad_token": "!" if open_clip else _END, "unk_token": _END}
    return {
        "vocab.json": {special.get(number, token): number for token, number in tokenizer.encoder.items()},
        "merges.txt": "\n".join(["#version: 0.2", *(" ".join(merge) for merge in merges)]) + "\n",
        "special_tokens_map.json": tokens,
        "tokenizer_config.json": {
            "tokenizer_class": "CLIPTokenizer", **tokens, "do_lower_case": True, "model_max_length": 77
        },
    }  # fmt: skip


def _count(tensors: Tensors, pattern: str) -> int:
    """How many different numbers the keys have at the group of a pattern."""
    return len({match[1] for match in (re.match(pattern, key) for key in tensors) if match})


def _shape(tensors: Tensors, key: str, *dimensions: int) -> tuple[int, ...]:
    """The shape of a tensor that must be there and have one of these numbers of dimensions."""
    if key not in tensors:
        raise CheckpointError(f"the weights are incomplete: {key!r} is missing")
    shape = tensors[key].shape
    if len(shape) not in dimensions:
        raise CheckpointError(f"{key!r} has shape {list(shape)}, which no model of this kind has")
    return shape


def _section(params: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The `params` of a part of the model."""
    section = params.get(name)
    options = (section.get("params") or {}) if isinstance(section, Mapping) else None
    if not isinstance(options, Mapping):
        raise CheckpointError(f"the configuration has no {name} with params; name that of a whole model with --config")
    return options


def _image_size(params: Mapping[str, Any]) -> int:
    """Width of the latents."""
    size = params.get("image_size")
    if type(size) is not int:
        raise CheckpointError(f"the configuration's image_size must be a whole number, not {size!r}")
    return size
