"""Image helpers shared by the detectors: pixels in, pixels out, no networks.

Images are HWC, uint8, RGB. Floats become uint8 by clipping to 0..255 and cutting off the fraction, nowhere by rounding.
"""

import random

import cv2
import numpy as np

SIZE_STEP = 64
MAX_PIXELS = 2**27  # what `resize_image` agrees to make: 11,585 pixels a side

# A pixel survives `nms` if it is the maximum along one of these directions: horizontal, vertical, both diagonals.
LINE_KERNELS = tuple(
    np.array(rows, dtype=np.uint8)
    for rows in (
        [[0, 0, 0], [1, 1, 1], [0, 0, 0]],
        [[0, 1, 0], [0, 1, 0], [0, 1, 0]],
        [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
        [[0, 0, 1], [0, 1, 0], [1, 0, 0]],
    )
)


class PixelDetector:
    """Base of the detectors without a network. They are made like all others; neither argument has a meaning here."""

    def __init__(self, device: object = None, weights: object = None) -> None:
        pass


def check_image(image: np.ndarray) -> np.ndarray:
    """`image` itself, if it is a uint8 picture: (H, W), or (H, W, C) with 1, 3 or 4 channels, and not empty.

    Raises:
        ValueError: saying what was given instead.
    """
    if not isinstance(image, np.ndarray):
        raise ValueError(f"an image must be a numpy array (height, width, channels), not {type(image).__name__}")
    if image.dtype != np.uint8:
        raise ValueError(f"an image must be uint8 with values 0 to 255, not {image.dtype}; convert it first")
    if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (1, 3, 4)):
        raise ValueError(f"an image must have shape (H, W) or (H, W, 1, 3 or 4), not {image.shape}")
    if 0 in image.shape:
        raise ValueError(f"the image is empty: shape {image.shape}")
    return image


def to_uint8(x: np.ndarray) -> np.ndarray:
    """Numbers of any kind as uint8: clipped to 0..255, the fraction cut off, NaN as 0."""
    return np.nan_to_num(np.asarray(x), nan=0.0, posinf=255.0, neginf=0.0).clip(0, 255).astype(np.uint8)


def HWC3(x: np.ndarray) -> np.ndarray:  # noqa: N802 (the public name)
    """A uint8 picture with three channels: grey is repeated, RGBA is laid over white, RGB comes back as it is.

    Args:
        x: (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), uint8.

    Returns:
        (H, W, 3), uint8.
    """
    x = check_image(x)
    if x.ndim == 2:
        x = x[:, :, None]
    if x.shape[2] == 3:
        return x
    if x.shape[2] == 1:
        return np.repeat(x, 3, axis=2)
    alpha = x[:, :, 3:].astype(np.float32) / 255.0
    return to_uint8(x[:, :, :3].astype(np.float32) * alpha + 255.0 * (1.0 - alpha))


def resized_shape(height: int, width: int, resolution: int) -> tuple[int, int]:
    """Height and width that `resize_image` gives: the shorter side near `resolution`, both multiples of 64.

    Raises:
        ValueError: if a side would vanish or the picture would have more than 2**27 pixels.
    """
    scale = float(resolution) / min(height, width)
    if not np.isfinite(scale):
        raise ValueError(f"resolution must be a number of pixels, got {resolution}")
    new_height, new_width = (round(side * scale / SIZE_STEP) * SIZE_STEP for side in (height, width))
    if new_height < SIZE_STEP or new_width < SIZE_STEP:
        raise ValueError(f"resolution {resolution} is too small: sides are rounded to multiples of {SIZE_STEP}")
    if new_height * new_width > MAX_PIXELS:
        raise ValueError(
            f"a picture of {height}x{width} (height x width) at resolution {resolution} would have "
            f"{new_height}x{new_width} pixels; crop it to a less extreme shape or ask for a lower resolution"
        )
    return new_height, new_width


def resize_image(image: np.ndarray, resolution: int) -> np.ndarray:
    """Scale so that the shorter side is about `resolution`, each side rounded to a multiple of 64.

    Lanczos when enlarging, area averaging when shrinking. A side may come out longer than asked (100 gives 128).

    Args:
        image: (H, W) or (H, W, C), uint8.
        resolution: pixels of the shorter side.
    """
    image = check_image(image)
    height, width = image.shape[:2]
    new_height, new_width = resized_shape(height, width, resolution)
    enlarging = float(resolution) / min(height, width) > 1
    method = cv2.INTER_LANCZOS4 if enlarging else cv2.INTER_AREA
    return cv2.resize(image, (new_width, new_height), interpolation=method)


def pad_to_multiple(image: np.ndarray, multiple: int) -> np.ndarray:
    """`image` (H, W[, C]) with its last row and column repeated until both sides are multiples of `multiple`."""
    height, width = image.shape[:2]
    bottom, right = -height % multiple, -width % multiple
    if not bottom and not right:
        return image
    return np.pad(image, [(0, bottom), (0, right)] + [(0, 0)] * (image.ndim - 2), mode="edge")


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


def make_noise_disk(
    H: int,  # noqa: N803
    W: int,  # noqa: N803
    C: int,  # noqa: N803
    F: int,  # noqa: N803
    rng: np.random.RandomState | np.random.Generator | None = None,
) -> np.ndarray:
    """Smooth noise whose bumps are about `F` pixels wide: (H, W, C), float64, 0..1.

    Args:
        rng: where the numbers come from; numpy's global state if not given.
    """
    if F < 1:
        raise ValueError(f"the width of the noise must be at least 1 pixel, got {F}")
    coarse = (rng or np.random).uniform(0, 1, size=((H // F) + 2, (W // F) + 2, C))
    smooth = cv2.resize(coarse, (W + 2 * F, H + 2 * F), interpolation=cv2.INTER_CUBIC)
    smooth = smooth[F : F + H, F : F + W].reshape(H, W, C)
    smooth = smooth - smooth.min()
    return smooth / max(smooth.max(), np.finfo(np.float64).tiny)


def img2mask(
    img: np.ndarray,
    H: int,  # noqa: N803
    W: int,  # noqa: N803
    low: int = 10,
    high: int = 90,
    rng: random.Random | None = None,
) -> np.ndarray:
    """A random mask from a picture: one channel, perhaps inverted, below a random percentile in [low, high).

    Returns:
        (H, W), bool.
    """
    rng = rng or random
    img = check_image(img)
    channel = img if img.ndim == 2 else img[:, :, rng.randrange(img.shape[2])]
    channel = cv2.resize(channel, (W, H), interpolation=cv2.INTER_CUBIC)
    if rng.uniform(0, 1) < 0.5:
        channel = 255 - channel
    return channel < np.percentile(channel, rng.randrange(low, high))
