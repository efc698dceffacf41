"""Scribbles, drawn or made from soft edges so that they look drawn: white on black, as the model takes them."""

import cv2
import numpy as np

from annotator.detector import Detector
from annotator.pictures import HWC3, check_image
from annotator.util import nms


def _binary(is_line: np.ndarray) -> np.ndarray:
    return HWC3(np.where(is_line, 255, 0).astype(np.uint8))


class ScribbleDetector(Detector):
    """Dark strokes on a light ground."""

    def detect(self, image: np.ndarray) -> np.ndarray:
        """(H, W, 3) uint8 picture; (H, W, 3) with 255 where the darkest channel is below 127, else 0."""
        return _binary(HWC3(image).min(axis=2) < 127)


class InteractiveScribbleDetector(Detector):
    """Light strokes on a dark ground: the mask that a drawing tool hands out."""

    def detect(self, image: np.ndarray) -> np.ndarray:
        """(H, W) or (H, W, C) uint8 mask, whose first channel counts; (H, W, 3) with 255 where it is above 127."""
        return _binary(first_channel(image) > 127)


def first_channel(mask: np.ndarray) -> np.ndarray:
    """(H, W) of a (H, W) or (H, W, C) uint8 mask."""
    return np.atleast_3d(check_image(mask))[:, :, 0]


def fake_scribble(edge: np.ndarray) -> np.ndarray:
    """Soft edges, resized to the picture, as scribbles: thinned (threshold 127, sigma 3), blurred (sigma 3), cut at 4.

    Args:
        edge: (H, W) or (H, W, 3), uint8, bright on black, e.g. from HED.

    Returns:
        (H, W, 3), uint8, 0 or 255.
    """
    thin = nms(HWC3(edge), 127, 3.0)
    return np.where(cv2.GaussianBlur(thin, (0, 0), 3.0) > 4, 255, 0).astype(np.uint8)
