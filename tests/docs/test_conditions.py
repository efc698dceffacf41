"""The table of conditions in the docs: a row for every condition, with what it needs; and the picture of those that need nothing."""

import re
from pathlib import Path

import numpy as np
import pytest

from annotator.registry import REGISTRY
from docs.make_conditions import conditions

ROOT = Path(__file__).parent.parent.parent
COLUMNS = ("name", "what", "versions", "extra", "weights", "licence", "parameters", "picture")
PROJECT = (ROOT / "pyproject.toml").read_text()


def rows() -> dict[str, dict[str, str]]:
    lines = (ROOT / "docs" / "annotators.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `")]
    return {row[0].strip("`"): dict(zip(COLUMNS, row, strict=True)) for row in cells if len(row) == len(COLUMNS)}


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


def test_conditions_without_weights_are_in_the_picture():
    photo = np.load(ROOT / "tests" / "data" / "annotator" / "canny.npz")["astronaut/input"]
    captions = {part.strip() for caption, _ in conditions(photo) for part in caption.split(",")}
    for name, infos in INFOS.items():
        assert (name in captions) == (ROWS[name]["picture"] == "yes") == (not infos[0].network)
