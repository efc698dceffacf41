"""Line art of anime drawings."""

from typing import Any

import cv2
import numpy as np
from torch import Tensor

from annotator.lineart_anime.model import SIDE, UnetGenerator
from annotator.network import LazyNetwork, NetworkDetector, to_tensor
from annotator.pictures import to_uint8

__all__ = ["LineartAnimeDetector", "UnetGenerator"]


class LineartAnimeDetector(NetworkDetector):
    """The lines of a drawing (H, W), dark on white; in controlnet_aux's way white on black."""

    network = LazyNetwork("netG.pth")
    build_network = UnetGenerator

    def encode(self, image: np.ndarray) -> Tensor:
        height, width = (-(-side // SIDE) * SIDE for side in image.shape[:2])
        if height * width > self.max_pixels:
            raise ValueError(
                f"a picture of {image.shape[0]}x{image.shape[1]} pixels is enlarged to {height}x{width}, which is too large for "
                f"{type(self).__name__} (at most {self.max_pixels} pixels); crop it or make it smaller first"
            )
        return to_tensor(cv2.resize(image, (width, height), interpolation=cv2.INTER_CUBIC)) / 127.5 - 1.0

    def decode(self, output: Any, size: tuple[int, int]) -> np.ndarray:
        lines = output[0].cpu().numpy() * 127.5 + 127.5
        return to_uint8(cv2.resize(lines, size[::-1], interpolation=cv2.INTER_CUBIC))

    def aux_map(self, view: np.ndarray, size: tuple[int, int], **parameters: Any) -> np.ndarray:
        return 255 - super().aux_map(view, size, **parameters)
