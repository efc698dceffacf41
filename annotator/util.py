"""The small helpers of the published package under their names: thinning of edges, quantising, noise, masks.

`HWC3` and `resize_image` come from `annotator.pictures`, `annotator_ckpts_path` is where weight files are looked for first.
"""

import random
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from annotator.pictures import HWC3, check_image, resize_image

__all__ = ["HWC3", "annotator_ckpts_path", "img2mask", "make_noise_disk", "min_max_norm", "nms", "resize_image",
           "safe_step"]  # fmt: skip

annotator_ckpts_path = str(Path(__file__).parent / "ckpts")

# A pixel survives `nms` if it is the maximum along one of these directions: horizontal, vertical, both diagonals.
HORIZONTAL, DIAGONAL = np.array([[0, 0, 0], [1, 1, 1], [0, 0, 0]], dtype=np.uint8), np.eye(3, dtype=np.uint8)
LINE_KERNELS = (HORIZONTAL, HORIZONTAL.T.copy(), DIAGONAL, np.fliplr(DIAGONAL).copy())


def nms(x: np.ndarray, t: float, s: float) -> np.ndarray:
    """Thin soft edges: keep blurred pixels that are a maximum along a line through them.

    Args:
        x: (H, W) or (H, W, C); each channel is treated for itself.
        t: threshold for the blurred value.
        s: sigma of the blur, in pixels.

    Returns:
        uint8 of the same shape, 255 on the ridges that are brighter than `t`, else 0. (As published, off the ridges 0 counts
        as brightness, so that everything is 255 for `t` below 0.)
    """
    if not x.size:
        raise ValueError(f"edges of shape {x.shape} hold no pixels")
    if not s > 0:
        raise ValueError(f"sigma must be above 0, got {s}")
    blurred = cv2.GaussianBlur(x.astype(np.float32), (0, 0), s)
    ridge = np.zeros(blurred.shape, dtype=bool)
    for kernel in LINE_KERNELS:
        ridge |= cv2.dilate(blurred, kernel) == blurred
    return np.where(np.where(ridge, blurred, 0) > t, 255, 0).astype(np.uint8)


def safe_step(x: np.ndarray, step: int = 2) -> np.ndarray:
    """Quantise 0..1 to multiples of 1/`step`, as float32; exactly 1 becomes (step + 1) / step, which callers clip."""
    return (x.astype(np.float32) * np.float32(step + 1)).astype(np.int32).astype(np.float32) / np.float32(step)


def min_max_norm(x: np.ndarray) -> np.ndarray:
    """Scaled to 0..1, as a new array. A constant array becomes 0."""
    shifted = x - np.min(x)
    return shifted / np.maximum(np.max(shifted), 1e-5)


def make_noise_disk(H: int, W: int, C: int, F: int, rng: Any = None) -> np.ndarray:
    """Smooth noise whose bumps are about `F` pixels wide: (H, W, C), float64, 0..1.

    Args:
        rng: where the numbers come from, a numpy RandomState or Generator; numpy's global state if not given.
    """
    if F < 1:
        raise ValueError(f"the width of the noise must be at least 1 pixel, got {F}")
    coarse = (rng or np.random).uniform(0, 1, size=((H // F) + 2, (W // F) + 2, C))
    smooth = cv2.resize(coarse, (W + 2 * F, H + 2 * F), interpolation=cv2.INTER_CUBIC)
    smooth = smooth[F : F + H, F : F + W].reshape(H, W, C)
    smooth = smooth - smooth.min()
    return smooth / max(smooth.max(), np.finfo(np.float64).tiny)


def img2mask(
    img: np.ndarray, H: int, W: int, low: int = 10, high: int = 90, rng: random.Random | None = None
) -> np.ndarray:
    """A random mask from a picture: one channel, perhaps inverted, below a random percentile in [low, high).

    Returns:
        (H, W), bool.
    """
    draw: Any = rng or random
    img = check_image(img)
    channel = img if img.ndim == 2 else img[:, :, draw.randrange(img.shape[2])]
    channel = cv2.resize(channel, (W, H), interpolation=cv2.INTER_CUBIC)
    if draw.uniform(0, 1) < 0.5:
        channel = 255 - channel
    return channel < np.percentile(channel, draw.randrange(low, high))
