"""Canny edges, by OpenCV: three colour channels, no blur, aperture 3, L1 gradient."""

import math
from collections.abc import Mapping
from typing import Annotated

import cv2
import numpy as np

from annotator.detector import Detector
from annotator.pictures import HWC3, check_image


class CannyDetector(Detector):
    """J. Canny, "A Computational Approach to Edge Detection", 1986."""

    output_type = None

    def detect(
        self,
        image: np.ndarray,
        low_threshold: Annotated[int, 1, 255, "gradient above which a pixel continues an edge"] = 100,
        high_threshold: Annotated[int, 1, 255, "gradient above which a pixel starts an edge"] = 200,
    ) -> np.ndarray:
        """Edges of a picture (H, W) or (H, W, C) as 255 on 0: (H, W), uint8.

        OpenCV exchanges the thresholds, of which any number from 0 upwards will do, if the high one is lower.
        """
        for name, threshold in (("low_threshold", low_threshold), ("high_threshold", high_threshold)):
            if not (threshold >= 0 and math.isfinite(threshold)):
                raise ValueError(f"{name} must be a number from 0 upwards, got {threshold}")
        return cv2.Canny(check_image(image) if image.ndim == 2 else HWC3(image), low_threshold, high_threshold)


def check_thresholds(parameters: Mapping[str, float]) -> None:
    """ValueError if the low threshold is above the high one."""
    low, high = parameters["low_threshold"], parameters["high_threshold"]
    if low > high:
        raise ValueError(f"low_threshold must not be above high_threshold, got {low} and {high}")
