"""The three scribble chains of the 1.0 apps against the public reference; tile and inpainting."""

from dataclasses import replace

import cv2
import numpy as np
import pytest

from annotator import describe, load
from annotator.inpaint import InpaintDetector, soft_mask
from annotator.registry import Annotator
from annotator.util import resize_image
from tests.annotator.cases import open_cases

ARRAYS, META = open_cases("scribble")
CASES = META["cases"]


def assert_case(case: str, found) -> None:
    assert np.array_equal(found.map, ARRAYS[f"{case}/map"])
    assert np.array_equal(found.hint, ARRAYS[f"{case}/map"].astype(np.float32) / 255)
    assert np.array_equal(found.shown, ARRAYS[f"{case}/shown"])


@pytest.mark.parametrize("case", [name for name in CASES if name.startswith("user_")])
def test_user_scribbles_equal_the_reference(case):
    assert_case(case, load("scribble").make_hint(ARRAYS[f"{case}/input"], CASES[case]["resolution"]))


def test_interactive_scribble_equals_the_reference():
    resolution = CASES["interactive"]["resolution"]
    assert_case("interactive", load("scribble_interactive").make_hint(ARRAYS["interactive/mask"], resolution))


class GivenEdges:
    """Stands for the edge detector: returns the case's edges and remembers what it was shown."""

    def __init__(self, edge: np.ndarray) -> None:
        self.edge = edge

    def __call__(self, image: np.ndarray) -> np.ndarray:
        self.seen = image
        return self.edge


@pytest.mark.parametrize("case", [name for name in CASES if name.startswith("fake_")])
def test_fake_scribbles_equal_the_reference(case):
    # No network is needed: the registry's chain runs around a stand-in for the edge detector.
    annotator = Annotator(replace(describe("fake_scribble"), detector="annotator.tile.TileDetector"))
    annotator.detector = GivenEdges(ARRAYS[f"{case}/edge"])
    sizes = CASES[case]["image_resolution"], CASES[case]["detect_resolution"]
    assert_case(case, annotator.make_hint(ARRAYS[f"{case}/input"], *sizes))
    assert np.array_equal(annotator.detector.seen, resize_image(ARRAYS[f"{case}/input"], sizes[1]))


def test_tile_is_the_picture_resized_linearly():
    image = ARRAYS["user_photo/input"]
    found = load("tile").make_hint(image, 256)
    height, width = resize_image(image, 256).shape[:2]
    assert np.array_equal(found.map, cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR))


def test_the_hole_of_an_inpainting_hint_is_minus_one():
    image = np.random.RandomState(0).randint(0, 256, (128, 192, 3), dtype=np.uint8)
    mask = np.zeros((64, 96), dtype=np.uint8)  # of half the picture's size
    mask[16:48, 24:72] = 255
    hole = np.zeros((128, 192), dtype=bool)
    hole[32:96, 48:144] = True
    found = InpaintDetector()(image, mask, blur=0.0)
    assert np.array_equal(found[:, :, 3] == 0, hole) and np.array_equal(found[:, :, :3], image)

    rgba = np.dstack([image, np.where(hole, 0, 255).astype(np.uint8)])
    made = load("inpaint").make_hint(rgba, None, blur=0.0)
    assert (made.hint[hole] == -1).all()
    assert np.array_equal(made.hint[~hole], image[~hole].astype(np.float32) / 255)
    assert np.array_equal(made.picture, image) and not made.shown[hole].any()

    soft = soft_mask(mask, 128, 192, blur=5.0)
    assert soft[64, 96] == pytest.approx(1) and 0.4 < soft[32, 96] < 0.6 and soft[0, 0] == pytest.approx(0)
    with pytest.raises(ValueError, match="mask"):
        InpaintDetector()(image)
