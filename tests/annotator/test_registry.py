"""The registry: facts of every condition, parameters, and the way from picture to hint."""

import subprocess
import sys

import cv2
import numpy as np
import pytest
from PIL import Image

from annotator import describe, list_annotators, load, use_version
from annotator.pictures import HWC3, resize_image
from annotator.registry import (
    REGISTRY,
    Annotator,
    Hint,
    invert,
    scale,
    scale_inverted,
    scale_reversed,
    thicken_and_invert,
)
from annotator.shuffle import ContentShuffleDetector
from tests.annotator.cases import Given

IMAGE = np.random.RandomState(0).randint(0, 256, (150, 203, 3), dtype=np.uint8)


def given(name: str, version: str, result) -> Annotator:
    return Annotator(describe(name, version), Given(result))


def test_all_conditions_are_there():
    assert {"canny", "mlsd", "hed", "scribble", "fake_scribble", "openpose", "seg", "depth", "normal"} <= set(
        list_annotators("1.0")
    )
    new = {"lineart", "lineart_anime", "pidinet", "normalbae", "shuffle", "tile", "inpaint"}
    assert new <= set(list_annotators("1.1")) and not new & set(list_annotators("1.0"))
    assert list_annotators() == sorted(set(list_annotators("1.0")) | set(list_annotators("1.1")))


@pytest.mark.parametrize("key", list(REGISTRY), ids="-".join)
def test_every_entry_names_a_class_that_has_its_parameters(key):
    info = REGISTRY[key]
    assert set(info.offers) | set(info.defaults_here) <= set(info.detector_class.parameters())
    assert info.check_parameters({}) == info.defaults and all(parameter.help for parameter in info.parameters)
    assert (info.detect_resolution is None) == (info.works_at != "detect")


@pytest.mark.parametrize(
    ("name", "version", "size", "interpolation", "to_hint", "to_shown"),
    [  # what the reference's apps do
        ("canny", "1.0", None, None, scale, invert),
        ("canny", "1.1", 512, cv2.INTER_LINEAR, scale, HWC3),
        ("mlsd", "1.0", 512, cv2.INTER_NEAREST, scale, thicken_and_invert),
        ("mlsd", "1.1", 512, cv2.INTER_LINEAR, scale, HWC3),
        ("hed", "1.0", 512, cv2.INTER_LINEAR, scale, HWC3),
        ("openpose", "1.0", 512, cv2.INTER_NEAREST, scale, HWC3),
        ("openpose", "1.1", 512, cv2.INTER_LINEAR, scale, HWC3),
        ("seg", "1.0", 512, cv2.INTER_NEAREST, scale, HWC3),
        ("seg", "1.1", 512, cv2.INTER_LINEAR, scale, HWC3),
        ("depth", "1.0", 384, cv2.INTER_LINEAR, scale, HWC3),
        ("depth", "1.1", 384, cv2.INTER_LINEAR, scale, HWC3),
        ("normal", "1.0", 384, cv2.INTER_LINEAR, scale_reversed, HWC3),
        ("normalbae", "1.1", 512, cv2.INTER_LINEAR, scale, HWC3),
        ("lineart", "1.1", 512, cv2.INTER_LINEAR, scale_inverted, HWC3),
        ("lineart_anime", "1.1", 512, cv2.INTER_LINEAR, scale_inverted, HWC3),
    ],
)
def test_facts_of_the_two_versions(name, version, size, interpolation, to_hint, to_shown):
    info = describe(name, version)
    assert (info.detect_resolution, info.to_hint, info.to_shown) == (size, to_hint, to_shown)
    assert interpolation in (None, info.interpolation)


def test_line_art_reaches_the_model_inverted():
    found = given("lineart", "1.1", lambda image: image[:, :, 0]).make_hint(IMAGE, None, detect_resolution=64)
    assert found.hint.shape == IMAGE.shape and found.hint.dtype == np.float32
    assert np.array_equal(found.hint, 1 - found.map.astype(np.float32) / 255)
    assert np.array_equal(found.source, 255 - found.map)


def test_normals_reach_the_model_reversed_and_people_as_they_are():
    annotator = given("normal", "1.0", lambda image: (image[:, :, 0], image))
    found = annotator.make_hint(IMAGE, None, bg_th=0.2)
    assert annotator.detector.parameters == {"a": 2 * np.pi, "bg_th": 0.2}
    assert np.array_equal(found.shown, found.map)
    assert np.array_equal(found.hint, found.map[:, :, ::-1].astype(np.float32) / 255)
    assert np.array_equal(found.source, found.map[:, :, ::-1])


