"""Tile (ControlNet 1.1): the condition is the picture itself, which the model paints anew with finer detail."""

import numpy as np

from annotator.util import HWC3, PixelDetector


class TileDetector(PixelDetector):
    """Gives the picture back; what makes it a condition is the linear resize to the size of the result."""

    def __call__(self, img: np.ndarray) -> np.ndarray:
        """(H, W), (H, W, 3) or RGBA, uint8, to (H, W, 3)."""
        return HWC3(img)
