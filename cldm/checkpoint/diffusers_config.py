"""The configuration files that diffusers and transformers need beside the weights.

Widths, depths and channels are read from the weights' shapes; from our configuration comes what shapes do not show:
attention heads, the latents' scale and size, and what the network predicts. Tensors are named as in diffusers; what does
not fit is a `CheckpointError`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from cldm.checkpoint.names import count_blocks
from ldm.files import CheckpointError
from ldm.files.tensors import Tensors

_GROUPS = 32  # of every group normalisation
_ENCODER = {"act_fn": "silu", "norm_eps": 1e-05, "norm_num_groups": _GROUPS, "only_cross_attention": False}
_ENCODER |= {"downsample_padding": 1, "flip_sin_to_cos": True, "freq_shift": 0}
_START_TOKEN, _END_TOKEN = 49406, 49407
_START, _END = "<|startoftext|>", "<|endoftext|>"


def component_config(
    component: str,
    tensors: Tensors,
    params: Mapping[str, Any],
    prediction: str = "eps",
    pooling: bool = False,
    open_clip: bool = False,
) -> dict[str, Any]:
    """`config.json` of a component, one of `names.COMPONENTS`.

    Args:
        tensors: of the component.
        params: of the whole model's configuration.
        prediction: of the UNet, "eps", "v" or "x0".
        pooling: `global_average_pooling` of the ControlNet.
        open_clip: whether the text encoder is OpenCLIP's.
    """
    if component == "vae":
        return _vae_config(tensors, params)
    if component == "text_encoder":
        return _text_config(tensors, params, open_clip)
    if component == "unet":
        encoder = _encoder_config(tensors, _section(params, "unet_config"))
        return {
            "_class_name": "UNet2DConditionModel",
            **encoder,
            "up_block_types": [name.replace("Down", "Up") for name in reversed(encoder["down_block_types"])],
            "mid_block_type": "UNetMidBlock2DCrossAttn",
            "out_channels": _shape(tensors, "conv_out.weight", 4)[0],
            "sample_size": _image_size(params),
            "center_input_sample": False,
            "mid_block_scale_factor": 1,
            "upcast_attention": prediction == "v",  # as of SD 2.1: in half precision its attention overflows
        }
    hint = [f"controlnet_cond_embedding.{name}.weight" for name in ("conv_in", "blocks.1", "blocks.3", "blocks.5")]
    return {
        "_class_name": "ControlNetModel",
        **_encoder_config(tensors, _section(params, "control_stage_config")),
        "conditioning_channels": _shape(tensors, hint[0], 4)[1],
        "conditioning_embedding_out_channels": [_shape(tensors, name, 4)[0] for name in hint],
        "controlnet_conditioning_channel_order": "rgb",
        "global_pool_conditions": pooling,
    }


def _encoder_config(tensors: Tensors, options: Mapping[str, Any]) -> dict[str, Any]:
    """What UNet and ControlNet have in common; `options` are those of our network."""
    resnets = count_blocks(tensors, r"down_blocks\.(\d{1,4})\.resnets\.\d+\.conv1\.weight")
    attentions = count_blocks(tensors, r"down_blocks\.(\d{1,4})\.attentions\.\d+\.norm\.weight")
    if len(set(resnets.values())) != 1 or any(count != resnets[level] for level, count in attentions.items()):
        raise CheckpointError("levels or blocks that differ in depth or attention, which diffusers cannot express")
    channels = [_shape(tensors, f"down_blocks.{i}.resnets.0.conv2.weight", 4)[0] for i in range(len(resnets))]
    depths = count_blocks(tensors, r"mid_block\.attentions\.0\.transformer_blocks\.(\d{1,4})\.")
    text_key = next((key for key in tensors if key.endswith("attn2.to_k.weight")), None)
    if text_key is None:
        raise CheckpointError("a UNet without attention to a text, which diffusers keeps in other classes")
    heads, width = options.get("num_heads", -1), options.get("num_head_channels", -1)
    return {
        **_ENCODER,
        "attention_head_dim": heads if width == -1 else [max(c // width, 1) for c in channels],  # a count of heads
        "block_out_channels": channels,
        "cross_attention_dim": _shape(tensors, text_key, 2)[1],
        "down_block_types": ["CrossAttnDownBlock2D" if attentions[i] else "DownBlock2D" for i in range(len(resnets))],
        "in_channels": _shape(tensors, "conv_in.weight", 4)[1],
        "layers_per_block": resnets[0],
        "transformer_layers_per_block": len(depths),
        "use_linear_projection": len(_shape(tensors, "mid_block.attentions.0.proj_in.weight", 2, 4)) == 2,
    }


def _vae_config(tensors: Tensors, params: Mapping[str, Any]) -> dict[str, Any]:
    resnets = count_blocks(tensors, r"encoder\.down_blocks\.(\d{1,4})\.resnets\.\d+\.conv1\.weight")
    levels = len(resnets)
    firsts = [f"encoder.down_blocks.{i}.resnets.0.conv1.weight" for i in range(levels)]
    options = _section(params, "first_stage_config").get("ddconfig")  # narrow autoencoders have fewer groups
    return {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": [_shape(tensors, key, 4)[0] for key in firsts],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "in_channels": _shape(tensors, "encoder.conv_in.weight", 4)[1],
        "out_channels": _shape(tensors, "decoder.conv_out.weight", 4)[0],
        "latent_channels": _shape(tensors, "decoder.conv_in.weight", 4)[1],
        "layers_per_block": resnets[0],
        "norm_num_groups": options.get("num_groups", _GROUPS) if isinstance(options, Mapping) else _GROUPS,
        "sample_size": _image_size(params) * 2 ** (levels - 1),
        "scaling_factor": float(params.get("scale_factor", 1.0)),
    }


def _text_config(tensors: Tensors, params: Mapping[str, Any], open_clip: bool) -> dict[str, Any]:
    """That of a `CLIPTextModel`.

    SD 2.x uses the output of OpenCLIP's next-to-last layer, so the configuration counts one layer less than the file holds.
    """
    options = _section(params, "cond_stage_config")
    vocabulary, width = _shape(tensors, "text_model.embeddings.token_embedding.weight", 2)
    unused = 1 if open_clip and options.get("layer", "last") == "penultimate" else 0
    projection = tensors.get("text_projection.weight")
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "bos_token_id": _START_TOKEN,
        "eos_token_id": _END_TOKEN,
        "pad_token_id": 0 if open_clip else _END_TOKEN,
        "hidden_act": "gelu" if open_clip else "quick_gelu",
        "hidden_size": width,
        "intermediate_size": _shape(tensors, "text_model.encoder.layers.0.mlp.fc1.weight", 2)[0],
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": _shape(tensors, "text_model.embeddings.position_embedding.weight", 2)[0],
        "num_attention_heads": options.get("heads") or max(width // 64, 1),
        "num_hidden_layers": len(count_blocks(tensors, r"text_model\.encoder\.layers\.(\d{1,4})\.")) - unused,
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
    options = {"tokenizer_class": "CLIPTokenizer", "do_lower_case": True, "model_max_length": 77}
    return {
        "vocab.json": {special.get(number, token): number for token, number in tokenizer.encoder.items()},
        "merges.txt": "\n".join(["#version: 0.2", *(" ".join(merge) for merge in merges)]) + "\n",
        "special_tokens_map.json": tokens,
        "tokenizer_config.json": {**options, **tokens},
    }


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
