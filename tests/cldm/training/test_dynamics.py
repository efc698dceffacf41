"""What the training tells about itself, against the same numbers taken directly; and the picture of it."""

import csv
import os

import cv2
import matplotlib
import numpy as np
import pytest
import pytorch_lightning as pl
import torch

from cldm.training.curves import curves_png, draw_curves, main, smoothed
from cldm.training.dynamics import Dynamics, control_norms
from cldm.training.metrics import MetricsFile, read_metrics
from tests.cldm.training.small_runs import small_model, train


class Spy(pl.Callback):
    """Notes the losses of each batch, and saves the second step."""

    def __init__(self, folder):
        self.folder, self.losses, self.by_level = folder, [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]) * trainer.accumulate_grad_batches)
        t, losses = pl_module.sample_losses
        self.by_level += list(zip((t // 250).tolist(), losses.tolist(), strict=True))
        if trainer.global_step == 2:
            trainer.save_checkpoint(self.folder / "two.ckpt")


def test_rows_hold_what_happened_since_the_last_one_and_a_resume_repeats_none(tmp_path):
    spy, model = Spy(tmp_path), small_model()
    options = {"accumulate_grad_batches": 2, "batch_size": 2, "items": 32}
    train(model, 4, [spy, Dynamics(every=2)], logger=[MetricsFile(tmp_path)], **options)
    first, second = (row for row in read_metrics(tmp_path / "metrics.csv") if "train/loss" in row)
    assert (first["step"], second["step"]) == (2, 4)
    assert first["train/loss"] == pytest.approx(np.mean(spy.losses[:4]), rel=1e-5)
    assert second["train/loss"] == pytest.approx(np.mean(spy.losses[4:]), rel=1e-5)
    for row, seen in ((first, spy.by_level[:8]), (second, spy.by_level[8:])):
        for level in range(4):
            losses = [loss for at, loss in seen if at == level]
            assert row.get(f"train/loss_noise_{level}") == (
                pytest.approx(np.mean(losses), rel=1e-5) if losses else None
            )
    control = model.control_model
    assert second["norm/zero_conv_04"] == pytest.approx(
        float(torch.cat([p.flatten() for p in control.middle_block_out.parameters()]).norm()), rel=1e-5
    )
    assert second["norm/hint"] > second["norm/hint_zero_conv"] > 0 and second["norm/zero_conv_00"] > 0
    assert second["speed/images_per_second"] == pytest.approx(4 * second["speed/steps_per_second"])
    assert 0.1 < second["memory/peak_gib"] < 100

    train(
        small_model(),
        6,
        [Dynamics(every=2)],
        logger=[MetricsFile(tmp_path)],
        ckpt_path=tmp_path / "two.ckpt",
        **options,
    )
    rows = read_metrics(tmp_path / "metrics.csv")
    assert [row["step"] for row in rows if "train/loss" in row] == [2, 4, 6] and len(
        {row["step"] for row in rows}
    ) == len(rows)
    assert rows[0]["train/loss"] == first["train/loss"]


def test_other_networks_have_no_norms():
    assert control_norms(None) == {} == control_norms(torch.nn.Linear(2, 2))
    assert set(control_norms(small_model().control_model).values()) > {0.0}  # zero convolutions, before training


def made_up_run(folder, took_hold=None):
    log = MetricsFile(folder)
    for step in range(0, 200, 10):
        row = {"train/loss": 0.1 + 0.05 * np.sin(step), "train/loss_noise_0": 0.2, "norm/zero_conv_00": step / 100}
        row |= {"gain/mean": step / 1000, "gain/noise_3": 0.01, "fill/iou": 0.5}
        log.log_metrics(row | ({"gain/took_hold": took_hold} if step == took_hold else {}), step=step)


def test_the_picture_shows_what_there_is(tmp_path, capsys):
    made_up_run(tmp_path / "a")
    made_up_run(tmp_path / "b", took_hold=100)
    assert main([str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert "curves.png" in capsys.readouterr().out
    pictures = [cv2.imread(str(tmp_path / name / "curves.png")) for name in "ab"]
    assert pictures[0].shape == pictures[1].shape and pictures[0].shape[0] > pictures[0].shape[1] * 0.8
    columns = (pictures[0] != pictures[1]).any(axis=(0, 2))  # the mark, beside the name of the folder
    assert columns[columns.size // 4 : columns.size // 2].any()
    few = curves_png([{"step": 0, "gain/mean": 0.0}, {"step": 5, "gain/mean": float("nan")}])
    picture = cv2.imdecode(np.frombuffer(few, np.uint8), cv2.IMREAD_COLOR)
    assert picture.shape[0] < pictures[0].shape[0] / 2
    assert curves_png([]).startswith(b"\x89PNG")


def test_mistakes_are_one_line(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert "metrics.csv is missing" in capsys.readouterr().err
    with open(tmp_path / "metrics.csv", "w", newline="") as file:
        csv.writer(file).writerow(["name", "size"])
    assert main([str(tmp_path)]) == 2
    assert "not the metrics of a run" in capsys.readouterr().err
    assert not (tmp_path / "curves.png").exists()


def test_smoothing_keeps_a_constant_and_follows_a_step():
    assert smoothed([2.0] * 5, 3) == pytest.approx([2.0] * 5)
    values = smoothed([0.0] * 50 + [1.0] * 50, 5)
    assert values[49] == 0 and 0.15 < values[50] < 0.25 and values[-1] > 0.99


def test_drawing_replaces_the_picture_whole(tmp_path):
    made_up_run(tmp_path)
    (tmp_path / "curves.png").write_bytes(b"old")
    assert draw_curves(tmp_path).read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curves.png", "metrics.csv"]


@pytest.mark.parametrize("name", ["lr $x^$", *([] if os.name == "nt" else [os.fsdecode(b"caf\xe9")])])
def test_no_folder_name_and_no_setting_for_papers_keeps_the_curves_from_being_drawn(tmp_path, name):
    made_up_run(tmp_path / name)
    with matplotlib.rc_context({"text.usetex": True}):
        assert draw_curves(tmp_path / name).read_bytes().startswith(b"\x89PNG")
        assert matplotlib.rcParams["text.usetex"]
