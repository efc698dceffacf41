"""The main job's script: a short run from nothing, going on after it, and the mistakes that it must find before training."""

import csv
import json

import cv2
import numpy as np
import pytest

import tutorial_dataset
import tutorial_train
from cldm.checkpoint.reading import read_state_dict
from cldm.data.fill import generate_fill


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tutorial") / "fill"
    generate_fill(folder, count=24, size=64, palette="clear", progress=False)
    return folder


def arguments(data, out, **changes):
    settings = {"data": data, "out": out, "held_out": 8, "batch_size": 4, "steps": 4, "log_every": 2, "save_every": 2,
                "sample_steps": 2, "accelerator": "cpu", **changes}  # fmt: skip
    return [f"{k}={v}" for k, v in settings.items()]


def test_a_short_run_and_going_on(data, tmp_path):
    out = tmp_path / "run"
    assert tutorial_train.main(arguments(data, out)) == 0
    trained = read_state_dict(out / "model.safetensors")
    initial = read_state_dict(out / "control_ini.safetensors")
    changed = {k for k in initial if not np.array_equal(initial[k].float().numpy(), trained[k].numpy())}
    assert changed and all(k.startswith("control_model.") for k in changed)
    picture = cv2.imread(str(out / "result.png"))
    assert picture is not None and picture.shape[1] > 8 * 64
    assert list((out / "image_log" / "train").glob("overview_*.png"))
    with open(out / "log" / "version_0" / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert [int(r["step"]) for r in rows if r.get("fill/iou")] == [2, 4]
    assert tutorial_train.main(arguments(data, out, steps=6)) == 0
    again = read_state_dict(out / "model.safetensors")
    assert any(not np.array_equal(trained[k].numpy(), again[k].numpy()) for k in trained)


def test_another_run_is_not_written_over(data, tmp_path, capsys):
    out = tmp_path / "run"
    out.mkdir()
    (out / "settings.json").write_text(json.dumps({"seed": 5}))
    assert tutorial_train.main(arguments(data, out)) == 2
    assert "choose another folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argument, message",
    [
        ("steps=0", "steps must be at least 1"),
        ("steps=many", "many"),
        ("stepz=3", "unknown setting 'stepz'"),
        ("steps", "key=value"),
        ("learning_rate=-1", "learning_rate must be positive"),
        ("config=cldm_v99", "cldm_v99"),
        ("weights=nowhere.safetensors", "nowhere.safetensors"),
        ("data=nowhere", "no data folder"),
        ("held_out=24", "held out"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(data, tmp_path, capsys, argument, message):
    assert tutorial_train.main([*arguments(data, tmp_path / "run"), argument]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and error.startswith("tutorial_train.py: ") and "\n" not in error


def test_broken_data_is_found_before_training(data, tmp_path, capsys):
    folder = tmp_path / "fill"
    generate_fill(folder, count=10, size=64, palette="clear", progress=False)
    (folder / "target" / "3.png").write_bytes(b"no picture")
    assert tutorial_train.main(arguments(folder, tmp_path / "run")) == 2
    assert "3.png does not decode" in capsys.readouterr().err
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_dataset_script(tmp_path, capsys):
    out = tmp_path / "set"
    assert tutorial_dataset.main(["--out", str(out), "--count", "5", "--size", "64"]) == 0
    item = tutorial_dataset.MyDataset(out)[0]
    assert item["jpg"].shape == (64, 64, 3) and item["jpg"].min() >= -1 and item["hint"].max() == 1.0
    assert tutorial_dataset.main(["--out", str(out), "--count", "5", "--size", "128"]) == 2
    assert "other settings" in capsys.readouterr().err
    assert tutorial_dataset.main(["--out", str(tmp_path / "x"), "--size", "100"]) == 2
    assert "multiple of 64" in capsys.readouterr().err
