"""Tiny random networks of transformers, saved to folders as the published ones are: configuration, weights, processor."""

import json
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")

MEAN_STD = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


def _save(folder: Path, network: "transformers.PreTrainedModel", processor: object, seed: int = 0) -> Path:
    """Both saved to `folder`; random weights of some size, so that maps are not constant."""
    numbers = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() > 1:
                fan_in = parameter[0].numel()
                parameter.copy_(torch.randn(parameter.shape, generator=numbers) * fan_in**-0.5)
            else:
                parameter.add_(torch.randn(parameter.shape, generator=numbers) * 0.1)
    network.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def _dino(**changes: object) -> "transformers.Dinov2Config":
    size = {"hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2, "mlp_ratio": 2, "image_size": 70}
    return transformers.Dinov2Config(
        **size, patch_size=14, out_indices=[1, 2, 3, 4], reshape_hidden_states=False, **changes
    )


def depth_anything(folder: Path, **changes: object) -> Path:
    """Depth Anything V2; `depth_estimation_type="metric", max_depth=20` for its metric variant."""
    config = transformers.DepthAnythingConfig(
        backbone_config=_dino(), reassemble_hidden_size=24, neck_hidden_sizes=[8, 8, 16, 16], fusion_hidden_size=8,
        head_hidden_size=8, **changes,
    )  # fmt: skip
    processor = transformers.DPTImageProcessor(
        size={"height": 70, "width": 70}, keep_aspect_ratio=True, ensure_multiple_of=14, do_rescale=True, **MEAN_STD
    )
    return _save(folder, transformers.DepthAnythingForDepthEstimation(config), processor)


def dpt(folder: Path) -> Path:
    """A depth model of another kind: DPT, which MiDaS 3 is."""
    config = transformers.DPTConfig(
        hidden_size=24, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32, image_size=64, patch_size=16,
        backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8, 8, 16, 16], fusion_hidden_size=8, is_hybrid=False,
    )  # fmt: skip
    processor = transformers.DPTImageProcessor(size={"height": 64, "width": 64}, **MEAN_STD)
    return _save(folder, transformers.DPTForDepthEstimation(config), processor)


ZOE = {
    "neck_hidden_sizes": [8, 8, 16, 16], "fusion_hidden_size": 8, "num_relative_features": 8, "bottleneck_features": 8,
    "bin_embedding_dim": 8, "num_attractors": [4, 2, 2, 1],
    "bin_configurations": [{"n_bins": 8, "min_depth": 0.001, "max_depth": 10.0}],
}  # fmt: skip
ZOE_PROCESSOR = {"size": {"height": 64, "width": 96}, "ensure_multiple_of": 32, "keep_aspect_ratio": True}


def zoedepth(folder: Path) -> Path:
    """ZoeDepth with one head of bins, as Intel/zoedepth-nyu has."""
    backbone = transformers.BeitConfig(
        hidden_size=24, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32, image_size=64, patch_size=16,
        use_relative_position_bias=True, reshape_hidden_states=False,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    network = transformers.ZoeDepthForDepthEstimation(transformers.ZoeDepthConfig(backbone_config=backbone, **ZOE))
    return _save(folder, network, transformers.ZoeDepthImageProcessor(**ZOE_PROCESSOR))


def segformer(folder: Path, classes: int = 150) -> Path:
    """A semantic segmentation model with logits for each pixel."""
    config = transformers.SegformerConfig(
        num_labels=classes, depths=[1, 1, 1, 1], hidden_sizes=[8, 8, 16, 16], num_attention_heads=[1, 1, 2, 2],
        decoder_hidden_size=16,
    )  # fmt: skip
    processor = transformers.SegformerImageProcessor(size={"height": 64, "width": 64}, **MEAN_STD)
    return _save(folder, transformers.SegformerForSemanticSegmentation(config), processor)


def _swin() -> "transformers.SwinConfig":
    return transformers.SwinConfig(
        image_size=64, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip


def mask2former(folder: Path, classes: int = 133) -> Path:
    """A universal segmentation model: masks and their classes, for all three tasks."""
    config = transformers.Mask2FormerConfig(
        backbone_config=_swin(), feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=32,
        dim_feedforward=32, encoder_layers=1, decoder_layers=2, num_attention_heads=2, num_queries=10,
        num_labels=classes,
    )  # fmt: skip
    processor = transformers.Mask2FormerImageProcessor(
        size={"shortest_edge": 64, "longest_edge": 128}, num_labels=classes, ignore_index=255, **MEAN_STD
    )
    return _save(folder, transformers.Mask2FormerForUniversalSegmentation(config), processor)


def oneformer(folder: Path, classes: int = 150, class_info_file: bool = True) -> Path:
    """OneFormer with its tokenizer; `class_info_file` names a file that lies on the hub, as published ones do."""
    config = transformers.OneFormerConfig(
        backbone_config=_swin(), num_classes=classes, num_labels=classes, num_queries=10, hidden_dim=32, mask_dim=32,
        conv_dim=32, encoder_feedforward_dim=32, dim_feedforward=32, encoder_layers=1, decoder_layers=3,
        num_attention_heads=2, query_dec_layers=1, text_encoder_width=32, text_encoder_context_length=77,
        text_encoder_num_layers=1, text_encoder_proj_layers=1, text_encoder_vocab_size=600, use_auxiliary_loss=False,
        is_training=False,
    )  # fmt: skip
    processor = transformers.OneFormerImageProcessor(
        size={"shortest_edge": 64, "longest_edge": 128}, num_labels=classes, ignore_index=255, **MEAN_STD
    )
    _save(folder, transformers.OneFormerForUniversalSegmentation(config), processor)
    if class_info_file:
        path = folder / "preprocessor_config.json"
        path = path if path.exists() else folder / "processor_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"class_info_file": "ade20k_panoptic.json"}))
    clip_tokenizer(folder)
    return folder


def clip_tokenizer(folder: Path) -> None:
    """CLIP's tokenizer with single letters for words, in its two files."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    entries = ["!", *letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({entry: index for index, entry in enumerate(entries)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "pad_token": "<|endoftext|>"})
    )


def sam(folder: Path) -> Path:
    """Segment Anything."""
    config = transformers.SamConfig(
        vision_config=transformers.SamVisionConfig(
            hidden_size=16, output_channels=16, num_hidden_layers=1, num_attention_heads=2, image_size=64, patch_size=8,
            mlp_dim=16, window_size=4, num_pos_feats=8, global_attn_indexes=[0],
        ),
        prompt_encoder_config=transformers.SamPromptEncoderConfig(
            hidden_size=16, image_size=64, patch_size=8, mask_input_channels=4
        ),
        mask_decoder_config=transformers.SamMaskDecoderConfig(
            hidden_size=16, mlp_dim=16, num_attention_heads=2, iou_head_hidden_dim=16, num_hidden_layers=1
        ),
    )  # fmt: skip
    processor = transformers.SamImageProcessor(
        size={"longest_edge": 64}, pad_size={"height": 64, "width": 64}, mask_size={"longest_edge": 32},
        mask_pad_size={"height": 32, "width": 32},
    )  # fmt: skip
    return _save(folder, transformers.SamModel(config), processor)
