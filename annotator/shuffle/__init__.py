"""Shuffled pictures of ControlNet 1.1: content moved about, colours exchanged, detail lost.

Each detector draws from numpy's and Python's global generators, or, with `seed`, from fresh ones of its own.
"""

import random
from typing import Annotated, Any

import cv2
import numpy as np

from annotator.detector import Detector
from annotator.pictures import HWC3, to_uint8
from annotator.util import make_noise_disk

REMAP_LIMIT = 2**15 - 2  # OpenCV's remap counts pixels in 16 bits

MAX_LEVEL = 12  # a picture of one pixel is doubled as often as it was halved


def _generators(seed: int | None) -> tuple[Any, Any]:
    return (np.random, random) if seed is None else (np.random.RandomState(seed), random.Random(seed))


class ContentShuffleDetector(Detector):
    """Moves the content along a smooth random flow; colours and textures stay."""

    def detect(
        self,
        image: np.ndarray,
        h: int | None = None,
        w: int | None = None,
        f: Annotated[int | None, 1, 4096, "size of the bumps of the flow, in pixels"] = 256,
        seed: Annotated[int | None, 0, 2**32 - 1, "makes the shuffle repeatable"] = None,
    ) -> np.ndarray:
        """(H, W, 3), uint8, to (h, w, 3), uint8.

        Args:
            h, w: height and width of the result, those of `image` if not given.
            f: 256 if None.
        """
        image = HWC3(image)
        height, width = image.shape[:2]
        h, w, f = (height if h is None else h), (width if w is None else w), (256 if f is None else f)
        if min(h, w, f) < 1:
            raise ValueError(f"h, w and f must be at least 1, got {h}, {w} and {f}")
        if max(height, width, h, w) > REMAP_LIMIT:
            raise ValueError(
                f"cannot shuffle {height}x{width} pixels to {h}x{w}: a side may have {REMAP_LIMIT} pixels at most"
            )
        numbers, _ = _generators(seed)
        x, y = (make_noise_disk(h, w, 1, f, numbers) * float(side - 1) for side in (width, height))  # (h, w, 1), each
        return cv2.remap(image, x.astype(np.float32), y.astype(np.float32), cv2.INTER_LINEAR)


class ColorShuffleDetector(Detector):
    """Paints the picture's brightness with two random smooth colour fields."""

    def detect(self, image: np.ndarray, seed: int | None = None) -> np.ndarray:
        """(H, W, 3) uint8 to the same."""
        image = HWC3(image)
        height, width = image.shape[:2]
        numbers, choices = _generators(seed)
        bump = choices.randint(64, 384)
        light, dark = (make_noise_disk(height, width, 3, bump, numbers) for _ in range(2))
        mean = (light + dark) / 2.0
        light, dark = ((mean + (field - mean) * 3.0).clip(0, 1) for field in (light, dark))
        level = image.astype(np.float32) / 255.0
        mixed = light * level + dark * (1 - level)
        mixed -= mixed.min(axis=(0, 1), keepdims=True)
        mixed /= np.maximum(mixed.max(axis=(0, 1), keepdims=True), 1e-5)
        return to_uint8(mixed * 255.0)


class GrayDetector(Detector):
    """Grey with random weights of the three channels."""

    def detect(self, image: np.ndarray, seed: int | None = None) -> np.ndarray:
        """(H, W, 3) uint8 to the same."""
        image = HWC3(image).astype(np.float32)
        _, choices = _generators(seed)
        weights = [choices.random() + 1e-5 for _ in range(3)]
        red, green, blue = (weight / sum(weights) for weight in weights)
        grey = image[:, :, 0] * red + image[:, :, 1] * green + image[:, :, 2] * blue
        return to_uint8(np.repeat(grey[:, :, None], 3, axis=2))


class DownSampleDetector(Detector):
    """Halves the picture a few times, with noise before each, then doubles it as often, with noise after each."""

    def detect(self, image: np.ndarray, level: int = 3, k: float = 16.0, seed: int | None = None) -> np.ndarray:
        """(H, W, 3), uint8, to the same.

        Args:
            level: how often the size is halved, at most 12.
            k: standard deviation of the noise, in levels.
        """
        image = HWC3(image)
        if level < 0 or not k >= 0:
            raise ValueError(f"level and k must be 0 or above, got {level} and {k}")
        if level > MAX_LEVEL:
            raise ValueError(f"level must be {MAX_LEVEL} at most, got {level}: no picture is that large")
        numbers, _ = _generators(seed)

        def add_noise(image: np.ndarray) -> np.ndarray:
            image = image.copy()
            image += numbers.normal(loc=0.0, scale=k, size=image.shape)  # rounded to float32 once, after adding
            return image

        noisy: Any = image.astype(np.float32)
        for _ in range(level):
            noisy = cv2.pyrDown(add_noise(noisy))
        for _ in range(level):
            noisy = add_noise(cv2.pyrUp(noisy))
        height, width = image.shape[:2]
        return to_uint8(noisy[:height, :width])
