"""Joints in heat maps: maxima of blurred maps, equal to the last bit to those of a float64 blur of everything.

A blur of whole maps in float64 is what the reference spends most of its time with. Here a quick blur in float32 finds
the few pixels that it cannot decide about, and only those are blurred in float64, with the additions in SciPy's order.
"""

from collections.abc import Iterable

import cv2
import numpy as np

SIGMA = 3.0
RADIUS = 12  # of the blur: four sigma
BODY_THRESHOLD = 0.1
POINT_THRESHOLD = 0.05  # for hands and faces

_WIDTH = 2 * RADIUS + 1
_WEIGHTS = np.exp(-0.5 / SIGMA**2 * np.arange(-RADIUS, RADIUS + 1) ** 2)
_WEIGHTS = _WEIGHTS / _WEIGHTS.sum()
_SLACK = 1e-5  # what the quick blur may be off by, relative to the largest value; it is off by about 5e-7
_MANY = 2**14  # from here on blurring the whole map takes less time than blurring around pixels
_CROSS = np.array([[0, 1, -1, 0, 0], [0, 0, 0, 1, -1]])[:, :, None]  # y and x of a pixel and its neighbours


def _correlate(x: np.ndarray, axis: int) -> np.ndarray:
    """Blur along `axis`, where the window fits: the centre first, then pairs of equal weight from the outside in."""
    x = np.moveaxis(x, axis, 0)
    count = x.shape[0] - 2 * RADIUS
    total = x[RADIUS : RADIUS + count] * _WEIGHTS[RADIUS]
    for i in range(RADIUS):
        total += (x[i : i + count] + x[2 * RADIUS - i : 2 * RADIUS - i + count]) * _WEIGHTS[i]
    return np.moveaxis(total, 0, axis)


def gaussian_filter(x: np.ndarray) -> np.ndarray:
    """Gaussian blur of sigma 3, cut at 12 pixels, with reflecting borders (c b a | a b c): (H, W), in float64."""
    return _correlate(_correlate(np.pad(x.astype(np.float64), RADIUS, mode="symmetric"), 0), 1)


def _blur_at(x: np.ndarray, ys: np.ndarray, xs: np.ndarray) -> np.ndarray:
    """`gaussian_filter` at some pixels only."""
    if ys.size > _MANY:
        return gaussian_filter(x)[ys, xs]
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(x, RADIUS, mode="symmetric"), (_WIDTH, _WIDTH))
    return _correlate(_correlate(windows[ys, xs].astype(np.float64), -2), -1)[..., 0, 0]


def _quick_blur(x: np.ndarray) -> tuple[np.ndarray, float]:
    """`gaussian_filter` in float32, and how far off it may be."""
    blurred = cv2.GaussianBlur(x.astype(np.float32, copy=False), (_WIDTH, _WIDTH), SIGMA, borderType=cv2.BORDER_REFLECT)
    return blurred, _SLACK * max(abs(extreme) for extreme in cv2.minMaxLoc(x)[:2])


def _part_above(heatmap: np.ndarray, threshold: float) -> tuple[np.ndarray, int, int]:
    """The part of a map outside of which no blurred value is above the threshold, and its top and left; maybe empty."""
    # The blur is a mean: it is above the threshold only near pixels that are. The factor allows for rounding.
    left, top, width, height = cv2.boundingRect((heatmap > threshold * 0.999).view(np.uint8))
    if not width:
        return heatmap[:0, :0], 0, 0
    margin = 2 * RADIUS + 2  # from that box to the farthest peak, its neighbour, and what the blur sees there
    bottom, right = top + height + margin, left + width + margin
    top, left = max(top - margin, 0), max(left - margin, 0)
    return heatmap[top:bottom, left:right], top, left


def _find_in_map(heatmap: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of a map's peaks, by row, then column."""
    part, top, left = _part_above(heatmap, threshold)
    if not part.size:
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    blurred, slack = _quick_blur(part)
    least = cv2.dilate(blurred, cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3)))
    np.maximum(np.subtract(least, 2 * slack, out=least), threshold - slack, out=least)
    ys, xs = np.nonzero(cv2.compare(blurred, least, cv2.CMP_GE))
    # A pixel at the border stands for its neighbour outside, to which it does not lose.
    cross = [np.clip(at + steps, 0, size - 1) for at, steps, size in zip((ys, xs), _CROSS, part.shape, strict=True)]
    centre, *neighbours = _blur_at(part, *cross)
    chosen = (centre > threshold) & (centre >= np.max(neighbours, axis=0))
    return ys[chosen] + top, xs[chosen] + left


def find_body_peaks(heatmaps: Iterable[np.ndarray], threshold: float = BODY_THRESHOLD) -> list[np.ndarray]:
    """Candidates for each joint: pixels whose blurred value is above the threshold and no lower than a neighbour's.

    Args:
        heatmaps: for each joint (H, W), float32, at the picture's size; each may be gone when the next is asked for.

    Returns:
        for each joint (n, 4), float64: x, y, unblurred value, number; by row, then column, numbered through all joints.
    """
    found, count = [], 0
    for heatmap in heatmaps:
        ys, xs = _find_in_map(heatmap, threshold)
        numbers = np.arange(count, count + len(ys))
        found.append(np.stack([xs, ys, heatmap[ys, xs], numbers], axis=1, dtype=np.float64))
        count += len(ys)
    return found


def find_hand_peaks(heatmaps: Iterable[np.ndarray], threshold: float = POINT_THRESHOLD) -> np.ndarray:
    """The place of each point of a hand: the maximum of that connected part of its map that weighs most.

    Args:
        heatmaps: for each point (H, W), float64. The parts are those of the blurred map that are above the threshold.

    Returns:
        (points, 2), int64: x, y; (0, 0) where nothing was found.
    """
    peaks = []
    for whole in heatmaps:
        heatmap, top, left = _part_above(whole, threshold)
        if not heatmap.size:
            peaks.append((0, 0))
            continue
        blurred, slack = _quick_blur(heatmap)
        above = blurred > threshold
        unsure = np.nonzero(np.abs(blurred - threshold) <= slack)
        above[unsure] = _blur_at(heatmap, *unsure) > threshold
        count, labels = cv2.connectedComponents(above.view(np.uint8), connectivity=8)
        if count == 1:
            peaks.append((0, 0))
            continue
        inside = labels[above]
        weights = np.bincount(inside, heatmap[above])
        weights[0] = -np.inf
        heaviest = np.flatnonzero(weights == weights.max())
        # Of equals the first by row, then column.
        part = heaviest[0] if len(heaviest) == 1 else inside[np.isin(inside, heaviest)][0]
        y, x = divmod(int(np.where(labels == part, heatmap, 0.0).argmax()), heatmap.shape[1])
        peaks.append((left + x, top + y))
    return np.array(peaks, dtype=np.int64)


def find_face_peaks(heatmaps: np.ndarray, threshold: float = POINT_THRESHOLD) -> np.ndarray:
    """The maxima of a face's maps (maps, H, W): (n, 2), int64: x, y; maps that stay below it are left out."""
    flat = heatmaps.reshape(len(heatmaps), -1)
    best = flat.argmax(axis=1)[flat.max(axis=1) > threshold]
    return np.stack([best % heatmaps.shape[2], best // heatmaps.shape[2]], axis=1)
