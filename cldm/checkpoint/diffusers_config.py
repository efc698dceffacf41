"""The configuration files that diffusers and transformers need beside the weights.

Widths, depths and channels are read from the weights' shapes; from our configuration comes what shapes do not show:
attention heads, the noise schedule, the latents' scale, and what the network predicts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from cldm.checkpoint.errors import CheckpointError
from cldm.checkpoint.lazy import Entries
from cldm.checkpoint.names import HINT_ENCODER, encoder_levels, is_open_clip

_GROUPS = 32  # of every group normalisation
_START_TOKEN, _END_TOKEN = 49406, 49407


def unet_config(entries: Entries, params: Mapping[str, Any], prediction: str) -> dict[str, Any]:
    """`config.json` of a `UNet2DConditionModel`; as the others here, it raises `CheckpointError` for what does not fit.

    Args:
        entries: of the UNet, under our names without prefix.
        params: of the whole model, as the YAML file gives them.
        prediction: "eps", "v" or "x0".
    """
    encoder, attended = _encoder_config(entries, _section(params, "unet_config"))
    up = [f"{'CrossAttn' if a else ''}UpBlock2D" for a in reversed(attended)]
    return {
        "_class_name": "UNet2DConditionModel",
        **encoder,
        "up_block_types": up,
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "out_channels": _shape(entries, "out.2.weight", 4)[0],
        "sample_size": _image_size(params),
        "center_input_sample": False,
        "mid_block_scale_factor": 1,
        "upcast_attention": prediction == "v",  # as of SD 2.1: in half precision its attention overflows
    }


def controlnet_config(entries: Entries, params: Mapping[str, Any], pooling: bool) -> dict[str, Any]:
    """`config.json` of a `ControlNetModel`; `pooling` is `global_average_pooling`."""
    encoder, _ = _encoder_config(entries, _section(params, "control_stage_config"))
    hint = [_shape(entries, f"{ours}.weight", 4) for ours, _ in HINT_ENCODER]
    return {
        "_class_name": "ControlNetModel",
        **encoder,
        "conditioning_channels": hint[0][1],
        "conditioning_embedding_out_channels": [shape[0] for shape in hint[0:-1:2]],
        "controlnet_conditioning_channel_order": "rgb",
        "global_pool_conditions": pooling,
    }


def _encoder_config(entries: Entries, options: Mapping[str, Any]) -> tuple[dict[str, Any], list[bool]]:
    """What UNet and ControlNet have in common, and whether each level has attention."""
    counts = encoder_levels(entries)
    _check_levels(counts, options)
    channels, attended, position = [], [], 1
    for count in counts:
        blocks = range(position, position + count)
        having = [f"input_blocks.{i}.1.norm.weight" in entries for i in blocks]
        if any(having) != all(having):
            raise CheckpointError("some but not all blocks of a level have attention, which diffusers cannot express")
        channels.append(_shape(entries, f"input_blocks.{position}.0.out_layers.3.weight", 4)[0])
        attended.append(having[0])
        position += count + 1
    text_key = next((key for key in entries if key.endswith("attn2.to_k.weight")), None)
    if text_key is None:
        raise CheckpointError("a UNet without attention to a text, which diffusers keeps in other classes")
    transformer = "middle_block.1.transformer_blocks"
    depth = len({m[1] for key in entries if (m := re.match(re.escape(transformer) + r"\.(\d+)\.", key))})
    heads = options.get("num_heads", -1)
    width = options.get("num_head_channels", -1)
    config = {
        "act_fn": "silu",
        "attention_head_dim": heads
        if width == -1
        else [max(c // width, 1) for c in channels],  # a count, despite its name
        "block_out_channels": channels,
        "cross_attention_dim": _shape(entries, text_key, 2)[1],
        "down_block_types": [f"{'CrossAttn' if a else ''}DownBlock2D" for a in attended],
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": _shape(entries, "input_blocks.0.0.weight", 4)[1],
        "layers_per_block": counts[0],
        "norm_eps": 1e-05,
        "norm_num_groups": _GROUPS,
        "only_cross_attention": False,
        "transformer_layers_per_block": depth,
        "use_linear_projection": len(_shape(entries, "middle_block.1.proj_in.weight", 2, 4)) == 2,
    }
    return config, attended


def _check_levels(counts: list[int], options: Mapping[str, Any]) -> None:
    configured = options.get("num_res_blocks", 2)
    levels = len(options.get("channel_mult", (1, 2, 4, 8)))
    expected = [configured] * levels if isinstance(configured, int) else list(configured)
    if counts != expected:
        raise CheckpointError(
            f"the weights have {counts} blocks a level, the configuration {expected}; name the right --config"
        )
    if len(set(counts)) != 1:
        raise CheckpointError(f"levels of different depth, {counts}, which diffusers cannot express")


def vae_config(entries: Entries, params: Mapping[str, Any]) -> dict[str, Any]:
    """`config.json` of an `AutoencoderKL`; entries under our names without prefix."""
    blocks = [m for key in entries if (m := re.match(r"encoder\.down\.(\d+)\.block\.(\d+)\.conv1\.weight", key))]
    levels = len({m[1] for m in blocks})
    channels = [_shape(entries, f"encoder.down.{level}.block.0.conv1.weight", 4)[0] for level in range(levels)]
    return {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": channels,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "in_channels": _shape(entries, "encoder.conv_in.weight", 4)[1],
        "out_channels": _shape(entries, "decoder.conv_out.weight", 4)[0],
        "latent_channels": _shape(entries, "decoder.conv_in.weight", 4)[1],
        "layers_per_block": len(blocks) // max(levels, 1),
        "norm_num_groups": _vae_groups(params),
        "sample_size": _image_size(params) * 2 ** (levels - 1),
        "scaling_factor": float(params.get("scale_factor", 1.0)),
    }


def _vae_groups(params: Mapping[str, Any]) -> int:
    """Groups of the autoencoder's norms, which shapes do not show; narrow autoencoders have fewer than published ones."""
    options = _section(params, "first_stage_config").get("ddconfig")
    return options.get("num_groups", _GROUPS) if isinstance(options, Mapping) else _GROUPS


