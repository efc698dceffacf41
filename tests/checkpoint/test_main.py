"""`python -m cldm.checkpoint`: a table, JSON, and one line an error."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cldm.checkpoint.__main__ import main
from tests.ldm.files.forging import hollow
from tests.parity import load_json


@pytest.fixture
def control(tmp_path: Path) -> Path:
    entries = load_json("core/manifest_v15.json").items()
    shapes = {key: tuple(shape) for key, (shape, _) in entries if key.startswith("control_model.")}
    del shapes["control_model.middle_block_out.0.bias"]
    return hollow(tmp_path / "control_v11p_sd15_canny.safetensors", shapes, "F16")


def test_table(control: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(control)]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line for line in lines if not line.startswith(" ")}
    assert "ControlNet alone" in rows["layout"] and "Stable Diffusion 1.x" in rows["family"]
    assert "control 339" in rows["entries"] and "float16 339" in rows["dtypes"]
    assert "1: control_model.middle_block_out.0.bias" in rows["missing"]
    assert len(lines) < 20 and max(map(len, lines)) < 250


def test_json(control: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(control), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["layout"] == "control" and report["missing"] == ["control_model.middle_block_out.0.bias"]
    assert report["path"] == str(control)


def test_errors_are_one_line(control: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "page.ckpt").write_text("<html>\n")
    assert main([str(tmp_path / "page.ckpt"), str(control), str(tmp_path / "absent.ckpt")]) == 2
    captured = capsys.readouterr()
    page, absent = captured.err.splitlines()
    assert "page.ckpt" in page and "HTML page" in page and "absent.ckpt: does not exist" in absent
    assert "control_v11p" in captured.out  # the good one is still shown


def test_names_in_a_file_cannot_write_to_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entries = load_json("core/manifest_v15.json").items()
    shapes = {key: tuple(shape) for key, (shape, _) in entries if key.startswith("control_model.")}
    path = hollow(tmp_path / "c.safetensors", shapes | {"\x1b[2J\ud800\nfamily fake": (1,)})
    assert main([str(path)]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out and "?[2J" in out and "\nfamily fake" not in out


@pytest.mark.parametrize("files", [1, 40])
def test_a_reader_may_stop_early(tmp_path: Path, files: int) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "w.pt")
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "cldm.checkpoint", *[str(tmp_path / "w.pt")] * files]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, cwd=Path(__file__).parents[2])
    os.close(writer)
    assert done.returncode == 0 and not done.stderr


def test_as_a_command(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "w.pt")
    command = [sys.executable, "-m", "cldm.checkpoint", str(tmp_path / "w.pt")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, cwd=Path(__file__).parents[2])
    assert done.returncode == 0 and "torch-zip" in done.stdout and not done.stderr
