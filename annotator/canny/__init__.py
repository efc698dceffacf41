"""Canny edges, by OpenCV: three colour channels, no blur, aperture 3, L1 gradient."""

import math

import cv2
import numpy as np

from annotator.util import HWC3, PixelDetector, check_image


class CannyDetector(PixelDetector):
    """J. Canny, "A Computational Approach to Edge Detection", 1986."""

    def __call__(self, img: np.ndarray, low_threshold: float = 100, high_threshold: float = 200) -> np.ndarray:
        """Edges as 255 on 0.

        Args:
            img: (H, W), (H, W, 3) or RGBA, uint8.
            low_threshold: gradient above which a pixel continues an edge; 1 to 255 is usual.
            high_threshold: gradient above which a pixel starts one. OpenCV exchanges the two if this is the lower one.

        Returns:
            (H, W), uint8.
        """
        img = check_image(img)
        for name, threshold in (("low_threshold", low_threshold), ("high_threshold", high_threshold)):
            if not (threshold >= 0 and math.isfinite(threshold)):
                raise ValueError(f"{name} must be a number from 0 upwards, got {threshold}")
        return cv2.Canny(img if img.ndim == 2 else HWC3(img), low_threshold, high_threshold)
