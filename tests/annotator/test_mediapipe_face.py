"""Faces as contours: the drawing on made-up points; where MediaPipe and a model file are installed, the network as well."""

import importlib.util
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from annotator.mediapipe_face import FILE, MediapipeFaceDetector
from annotator.mediapipe_face.drawing import COLOURS, PUPILS, draw_face

INSTALLED = importlib.util.find_spec("mediapipe") is not None
MODEL = Path(os.environ.get("ANNOTATOR_CKPTS", "")) / FILE
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


def test_every_picture_of_a_batch_gets_its_faces():
    class Detector(MediapipeFaceDetector):
        def load(self, **parameters) -> None:
            self.calls = []
            self.network = SimpleNamespace(edges=EDGES)

        def predict(self, images, max_faces, min_confidence):
            self.calls.append((max_faces, min_confidence))
            return [[FACE] * bool(image.any()) for image in images]

    detector = Detector("cpu")
    light = np.full((100, 200, 3), 9, dtype=np.uint8)
    expected = np.zeros_like(light)
    draw_face(expected, FACE, EDGES)
    outputs = detector.run(torch.stack([detector.prepare(light), detector.prepare(light * 0)]), max_faces=3)
    assert (detector.finish(outputs[0], light) == expected).all() and not detector.finish(outputs[1], light).any()
    assert (detector(light, max_faces=2, min_confidence=0.25) == expected).all()
    assert detector.calls == [(3, 0.5), (2, 0.25)]


@pytest.mark.skipif(INSTALLED, reason="MediaPipe is installed")
def test_the_missing_library_is_named():
    with pytest.raises(ImportError, match=r"this detector needs mediapipe: pip install 'controlnet\[face\]'"):
        MediapipeFaceDetector("cpu")


@pytest.mark.skipif(not (INSTALLED and MODEL.is_file()), reason=f"MediaPipe or {FILE} in ANNOTATOR_CKPTS is missing")
def test_a_real_face_is_found_and_a_file_of_another_kind_refused(tmp_path):
    photo = np.load(Path(__file__).parent.parent / "data" / "annotator" / "canny.npz")["astronaut/input"]
    photo = np.asarray(Image.fromarray(photo).resize((512, 512)))
    found = MediapipeFaceDetector("cpu", MODEL)(photo)
    colours = {tuple(colour) for colour in found.reshape(-1, 3).tolist()}
    assert colours == {(0, 0, 0), *COLOURS.values(), *PUPILS.values()}
    y, x = np.argwhere(found.any(axis=2)).mean(axis=0)
    assert 90 < y < 150 and 200 < x < 250  # where the astronaut's face is
    (tmp_path / FILE).write_bytes(b"no model")
    with pytest.raises(ValueError, match="is no model of MediaPipe's face landmarker"):
        MediapipeFaceDetector("cpu", tmp_path)(photo)
