"""The shuffles of ControlNet 1.1 against the public reference."""

import random

import cv2
import numpy as np
import pytest

from annotator.shuffle import ColorShuffleDetector, ContentShuffleDetector, DownSampleDetector, GrayDetector
from annotator.util import img2mask
from tests.annotator.cases import open_cases

ARRAYS, META = open_cases("shuffle")
CALLS = {
    "content_astronaut": lambda image, case: ContentShuffleDetector()(image),
    "content_chelsea": lambda image, case: ContentShuffleDetector()(image, h=case["h"], w=case["w"], f=case["f"]),
    "color": lambda image, case: ColorShuffleDetector()(image),
    "gray": lambda image, case: GrayDetector()(image),
    "downsample": lambda image, case: DownSampleDetector()(image),
    "img2mask": lambda image, case: img2mask(image, case["H"], case["W"]),
}


@pytest.mark.parametrize("name", list(META["cases"]))
def test_shuffles_equal_the_reference(name):
    case = META["cases"][name]
    np.random.seed(case["numpy_seed"])
    random.seed(case.get("python_seed", 0))
    got, want = CALLS[name](ARRAYS[f"{name}/input"], case), ARRAYS[f"{name}/output"]
    assert got.dtype == want.dtype and got.shape == want.shape
    # OpenCV's remap interpolates more finely since 5.0.
    levels = 3 if name.startswith("content") and int(cv2.__version__.split(".")[0]) < 5 else 0
    assert np.abs(got.astype(int) - want.astype(int)).max() <= levels


@pytest.mark.parametrize("detector", [ContentShuffleDetector, ColorShuffleDetector, GrayDetector, DownSampleDetector])
def test_a_seed_repeats_the_result_and_touches_no_global_generator(detector):
    image = ARRAYS["color/input"][:51, :77]  # odd sizes
    state = random.getstate(), np.random.get_state()[1].copy()
    first, again, other = (detector()(image, seed=seed) for seed in (1, 1, 2))
    assert first.shape == image.shape and first.dtype == np.uint8
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    assert random.getstate() == state[0] and np.array_equal(np.random.get_state()[1], state[1])


def test_bad_arguments_are_named():
    image = ARRAYS["color/input"]
    with pytest.raises(ValueError, match="at least 1"):
        ContentShuffleDetector()(image, f=0)
    with pytest.raises(ValueError, match="40000"):
        ContentShuffleDetector()(np.zeros((2, 40000, 3), dtype=np.uint8))
    with pytest.raises(ValueError, match="32767"):
        ContentShuffleDetector()(image, h=32767)
    for level in (-1, 20):
        with pytest.raises(ValueError, match="level"):
            DownSampleDetector()(image, level=level)
    assert not ContentShuffleDetector()(np.zeros((1, 9, 3), dtype=np.uint8)).any()
