"""Tile and instruct-pix2pix (ControlNet 1.1): the condition is the picture itself."""

import numpy as np

from annotator.detector import Detector
from annotator.pictures import HWC3


class TileDetector(Detector):
    """Gives the picture back; for tile, what makes it a condition is the linear resize to the size of the result."""

    def detect(self, image: np.ndarray) -> np.ndarray:
        """(H, W), (H, W, 3) or RGBA, uint8, to (H, W, 3)."""
        return HWC3(image)
