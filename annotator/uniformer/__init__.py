"""Semantic segmentation of pictures into the 150 classes of ADE20K."""

from typing import Any

import cv2
import numpy as np
from torch import Tensor

from annotator.network import LazyNetwork, NetworkDetector, to_tensor
from annotator.pictures import pad_to_multiple
from annotator.uniformer.labels import PALETTE, colour, label_map
from annotator.uniformer.model import STRIDE, UPerNet

__all__ = ["PALETTE", "UPerNet", "UniformerDetector", "colour"]

SHORTER_SIDE, LONGER_SIDE = 512, 2048  # the picture is resized to the first, or to the second if that comes first
# Of ImageNet's pictures, in the order R, G, B; but the reference gives the network B, G, R, and ControlNet has learned
# from the maps that this gives.
MEAN = np.array([123.675, 116.28, 103.53], dtype=np.float32)
STD = np.array([58.395, 57.12, 57.375], dtype=np.float32)


def network_shape(height: int, width: int) -> tuple[int, int]:
    """Height and width at which the network sees a picture."""
    scale = min(SHORTER_SIDE / min(height, width), LONGER_SIDE / max(height, width))
    return max(int(height * scale + 0.5), 1), max(int(width * scale + 0.5), 1)


class UniformerDetector(NetworkDetector):
    """A colour of `PALETTE` for what each pixel shows: wall, sky, tree, and 147 more: (H, W, 3), uint8, RGB.

    Pictures so long that the network would see fewer than 32 rows or columns, where the reference fails, are padded.
    """

    network = LazyNetwork("upernet_global_small.pth")
    build_network = UPerNet
    optional = "auxiliary_head."  # which only trains

    def encode(self, image: np.ndarray) -> Tensor:
        height, width = network_shape(*image.shape[:2])
        resized = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
        if min(height, width) < STRIDE:
            resized = pad_to_multiple(resized, STRIDE)
        return to_tensor((resized[:, :, ::-1].astype(np.float32) - MEAN) / STD)

    def labels(self, image: np.ndarray) -> np.ndarray:
        """The class of each pixel in ADE20K's order, 0 to 149: (H, W), uint8."""
        (logits,) = self.run(self.prepare(image)[None])
        return label_map(logits, network_shape(*image.shape[:2]), image.shape[:2])

    def decode(self, output: Any, size: tuple[int, int]) -> np.ndarray:
        return colour(label_map(output, network_shape(*size), size))