def text_config(entries: Entries, converted: Entries, params: Mapping[str, Any]) -> dict[str, Any]:
    """`config.json` of a `CLIPTextModel`.

    SD 2.x uses the output of OpenCLIP's next-to-last layer, so the configuration counts one layer less than the file holds.

    Args:
        entries: of the text encoder, under our names without prefix.
        converted: the same under those of transformers.
        params: of the whole model.
    """
    options = _section(params, "cond_stage_config")
    open_clip = is_open_clip(entries)
    vocabulary, width = _shape(converted, "text_model.embeddings.token_embedding.weight", 2)
    layers = len({m[1] for key in converted if (m := re.match(r"text_model\.encoder\.layers\.(\d+)\.", key))})
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
        "num_hidden_layers": layers - unused,
        "projection_dim": width if projection is None else projection.info.shape[0],
        "vocab_size": vocabulary,
    }


def model_index(components: Iterable[str]) -> dict[str, Any]:
    """`model_index.json` of a Stable Diffusion pipeline, with a ControlNet if that is among the components."""
    control = "controlnet" in components
    return {
        "_class_name": f"StableDiffusion{'ControlNet' if control else ''}Pipeline",
        **({"controlnet": ["diffusers", "ControlNetModel"]} if control else {}),
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

    start, end = "<|startoftext|>", "<|endoftext|>"
    tokenizer = SimpleTokenizer()
    vocabulary = {
        {_START_TOKEN: start, _END_TOKEN: end}.get(number, token): number for token, number in tokenizer.encoder.items()
    }
    merges = sorted(tokenizer.bpe_ranks, key=tokenizer.bpe_ranks.__getitem__)
    padding = "!" if open_clip else end
    return {
        "vocab.json": vocabulary,
        "merges.txt": "\n".join(["#version: 0.2", *(" ".join(merge) for merge in merges)]) + "\n",
        "special_tokens_map.json": {"bos_token": start, "eos_token": end, "pad_token": padding, "unk_token": end},
        "tokenizer_config.json": {
            "tokenizer_class": "CLIPTokenizer",
            "bos_token": start,
            "eos_token": end,
            "pad_token": padding,
            "unk_token": end,
            "do_lower_case": True,
            "model_max_length": 77,
        },
    }


def _shape(entries: Entries, key: str, *dimensions: int) -> tuple[int, ...]:
    """The shape of an entry that must be there and have one of these numbers of dimensions."""
    if key not in entries:
        raise CheckpointError(f"the weights are incomplete: {key!r} is missing")
    shape = entries[key].info.shape
    if len(shape) not in dimensions:
        raise CheckpointError(f"{key!r} has shape {list(shape)}, which no model of this kind has")
    return shape


def _section(params: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The `params` of a part of the model."""
    section = params.get(name)
    if not isinstance(section, Mapping):
        raise CheckpointError(f"the configuration has no {name}; name that of a whole model with --config")
    options = section.get("params") or {}
    if not isinstance(options, Mapping):
        raise CheckpointError(f"the configuration's {name}.params is not a mapping")
    return options


def _image_size(params: Mapping[str, Any]) -> int:
    """Width of the latents."""
    size = params.get("image_size")
    if type(size) is not int:
        raise CheckpointError(f"the configuration's image_size must be a whole number, not {size!r}")
    return size
