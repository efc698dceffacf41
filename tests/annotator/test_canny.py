"""Canny against the public reference, and odd pictures."""

import numpy as np
import pytest

from annotator import load
from annotator.canny import CannyDetector
from tests.annotator.cases import open_cases

ARRAYS, META = open_cases("canny")


@pytest.mark.parametrize("name", [name for name in ARRAYS if "/low" in name])
def test_maps_equal_the_reference(name):
    case, thresholds = name.split("/")
    low, high = (int(part.lstrip("lowhig")) for part in thresholds.split("_"))
    assert np.array_equal(CannyDetector()(ARRAYS[f"{case}/input"], low, high), ARRAYS[name])


def test_the_app_s_chain_equals_the_reference():
    case = META["cases"]["app"]
    thresholds = {name: case[name] for name in ("low_threshold", "high_threshold")}
    found = load("canny").make_hint(ARRAYS["app/input"], case["resolution"], **thresholds)
    assert np.array_equal(found.map, ARRAYS["app/output"])
    assert np.array_equal(found.hint, ARRAYS["app/output"].astype(np.float32) / 255)
    assert np.array_equal(found.shown, 255 - ARRAYS["app/output"])


@pytest.mark.parametrize("shape", [(1, 50, 3), (50, 1, 3), (1, 1), (9, 13, 4), (8, 8, 1)])
@pytest.mark.parametrize("level", [0, 255])
def test_flat_and_tiny_pictures_have_no_edges(shape, level):
    found = CannyDetector()(np.full(shape, level, dtype=np.uint8))
    assert found.shape == shape[:2] and not found.any()


def test_a_huge_picture_works():
    picture = np.zeros((10_000, 10_000), dtype=np.uint8)
    picture[:, 5000:] = 255
    found = CannyDetector()(picture)
    assert found.shape == picture.shape and found[:, 4998:5002].any() and not found[:, :4990].any()


@pytest.mark.parametrize("low", [-1, float("nan"), float("inf")])
def test_thresholds_out_of_range_are_named(low):
    with pytest.raises(ValueError, match="low_threshold"):
        CannyDetector()(np.zeros((8, 8, 3), dtype=np.uint8), low, 200)
