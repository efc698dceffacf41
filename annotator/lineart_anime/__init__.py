"""Line art of anime drawings."""

import cv2
import numpy as np
import torch
from torch import nn

from annotator.detector import NetworkDetector
from annotator.lineart_anime.model import SIDE, UnetGenerator
from annotator.util import to_uint8

__all__ = ["LineartAnimeDetector", "UnetGenerator"]


class LineartAnimeDetector(NetworkDetector):
    """The lines of a drawing, dark on white."""

    filename = "netG.pth"

    def build_network(self) -> nn.Module:
        return UnetGenerator()

    @torch.no_grad()
    def __call__(self, input_image: np.ndarray) -> np.ndarray:
        """
        Args:
            input_image: (H, W, 3), uint8, RGB.

        Returns:
            (H, W), uint8.
        """
        image = self.prepare(input_image)
        height, width = image.shape[:2]
        full_height, full_width = (-(-side // SIDE) * SIDE for side in (height, width))
        if full_height * full_width > self.max_pixels:
            raise ValueError(
                f"a picture of {height}x{width} pixels is enlarged to {full_height}x{full_width}, which is too large "
                f"for {type(self).__name__} (at most {self.max_pixels} pixels); crop it or make it smaller first"
            )
        enlarged = cv2.resize(image, (full_width, full_height), interpolation=cv2.INTER_CUBIC)
        lines = self.network(self.tensor(enlarged) / 127.5 - 1.0)[0, 0].cpu().numpy() * 127.5 + 127.5
        return to_uint8(cv2.resize(lines, (width, height), interpolation=cv2.INTER_CUBIC))
