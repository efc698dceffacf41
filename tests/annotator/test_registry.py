"""The registry: facts of every condition, parameters, and the way from picture to hint."""

import importlib
import inspect
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from annotator import describe, list_annotators, load
from annotator.registry import REGISTRY, Annotator

IMAGE = np.random.RandomState(0).randint(0, 256, (150, 203, 3), dtype=np.uint8)


class Stub:
    """Stands for a detector: gives `result`, remembers its arguments."""

    def __init__(self, result) -> None:
        self.result = result

    def __call__(self, image, **parameters):
        self.image, self.parameters = image, parameters
        return self.result(image)


def stubbed(name: str, version: str, result) -> Annotator:
    annotator = Annotator(replace(describe(name, version), detector="annotator.tile.TileDetector", options={}))
    annotator.detector = Stub(result)
    return annotator


def test_all_conditions_are_there():
    assert {"canny", "mlsd", "hed", "scribble", "fake_scribble", "openpose", "seg", "depth", "normal"} <= set(
        list_annotators("1.0")
    )
    new = {"lineart", "lineart_anime", "pidinet", "normalbae", "shuffle", "tile", "inpaint"}
    assert new <= set(list_annotators("1.1")) and not new & set(list_annotators("1.0"))
    assert list_annotators() == sorted(set(list_annotators("1.0")) | set(list_annotators("1.1")))


@pytest.mark.parametrize("key", list(REGISTRY), ids="-".join)
def test_every_entry_names_a_class_that_takes_its_options_and_parameters(key):
    info = REGISTRY[key]
    module, _, name = info.detector.rpartition(".")
    detector = getattr(importlib.import_module(module), name)
    assert {"device", "weights", *info.options} <= set(inspect.signature(detector.__init__).parameters)
    assert set(info.defaults) <= set(inspect.signature(detector.__call__).parameters)
    assert info.check_parameters({}) == info.defaults
    assert (info.detect_resolution is None) == (info.works_at != "detect")


@pytest.mark.parametrize(
    ("name", "version", "size", "interpolation", "hint", "shown"),
    [  # what the reference's apps do
        ("canny", "1.0", None, None, "map", "inverted"),
        ("canny", "1.1", 512, "linear", "map", "map"),
        ("mlsd", "1.0", 512, "nearest", "map", "dilated, inverted"),
        ("mlsd", "1.1", 512, "linear", "map", "map"),
        ("hed", "1.0", 512, "linear", "map", "map"),
        ("openpose", "1.0", 512, "nearest", "map", "map"),
        ("openpose", "1.1", 512, "linear", "map", "map"),
        ("seg", "1.0", 512, "nearest", "map", "map"),
        ("seg", "1.1", 512, "linear", "map", "map"),
        ("depth", "1.0", 384, "linear", "map", "map"),
        ("depth", "1.1", 384, "linear", "map", "map"),
        ("normal", "1.0", 384, "linear", "channels reversed", "map"),
        ("normalbae", "1.1", 512, "linear", "map", "map"),
        ("lineart", "1.1", 512, "linear", "inverted", "map"),
        ("lineart_anime", "1.1", 512, "linear", "inverted", "map"),
    ],
)
def test_facts_of_the_two_versions(name, version, size, interpolation, hint, shown):
    info = describe(name, version)
    assert (info.detect_resolution, info.hint, info.shown) == (size, hint, shown)
    assert interpolation in (None, info.interpolation)


def test_line_art_reaches_the_model_inverted():
    found = stubbed("lineart", "1.1", lambda image: image[:, :, 0]).make_hint(IMAGE, None, detect_resolution=64)
    assert found.hint.shape == IMAGE.shape and found.hint.dtype == np.float32
    assert np.array_equal(found.hint, 1 - found.map.astype(np.float32) / 255)
    assert np.array_equal(found.source, 255 - found.map)


def test_normals_reach_the_model_reversed_and_people_as_they_are():
    annotator = stubbed("normal", "1.0", lambda image: (image[:, :, 0], image))
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

    found = stubbed("mlsd", "1.0", two_lines).make_hint(IMAGE, 256)
    assert set(np.unique(found.map)) == {0, 255}
    assert (found.shown == 0).sum() > 2 * (found.map == 255).sum()  # thicker, and dark on light
    assert (found.shown[found.map == 255] == 0).all()


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("canny", {"low_threshold": 0}, "low_threshold must be a whole number from 1 to 255, got 0"),
        ("canny", {"low_threshold": 1.5}, "whole number"),
        ("canny", {"low_threshold": "100"}, "number, got '100'"),
        ("canny", {"low": 3}, "no parameter low; it has: low_threshold, high_threshold"),
        ("mlsd", {"thr_v": float("nan")}, "thr_v"),
        ("openpose", {"hand": 1}, "True or False"),
    ],
)
def test_bad_parameters_are_named_before_anything_runs(name, parameters, message):
    with pytest.raises(ValueError, match=message):
        describe(name).check_parameters(parameters)


def test_unknown_names_and_versions_say_what_there_is():
    with pytest.raises(ValueError, match="no annotator 'cany'; there are: canny, "):
        load("cany")
    with pytest.raises(ValueError, match="version 1.1, not in '1.0'"):
        load("tile", version="1.0")
    with pytest.raises(ValueError, match="1.2"):
        list_annotators("1.2")
    with pytest.raises(ValueError, match="no detect_resolution"):
        load("canny").make_hint(IMAGE, 128, detect_resolution=256)
    with pytest.raises(ValueError, match="float64"):
        load("inpaint").make_hint(IMAGE / 255)


def test_importing_the_package_loads_no_network_library():
    code = "import sys, annotator; annotator.load('canny'); sys.exit('torch' in sys.modules or 'timm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
