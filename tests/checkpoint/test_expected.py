"""The tables of the packaged configurations' entries; `python -m tests.checkpoint.test_expected` writes them anew."""

import json
import logging

import pytest

from cldm.checkpoint.expected import TABLE_SUFFIX, build_entries, digest_of, expected_entries
from cldm.config import resolve

PACKAGED = ("cldm_v15", "cldm_v21", "cldm_tiny")


def table_of(name: str) -> str:
    """The content of the table that belongs to a packaged configuration."""
    path = resolve(name, ".yaml")
    entries = [[key, list(t.shape), str(t.dtype).removeprefix("torch.")] for key, t in build_entries(path).items()]
    lines = ",\n".join(json.dumps(entry) for entry in entries)
    return f'{{"configuration": "{digest_of(path)}",\n"entries": [\n{lines}\n]}}\n'


@pytest.mark.parametrize("name", PACKAGED)
def test_the_table_is_what_the_model_holds(name):
    assert resolve(name, ".yaml").with_suffix(TABLE_SUFFIX).read_text() == table_of(name)
    table, built = expected_entries(name), build_entries(name)
    assert [(k, t.shape, t.dtype) for k, t in table.items()] == [(k, t.shape, t.dtype) for k, t in built.items()]


def test_a_changed_configuration_is_built_instead(tmp_path, caplog):
    yaml, table = resolve("cldm_tiny", ".yaml"), resolve("cldm_tiny.entries.json")
    changed = tmp_path / "cldm_tiny.yaml"
    changed.write_text(yaml.read_text().replace("hint_channels: 3", "hint_channels: 5"))
    (tmp_path / table.name).write_text(table.read_text())
    with caplog.at_level(logging.INFO):
        assert expected_entries(changed)["control_model.input_hint_block.0.weight"].shape == (16, 5, 3, 3)
    assert "the model is built" in caplog.text


def test_a_configuration_may_change_while_it_is_used(tmp_path):
    text, key = resolve("cldm_tiny", ".yaml").read_text(), "control_model.input_hint_block.0.weight"
    for channels in (3, 5):
        (tmp_path / "own.yaml").write_text(text.replace("hint_channels: 3", f"hint_channels: {channels}"))
        assert expected_entries(tmp_path / "own.yaml")[key].shape == (16, channels, 3, 3)


@pytest.mark.parametrize(
    "table", ["{}", "[1]", "not JSON", '{"configuration": "DIGEST", "entries": [["a", [1], "x"]]}']
)
def test_a_table_of_something_else_is_none(tmp_path, table):
    path = tmp_path / "own.yaml"
    path.write_text(resolve("cldm_tiny", ".yaml").read_text())
    path.with_suffix(TABLE_SUFFIX).write_text(table.replace("DIGEST", digest_of(path)))
    assert expected_entries(path).keys() == expected_entries("cldm_tiny").keys()


if __name__ == "__main__":
    for packaged in PACKAGED:
        resolve(packaged, ".yaml").with_suffix(TABLE_SUFFIX).write_text(table_of(packaged), encoding="utf-8")
