"""Depth by ZoeDepth, as ControlNet 1.1 uses it. S. F. Bhat et al., "ZoeDepth", 2023."""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from torch import Tensor, nn

from annotator.depth_anything import DepthAnythingDetector
from annotator.library import load_entries
from annotator.network import LazyNetwork
from annotator.pictures import to_uint8
from annotator.weights import WeightsError, read_state_dict
from annotator.zoe.published import BACKBONE, CONFIG, PROCESSOR, hub_names

NEAR, FAR = 2, 85  # percentiles of the distances: what is nearer is white, what is farther is black


class ZoeDetector(DepthAnythingDetector):
    """Depth of a picture (H, W), near is light.

    Args:
        weights: the published file ZoeD_M12_N.pt, a folder that holds it, or a ZoeDepth model of transformers: an id or a folder.
    """

    network = LazyNetwork("ZoeD_M12_N.pt")
    model = "Intel/zoedepth-nyu"
    model_types = ("zoedepth",)
    output_type = None

    def load_published(self, path: Path) -> nn.Module:
        self.processor = self.transformers.ZoeDepthImageProcessor(**PROCESSOR)
        backbone = self.transformers.BeitConfig(**BACKBONE)
        config = self.transformers.ZoeDepthConfig(backbone_config=backbone, **CONFIG)
        entries = hub_names(read_state_dict(path))
        return load_entries(self.transformers.ZoeDepthForDepthEstimation, config, entries, path)

    def load_model(self, path: Path, **processor_options: Any) -> tuple[Any, Iterable[str]]:
        network, missing = super().load_model(path, **processor_options)
        if network.config.model_type != "zoedepth":  # it might give the inverse of distances
            raise WeightsError(
                f"{path} holds a model of type {network.config.model_type}, not zoedepth; use depth_anything"
            )
        return network, missing

    def predict_depth(self, pixels: Tensor) -> Tensor:
        """The mean of the distances in the picture and in its mirror image: (B, h, w)."""
        return (super().predict_depth(pixels) + super().predict_depth(pixels.flip(3)).flip(2)) / 2

    def decode(
        self,
        output: Tensor,
        size: tuple[int, int],
        gamma_corrected: Annotated[bool, "darker where it is far: the map to the power of 2.2"] = False,
    ) -> np.ndarray:
        distance = output[: size[0], : size[1]].cpu().numpy()
        near, far = np.percentile(distance, (NEAR, FAR))
        depth = 1.0 - (distance - near) / max(far - near, 1e-6)
        return to_uint8((depth.clip(0.0) ** 2.2 if gamma_corrected else depth) * 255.0)
