"""The table of conditions in the docs: a row for every condition, with what it needs, and its picture."""

import re
from pathlib import Path

import numpy as np
import pytest

from annotator.openpose import OpenposeDetector
from annotator.pictures import read_image
from annotator.registry import REGISTRY
from docs import make_conditions
from docs.drawn_scene import BALL, EYE, FLOOR, JOINTS, PERSON, WALL, WALL_ID, draw_scene, pose_maps, project

ROOT = Path(__file__).parent.parent.parent
COLUMNS = ("picture", "name", "what", "versions", "extra", "weights", "licence", "parameters")
PROJECT = (ROOT / "pyproject.toml").read_text()


def rows() -> dict[str, dict[str, str]]:
    lines = (ROOT / "docs" / "annotators.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ![")]
    return {row[1].strip("`"): dict(zip(COLUMNS, row, strict=True)) for row in cells}


ROWS = rows()
INFOS = {name: [info for (known, _), info in REGISTRY.items() if known == name] for name, _ in REGISTRY}


def test_the_table_has_every_condition_once():
    assert sorted(ROWS) == sorted(INFOS)


@pytest.mark.parametrize("name", INFOS)
def test_a_row_says_what_its_condition_needs(name):
    row, infos = ROWS[name], INFOS[name]
    assert row["versions"] == ", ".join(info.version for info in infos)
    assert {info.extra for info in infos} == {row["extra"].strip("`")}
    assert not row["extra"] or f"\n{row['extra'].strip('`')} = [" in PROJECT
    while row["weights"].startswith("as `"):
        row = row | {key: ROWS[re.search("`(.+)`", row["weights"])[1]][key] for key in ("weights", "licence")}
    for file in re.findall(r"[\w./-]+\.\w+|[\w-]+/[\w.-]+", " ".join(info.weights for info in infos)):
        assert file in row["weights"]
    assert bool(row["weights"]) == bool(row["licence"]) == any(info.network for info in infos)
    for info in infos:
        for parameter in info.offers:
            assert f"`{parameter}`" in row["parameters"]


def test_every_condition_has_its_picture(tmp_path, monkeypatch):
    monkeypatch.setattr(make_conditions, "SCENE_SIZE", 128)
    assert make_conditions.main([str(ROOT / "docs" / "conditions" / "drawn_scene.png"), str(tmp_path)]) == 0
    for name, row in ROWS.items():
        picture = re.fullmatch(r"!\[.+\]\((conditions/.+\.png)\)", row["picture"])[1]
        assert Path(picture).stem == name
        for folder in (ROOT / "docs", tmp_path):
            assert np.ptp(read_image(folder / picture)) > 100  # something is seen


def test_the_drawn_room_is_as_its_geometry_says():
    scene = draw_scene(128)
    np.testing.assert_allclose(np.linalg.norm(scene.normals, axis=2), 1.0, atol=1e-3)
    wall, floor, ball = (scene.objects == number for number in (WALL_ID, FLOOR, BALL))
    np.testing.assert_allclose(scene.distance[wall], WALL - EYE[2], atol=1e-2)
    np.testing.assert_allclose(scene.normals[wall].mean(axis=0), (0, 0, 1), atol=1e-2)
    np.testing.assert_allclose(scene.normals[floor].mean(axis=0), (0, 1, 0), atol=1e-2)
    assert abs(scene.distance[ball].min() - (-EYE[2] - 0.2)) < 0.02  # a ball of radius 0.2 at z = 0
    x, y = project(JOINTS, 128).astype(int).T
    assert set(scene.objects[y, x]) == {PERSON}


def test_pose_of_the_drawn_room_is_found_again():
    scene = draw_scene(128)
    detector = OpenposeDetector.__new__(OpenposeDetector)
    detector.version = "1.0"
    _, pose = detector.finish(pose_maps(128), scene.picture)
    (person,) = np.array(pose["subset"])
    found = np.array(pose["candidate"])[person[:18].astype(int), :2]
    np.testing.assert_allclose(found, project(JOINTS, 128), atol=3.0)  # pixels; the maps have cells of 5.6
