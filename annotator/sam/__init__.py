"""All masks that Segment Anything finds in a picture. A. Kirillov et al., "Segment Anything", ICCV 2023."""

from pathlib import Path
from typing import Annotated

import numpy as np
from PIL import Image
from torch import nn

from annotator.library import HubModelDetector, load_entries
from annotator.network import LazyNetwork
from annotator.sam.published import hub_names, vision_config
from annotator.segmentation.colours import colour_labels, distinct_colours, stack_masks
from annotator.weights import read_state_dict

POINTS_AT_ONCE = 64

Quality = Annotated[float, 0.0, 1.0, "quality, as the network judges it, above which a mask counts"]
Stability = Annotated[float, 0.0, 1.0, "how little a mask must change with its threshold to count"]


class SamDetector(HubModelDetector):
    """Each mask in a colour of its own, small ones over large ones, the rest black (H, W, 3).

    Args:
        weights: id or folder of a model of transformers that makes masks from points: SAM, SAM 2, SAM-HQ; or a published file of
            SAM, sam_vit_h_4b8939.pth and so on.
    """

    network = LazyNetwork("sam_vit_h_4b8939.pth", "sam_vit_l_0b3195.pth", "sam_vit_b_01ec64.pth")
    model_types = ("vit_h", "vit_l", "vit_b")
    model = "facebook/sam-vit-base"
    auto_class = "AutoModelForMaskGeneration"

    def load_published(self, path: Path) -> nn.Module:
        transformers = self.transformers
        entries = hub_names(read_state_dict(path))
        self.processor = transformers.SamImageProcessor()
        config = transformers.SamConfig(vision_config=transformers.SamVisionConfig(**vision_config(entries)))
        return load_entries(transformers.SamModel, config, entries, path)

    def predict(
        self, images: list[np.ndarray], points: int, pred_iou_thresh: float, stability_score_thresh: float
    ) -> list[np.ndarray]:
        """For each picture (H, W), int: numbers of masks, largest first; -1 for nothing."""
        models = {"model": self.network, "image_processor": self.processor, "device": self.device}
        pipeline = self.transformers.pipeline("mask-generation", **models)
        limits = {"pred_iou_thresh": pred_iou_thresh, "stability_score_thresh": stability_score_thresh}
        results = []
        for image in images:
            picture = Image.fromarray(image)
            masks = pipeline(picture, points_per_batch=POINTS_AT_ONCE, points_per_crop=points, **limits)["masks"]
            results.append(stack_masks([np.asarray(mask, dtype=bool) for mask in masks], image.shape[:2]))
        return results

    def decode(
        self,
        output: np.ndarray,
        size: tuple[int, int],
        points: Annotated[int, 1, 128, "points along each side of the picture that masks are looked for at"] = 32,
        pred_iou_thresh: Quality = 0.88,
        stability_score_thresh: Stability = 0.95,
    ) -> np.ndarray:
        labels = output[: size[0], : size[1]]
        return colour_labels(labels, distinct_colours(labels.max(initial=0) + 1))