def test_nearest_maps_gain_no_new_values_and_mlsd_is_shown_dilated():
    def two_lines(image):
        drawn = np.zeros(image.shape[:2], dtype=np.uint8)
        drawn[::32] = 255
        return drawn

    found = given("mlsd", "1.0", two_lines).make_hint(IMAGE, 256)
    assert set(np.unique(found.map)) == {0, 255}
    assert (found.shown == 0).sum() > 2 * (found.map == 255).sum()  # thicker, and dark on light
    assert (found.shown[found.map == 255] == 0).all()


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("canny", {"low_threshold": 0}, "low_threshold must be a whole number from 1 to 255, got 0"),
        ("canny", {"low_threshold": 1.5}, "whole number"),
        ("canny", {"low_threshold": "100"}, "from 1 to 255, got '100'"),
        ("canny", {"low": 3}, "no parameter low; it has: low_threshold, high_threshold"),
        ("mlsd", {"thr_v": float("nan")}, "thr_v"),
        ("openpose", {"hand": 1}, "True or False"),
        ("canny", {"low_threshold": 200, "high_threshold": 100}, "must not be above high_threshold, got 200 and 100"),
    ],
)
def test_bad_parameters_are_named_before_anything_runs(name, parameters, message):
    with pytest.raises(ValueError, match=message):
        describe(name).check_parameters(parameters)


def test_the_picture_is_warped_straight_to_its_size_as_by_the_app():
    result = load("shuffle").make_hint(IMAGE, 256, seed=3)
    height, width = resize_image(IMAGE, 256).shape[:2]
    assert np.array_equal(result.map, ContentShuffleDetector()(IMAGE, h=height, w=width, f=256, seed=3))
    with pytest.raises(ValueError, match="no detect_resolution"):
        load("shuffle").make_hint(IMAGE, 256, detect_resolution=512)


def test_instruct_pix2pix_sees_the_picture_at_its_size():
    assert np.array_equal(load("ip2p").make_hint(IMAGE, 256).map, resize_image(IMAGE, 256))


def test_pil_pictures_and_paths_are_pictures_too(tmp_path):
    Image.fromarray(IMAGE).save(tmp_path / "a.png")
    canny = load("canny")
    want = canny.make_hint(IMAGE, 128)
    for picture in (Image.fromarray(IMAGE), tmp_path / "a.png", str(tmp_path / "a.png")):
        assert np.array_equal(canny.make_hint(picture, 128).hint, want.hint)
        assert np.array_equal(canny(picture), canny(IMAGE))
    assert repr(want) == "Hint(canny 1.0, 128x192)"


def test_devices_and_weights_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="CannyDetector needs no weights, got nope"):
        load("canny", weights="nope")
    with pytest.raises(ValueError, match="gpu"):
        load("canny", device="gpu")
    assert load("canny", device="cpu")


def test_unknown_names_and_versions_say_what_there_is():
    with pytest.raises(ValueError, match="no annotator 'cany'; there are: .*canny, "):
        load("cany")
    with pytest.raises(ValueError, match="version 1.1, not in '1.0'"):
        load("tile", version="1.0")
    with pytest.raises(ValueError, match="version must be one of '1.0', '1.1', got 1.1$"):
        load("canny", version=1.1)  # a number
    with pytest.raises(ValueError, match="1.2"):
        list_annotators("1.2")
    with pytest.raises(ValueError, match="no detect_resolution"):
        load("canny").make_hint(IMAGE, 128, detect_resolution=256)
    with pytest.raises(ValueError, match="float64"):
        load("inpaint").make_hint(IMAGE / 255)


def test_the_version_is_chosen_once(monkeypatch):
    assert describe("hed").version == "1.0" and describe("tile").version == "1.1"
    monkeypatch.setenv("ANNOTATOR_VERSION", "1.1")
    assert describe("hed").version == "1.1"
    use_version("1.0")
    assert describe("hed").version == "1.0"
    use_version(None)
    assert describe("normal").version == "1.0" and describe("hed", "1.0").version == "1.0"
    for wrong in ("1.2", "2"):
        monkeypatch.setenv("ANNOTATOR_VERSION", wrong)
        for call in (lambda: describe("hed"), lambda: use_version("3")):
            with pytest.raises(ValueError, match="(ANNOTATOR_VERSION|version) must be one of '1.0', '1.1'"):
                call()


def test_importing_the_package_loads_no_network_library():
    code = "import sys, annotator; annotator.load('canny'); sys.exit('torch' in sys.modules or 'timm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("name", ["canny", "lineart", "normal"])
def test_the_source_of_a_large_map_is_the_hint_in_whole_numbers(name):
    info, drawn = describe(name), np.random.RandomState(0).randint(0, 256, (600, 8, 3), dtype=np.uint8)
    hint = Hint(info, drawn, drawn)
    assert np.array_equal(hint.source, np.rint(hint.hint * 255).astype(np.uint8))
