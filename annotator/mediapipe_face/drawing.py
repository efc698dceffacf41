"""Faces as coloured contours on black, as the face model of CrucibleAI (ControlNetMediaPipeFace) was trained on."""

from collections.abc import Mapping, Sequence

import cv2
import numpy as np

# Parts by the names that MediaPipe's lists of edges have, in the order in which they are drawn; colours in RGB.
COLOURS = {
    "FACE_OVAL": (10, 200, 10),
    "LEFT_EYE": (10, 200, 180),
    "LEFT_EYEBROW": (10, 220, 180),
    "RIGHT_EYE": (180, 200, 10),
    "RIGHT_EYEBROW": (180, 220, 10),
    "LIPS": (10, 180, 10),
}
PUPILS = {468: (250, 200, 10), 473: (10, 200, 250)}  # right and left
THICKNESS = 2  # of contours, and half the side of a pupil
MIN_FACE = 64  # pixels; smaller faces are left out


def draw_face(canvas: np.ndarray, face: np.ndarray, edges: Mapping[str, Sequence[tuple[int, int]]]) -> None:
    """Draw one face on `canvas` (H, W, 3), uint8, RGB, unless it is smaller than 64 pixels.

    Args:
        face: (points, 2), x and y relative to width and height; points outside of the picture are not drawn.
        edges: pairs of points that a contour connects, by the names of `COLOURS`.
    """
    size = np.array([canvas.shape[1], canvas.shape[0]])
    if (np.ptp(face, axis=0) * size).min() < MIN_FACE:
        return
    inside = np.all((face >= 0) & (face <= 1), axis=1)
    pixels = np.minimum(face * size, size - 1).astype(np.int64)
    for part, colour in COLOURS.items():
        for start, end in edges[part]:
            if inside[start] and inside[end]:
                cv2.line(canvas, pixels[start].tolist(), pixels[end].tolist(), colour, THICKNESS)
    for point, colour in PUPILS.items():
        if point < len(face) and inside[point]:
            x, y = pixels[point]
            canvas[max(y - THICKNESS, 0) : y + THICKNESS, max(x - THICKNESS, 0) : x + THICKNESS] = colour
