"""The file that ControlNet 1.1 and controlnet_aux use, ZoeD_M12_N.pt, under the names of Intel/zoedepth-nyu."""

import re

from torch import Tensor

# Of all that differs from the configuration's defaults, in transformers' terms.
BACKBONE = {
    "image_size": 384, "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096,
    "use_relative_position_bias": True, "reshape_hidden_states": False, "layer_norm_eps": 1e-6,
    "out_features": ["stage6", "stage12", "stage18", "stage24"],
}  # fmt: skip
CONFIG = {"neck_hidden_sizes": [256, 512, 1024, 1024]}
PROCESSOR = {"size": {"height": 384, "width": 512}, "keep_aspect_ratio": True, "ensure_multiple_of": 32}
# Patterns are tried from the top, and the first one that matches a whole name counts; <n> and >n< see `_hub_name`.
NAMES = [
    (r"core\.core\.pretrained\.model\.cls_token", "backbone.embeddings.cls_token"),
    (r"core\.core\.pretrained\.model\.patch_embed\.proj\.(\w+)", r"backbone.embeddings.patch_embeddings.projection.\1"),
    (r"core\.core\.pretrained\.model\.blocks\.(.+)", r"backbone.encoder.layer.\1"),
    (r"core\.core\.pretrained\.act_postprocess(\d)\.0\.project\.0\.(\w+)", r"neck.reassemble_stage.readout_projects.<\1>.0.\2"),
    (r"core\.core\.pretrained\.act_postprocess(\d)\.3\.(\w+)", r"neck.reassemble_stage.layers.<\1>.projection.\2"),
    (r"core\.core\.pretrained\.act_postprocess(\d)\.4\.(\w+)", r"neck.reassemble_stage.layers.<\1>.resize.\2"),
    (r"core\.core\.scratch\.layer(\d)_rn\.(\w+)", r"neck.convs.<\1>.\2"),
    (r"core\.core\.scratch\.refinenet(\d)\.out_conv\.(\w+)", r"neck.fusion_stage.layers.>\1<.projection.\2"),
    (r"core\.core\.scratch\.refinenet(\d)\.resConfUnit(\d)\.conv(\d)\.(\w+)",
     r"neck.fusion_stage.layers.>\1<.residual_layer\2.convolution\3.\4"),
    (r"core\.core\.scratch\.output_conv\.0\.(\w+)", r"relative_head.conv1.\1"),
    (r"core\.core\.scratch\.output_conv\.2\.(\w+)", r"relative_head.conv2.\1"),
    (r"core\.core\.scratch\.output_conv\.4\.(\w+)", r"relative_head.conv3.\1"),
    (r"(.+)\._net\.0\.(\w+)", r"metric_head.\1.conv1.\2"),
    (r"(.+)\._net\.2\.(\w+)", r"metric_head.\1.conv2.\2"),
    (r"(conv2|conditional_log_binomial\.mlp)\.(.+)", r"metric_head.\1.\2"),
]  # fmt: skip
IN_A_LAYER = {
    "gamma_1": "lambda_1", "gamma_2": "lambda_2", "norm1": "layernorm_before", "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense", "attn.proj": "attention.output.dense",
    "attn.q_bias": "attention.attention.query.bias", "attn.v_bias": "attention.attention.value.bias",
    "attn.relative_position_bias_table": "attention.attention.relative_position_bias.relative_position_bias_table",
}  # fmt: skip


def hub_names(published: dict[str, Tensor]) -> dict[str, Tensor]:
    """The published entries under the hub's names; those that only training needs are dropped."""
    renamed = {}
    for key, tensor in published.items():
        name = _hub_name(key)
        if name is None:
            continue
        if name.endswith("attn.qkv.weight"):
            for part, weight in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                renamed[name.replace("attn.qkv", f"attention.attention.{part}")] = weight.contiguous()
            continue
        for theirs, ours in IN_A_LAYER.items():
            name = re.sub(rf"(\.layer\.\d+\.){re.escape(theirs)}\b", rf"\g<1>{ours}", name)
        renamed[name] = tensor
    return renamed


def _hub_name(key: str) -> str | None:
    """The hub's name, but for what lies in a layer of the backbone; None for entries without one."""
    for pattern, name in NAMES:
        if match := re.fullmatch(pattern, key):
            name = match.expand(name)
            name = re.sub(r"<(\d)>", lambda found: str(int(found[1]) - 1), name)  # 1 to 4 become 0 to 3
            return re.sub(r">(\d)<", lambda found: str(4 - int(found[1])), name)  # and here 3 to 0
    return None
