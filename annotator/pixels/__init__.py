"""Conditions that are arithmetic on pixels: inverted, black and white, blurred, grey, coarse colours, soft detail.

Each is a condition of models that are in use: blur and gaussian tile for restoring detail, grey for colouring a picture,
a grid of colours for painting with given colours, inverted and black and white pictures for drawings on paper.
"""

import math

import cv2
import numpy as np

from annotator.util import HWC3, PixelDetector, to_uint8


def check_range(name: str, value: float, low: float, high: float) -> None:
    """Raise ValueError unless `value` is a number from `low` to `high`."""
    if not (low <= value <= high and math.isfinite(value)):
        raise ValueError(f"{name} must be a number from {low:g} to {high:g}, got {value}")


class InvertDetector(PixelDetector):
    """Light for dark: makes white lines on black, which models expect, from a drawing on white paper."""

    def __call__(self, img: np.ndarray) -> np.ndarray:
        """(H, W, 3) uint8 to the same."""
        return 255 - HWC3(img)


class ThresholdDetector(PixelDetector):
    """Black and white: white where even the darkest channel is above the threshold."""

    def __call__(self, img: np.ndarray, threshold: int = 127) -> np.ndarray:
        """
        Args:
            img: (H, W, 3), uint8.
            threshold: 0 to 255; a pixel at the threshold becomes black.

        Returns:
            (H, W), uint8, 255 and 0.
        """
        check_range("threshold", threshold, 0, 255)
        return np.where(HWC3(img).min(axis=2) > threshold, 255, 0).astype(np.uint8)


class BlurDetector(PixelDetector):
    """The picture out of focus: a gaussian blur."""

    def __call__(self, img: np.ndarray, sigma: float = 9.0) -> np.ndarray:
        """
        Args:
            img: (H, W, 3), uint8.
            sigma: of the gaussian, in pixels; above 0.

        Returns:
            (H, W, 3), uint8.
        """
        check_range("sigma", sigma, 0.01, 1000)
        return cv2.GaussianBlur(HWC3(img), (0, 0), float(sigma))


class GreyDetector(PixelDetector):
    """The picture without its colours, for models that colour it anew."""

    def __call__(self, img: np.ndarray, gamma: float = 1.0, intensity: bool = False) -> np.ndarray:
        """
        Args:
            img: (H, W, 3), uint8, RGB.
            gamma: exponent on the grey of 0 to 1; above 1 is darker.
            intensity: the brightest channel (V of HSV) instead of the luminance that people see (L of CIELAB).

        Returns:
            (H, W), uint8.
        """
        check_range("gamma", gamma, 0.01, 100)
        img = HWC3(img)
        grey = img.max(axis=2) if intensity else cv2.cvtColor(img, cv2.COLOR_RGB2LAB)[:, :, 0]
        return to_uint8(
            (grey.astype(np.float32) / 255.0) ** gamma * 255.0 + 1e-3
        )  # 1e-3: rounding must not cost a level


class ColourDetector(PixelDetector):
    """A coarse grid of the picture's colours, as T2I-Adapter's model of colours was trained on (Mou et al. 2023)."""

    def __call__(self, img: np.ndarray, cell: int = 64) -> np.ndarray:
        """
        Args:
            img: (H, W, 3), uint8.
            cell: side of a cell of the grid, in pixels.

        Returns:
            (H, W, 3), uint8.
        """
        check_range("cell", cell, 1, 4096)
        img = HWC3(img)
        height, width = img.shape[:2]
        grid = cv2.resize(img, (max(width // cell, 1), max(height // cell, 1)), interpolation=cv2.INTER_CUBIC)
        return cv2.resize(grid, (width, height), interpolation=cv2.INTER_NEAREST)


class GaussianTileDetector(PixelDetector):
    """The picture with its fine detail taken away, for tile models, which paint new detail.

    Shrunk and enlarged again, then blurred: what TTPlanet's tile models are used with, in their authors' terms.
    """

    def __call__(self, img: np.ndarray, scale_factor: float = 1.0, blur_strength: float = 2.0) -> np.ndarray:
        """
        Args:
            img: (H, W, 3), uint8.
            scale_factor: how many times smaller the picture is made in between.
            blur_strength: side of the blur's window, in pixels (an even one counts as the next); its sigma is half of it.

        Returns:
            (H, W, 3), uint8.
        """
        check_range("scale_factor", scale_factor, 1, 64)
        check_range("blur_strength", blur_strength, 1, 256)
        img = HWC3(img)
        height, width = img.shape[:2]
        small = max(int(width / scale_factor), 1), max(int(height / scale_factor), 1)
        coarse = cv2.resize(
            cv2.resize(img, small, interpolation=cv2.INTER_AREA), (width, height), interpolation=cv2.INTER_LANCZOS4
        )
        window = int(blur_strength) | 1
        return cv2.GaussianBlur(coarse, (window, window), blur_strength / 2)
