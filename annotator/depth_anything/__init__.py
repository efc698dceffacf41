"""Depth by Depth Anything V2, or by any other depth model of transformers; and normals from that depth.

L. Yang et al., "Depth Anything V2", NeurIPS 2024.
"""

import math
from types import SimpleNamespace
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor

from annotator.library import HubModelDetector
from annotator.midas import Background, Flatness, depth_to_map, depth_to_normals, relative_depth

Distances = Annotated[bool, "the network gives distances, though its configuration does not say so"]
DISTANCE_MODELS = ("depth_pro", "glpn", "prompt_depth_anything", "zoedepth")
# Slopes are taken of a depth from 0 to 1000 over a side of 384 pixels, as MiDaS gives it, about, so that `a` means the same.
RELIEF, SIDE = 1000.0, 384


class DepthAnythingDetector(HubModelDetector):
    """Inverse depth of a picture (H, W), near is light.

    Args:
        weights: id or folder of any depth model of transformers: relative ones give inverse depth, metric ones distances, which
            are inverted.
    """

    model = "depth-anything/Depth-Anything-V2-Small-hf"
    auto_class = "AutoModelForDepthEstimation"

    def predict(self, images: list[np.ndarray], **parameters: Any) -> list[Tensor]:
        inputs = self.inputs(images)
        depth = self.predict_depth(inputs["pixel_values"])
        outputs = SimpleNamespace(predicted_depth=depth, field_of_view=None)
        sizes = [image.shape[:2] for image in images]  # the second argument has several names in transformers
        return [result["predicted_depth"] for result in self.processor.post_process_depth_estimation(outputs, sizes)]

    def predict_depth(self, pixels: Tensor) -> Tensor:
        """The network's depth for its input (B, 3, h, w): (B, h, w)."""
        return self.network(pixel_values=pixels).predicted_depth

    def inverse_depth(self, output: Tensor, size: tuple[int, int], distances: bool) -> np.ndarray:
        """(H, W), float32: large is near."""
        depth = output[: size[0], : size[1]].float()
        config = self.network.config
        metric = config.model_type in DISTANCE_MODELS or getattr(config, "depth_estimation_type", "") == "metric"
        if distances or metric:
            depth = 1.0 / depth.clamp(min=1e-4)
        return torch.nan_to_num(depth, posinf=0.0, neginf=0.0).cpu().numpy()

    def decode(self, output: Tensor, size: tuple[int, int], distances: Distances = False) -> np.ndarray:
        return depth_to_map(self.inverse_depth(output, size, distances))


class DepthNormalDetector(DepthAnythingDetector):
    """Normals of a picture's surfaces (H, W, 3; x, y, z) from its depth: red is left, green is up, blue is towards the viewer."""

    def decode(
        self,
        output: Tensor,
        size: tuple[int, int],
        distances: Distances = False,
        a: Flatness = 2 * math.pi,
        bg_th: Background = 0.1,
    ) -> np.ndarray:
        depth = relative_depth(self.inverse_depth(output, size, distances))
        return depth_to_normals(depth * (RELIEF * min(size) / SIDE), a, bg_th)
