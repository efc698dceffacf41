"""Image helpers against the public reference, pixel for pixel, and what they say to bad input."""

import io
import random

import numpy as np
import pytest
from PIL import Image

from annotator import pictures, util
from annotator.pictures import read_image
from tests.annotator.cases import assert_close, open_cases

ARRAYS, META = open_cases("util")
CASES = META["cases"]


def case_names(prefix: str) -> list[str]:
    return [name for name in CASES if name.startswith(prefix)]


@pytest.mark.parametrize("case", case_names("hwc3_"))
def test_hwc3_equals_the_reference(case):
    assert np.array_equal(util.HWC3(ARRAYS[f"{case}/input"]), ARRAYS[f"{case}/output"])


@pytest.mark.parametrize("case", [name for name in case_names("resize_") if name != "resize_shapes"])
def test_resize_image_equals_the_reference(case):
    got = util.resize_image(ARRAYS[f"{case}/input"], CASES[case]["resolution"])
    if f"{case}/output" in ARRAYS:
        assert np.array_equal(got, ARRAYS[f"{case}/output"])
    else:
        assert got.shape == tuple(ARRAYS[f"{case}/output_shape"])
        assert np.array_equal(got[::3, ::3], ARRAYS[f"{case}/output_every_3rd"])


def test_resized_shapes_equal_the_reference():
    got = [pictures.resized_shape(*map(int, row)) for row in ARRAYS["resize_shapes/height_width_resolution"]]
    assert np.array_equal(got, ARRAYS["resize_shapes/output_height_width"])
    assert pictures.resized_shape(360, 640, 512) == (512, 896)


def test_safe_step_and_min_max_norm_equal_the_reference():
    ramp = ARRAYS["safe_step/input"]
    for step in (2, 5):
        got = util.safe_step(ramp, step)
        assert got.dtype == np.float32 and np.array_equal(got, ARRAYS[f"safe_step/output_step{step}"])
    assert np.array_equal(util.safe_step(ARRAYS["safe_step/input_random"]), ARRAYS["safe_step/output_random"])
    for kind in ("", "_flat"):
        given = ARRAYS[f"min_max_norm/input{kind}"]
        before = given.copy()
        assert_close(util.min_max_norm(given), ARRAYS[f"min_max_norm/output{kind}"], 1e-6)
        assert np.array_equal(given, before)


@pytest.mark.parametrize(("t", "s"), [(127, 3.0), (40, 1.0), (20, 2.2)])
def test_nms_equals_the_reference(t, s):
    got = util.nms(ARRAYS["nms/input"], t, s)
    assert got.dtype == np.uint8 and np.array_equal(got, ARRAYS[f"nms/output_t{t}_s{s}"])


@pytest.mark.parametrize("case", case_names("noise_disk_"))
def test_noise_disk_equals_the_reference(case):
    sizes = [CASES[case][name] for name in "HWCF"]
    np.random.seed(CASES[case]["seed"])
    got = util.make_noise_disk(*sizes)
    assert_close(got, ARRAYS[f"{case}/output"], 1e-6)
    own = util.make_noise_disk(*sizes, rng=np.random.RandomState(CASES[case]["seed"]))
    assert np.array_equal(got, own)


@pytest.mark.parametrize(
    ("image", "word"),
    [
        (np.zeros((4, 4, 3), dtype=np.float32), "float32"),
        (np.full((4, 4, 3), np.nan), "float64"),
        (np.zeros((4, 4, 2), dtype=np.uint8), r"\(4, 4, 2\)"),
        (np.zeros((4, 0, 3), dtype=np.uint8), "empty"),
        (np.zeros((2, 4, 4, 3), dtype=np.uint8), r"\(2, 4, 4, 3\)"),
        ([[1, 2], [3, 4]], "list"),
        (None, "NoneType"),
    ],
)
def test_what_is_no_picture_is_refused_with_its_description(image, word):
    for call in (util.HWC3, lambda x: util.resize_image(x, 64), lambda x: util.img2mask(x, 8, 8)):
        with pytest.raises(ValueError, match=word):
            call(image)


def test_sizes_that_cannot_be_made_are_refused_before_memory_is_taken():
    with pytest.raises(ValueError, match="too small"):
        util.resize_image(np.zeros((50, 50, 3), dtype=np.uint8), 20)
    with pytest.raises(ValueError, match="512x512000"):  # twice what is allowed
        pictures.resized_shape(1, 1000, 512)
    assert util.resize_image(np.zeros((1, 40, 3), dtype=np.uint8), 64).shape == (64, 2560, 3)


def test_padding_repeats_the_border_and_leaves_what_fits():
    image = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3)
    padded = pictures.pad_to_multiple(image, 4)
    assert padded.shape == (8, 8, 3)
    assert np.array_equal(padded[:5, :7], image) and (padded[5:, :7] == image[-1]).all()
    assert pictures.pad_to_multiple(padded, 4) is padded


def test_floats_are_cut_off_and_nan_is_black():
    got = pictures.to_uint8(np.array([-3.0, 0.99, 254.999, 300.0, np.nan, np.inf]))
    assert got.tolist() == [0, 0, 254, 255, 0, 255]


def test_img2mask_with_its_own_generator_leaves_the_global_one_alone():
    image = np.random.RandomState(0).randint(0, 256, (20, 30, 3), dtype=np.uint8)
    state = random.getstate()
    masks = [util.img2mask(image, 10, 12, rng=random.Random(5)) for _ in range(2)]
    assert random.getstate() == state
    assert np.array_equal(*masks) and masks[0].shape == (10, 12) and 0 < masks[0].mean() < 1


def test_thinning_at_the_limits():
    edges = np.random.RandomState(0).rand(20, 30).astype(np.float32) * 255
    assert (util.nms(edges, -1, 1.0) == 255).all()  # as published
    with pytest.raises(ValueError, match="no pixels"):
        util.nms(edges[:0], 127, 1.0)
    for resolution in (float("inf"), float("nan")):
        with pytest.raises(ValueError, match="resolution"):
            util.resize_image(np.zeros((8, 8, 3), np.uint8), resolution)


def test_grey_pictures_with_transparency_keep_it():
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    file = io.BytesIO()
    Image.fromarray(grey).save(file, "png", transparency=5)
    found = read_image(file)
    assert found.shape == (8, 8, 4) and np.array_equal(found[:, :, 0], grey)
    assert np.array_equal(found[:, :, 3] == 0, grey == 5)
