"""Pictures: from tensors, and laid out in grids."""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from annotator.pictures import save_png

__all__ = ["as_rgb", "grid", "save_png", "to_uint8"]


def to_uint8(images: Tensor) -> np.ndarray:
    """Pictures (N, 3, H, W), about in [-1, 1] -> uint8 (N, H, W, 3); fractions are cut off."""
    scaled = images.float().permute(0, 2, 3, 1) * 127.5 + 127.5
    return scaled.cpu().numpy().clip(0, 255).astype(np.uint8)


def as_rgb(pictures: np.ndarray) -> np.ndarray:
    """Pictures (..., C) of any number of channels as people can look at them, (..., 3): the first three, or the last one repeated."""
    return pictures[..., np.minimum(range(3), pictures.shape[-1] - 1)]


def grid(rows: Sequence[Sequence[np.ndarray]], gap: int = 4, background: int = 255, scale: int = 1) -> np.ndarray:
    """Equally sized uint8 (H, W, C) pictures laid out in rows, each enlarged `scale` times without smoothing.

    Raises:
        ValueError: no picture, or pictures of different sizes.
    """
    shapes = {picture.shape[:2] for row in rows for picture in row}
    if len(shapes) != 1:
        raise ValueError(f"a grid needs pictures of one size, found {sorted(shapes)}")
    height, width = shapes.pop()
    height, width = height * scale, width * scale
    columns = max(len(row) for row in rows)
    sheet = np.full((len(rows) * (height + gap) + gap, columns * (width + gap) + gap, 3), background, dtype=np.uint8)
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            top, left = gap + i * (height + gap), gap + j * (width + gap)
            sheet[top : top + height, left : left + width] = as_rgb(picture).repeat(scale, axis=0).repeat(scale, axis=1)
    return sheet
