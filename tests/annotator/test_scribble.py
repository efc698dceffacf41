"""The three scribble chains of the 1.0 apps against the public reference; tile and inpainting."""

import cv2
import numpy as np
import pytest
from PIL import Image

from annotator import describe, load
from annotator.inpaint import InpaintDetector, soft_mask
from annotator.registry import Annotator
from annotator.util import resize_image
from tests.annotator.cases import Given, open_cases

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


@pytest.mark.parametrize("case", [name for name in CASES if name.startswith("fake_")])
def test_fake_scribbles_equal_the_reference(case):
    # No network is needed: the registry's chain runs around a stand-in for the edge detector.
    annotator = Annotator(describe("fake_scribble"), Given(ARRAYS[f"{case}/edge"]))
    sizes = CASES[case]["image_resolution"], CASES[case]["detect_resolution"]
    assert_case(case, annotator.make_hint(ARRAYS[f"{case}/input"], *sizes))
    assert np.array_equal(annotator.detector.seen, resize_image(ARRAYS[f"{case}/input"], sizes[1]))


def test_tile_is_the_picture_resized_linearly():
    image = ARRAYS["user_photo/input"]
    found = load("tile").make_hint(image, 256)
    height, width = resize_image(image, 256).shape[:2]
    assert np.array_equal(found.map, cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR))


@pytest.fixture
def hole() -> np.ndarray:
    hole = np.zeros((128, 192), dtype=bool)
    hole[32:96, 48:144] = True
    return hole


IMAGE = np.random.RandomState(0).randint(0, 256, (128, 192, 3), dtype=np.uint8)


def test_the_hole_of_an_inpainting_hint_is_minus_one(hole):
    mask = hole[::2, ::2].astype(np.uint8) * 255  # of half the picture's size
    found = InpaintDetector()(IMAGE, mask, blur=0.0)
    assert np.array_equal(found[:, :, 3] == 0, hole) and np.array_equal(found[:, :, :3], IMAGE)

    rgba = np.dstack([IMAGE, np.where(hole, 0, 255).astype(np.uint8)])
    inpaint = load("inpaint")
    made = inpaint.make_hint(rgba, None, blur=0.0)
    assert (made.hint[hole] == -1).all()
    assert np.array_equal(made.hint[~hole], IMAGE[~hole].astype(np.float32) / 255)
    assert np.array_equal(made.picture, IMAGE) and not made.shown[hole].any()
    assert np.array_equal(inpaint.make_hint(IMAGE, None, mask=mask, blur=0.0).hint, made.hint)
    assert np.array_equal(inpaint.info.to_hint(made.map), made.hint)
    with pytest.raises(ValueError, match="-1, which no picture file can hold"):
        _ = made.source

    soft = soft_mask(mask, 128, 192, blur=5.0)
    assert soft[64, 96] == pytest.approx(1) and 0.4 < soft[32, 96] < 0.6 and soft[0, 0] == pytest.approx(0)
    for call in (lambda: InpaintDetector()(IMAGE), lambda: inpaint.make_hint(IMAGE)):
        with pytest.raises(ValueError, match="mask"):
            call()
    with pytest.raises(ValueError, match="takes no mask"):
        load("canny").make_hint(IMAGE, mask=mask)


@pytest.mark.parametrize("resolution", [64, 192])
def test_what_is_transparent_does_not_bleed_into_what_is_seen(hole, resolution):
    """A light picture whose hole hides black, made smaller and larger: every pixel that is seen stays light."""
    rgba = np.dstack([np.where(hole[:, :, None], 0, np.full_like(IMAGE, 200)), np.where(hole, 0, 255).astype(np.uint8)])
    made = load("inpaint").make_hint(rgba, resolution, blur=0.0)
    seen = made.hint.min(axis=2) >= 0
    assert 0 < seen.mean() < 1 and np.abs(made.hint[seen] * 255 - 200).max() <= 1


def test_pil_pictures_keep_their_hole(hole, tmp_path):
    mask = np.where(hole, 255, 0).astype(np.uint8)
    Image.fromarray(mask).save(tmp_path / "mask.png")
    expected = InpaintDetector()(IMAGE, mask)
    rgba = Image.fromarray(np.dstack([IMAGE, 255 - mask]))
    for call in ((rgba,), (Image.fromarray(IMAGE), mask), (Image.fromarray(IMAGE), Image.fromarray(mask))):
        found = InpaintDetector()(*call)
        assert isinstance(found, Image.Image) and np.array_equal(np.asarray(found), expected)
    assert np.array_equal(InpaintDetector()(IMAGE, tmp_path / "mask.png"), expected)
