"""Published files of Segment Anything, sam_vit_h_4b8939.pth and so on, under the names of facebook/sam-vit-huge."""

import re
from typing import Any

from torch import Tensor

# Layers, heads, and the layers that see the whole picture, by the width of the image encoder.
ENCODERS = {768: (12, 12, [2, 5, 8, 11]), 1024: (24, 16, [5, 11, 17, 23]), 1280: (32, 16, [7, 15, 23, 31])}
# Each pattern is replaced wherever it is found, from the top.
NAMES = [
    (r"^image_encoder\.", "vision_encoder."),
    (r"\.blocks\.", ".layers."),
    (r"patch_embed\.proj\b", "patch_embed.projection"),
    (r"\bnorm(\d|_final_attn)\b", r"layer_norm\1"),
    (r"\bneck\.0\b", "neck.conv1"),
    (r"\bneck\.1\b", "neck.layer_norm1"),
    (r"\bneck\.2\b", "neck.conv2"),
    (r"\bneck\.3\b", "neck.layer_norm2"),
    (r"output_upscaling\.0\b", "upscale_conv1"),
    (r"output_upscaling\.1\b", "upscale_layer_norm"),
    (r"output_upscaling\.3\b", "upscale_conv2"),
    (r"mask_downscaling\.0\b", "mask_embed.conv1"),
    (r"mask_downscaling\.1\b", "mask_embed.layer_norm1"),
    (r"mask_downscaling\.3\b", "mask_embed.conv2"),
    (r"mask_downscaling\.4\b", "mask_embed.layer_norm2"),
    (r"mask_downscaling\.6\b", "mask_embed.conv3"),
    (r"point_embeddings\.", "point_embed."),
    (r"^prompt_encoder\.pe_layer\.positional_encoding_gaussian_matrix$", "shared_image_embedding.positional_embedding"),
    (r"(iou_prediction_head|output_hypernetworks_mlps\.\d)\.layers\.0\.", r"\1.proj_in."),
    (r"(iou_prediction_head|output_hypernetworks_mlps\.\d)\.layers\.1\.", r"\1.layers.0."),
    (r"(iou_prediction_head|output_hypernetworks_mlps\.\d)\.layers\.2\.", r"\1.proj_out."),
]


def hub_names(published: dict[str, Tensor]) -> dict[str, Tensor]:
    """The published entries under the hub's names."""
    renamed = {}
    for key, tensor in published.items():
        for pattern, name in NAMES:
            key = re.sub(pattern, name, key)
        renamed[key] = tensor
    shared = "shared_image_embedding.positional_embedding"
    if shared in renamed:  # which the prompt encoder has, too
        renamed["prompt_encoder.shared_embedding.positional_embedding"] = renamed[shared]
    return renamed


def vision_config(entries: dict[str, Tensor]) -> dict[str, Any]:
    """The image encoder's configuration in transformers' terms, as the entries tell it.

    Raises:
        ValueError: for an encoder of another kind, such as MobileSAM's.
    """
    width = len(entries.get("vision_encoder.patch_embed.projection.weight", ()))
    if width not in ENCODERS:
        raise ValueError("the file holds none of Segment Anything's image encoders vit_b, vit_l and vit_h")
    layers, heads, whole = ENCODERS[width]
    sizes = {"hidden_size": width, "mlp_dim": 4 * width, "num_hidden_layers": layers, "num_attention_heads": heads}
    return sizes | {"global_attn_indexes": whole}
