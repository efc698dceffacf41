"""Inpainting (ControlNet 1.1): the picture with a hole. In the hint, the hole's pixels are -1 instead of 0 to 1."""

import cv2
import numpy as np

from annotator.util import HWC3, PixelDetector, check_image


def soft_mask(mask: np.ndarray, height: int, width: int, blur: float = 5.0) -> np.ndarray:
    """A drawn mask at the size of the picture: (height, width), float32, 0..1, 1 where to paint.

    Args:
        mask: (H, W) or (H, W, C), uint8, white where to paint; the first channel counts.
        blur: sigma of the gaussian that softens the border, in pixels; 0 for none.
    """
    mask = check_image(mask)
    if not 0 <= blur <= 1000:
        raise ValueError(f"blur must lie within 0 and 1000, got {blur}")
    mask = mask if mask.ndim == 2 else mask[:, :, 0]
    mask = cv2.resize(np.ascontiguousarray(mask), (width, height), interpolation=cv2.INTER_LINEAR)
    mask = mask.astype(np.float32) / 255.0
    return cv2.GaussianBlur(mask, (0, 0), blur) if blur else mask


def inpaint_hint(picture: np.ndarray, hole: np.ndarray) -> np.ndarray:
    """The model's hint: (H, W, 3), float32, the picture in 0..1, and -1 where `hole` (H, W, bool) is true."""
    hint = HWC3(picture).astype(np.float32) / 255.0
    hint[hole] = -1.0
    return hint


class InpaintDetector(PixelDetector):
    """Cuts a hole. The map carries it as transparency, so that it can be kept as a PNG."""

    def __call__(self, img: np.ndarray, mask: np.ndarray | None = None, blur: float = 5.0) -> np.ndarray:
        """
        Args:
            img: (H, W, 3), uint8; without `mask` RGBA, where what is transparent is to be painted.
            mask: (h, w) or (h, w, C), uint8, white where to paint, of any size.
            blur: sigma of the gaussian on the mask, in pixels.

        Returns:
            (H, W, 4), uint8; the last channel is 0 in the hole and 255 elsewhere.
        """
        img = check_image(img)
        if mask is None:
            if img.ndim == 2 or img.shape[2] != 4:
                raise ValueError("inpainting needs a mask, or a picture whose alpha channel is 0 in the hole")
            mask = 255 - img[:, :, 3]
        picture = img[:, :, :3] if img.ndim == 3 and img.shape[2] == 4 else HWC3(img)
        hole = soft_mask(mask, *picture.shape[:2], blur) > 0.5
        return np.dstack([picture, np.where(hole, 0, 255).astype(np.uint8)])
