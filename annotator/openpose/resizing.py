"""Pictures to network inputs, and a network's maps back to the picture's size, in the ways of both versions.

1.0 interpolates cubically and rounds sizes; 1.1 averages or uses Lanczos and cuts sizes to integers.
"""

from collections.abc import Iterator

import cv2
import numpy as np

from annotator.openpose.model import STRIDE

PADDING = 128  # grey


def resize(x: np.ndarray, height: float, width: float, version: str) -> np.ndarray:
    """(H, W[, C]) at another size, of at least one pixel a side.

    1.1 averages if the sum of the sides becomes smaller; it resizes channels one by one unless they are three.
    """
    size = max(1, int(width)), max(1, int(height))
    if version == "1.0":
        return cv2.resize(x, size, interpolation=cv2.INTER_CUBIC)
    method = cv2.INTER_AREA if height + width < x.shape[0] + x.shape[1] else cv2.INTER_LANCZOS4
    if x.ndim == 2 or x.shape[2] == 3:
        return cv2.resize(x, size, interpolation=method)
    return cv2.merge([cv2.resize(channel, size, interpolation=method) for channel in cv2.split(x)])


def scale(x: np.ndarray, factor: float, version: str) -> np.ndarray:
    """(H, W[, C]) with both sides times `factor`."""
    height, width = x.shape[0] * factor, x.shape[1] * factor
    if version == "1.0" and min(height, width) > 0.5:
        return cv2.resize(x, (0, 0), fx=factor, fy=factor, interpolation=cv2.INTER_CUBIC)  # which knows the factor
    return resize(x, height, width, version)


def enlarge(maps: np.ndarray, seen: tuple[int, ...], height: int, width: int, version: str) -> np.ndarray:
    """Some of a network's maps (h, w, C), or one (h, w), at the picture's size, by way of the size of what the network saw: `seen`."""
    maps = scale(np.ascontiguousarray(maps), STRIDE, version)[: seen[0], : seen[1]]  # without the padding
    return resize(maps, height, width, version)


def enlarge_one_by_one(
    maps: np.ndarray, count: int, seen: tuple[int, ...], height: int, width: int, version: str
) -> Iterator[np.ndarray]:
    """The first `count` maps at the picture's size, as `enlarge` gives all together: (height, width), each.

    Taking the next ones may overwrite those before.
    """
    if version == "1.1":
        for channel in range(count):
            yield enlarge(maps[:, :, channel], seen, height, width, version)
        return
    # Two stay in the processor's cache. OpenCV's cubic interpolation rounds two and many alike only for such widths.
    group = 2 if width % 4 == 0 else maps.shape[2]
    planes = [np.empty((height, width), dtype=np.float32) for _ in range(group)]
    for channel in range(0, count, group):
        cv2.split(enlarge(maps[:, :, channel : channel + group], seen, height, width, version), planes)
        yield from planes[: count - channel]


def network_input(picture: np.ndarray) -> np.ndarray:
    """A uint8 picture (H, W, 3), BGR, as float32 from -0.5 to 0.5, padded at the right and below for the network."""
    bottom, right = (-side % STRIDE for side in picture.shape[:2])
    border = cv2.copyMakeBorder(picture, 0, bottom, 0, right, cv2.BORDER_CONSTANT, value=(PADDING,) * 3)
    return border.astype(np.float32) / 256 - 0.5
