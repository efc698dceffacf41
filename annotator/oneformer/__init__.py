"""Semantic segmentation by OneFormer, as ControlNet 1.1 uses it. J. Jain et al., "OneFormer", CVPR 2023."""

from annotator.segmentation import SegmentationDetector


class OneformerCOCODetector(SegmentationDetector):
    """The 133 classes of COCO in their colours (H, W, 3)."""

    model = "shi-labs/oneformer_coco_swin_large"


class OneformerADE20kDetector(SegmentationDetector):
    """The 150 classes of ADE20K in their colours (H, W, 3)."""

    model = "shi-labs/oneformer_ade20k_swin_large"
