"""Scenes of shapes: their pictures, hints, prompts and score, and pictures that resemble photographs."""

import json

import cv2
import numpy as np
import pytest

import tutorial_dataset
from cldm.data.fill import COLOURS, PALETTES
from cldm.data.leaves import draw_leaves
from cldm.data.pairs import DataError, PairDataset, read_rgb
from cldm.data.scenes import (
    HINTS,
    SEGMENTS,
    SHAPES,
    Scene,
    Shape,
    describe_scene,
    draw_hint,
    draw_scene,
    generate_scenes,
    label_scene,
    read_scenes,
)
from cldm.data.score import score_scenes

CLEAR = PALETTES["clear"]


@pytest.fixture(scope="module")
def scenes():
    return [describe_scene(i, 3, CLEAR) for i in range(300)]


def test_a_scene_depends_on_seed_and_number_alone():
    assert describe_scene(5, 1, CLEAR) == describe_scene(5, 1, CLEAR) != describe_scene(5, 2, CLEAR)


def test_prompts_name_what_is_drawn(scenes):
    for scene in scenes:
        for shape in scene.shapes:
            assert f"{shape.colour} {shape.kind}" in scene.prompt
        assert all(name in scene.prompt for name in scene.grounds)
    assert {len(scene.shapes) for scene in scenes} == {1, 2, 3}
    assert {shape.kind for scene in scenes for shape in scene.shapes} == set(SHAPES)
    assert {scene.ground for scene in scenes} == {"plain", "gradient", "striped", "checkered"}
    assert all(
        len(s.shapes) == 1 and s.ground == "plain" for s in (describe_scene(i, 3, CLEAR, 1, True) for i in range(50))
    )


def test_relations_hold(scenes):
    seen = set()
    for scene in scenes:
        if len(scene.shapes) < 2:
            continue
        far, near = scene.shapes[:2]
        (x0, y0), (x1, y1) = far.centre, near.centre
        truth = {"left of": x1 < x0, "right of": x1 > x0, "above": y1 < y0, "below": y1 > y0}
        relation = next(
            r for r in (*truth, "in front of") if f"{near.kind} {r} {far.colour} {far.kind}" in scene.prompt
        )
        assert truth.get(relation, True), scene.prompt
        if relation == "in front of":  # they overlap, and the nearer one is whole
            alone = label_scene(Scene("", (near,), "plain", ("black",)), 128) == 1
            assert np.array_equal(label_scene(scene, 128) == 2, alone & (label_scene(scene, 128) != 3))
        seen.add(relation)
        # Of every shape a good part can be seen.
        for number, shape in enumerate(scene.shapes, 1):
            whole = (label_scene(Scene("", (shape,), "plain", ("black",)), 128) == 1).sum()
            assert (label_scene(scene, 128) == number).sum() > 0.3 * whole
    assert seen == {"left of", "right of", "above", "below", "in front of"}


def test_shapes_have_their_areas():
    size, radius = 1600, 0.4  # what is drawn is half a pixel larger
    areas = {"circle": np.pi, "square": 2.0, "triangle": 3 * 3**0.5 / 4, "hexagon": 3 * 3**0.5 / 2, "diamond": 1.2}
    for kind, area in areas.items():
        scene = Scene("", (Shape(kind, "red", (0.5, 0.5), radius, 0.2),), "plain", ("black",))
        labels = label_scene(scene, size)
        assert labels.sum() == pytest.approx(area * (radius * size) ** 2, rel=0.015)
        picture = draw_scene(scene, size)
        inside = cv2.erode((labels == 1).astype(np.uint8), np.ones((5, 5), np.uint8)) == 1
        outside = cv2.dilate((labels == 1).astype(np.uint8), np.ones((5, 5), np.uint8)) == 0
        assert (picture[inside] == COLOURS["red"]).all() and (picture[outside] == 0).all()


def test_hints_show_the_same_scene(scenes):
    for scene in scenes[:40]:
        labels = label_scene(scene, 96)
        lines, segments, depth = (draw_hint(scene, 96, hint) for hint in HINTS)
        for number, shape in enumerate(scene.shapes, 1):
            assert (segments[labels == number] == SEGMENTS[shape.kind]).all()
        assert (segments[labels == 0] == 0).all() and (depth[labels == 0] == 0).all()
        levels = [depth[labels == i].max() for i in range(1, len(scene.shapes) + 1)]
        assert levels == sorted(set(levels))  # nearer is brighter
        # Lines close the shapes off: what is connected without crossing one is of one label.
        _, regions = cv2.connectedComponents((lines[..., 0] == 0).astype(np.uint8), connectivity=4)
        assert all(len(np.unique(labels[(regions == region)])) == 1 for region in range(1, regions.max() + 1))
    with pytest.raises(DataError, match="unknown hint 'edges'; the hints are lines"):
        draw_hint(scenes[0], 64, "edges")


