"""Conditions that are arithmetic on pixels: the picture itself, inverted, black and white, blurred, grey, coarse, soft.

Each is a condition of models that are in use: blur and gaussian tile for restoring detail, grey for colouring a picture,
a grid of colours for painting with given colours, inverted and black and white pictures for drawings on paper.
"""

from typing import Annotated, Any

import cv2
import numpy as np

from annotator.detector import Detector
from annotator.pictures import HWC3, to_uint8


class PixelDetector(Detector):
    """A detector that checks the ranges of its arguments also when it is called without the registry."""

    def __call__(self, input_image: Any = None, *args: Any, **parameters: Any) -> Any:
        for name, value in (dict(zip(self.arguments(), args, strict=False)) | parameters).items():
            if name in self.parameters():
                self.parameters()[name].check(value)
        return super().__call__(input_image, *args, **parameters)


class TileDetector(Detector):
    """Gives the picture back, for tile (where the linear resize makes it a condition) and instruct-pix2pix of ControlNet 1.1."""

    def detect(self, image: np.ndarray) -> np.ndarray:
        """(H, W), (H, W, 3) or RGBA, uint8, to (H, W, 3)."""
        return HWC3(image)


class InvertDetector(Detector):
    """Light for dark: makes white lines on black, which models expect, from a drawing on white paper."""

    def detect(self, image: np.ndarray) -> np.ndarray:
        """(H, W, 3), uint8, to the same."""
        return 255 - HWC3(image)


class ThresholdDetector(PixelDetector):
    """Black and white: white where even the darkest channel is above the threshold."""

    def detect(
        self,
        image: np.ndarray,
        threshold: Annotated[int, 0, 255, "a pixel becomes white if its darkest channel is above this"] = 127,
    ) -> np.ndarray:
        """(H, W, 3), uint8, to (H, W), 255 and 0."""
        return np.where(HWC3(image).min(axis=2) > threshold, 255, 0).astype(np.uint8)


class BlurDetector(PixelDetector):
    """The picture out of focus: a gaussian blur."""

    def detect(
        self, image: np.ndarray, sigma: Annotated[float, 0.01, 64.0, "of the gaussian, in pixels"] = 9.0
    ) -> np.ndarray:
        """(H, W, 3), uint8, to the same."""
        return cv2.GaussianBlur(HWC3(image), (0, 0), float(sigma))


class GreyDetector(PixelDetector):
    """The picture without its colours, for models that colour it anew."""

    def detect(
        self,
        image: np.ndarray,
        gamma: Annotated[float, 0.1, 4.0, "exponent on the grey of 0 to 1; above 1 is darker"] = 1.0,
        intensity: Annotated[bool, "the brightest channel (V of HSV), not the luminance (L of CIELAB)"] = False,
    ) -> np.ndarray:
        """(H, W, 3), uint8, RGB, to (H, W)."""
        image = HWC3(image)
        grey = image.max(axis=2) if intensity else cv2.cvtColor(image, cv2.COLOR_RGB2LAB)[:, :, 0]
        curve = to_uint8((np.arange(256) / 255.0) ** gamma * 255.0 + 1e-6)  # the addend: rounding must not cost a level
        return curve[grey]


class ColourDetector(PixelDetector):
    """A coarse grid of the picture's colours, as T2I-Adapter's model of colours was trained on (Mou et al. 2023)."""

    def detect(
        self, image: np.ndarray, cell: Annotated[int, 1, 4096, "side of a cell of the grid, in pixels"] = 64
    ) -> np.ndarray:
        """(H, W, 3), uint8, to the same."""
        image = HWC3(image)
        height, width = image.shape[:2]
        grid = cv2.resize(image, (max(width // cell, 1), max(height // cell, 1)), interpolation=cv2.INTER_CUBIC)
        return cv2.resize(grid, (width, height), interpolation=cv2.INTER_NEAREST)


class GaussianTileDetector(PixelDetector):
    """The picture with its fine detail taken away, for tile models, which paint new detail.

    Shrunk and enlarged again, then blurred: what TTPlanet's tile models are used with, in their authors' terms.
    """

    def detect(
        self,
        image: np.ndarray,
        scale_factor: Annotated[float, 1.0, 8.0, "how many times smaller the picture is made in between"] = 1.0,
        blur_strength: Annotated[float, 1.0, 64.0, "window of the blur, in pixels; its sigma is half of it"] = 2.0,
    ) -> np.ndarray:
        """(H, W, 3), uint8, to the same."""
        image = HWC3(image)
        height, width = image.shape[:2]
        small = max(int(width / scale_factor), 1), max(int(height / scale_factor), 1)
        coarse = cv2.resize(image, small, interpolation=cv2.INTER_AREA)
        coarse = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_LANCZOS4)
        window = int(blur_strength) | 1  # odd, as OpenCV wants it
        return cv2.GaussianBlur(coarse, (window, window), blur_strength / 2)
