"""From M-LSD's maps to line segments, and from segments to a drawing."""

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

MAX_LINES = 200
MAP_STRIDE = 2  # pixels of the network's picture a pixel of its map


def decode_lines(
    output: Tensor, thr_v: float = 0.1, thr_d: float = 0.1, scale: tuple[float, float] = (1.0, 1.0)
) -> np.ndarray:
    """Line segments of one picture, by falling score.

    A pixel is a line's centre if no neighbour has a higher score; of these the best 200 are looked at.

    Args:
        output: the network's (C, h, w) with at least five channels: score before the sigmoid, x1, y1, x2, y2.
        thr_v: lines have a score above this, 0 to 1.
        thr_d: lines are longer than this, in pixels of the map.
        scale: width and height of the picture divided by those of what the network saw.

    Returns:
        (n, 4), float64: x1, y1, x2, y2 in pixels of the picture; ends may lie outside of it.

    Raises:
        ValueError: for thresholds that are negative or no numbers.
    """
    for name, threshold in (("thr_v", thr_v), ("thr_d", thr_d)):
        if not threshold >= 0:
            raise ValueError(f"{name} must be a number of at least 0, got {threshold}")
    width = output.shape[2]
    score = torch.sigmoid(output[0])  # (h, w)
    # Compared after the sigmoid: where it saturates, neighbours are equal and all of them stay.
    peak = score == F.max_pool2d(score[None], 3, stride=1, padding=1)[0]
    best, index = torch.where(peak, score, 0.0).flatten().topk(min(MAX_LINES, score.numel()))  # (k,)
    ends = output[1:5].flatten(1)[:, index].T.reshape(-1, 2, 2).cpu().numpy()  # (k, end, x and y)
    length = np.sqrt(((ends[:, 0] - ends[:, 1]) ** 2).sum(axis=1))
    kept = (best.cpu().numpy() > thr_v) & (length > thr_d) & np.isfinite(ends).all(axis=(1, 2))
    centre = torch.stack([index % width, index // width], dim=1)[:, None].cpu().numpy()  # (k, 1, x and y)
    lines = (centre + ends.astype(np.float64))[kept] * MAP_STRIDE * np.array(scale)
    return lines.reshape(-1, 4)


def draw_lines(lines: np.ndarray, height: int, width: int) -> np.ndarray:
    """White lines, one pixel thick, on black: (height, width), uint8. Coordinates are cut to integers towards zero."""
    canvas = np.zeros((height, width), dtype=np.uint8)
    limit = np.iinfo(np.int32).max
    ends = lines.clip(-limit, limit).astype(np.int32).reshape(-1, 2, 2)
    cv2.polylines(canvas, list(ends), isClosed=False, color=255, thickness=1)
    return canvas