def test_scores_tell_right_from_wrong(scenes):
    truth = scenes[:60]
    pictures = np.stack([draw_scene(scene, 64) for scene in truth])
    perfect, shifted = score_scenes(pictures, truth), score_scenes(np.roll(pictures, 1, axis=0), truth)
    assert perfect.iou > 0.93 and perfect.colours == 1.0
    assert shifted.iou < 0.25 and shifted.colours < 0.1
    with pytest.raises(ValueError, match="expected uint8"):
        score_scenes(pictures[:3], truth)


def test_a_folder_of_scenes(tmp_path, capsys):
    out = tmp_path / "scenes"
    arguments = [
        "--task",
        "segments",
        "--out",
        str(out),
        "--count",
        "5",
        "--size",
        "64",
        "--palette",
        "clear",
        "--seed",
        "3",
    ]
    assert tutorial_dataset.main(arguments) == 0
    data = PairDataset(out)
    scenes = [describe_scene(i, 3, CLEAR) for i in range(5)]
    assert [pair.prompt for pair in data.pairs] == [scene.prompt for scene in scenes]
    assert np.array_equal(read_rgb(data.pairs[2].target), draw_scene(scenes[2], 64))
    assert np.array_equal(read_rgb(data.pairs[2].source), draw_hint(scenes[2], 64, "segments"))
    assert read_scenes([pair.target for pair in data.pairs]) == scenes
    # It goes on, and is not mixed with other settings.
    assert tutorial_dataset.main([*arguments, "--count", "7"]) == 0 and len(PairDataset(out)) == 7
    assert tutorial_dataset.main([*arguments, "--task", "depth"]) == 2
    assert "other settings (hint" in capsys.readouterr().err
    # Nor with what an earlier version drew from the same seed.
    note = json.loads((out / "scenes.json").read_text())
    (out / "scenes.json").write_text(json.dumps({key: value for key, value in note.items() if key != "drawing"}))
    assert tutorial_dataset.main([*arguments, "--count", "8"]) == 2 and len(PairDataset(out)) == 7
    assert "other settings (drawing" in capsys.readouterr().err
    assert read_scenes([data.pairs[0].target]) == []
    (out / "scenes.json").write_text(json.dumps({"palette": "clear"}))
    assert read_scenes([data.pairs[0].target]) == []


@pytest.mark.parametrize("wrong", [{"hint": "edges"}, {"most": 4}, {"size": 50}, {"count": 0}, {"palette": "pale"}])
def test_bad_settings_are_named_before_anything_is_made(tmp_path, wrong):
    name = next(iter(wrong))
    with pytest.raises(DataError, match=name):
        generate_scenes(tmp_path / "data", **{"count": 2, "size": 64, **wrong}, progress=False)
    assert not (tmp_path / "data").exists()


def test_leaves_have_a_spectrum_like_photographs():
    """Power falls with frequency as in photographs: as 1 / f^a, with a between 1.5 and 3.6 (Ruderman 1994 finds 1.8; blur adds to it)."""
    pictures = np.stack([draw_leaves(i, 64, 0) for i in range(100)]).mean(axis=3)
    assert np.array_equal(draw_leaves(3, 64, 0), draw_leaves(3, 64, 0))
    power = (np.abs(np.fft.fft2(pictures - pictures.mean(axis=(1, 2), keepdims=True))) ** 2).mean(axis=0)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(64), np.fft.fftfreq(64)))
    rings = [(0.03, 0.06), (0.06, 0.12), (0.12, 0.25)]
    means = [power[(frequency >= low) & (frequency < high)].mean() for low, high in rings]
    slopes = -np.diff(np.log2(means))
    assert ((slopes > 1.5) & (slopes < 3.6)).all(), slopes


def test_each_task_has_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for task, folder in (("fill", "fill50k"), ("shapes", "shapes"), ("depth", "depth")):
        assert tutorial_dataset.main(["--task", task, "--count", "1", "--size", "64"]) == 0
        assert (tmp_path / "training" / folder / "prompt.json").is_file()
