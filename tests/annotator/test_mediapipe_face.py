"""Faces as contours: the drawing on made-up points; where MediaPipe and a model file are installed, the network as well."""

import numpy as np

from annotator.mediapipe_face.drawing import COLOURS, PUPILS, draw_face

EDGES = {part: [] for part in COLOURS} | {"FACE_OVAL": [(0, 1), (1, 2)], "LIPS": [(3, 4)]}


def _face(**points: tuple[float, float]) -> np.ndarray:
    face = np.full((478, 2), 0.5)
    for name, point in points.items():
        face[int(name.removeprefix("p"))] = point
    return face


FACE = _face(
    p0=(0.1, 0.1), p1=(0.9, 0.1), p2=(0.9, 0.9), p3=(0.3, 0.7), p4=(0.6, 0.7), p468=(0.4, 0.4), p473=(0.6, 0.4)
)


def test_contours_and_pupils_have_their_colours():
    canvas = np.zeros((100, 200, 3), dtype=np.uint8)
    draw_face(canvas, FACE, EDGES)
    assert canvas[10, 100].tolist() == list(COLOURS["FACE_OVAL"]) and canvas[50, 180].tolist() == [10, 200, 10]
    assert canvas[70, 90].tolist() == list(COLOURS["LIPS"]) and canvas[69:72, 130].max() == 0
    for point, colour in PUPILS.items():
        x, y = (FACE[point] * (200, 100)).astype(int)
        assert (canvas[y - 2 : y + 2, x - 2 : x + 2] == colour).all()
    assert len(np.unique(canvas.reshape(-1, 3), axis=0)) == 5  # black, two contours, two pupils


def test_small_faces_and_points_outside_are_left_out():
    canvas = np.zeros((100, 200, 3), dtype=np.uint8)
    draw_face(canvas, FACE * 0.5, EDGES)  # 40 pixels high
    assert canvas.max() == 0
    outside = FACE.copy()
    outside[1] = (1.2, 0.1)
    draw_face(canvas, outside, EDGES)
    assert canvas[10].max() == 0 and canvas[70, 90].tolist() == list(COLOURS["LIPS"])


def test_a_pupil_at_the_border_is_cut():
    canvas = np.zeros((100, 200, 3), dtype=np.uint8)
    face = FACE.copy()
    face[468] = (0.0, 1.0)
    draw_face(canvas, face, EDGES)
    assert canvas[97:, :2].tolist() == np.broadcast_to(PUPILS[468], (3, 2, 3)).tolist()
