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
BACKBONE_PREFIX, DECODER_PREFIX = r"^core\.core\.pretrained\.", r"^core\.core\.scratch\."
# Each pattern is replaced wherever it is found, from the top. <1> to <4> become 0 to 3, and >1< to >4< become 3 to 0.
NAMES = [
    (BACKBONE_PREFIX + r"model\.cls_token", "backbone.embeddings.cls_token"),
    (BACKBONE_PREFIX + r"model\.patch_embed\.proj", "backbone.embeddings.patch_embeddings.projection"),
    (BACKBONE_PREFIX + r"model\.blocks", "backbone.encoder.layer"),
    (BACKBONE_PREFIX + r"act_postprocess(\d)\.0\.project\.0", r"neck.reassemble_stage.readout_projects.<\1>.0"),
    (BACKBONE_PREFIX + r"act_postprocess(\d)\.3", r"neck.reassemble_stage.layers.<\1>.projection"),
    (BACKBONE_PREFIX + r"act_postprocess(\d)\.4", r"neck.reassemble_stage.layers.<\1>.resize"),
    (DECODER_PREFIX + r"layer(\d)_rn", r"neck.convs.<\1>"),
    (DECODER_PREFIX + r"refinenet(\d)\.out_conv", r"neck.fusion_stage.layers.>\1<.projection"),
    (DECODER_PREFIX + r"refinenet(\d)\.resConfUnit(\d)\.conv(\d)", r"neck.fusion_stage.layers.>\1<.residual_layer\2.convolution\3"),
    (DECODER_PREFIX + r"output_conv\.0", "relative_head.conv1"),
    (DECODER_PREFIX + r"output_conv\.2", "relative_head.conv2"),
    (DECODER_PREFIX + r"output_conv\.4", "relative_head.conv3"),
    (r"^(.+)\._net\.0", r"metric_head.\1.conv1"),
    (r"^(.+)\._net\.2", r"metric_head.\1.conv2"),
    (r"^(conv2|conditional_log_binomial\.mlp)\.", r"metric_head.\1."),
    (r"\.gamma_(\d)", r".lambda_\1"),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.attn\.q_bias", ".attention.attention.query.bias"),
    (r"\.attn\.v_bias", ".attention.attention.value.bias"),
    (r"\.attn\.(relative_position_bias)_table", r".attention.attention.\1.\1_table"),
]  # fmt: skip


def hub_names(published: dict[str, Tensor]) -> dict[str, Tensor]:
    """The published entries under the hub's names; those that only training needs are dropped."""
    renamed = {}
    for key, tensor in published.items():
        name = key
        for pattern, theirs in NAMES:
            name = re.sub(pattern, theirs, name)
        name = re.sub(r"<(\d)>", lambda found: str(int(found[1]) - 1), name)
        name = re.sub(r">(\d)<", lambda found: str(4 - int(found[1])), name)
        if name.endswith("attn.qkv.weight"):
            for part, weight in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                renamed[name.replace("attn.qkv", f"attention.attention.{part}")] = weight.contiguous()
        elif name != key:
            renamed[name] = tensor
    return renamed
