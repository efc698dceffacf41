"""The tables of the packaged configurations' entries."""

import logging

import pytest

from cldm.checkpoint.expected import PACKAGED, build_entries, expected_entries
from cldm.config import resolve


@pytest.mark.parametrize("name", PACKAGED)
def test_the_table_is_what_the_model_holds(name):
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
