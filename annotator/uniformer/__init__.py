"""Semantic segmentation of pictures into the 150 classes of ADE20K."""

import cv2
import numpy as np
import torch
from torch import nn

from annotator.detector import NetworkDetector
from annotator.uniformer.labels import PALETTE, colour, label_map
from annotator.uniformer.model import STRIDE, UPerNet
from annotator.util import pad_to_multiple

__all__ = ["PALETTE", "UPerNet", "UniformerDetector", "colour"]

SHORTER_SIDE, LONGER_SIDE = 512, 2048  # the picture is resized to the first, or to the second if that comes first
# Of ImageNet's pictures, in the order R, G, B; but the reference gives the network B, G, R, and ControlNet has learned
# from the maps that this gives.
MEAN = np.array([123.675, 116.28, 103.53], dtype=np.float32)
DEVIATION = np.array([58.395, 57.12, 57.375], dtype=np.float32)


def network_shape(height: int, width: int) -> tuple[int, int]:
    """Height and width at which the network sees a picture."""
    scale = min(SHORTER_SIDE / min(height, width), LONGER_SIDE / max(height, width))
    return max(int(height * scale + 0.5), 1), max(int(width * scale + 0.5), 1)


class UniformerDetector(NetworkDetector):
    """A colour for what each pixel shows: wall, sky, tree, and 147 more.

    Pictures so long that the network would see fewer than 32 rows or columns, where the reference fails, are padded.
    """

    filename = "upernet_global_small.pth"
    wrapper = "state_dict"
    strict = False

    def build_network(self) -> nn.Module:
        return UPerNet()

    @torch.no_grad()
    def labels(self, input_image: np.ndarray) -> np.ndarray:
        """The class of each pixel in ADE20K's order, 0 to 149: (H, W), uint8."""
        image = self.prepare(input_image)
        height, width = network_shape(*image.shape[:2])
        resized = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
        padded = pad_to_multiple(resized, STRIDE) if min(height, width) < STRIDE else resized
        x = self.tensor((padded[:, :, ::-1].astype(np.float32) - MEAN) / DEVIATION)  # (1, 3, H, W)
        return label_map(self.network(x)[0], padded.shape[:2], (height, width), image.shape[:2])

    def __call__(self, input_image: np.ndarray) -> np.ndarray:
        """
        Args:
            input_image: (H, W, 3), uint8, RGB.

        Returns:
            (H, W, 3), uint8, RGB: the classes' colours in `PALETTE`.
        """
        return colour(self.labels(input_image))
