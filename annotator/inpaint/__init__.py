"""Inpainting (ControlNet 1.1): the picture with a hole. In the hint, the hole's pixels are -1 instead of 0 to 1.

The map carries the hole as transparency, so that it can be kept as a PNG.
"""

from typing import Annotated, Any

import cv2
import numpy as np
from PIL import Image

from annotator.detector import Detector
from annotator.pictures import Picture, as_array, check_image, without_alpha
from annotator.scribble import first_channel


def soft_mask(mask: np.ndarray, height: int, width: int, blur: float = 5.0) -> np.ndarray:
    """A drawn mask at the size of the picture: (height, width), float32, 0..1, 1 where to paint.

    Args:
        mask: (H, W) or (H, W, C), uint8, white where to paint; the first channel counts.
        blur: sigma of the gaussian that softens the border, in pixels; 0 for none.
    """
    if not 0 <= blur <= 1000:
        raise ValueError(f"blur must lie within 0 and 1000, got {blur}")
    mask = np.ascontiguousarray(first_channel(mask))
    mask = cv2.resize(mask, (width, height), interpolation=cv2.INTER_LINEAR).astype(np.float32) / 255.0
    return cv2.GaussianBlur(mask, (0, 0), blur) if blur else mask


def cut_hole(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """A picture as RGBA (H, W, 4), uint8, transparent where the mask, of any size, is white."""
    picture = without_alpha(image)
    height, width = picture.shape[:2]
    alpha = 255 - soft_mask(mask, height, width, blur=0.0) * 255.0
    return np.dstack([picture, np.rint(alpha).astype(np.uint8)])


def picture_with_hole(image: np.ndarray) -> np.ndarray:
    """An RGBA picture as it is.

    Raises:
        ValueError: for a picture without transparency, which says nothing of a hole.
    """
    if check_image(image).ndim != 3 or image.shape[2] != 4:
        raise ValueError("inpainting needs a mask, or a picture that is transparent where to paint")
    return image


def scale_with_hole(map: np.ndarray) -> np.ndarray:
    """The model's hint (H, W, 3), float32, of a map (H, W, 4): the picture in 0..1, and -1 where the map is transparent."""
    hint = picture_with_hole(map)[:, :, :3].astype(np.float32) / 255.0
    hint[map[:, :, 3] == 0] = -1.0
    return hint


def show_hole(map: np.ndarray) -> np.ndarray:
    """The picture (H, W, 3), uint8, of a map (H, W, 4), with a black hole."""
    return np.where(picture_with_hole(map)[:, :, 3:] == 0, 0, map[:, :, :3]).astype(np.uint8)


class InpaintDetector(Detector):
    """Cuts a hole, which PIL pictures keep too: controlnet_aux has no such detector, so its way of calling is not followed."""

    def __call__(self, input_image: Any = None, *args: Any, **parameters: Any) -> Any:
        found = self.detect(as_array(input_image), *args, **parameters)
        return Image.fromarray(found) if isinstance(input_image, Image.Image) else found

    def detect(
        self,
        image: np.ndarray,
        mask: Picture | None = None,
        blur: Annotated[float, 0.0, 64.0, "sigma that softens the hole's border, in pixels"] = 5.0,
    ) -> np.ndarray:
        """The picture with alpha 0 in the hole and 255 elsewhere: (H, W, 4), uint8.

        Args:
            image: (H, W, 3), uint8; without `mask` RGBA, where what is transparent is to be painted.
            mask: white where to paint, of any size; also a PIL picture or a path.
        """
        mask = None if mask is None else as_array(mask)
        rgba = picture_with_hole(image) if mask is None else cut_hole(image, mask)
        height, width = rgba.shape[:2]
        hole = soft_mask(255 - rgba[:, :, 3] if mask is None else mask, height, width, blur) > 0.5
        return np.dstack([rgba[:, :, :3], np.where(hole, 0, 255).astype(np.uint8)])
