"""The main job's script: a short run from nothing, going on after it, and the mistakes that it must find before training."""

import csv
from dataclasses import asdict

import cv2
import numpy as np
import pytest
import torch
from pytorch_lightning.strategies import SingleDeviceStrategy

import tool_train_tiny
import tutorial_dataset
import tutorial_train
from cldm.cldm import ControlLDM
from cldm.data.fill import generate_fill
from ldm.files import read_state_dict


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


@pytest.mark.parametrize(
    ("note", "message"),
    [
        ('{"seed": 5, "accelerator": "gpu", "devices": 8}', "different settings (data, batch_size, held_out, sample_steps, seed)"),
        ("", "is not a JSON object"),
        ("[1]", "is not a JSON object"),
    ],
)  # fmt: skip
def test_another_run_is_not_written_over(data, tmp_path, capsys, note, message):
    out = tmp_path / "run"
    out.mkdir()
    (out / "settings.json").write_text(note)
    assert tutorial_train.main(arguments(data, out)) == 2
    error = capsys.readouterr().err
    assert message in error and "choose another folder" in error and error.count("\n") == 1
    assert (out / "settings.json").read_text() == note and len(list(out.iterdir())) == 1


def test_where_pictures_are_made_and_which_prompts_are_trained_on(data, tmp_path, monkeypatch):
    """Before and after training, the model is on the trainer's device when it is sampled; prompts are dropped if asked."""
    events = []
    monkeypatch.setattr(SingleDeviceStrategy, "root_device", property(lambda self: torch.device("cpu", 0)))
    monkeypatch.setattr(ControlLDM, "to", lambda self, device: events.append(device) or self)
    monkeypatch.setattr(
        tutorial_train.Held, "sample_and_score", lambda self, model, sampling, when: events.append(when) or self.targets
    )
    step = ControlLDM.shared_step
    monkeypatch.setattr(ControlLDM, "shared_step", lambda self, batch: events.append(batch["txt"]) or step(self, batch))
    quiet = {"steps": 1, "log_every": 9}
    assert tutorial_train.main(arguments(data, tmp_path / "a", **quiet, empty_prompts=1)) == 0
    here = torch.device("cpu", 0)
    moves = [event for event in events if event == here or isinstance(event, (str, list))]
    before, prompts, after = moves.index("before training"), moves.index([""] * 4), moves.index("after 1 steps")
    assert moves[before - 1] == here == moves[after - 1] and before < prompts < after
    events.clear()
    assert tutorial_train.main(arguments(data, tmp_path / "b", **quiet)) == 0
    assert all(prompt for event in events if isinstance(event, list) for prompt in event)


def test_mistakes_can_be_corrected_and_defects_are_shown(data, tmp_path, capsys, monkeypatch):
    out = tmp_path / "run"
    assert tutorial_train.main(arguments(tmp_path / "nowhere", out)) == 2
    assert tutorial_train.main(arguments(data, out, base="nowhere")) == 2

    def broken(*args, **kwargs):
        raise ValueError("of torch")

    def locked(*args, **kwargs):
        raise PermissionError(13, "Permission denied", str(out))

    monkeypatch.setattr(tutorial_train, "write_weights", locked)
    capsys.readouterr()
    assert tutorial_train.main(arguments(data, out, steps=1)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("tutorial_train.py: ") and "Permission denied" in error
    monkeypatch.setattr(tutorial_train, "write_weights", broken)
    with pytest.raises(ValueError, match="of torch"):
        tutorial_train.main(arguments(data, out, steps=1))


def test_help_explains_every_setting(capsys):
    for script in (tutorial_train, tool_train_tiny):
        assert script.main(["--help"]) == 0
        lines = capsys.readouterr().out.splitlines()
        for key, value in asdict(script.Settings()).items():
            (line,) = [line for line in lines if line.startswith(f"  {key}={value} ")]
            assert len(line.split()) > 1
    assert tool_train_tiny.Settings().out.startswith("runs/")


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
        ("empty_prompts=1.5", "empty_prompts must be between 0 and 1"),
        ("seed=-1", "seed must be between 0"),
        ("sample_steps=2000", "sample_steps must be at most 1000"),
        ("accelerator=warp", "invalid accelerator name"),
        ("precision=3", "Precision '3' is invalid"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(data, tmp_path, capsys, argument, message):
    assert tutorial_train.main([*arguments(data, tmp_path / "run"), argument]) == 2
    *before, error = capsys.readouterr().err.strip().split("\n")
    assert message in error and error.startswith("tutorial_train.py: ")
    assert not any("control_ini" not in line for line in before)  # the bar of what was made until then


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
