"""Conditions on the page: the controls that the registry's records fill, maps, and what is said of missing weights."""

import numpy as np
import pytest

import annotator
from annotator.pictures import resize
from annotator.registry import CONDITIONS
from cldm.data.fill import draw_fill
from controlnet.app import conditions
from controlnet.app.conditions import READY, Chosen, Detectors, ParameterControls, for_editor, from_editor


@pytest.mark.parametrize("info", CONDITIONS, ids=lambda info: f"{info.name} {info.version}")
def test_each_condition_has_a_control_for_each_parameter(info):
    controls = ParameterControls("canny")
    updates = dict(zip(controls.components, controls.show(info.name, info.version), strict=True))
    shown = {update["label"]: update for update in updates.values() if update.get("visible") and "label" in update}
    assert shown.keys() == set(info.offers)
    for parameter in info.parameters:
        update = shown[parameter.name]
        assert update["value"] == info.defaults[parameter.name] and update["info"] == parameter.help
        if parameter.kind in (int, float):
            assert (update["minimum"], update["maximum"]) == (parameter.minimum, parameter.maximum)
    data = {component: update.get("value") for component, update in updates.items()}
    chosen = controls.read(info.name, data)
    assert (chosen.name, chosen.version, chosen.detect_resolution) == (info.name, info.version, info.detect_resolution)
    assert chosen.parameters == info.defaults


def test_values_are_shown_again_and_checked():
    controls = ParameterControls("shuffle")
    data = {component: component.value for component in controls.components}  # as a page has them that was just opened
    assert controls.read("shuffle", data).parameters == {"f": 256, "seed": None}
    updates = controls.show("canny", "1.1", {"low_threshold": 7, "detect_resolution": 256})
    data = dict(zip(controls.components, (update.get("value") for update in updates), strict=True))
    assert controls.read("canny", data) == Chosen("canny", "1.1", 256, {"low_threshold": 7, "high_threshold": 200})
    data[controls.slots["slider"][0]] = 7000.0
    with pytest.raises(ValueError, match="low_threshold must be"):
        controls.read("canny", data)
    assert controls.read(READY, data) == Chosen(READY)


@pytest.mark.parametrize("name", [info.name for info in CONDITIONS if not info.network and info.name != "inpaint"])
def test_a_map_that_goes_through_an_editor_is_the_same_hint(name):
    picture = draw_fill(2, 150, 3).target
    chosen, detectors = Chosen(name, parameters={"seed": 1} if name == "shuffle" else {}), Detectors("cpu")
    made = detectors.make_hint(chosen, picture, 64)
    shown = for_editor(made.map)
    assert min(shown.shape[:2]) == 512 and shown.shape[2] == 3
    assert np.array_equal(from_editor(shown, (64, 64)), for_editor(made.map)[::8, ::8])
    assert np.array_equal(chosen.hint_of(shown, 64), made.hint)


def test_a_thin_picture_is_refused_before_it_becomes_a_large_one(monkeypatch):
    thin, detectors = np.zeros((180, 2, 3), np.uint8), Detectors("cpu")
    monkeypatch.setattr(detectors, "get", lambda info: pytest.fail("it was detected"))
    message = "picture of 2 x 180 pixels would become one of 92,160 x 1,024: too large, 33,554,432 pixels are allowed"
    for refused in (
        lambda: detectors.make_hint(Chosen("canny"), thin, 1024),
        lambda: detectors.make_hint(Chosen("hed", "1.0", 1024), thin, 64),
        lambda: Chosen(READY).hint_of(thin, 1024),
    ):
        with pytest.raises(ValueError, match=message):
            refused()
    monkeypatch.undo()
    assert detectors.make_hint(Chosen("canny"), thin, 64).hint.shape == (5760, 64, 3)


def test_a_drawing_becomes_a_hint_of_the_size_of_the_result():
    drawing = np.zeros((512, 1024, 3), np.uint8)
    drawing[:256] = 255
    hint = Chosen(READY).hint_of(drawing, 64)
    assert hint.shape == (64, 128, 3) and hint.dtype == np.float32 and hint[:32].min() == 1 and hint[32:].max() == 0
    assert resize(drawing, (64, 128)).shape == hint.shape
    drawing[0, 0] = 9  # nothing of it is lost
    assert all(np.array_equal(from_editor(drawing, size), drawing) for size in ((64, 128), (1024, 2048)))


def test_what_a_condition_needs_is_said(monkeypatch, tmp_path):
    assert conditions.needs("canny") == conditions.needs(READY) == ""
    for name in annotator.list_annotators():
        info = annotator.describe(name)
        if info.network:
            text = conditions.needs(name)
            assert info.weights in text and "annotator/ckpts" in text and ("huggingface.co" in text or "hub" in text)
            assert not info.extra or f"controlnet[{info.extra}]" in text
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    titles = [title for title, _ in conditions.choices()]
    needs = ["needs weights" in title for title in titles]
    assert needs == sorted(needs)  # those that need none come first
