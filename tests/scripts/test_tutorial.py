"""The main job's script: a short run from nothing, what it leaves behind, and the mistakes that it must find before training."""

import errno
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import uuid
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch

import tool_train_tiny
import tutorial_dataset
import tutorial_train
from cldm.checkpoint import add_control, identify
from cldm.data.checking import Selected
from cldm.data.fill import generate_fill
from cldm.data.pairs import DataError
from cldm.evaluation import Sampling
from cldm.model import load_state_dict
from cldm.settings import write_settings
from cldm.training import checkpoints, folder
from cldm.training.checkpoints import WholeFiles, checkpoints_in
from cldm.training.data import TrainingData, check_once, note_shards
from cldm.training.folder import RunFolder
from cldm.training.health import SkipBadSteps
from cldm.training.held_out import HeldOut
from cldm.training.metrics import read_metrics
from cldm.training.optim import OPTIMIZERS
from cldm.training.presets import PRESETS
from cldm.training.settings import Settings, changes, parse_settings
from ldm.files import open_weights
from ldm.util import ConfigError

ROOT = Path(__file__).parents[2]
TINY = ROOT / "models" / "cldm_tiny.safetensors"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tutorial") / "fill"
    generate_fill(folder, count=24, size=64, palette="clear", progress=False)
    return folder


def arguments(data, out, **changes):
    settings = {"data": data, "out": out, "held_out": 8, "batch_size": 4, "steps": 4, "log_every": 2, "save_every": 2,
                "sample_steps": 2, "pictures": 2, "accelerator": "cpu", **changes}  # fmt: skip
    return [f"{k}={v}" for k, v in settings.items()]


def test_a_short_run_and_what_it_leaves_behind(data, tmp_path, capsys):
    out = tmp_path / "run"
    assert tutorial_train.main(arguments(data, out, ema=0.5, export_every=2)) == 0
    trained, initial = load_state_dict(out / "model.safetensors"), load_state_dict(out / "control_ini.safetensors")
    assert trained.keys() == initial.keys()
    told = identify("cldm_tiny").told
    assert "scale_factor" in told and identify(out / "model.safetensors").told == told
    with open_weights(out / "model.safetensors") as file:
        assert file.metadata.keys() == {"format", "scale_factor"}  # and not the title of the base
    changed = {k for k in initial if not torch.equal(initial[k].float(), trained[k].float())}
    assert changed and all(k.startswith("control_model.") for k in changed)
    # The checkpoint holds what is trained, its average, and whose base it is; the result is the average.
    newest = WholeFiles().load_checkpoint(checkpoints_in(out / "checkpoints")[4])
    assert {key.split(".")[0] for key in newest["state_dict"]} == {"control_model", "model_ema"}
    assert newest["base"]["name"] == "control_ini.safetensors" and len(newest["base"]["sha256"]) == 64
    key = "control_model.middle_block_out.0.weight"
    average = newest["state_dict"]["model_ema." + key.replace(".", "")]
    assert torch.equal(trained[key], average) and not torch.equal(trained[key], newest["state_dict"][key])
    exported = load_state_dict(out / "exports" / "control-step-00000004.safetensors")
    assert torch.equal(exported[key], average) and all(k.startswith("control_model.") for k in exported)
    # Pictures and numbers.
    picture = cv2.imread(str(out / "result.png"))
    assert picture is not None and picture.shape[1] > 8 * 64 and cv2.imread(str(out / "curves.png")) is not None
    assert {p.name for p in (out / "pictures").iterdir()} >= {"step_000002.png", "step_000004.png"}
    rows = read_metrics(out / "metrics.csv")
    assert [row["step"] for row in rows if "fill/iou" in row] == [2, 4] and any("gain/mean" in row for row in rows)
    result = json.loads((out / "result.json").read_text())
    assert result["steps"] == 4 and set(result["before"]) == set(result["after"]) >= {"fill/iou"}
    # Checkpoints are weights like any others.
    again = load_state_dict(checkpoints_in(out / "checkpoints")[4])
    assert torch.equal(again[key], newest["state_dict"][key])


def test_a_result_that_is_gone_is_made_again_without_training(data, tmp_path, monkeypatch):
    out = tmp_path / "run"
    assert tutorial_train.main(arguments(data, out)) == 0
    first = load_state_dict(out / "model.safetensors")
    (out / "model.safetensors").unlink()
    monkeypatch.setattr(tutorial_train, "fit", lambda *a, **k: pytest.fail("it trains again"))
    assert tutorial_train.main(arguments(data, out)) == 0
    again = load_state_dict(out / "model.safetensors")
    assert all(torch.equal(again[key], value) for key, value in first.items())


def test_another_run_is_not_written_over(data, tmp_path, capsys):
    out = tmp_path / "run"
    assert tutorial_train.main(arguments(data, out, steps=2)) == 0
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()}
    capsys.readouterr()
    assert tutorial_train.main(arguments(data, out, learning_rate=1e-4)) == 2
    error = capsys.readouterr().err
    assert (
        "different settings (learning_rate)" in error and f"weights={out / 'model.safetensors'} out=NEW_FOLDER" in error
    )
    assert before == {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()}
    # The pairs of a step may be split otherwise, for less memory; but not be others.
    assert tutorial_train.main(arguments(data, out, steps=3, batch_size=2, accumulate=2)) == 0
    assert tutorial_train.main(arguments(data, out, steps=4, batch_size=2)) == 2
    assert "(accumulate)" in capsys.readouterr().err
    # Other weights under the same name do not belong to the checkpoint.
    add_control(TINY, out / "control_ini.safetensors", overwrite=True, progress=False)
    with open(out / "control_ini.safetensors", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x3c")
    assert tutorial_train.main(arguments(data, out, steps=5)) == 2
    assert "is another file" in capsys.readouterr().err


def test_a_run_that_saved_nothing_may_begin_with_other_settings(data, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "settings.json").write_text(json.dumps(asdict(Settings(batch_size=512))))
    assert tutorial_train.main(arguments(data, out, steps=1)) == 0


@pytest.mark.parametrize("note", ["", "[1]"])
def test_a_broken_note_is_named(data, tmp_path, capsys, note):
    (tmp_path / "settings.json").write_text(note)
    assert tutorial_train.main(arguments(data, tmp_path)) == 2
    assert "is not a JSON object; choose another folder" in capsys.readouterr().err
    assert len([p for p in tmp_path.iterdir() if not p.name.startswith(".")]) == 1


@pytest.mark.parametrize("name", ["weights", "base"])
@pytest.mark.parametrize("way", ["file", "link", "folder"])
def test_the_weights_to_begin_with_are_not_written_over(data, tmp_path, capsys, name, way):
    out = tmp_path / "run"
    out.mkdir()
    write_settings(out / "settings.json", Settings())
    (out / "model.safetensors").write_bytes(b"precious")
    (tmp_path / "link.safetensors").symlink_to(out / "model.safetensors")
    given = {"file": out / "model.safetensors", "link": tmp_path / "link.safetensors", "folder": out}[way]
    before = (out / "settings.json").read_bytes()
    assert tutorial_train.main(arguments(data, out, **{name: given})) == 2
    error = capsys.readouterr().err
    assert f"{name}={given} is" in error and "choose another out" in error and error.count("\n") == 1
    assert (out / "model.safetensors").read_bytes() == b"precious" and (out / "settings.json").read_bytes() == before


@pytest.mark.parametrize("name", ["settings.json", "model.safetensors", "result.png", "metrics.csv"])
def test_files_of_others_are_not_written_over(data, tmp_path, capsys, name):
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text('{"theme": "dark"}')
    assert tutorial_train.main(arguments(data, out)) == 2
    error = capsys.readouterr().err
    assert name in error and "choose another out" in error and error.count("\n") == 1
    assert [p.name for p in out.iterdir() if not p.name.startswith(".")] == [name]
    (out / name).rename(out / "notes.json")  # files that are in nobody's way may stay
    assert RunFolder(out).begin(Settings(out=str(out))) is False and (out / "settings.json").is_file()


def test_a_process_that_is_ahead_of_the_first_one_is_not_another_run(tmp_path, monkeypatch):
    settings = Settings(out=str(tmp_path / "run"))
    run = RunFolder(settings.out)

    def second_process_begins():
        monkeypatch.setattr(folder, "own_rank", lambda: 1)
        run.begin(settings)
        (run.path / "data.json").write_text("{}")
        monkeypatch.setattr(folder, "own_rank", lambda: 0)

    def read_late(note, read=folder.noted_settings):
        monkeypatch.setattr(folder, "noted_settings", read)
        second_process_begins()
        return read(note)

    monkeypatch.setattr(folder, "noted_settings", read_late)
    run.begin(settings)  # the second one comes in between
    shutil.rmtree(run.path)
    second_process_begins()
    run.begin(settings)
    (run.path / "settings.json").unlink()
    for rank in (0, 1):
        monkeypatch.setattr(folder, "own_rank", lambda rank=rank: rank)
        with pytest.raises(ConfigError, match="holds data.json without a run's settings.json"):
            run.begin(settings)
    assert [path.name for path in run.path.iterdir()] == ["data.json"]


def test_pictures_from_before_belong_to_the_pairs_that_they_show(data, tmp_path, caplog):
    run, shown = RunFolder(tmp_path), np.zeros((2, 64, 64, 3), np.uint8)
    run.begin(Settings(out=str(tmp_path)))
    run.note_before(shown, {"fill/iou": 0.5}, of="pairs 1")
    assert run.noted_before("pairs 1")[1] == {"fill/iou": 0.5} and not caplog.text
    assert run.noted_before("pairs 2") == (None, {}) and "left out" in caplog.text
    run.begin(Settings(out=str(tmp_path)))  # nothing was trained: they are made anew
    assert run.noted_before("pairs 1") == (None, {})

    def told(pairs, **changes):
        return HeldOut(TrainingData(pairs, 2), Sampling(**changes), "32-true", TINY).told()

    pairs = tutorial_dataset.MyDataset(data)
    assert told(pairs) == told(pairs, seed=3) != told(pairs, steps=3) != told(Selected(pairs, range(20)), steps=3)


def test_a_result_is_there_even_if_its_pictures_fail(data, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("no pictures")

    monkeypatch.setattr(HeldOut, "sample", fail)
    out = tmp_path / "run"
    with pytest.raises(RuntimeError, match="no pictures"):
        tutorial_train.main(arguments(data, out, steps=1, pictures=0, pictures_before=False))
    assert (out / "model.safetensors").is_file() and not (out / "result.json").exists()


def test_a_full_disk_is_one_line(data, tmp_path, capsys, monkeypatch):
    """torch makes an error of its own of the system's."""

    class Full(io.BytesIO):
        def write(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")

    @contextmanager
    def whole_file(path):
        yield Full()

    monkeypatch.setattr(checkpoints, "whole_file", whole_file)
    assert tutorial_train.main(arguments(data, tmp_path, steps=1, pictures=0, pictures_before=False)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert (
        error.startswith("tutorial_train.py: ") and "No space left on device" in error and "step-00000001.ckpt" in error
    )


def test_a_score_that_cannot_be_had_is_found_before_training(data, tmp_path, capsys, monkeypatch):
    def missing(*args, **kwargs):
        raise ValueError("there is no hed.pth")

    monkeypatch.setattr("annotator.load", missing)
    out = tmp_path / "run"
    changes = {"pictures": 0, "pictures_before": False, "condition": "hed"}
    assert tutorial_train.main(arguments(data, out, **changes)) == 2
    assert "condition=hed: there is no hed.pth" in capsys.readouterr().err.splitlines()[-1]
    assert not (out / "checkpoints").exists()


def test_a_run_of_an_older_version_is_left_alone(data, tmp_path, capsys):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").write_bytes(b"")
    assert tutorial_train.main(arguments(data, tmp_path)) == 2
    error = capsys.readouterr().err
    assert "older version" in error and "last.ckpt" in error and error.count("\n") == 1


def test_two_runs_in_one_folder_do_not_mix(data, tmp_path, capsys):
    from cldm.files import locked

    with locked(tmp_path / "run"):
        assert tutorial_train.main(arguments(data, tmp_path)) == 2
    assert "another run is working in" in capsys.readouterr().err


def test_a_rate_that_is_too_large_ends_the_run_and_keeps_the_last_good_weights(data, tmp_path, capsys):
    out = tmp_path / "run"
    status = tutorial_train.main(
        arguments(data, out, learning_rate=1e30, steps=40, save_every=1, log_every=99, pictures_before=False, keep=99)
    )
    error = capsys.readouterr().err
    assert status == 2 and "not finite in 5 steps in a row" in error and "smaller learning_rate" in error
    assert not (out / "model.safetensors").exists() and not (out / "result.json").exists()
    for path in checkpoints_in(out / "checkpoints").values():
        state = WholeFiles().load_checkpoint(path)["state_dict"]
        assert all(bool(torch.isfinite(value).all()) for value in state.values())


def test_a_last_step_that_is_left_out_is_saved_and_deletes_nothing(data, tmp_path, monkeypatch, caplog):
    def bad_from_step_2_on(health, trainer, model, loss):
        health._finite, health._names = torch.tensor(trainer.global_step < 1), []

    monkeypatch.setattr(SkipBadSteps, "on_before_backward", bad_from_step_2_on)
    out = tmp_path / "run"
    argv = arguments(data, out, steps=3, save_every=1, keep=1, log_every=99, ema=0.5, pictures_before=False)
    assert tutorial_train.main(argv) == 0
    first, last = (WholeFiles().load_checkpoint(path) for path in checkpoints_in(out / "checkpoints").values())
    assert (first["global_step"], last["global_step"]) == (1, 3) and caplog.text.count("is left out") == 2
    for key, value in first["state_dict"].items():  # the average too, and how many steps it has seen
        assert torch.equal(value, last["state_dict"][key]), key


def test_what_a_kill_left_half_written_is_removed(data, tmp_path):
    run, settings = RunFolder(tmp_path / "run"), Settings(data=str(data), out=str(tmp_path / "run"))
    run.begin(settings)
    name = f".{uuid.uuid4().hex}.tmp"
    large = [
        *(run.checkpoints / name, run.path / "exports" / ".control-step-00000001.safetensors.0a1b2c3d.partial"),
        run.path / ".model.safetensors.0a1b2c3d.partial",
    ]
    small = [run.path / name, run.path / "pictures" / name]
    initial = run.path / ".control_ini.safetensors.0a1b2c3d.partial"
    kept = [run.checkpoints / "step-00000001.ckpt", run.path / ".notes", run.path / ".mine.tmp"]
    for path in (*large, *small, initial, *kept):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"begun")
    with run.in_use():
        run.begin(settings)
        assert not any(path.exists() for path in large)
        assert all(path.is_file() for path in (*small, initial))  # another process of the run may be writing them
        run.initial_weights(data / "prompt.json", "any", lambda path: path.touch())
        assert not initial.exists()
    assert all(path.is_file() for path in kept) and not any(path.exists() for path in small)


def test_the_8_bit_optimizer_goes_on_from_its_checkpoint(data, tmp_path, monkeypatch):
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(tutorial_train, "optimizer_config", lambda name, device: OPTIMIZERS[name])  # on a CPU, too
    quick = {"optimizer": "adamw8bit", "unlock_at": 2, "pictures": 0, "pictures_before": False}
    assert tutorial_train.main(arguments(data, tmp_path / "whole", steps=4, **quick)) == 0
    for steps in (3, 4):  # the second phase begins between two steps, and is then interrupted
        assert tutorial_train.main(arguments(data, tmp_path / "parts", steps=steps, **quick)) == 0
    whole, parts = (load_state_dict(tmp_path / run / "model.safetensors") for run in ("whole", "parts"))
    assert all(torch.equal(whole[key], parts[key]) for key in whole)


def test_16_mixed_on_a_cpu(data, tmp_path, capsys):
    argv = arguments(data, tmp_path / "run", steps=1, precision="16-mixed", pictures=0, pictures_before=False)
    assert tutorial_train.main([*argv, "frozen_precision=fp16"]) == 2
    assert "leave frozen_precision out" in capsys.readouterr().err
    assert tutorial_train.main(argv) == 0


def test_a_cache_of_data_beside_which_nothing_can_be_written(data, tmp_path, monkeypatch):
    argv = arguments(data, tmp_path / "run", steps=1, cache=True, pictures=0, pictures_before=False)
    monkeypatch.setattr(tutorial_train.os, "access", lambda path, mode: False)  # root may write anywhere
    assert tutorial_train.main(argv) == 0
    assert list((tmp_path / "run" / "cache").rglob("*.safetensors"))


def test_small_sets_fit_the_defaults(tmp_path, caplog):
    generate_fill(tmp_path / "five", count=5, size=64, palette="clear", progress=False)
    argv = arguments(tmp_path / "five", tmp_path / "run", steps=1, batch_size=32, pictures_before=False)
    with caplog.at_level("INFO"):
        assert tutorial_train.main([a for a in argv if not a.startswith("held_out")]) == 0
    assert "5 pairs to train on, 0 held out; with so few" in caplog.text and "batches hold 5" in caplog.text


def test_what_the_run_says_is_all_that_it_says(data, tmp_path):
    done = subprocess.run(
        [sys.executable, "tutorial_train.py", *arguments(data, tmp_path / "run", steps=2, pictures=0, pictures_before=False)],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    for word in ("Tip", "deprecat", "Warning", "eval mode", "GPU available", "Trainer.fit", "litlogger"):
        assert word.lower() not in (done.stdout + done.stderr).lower(), done.stderr


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


@pytest.mark.parametrize("changes", [{}, {"cache": "true"}])
def test_two_processes_of_torchrun(data, tmp_path, changes):
    """Data of two sizes; one process writes, both train, and a run on one with the same pairs a step goes on from it."""
    out = tmp_path / "run"
    argv = arguments(data, out, devices=2, batch_size=2, steps=2, pictures_before=False, **changes)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        f"--master_port={free_port()}",
        "tutorial_train.py",
        *argv,
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("pairs to train on") == 1  # one process speaks
    rows = read_metrics(out / "metrics.csv")
    assert len({row["step"] for row in rows}) == len(rows) and (out / "model.safetensors").is_file()
    assert tutorial_train.main(arguments(data, out, batch_size=4, steps=3, **changes)) == 0
    assert list(checkpoints_in(out / "checkpoints")) == [2, 3]


def test_ranks_and_steps_draw_differently(data, tmp_path, monkeypatch):
    from cldm.training.engine import SeedSteps

    class Rank:
        accumulate_grad_batches = 2

        def __init__(self, rank):
            self.global_rank = rank

    drawn = set()
    for rank in (0, 1):
        for batch in range(4):
            SeedSteps(0).on_train_batch_start(Rank(rank), None, None, batch)
            drawn.add(float(torch.rand(())))
    assert len(drawn) == 8


def test_help_explains_every_setting(capsys):
    for script, kind in ((tutorial_train, Settings), (tool_train_tiny, tool_train_tiny.Settings)):
        assert script.main(["--help"]) == 0
        lines = capsys.readouterr().out.splitlines()
        for key, value in asdict(kind()).items():
            (line,) = [line for line in lines if line.startswith(f"  {key}={'' if value is None else value} ")]
            assert len(line.split()) > 1
    assert tool_train_tiny.Settings().out.startswith("runs/")


def test_presets_are_settings_that_arguments_override():
    for name, values in PRESETS.items():
        settings = asdict(parse_settings([f"preset={name}"]))
        assert {key: settings[key] for key in values} == values
    assert parse_settings(["batch_size=3", "preset=8gb", "steps", "=", "30"]).batch_size == 3


def test_shards_that_a_shell_has_made_several_settings_of_are_refused():
    with pytest.raises(ConfigError, match="data is given more than once; .* in quotes"):
        parse_settings(["data=shards/0.tar", "data=shards/1.tar"])


@pytest.mark.parametrize("text", ["007", "1e3", "hash #2", "yes", "${data}", "None", "[a", "x=y", "'q'", "~"])
def test_texts_are_taken_as_they_stand(text):
    settings = parse_settings(
        ["weights=before", f"out={text}", f"weights={text}", "condition=", "held_out=", "ema=1e-1"]
    )
    assert (settings.out, settings.weights, settings.condition) == (text, text, "")
    assert (settings.held_out, settings.ema) == (None, 0.1)


def test_one_folder_written_in_two_ways_is_no_other_setting():
    noted = asdict(Settings(data="sets/x", config="cldm_tiny"))
    assert (
        changes(noted, Settings(data="./sets//x/"))
        == []
        == changes(noted | {"data": "a/../sets/x/"}, Settings(data="sets/x"))
    )
    assert changes(noted, Settings(data="sets/y", weights="w")) == ["weights", "data"]


@pytest.mark.parametrize(
    "argument, message",
    [
        ("steps=0", "steps must be at least 1"),
        ("steps=many", "many"),
        ("stepz=3", "unknown setting 'stepz'; did you mean steps?"),
        ("=3", "unknown setting ''; the settings are preset"),
        ("out=", "out is empty"),
        ("data=", "data is empty"),
        ("steps", "key=value"),
        ("learning_rate=-1", "learning_rate must be positive"),
        ("learning_rate=nan", "learning_rate must be positive"),
        ("config=cldm_v99", "cldm_v99"),
        ("weights=nowhere.safetensors", "nowhere.safetensors"),
        ("base=nowhere", "nowhere"),
        ("data=nowhere", "no data folder"),
        ("held_out=24", "held_out=24 leaves none of the 24 pairs"),
        ("empty_prompts=1.5", "empty_prompts must be between 0 and 1"),
        ("ema=2", "ema must be between 0 and 1"),
        ("seed=-1", "seed must be between 0"),
        ("sample_steps=2000", "sample_steps must be at most 1000"),
        ("accelerator=warp", "invalid accelerator name"),
        ("precision=3", "precision must be one of 32-true, bf16-mixed, 16-mixed"),
        ("precision=16-true", "trained stay in float32"),
        ("preset=9gb", "preset must be one of 8gb"),
        ("optimizer=adam", "optimizer must be one of adamw"),
        ("optimizer=adamw8bit", "needs a CUDA device"),
        ("schedule=cosin", "schedule must be one of constant"),
        ("warmup=4", "warmup must be less than the 4 steps"),
        ("reconnect_at=9", "reconnect_at must be less than the 4 steps"),
        ("unlock=encoder", "unlock must be one of decoder, all"),
        ("recompute=some", "recompute must be one of none"),
        ("frozen_precision=8", "frozen_precision must be one of"),
        ("broken=ignore", "broken must be one of stop"),
        ("condition=cany", "'cany'; did you mean canny?"),
        ("condition=zzz", "'zzz'; there are: canny"),
        ("strategy=fsdp", "fsdp"),
        ("guidance_scale=150", "guidance_scale must be above 0 and at most 100, found 150"),
        ("steps=1e3", "steps must be a whole number, found '1e3'"),
        ("held_out=few", "held_out must be a whole number, found 'few'"),
        ("compile=ja", "compile must be true or false, found 'ja'"),
        ("clip=-1", "clip must be zero or a positive number"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(data, tmp_path, capsys, argument, message):
    others = [
        a for a in arguments(data, tmp_path / "run", pictures_before=False) if a.split("=")[0] != argument.split("=")[0]
    ]
    assert tutorial_train.main([*others, argument]) == 2
    error = capsys.readouterr().err.strip().split("\n")[-1]
    assert message in error and error.startswith("tutorial_train.py: ")
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("config", "cldm_v99", "no file 'cldm_v99'"),
        ("config", "words.yaml", "model_channels must be int, found 'many'"),
        ("weights", "nowhere.safetensors", "nowhere.safetensors: does not exist"),
        ("base", "nowhere.safetensors", "nowhere.safetensors: does not exist"),
    ],
)
def test_what_a_run_begins_with_is_looked_for_before_the_pairs(
    data, tmp_path, capsys, monkeypatch, name, value, message
):
    monkeypatch.setattr(tutorial_train, "open_data", None)
    tiny = (ROOT / "models" / "cldm_tiny.yaml").read_text()
    (tmp_path / "words.yaml").write_text(tiny.replace("model_channels: 64", "model_channels: many"))
    monkeypatch.chdir(tmp_path)
    assert tutorial_train.main(arguments(data, "run", **{name: value})) == 2
    assert message in capsys.readouterr().err


def test_hints_of_another_number_of_channels(data, tmp_path, capsys, monkeypatch):
    config = tmp_path / "four.yaml"
    config.write_text((ROOT / "models" / "cldm_tiny.yaml").read_text().replace("hint_channels: 3", "hint_channels: 4"))
    run = arguments(data, tmp_path / "run", config=config, condition="canny", sample_steps=1)
    assert tutorial_train.main(run) == 2
    assert "a hint must have 4 channels, found 3" in capsys.readouterr().err.strip().split("\n")[-1]

    class FourChannels(tutorial_dataset.MyDataset):
        def __getitem__(self, index):
            item = super().__getitem__(index)
            return {**item, "hint": np.concatenate([item["hint"], item["hint"][..., :1]], axis=-1)}

    monkeypatch.setattr(tutorial_train, "MyDataset", FourChannels)
    assert tutorial_train.main(run) == 0
    assert (tmp_path / "run" / "result.png").is_file()


def test_a_configuration_that_names_other_entries_of_a_batch(data, tmp_path, capsys):
    config = tmp_path / "other.yaml"
    config.write_text((ROOT / "models" / "cldm_tiny.yaml").read_text().replace('"hint"', '"edges"'))
    assert tutorial_train.main(arguments(data, tmp_path / "run", config=config, pictures_before=False)) == 2
    assert "tutorial_train.py: the batch has no 'edges'; it has 'jpg'" in capsys.readouterr().err


def test_too_little_memory_is_one_line_that_says_what_helps(data, tmp_path, capsys, monkeypatch):
    def full(*args):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.\nTried")

    monkeypatch.setattr(tutorial_train, "fit", full)
    assert tutorial_train.main(arguments(data, tmp_path / "run", pictures_before=False)) == 2
    error = capsys.readouterr().err.strip().split("\n")[-1]
    assert "not enough memory; a smaller batch_size" in error and error.endswith("(CUDA out of memory.)")


def test_mistakes_can_be_corrected_and_defects_are_shown(data, tmp_path, capsys, monkeypatch):
    out = tmp_path / "run"
    assert tutorial_train.main(arguments(tmp_path / "nowhere", out)) == 2
    assert tutorial_train.main(arguments(data, out, base="nowhere")) == 2

    def broken(*args, **kwargs):
        raise ValueError("of torch")

    def locked(*args, **kwargs):
        raise PermissionError(13, "Permission denied", str(out))

    monkeypatch.setattr(tutorial_train, "write_trained", locked)
    capsys.readouterr()
    assert tutorial_train.main(arguments(data, out, steps=1)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("tutorial_train.py: ") and "Permission denied" in error
    monkeypatch.setattr(tutorial_train, "write_trained", broken)
    with pytest.raises(ValueError, match="of torch"):
        tutorial_train.main(arguments(data, out, steps=1))


def test_broken_data_is_found_before_training_or_left_out(data, tmp_path, capsys, caplog):
    folder = tmp_path / "fill"
    generate_fill(folder, count=10, size=64, palette="clear", progress=False)
    (folder / "target" / "3.png").write_bytes(b"no picture")
    out = tmp_path / "run"
    quick = {"steps": 1, "held_out": 2, "pictures_before": False}
    assert tutorial_train.main(arguments(folder, out, **quick)) == 2
    error = capsys.readouterr().err
    assert "3.png does not decode" in error and "broken=leave_out" in error
    assert not (out / "checkpoints").exists()
    with caplog.at_level("INFO"):
        assert tutorial_train.main(arguments(folder, out, **quick, broken="leave_out")) == 0
    assert "7 pairs to train on, 2 held out" in caplog.text


def test_a_caption_that_is_missing_stops_the_run_or_its_pair_is_left_out(tmp_path, capsys, caplog):
    folder = tmp_path / "captions"
    generate_fill(tmp_path / "fill", count=6, size=64, palette="clear", progress=False)
    for part in ("source", "target"):
        shutil.copytree(tmp_path / "fill" / part, folder / part)
    entries = [{"file": f"target/{i}.png", "text": "" if i == 3 else f"prompt {i}"} for i in range(6)]
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, entries)))
    quick = {"steps": 1, "held_out": 2, "pictures": 0, "pictures_before": False}
    for _ in range(2):
        assert tutorial_train.main(arguments(folder, tmp_path / "run", **quick)) == 2
        error = capsys.readouterr().err
        assert "3.png has no prompt" in error and "line 4 has an empty text" in error and "broken=leave_out" in error
    with caplog.at_level("INFO"):
        assert tutorial_train.main(arguments(folder, tmp_path / "run", **quick, broken="leave_out")) == 0
    assert "3 pairs to train on, 2 held out" in caplog.text


def test_pairs_that_break_or_change_between_two_starts(tmp_path, caplog, capsys):
    folder, note = tmp_path / "fill", tmp_path / "data.json"
    generate_fill(folder, count=24, size=64, palette="clear", progress=False)

    def look(broken="stop", begun=True):
        caplog.clear()
        dataset = tutorial_dataset.MyDataset(folder, leave_out=broken == "leave_out")
        return len(check_once(dataset, broken, note, 4, begun))

    (folder / "fill.json").unlink()  # it says how many there are
    assert look() == look() == 24 and not caplog.text
    whole = (folder / "target" / "22.png").read_bytes()
    (folder / "target" / "3.png").write_bytes(b"no picture")
    (folder / "target" / "22.png").write_bytes(whole[:-40])  # its header is sound; it is held out
    with pytest.raises(DataError, match="3.png does not decode.*22.png.*broken=leave_out"):
        look()
    assert look("leave_out") == look("leave_out") == 22
    (folder / "target" / "22.png").write_bytes(whole[:-40] + whole[-40:])
    lines = (folder / "prompt.json").read_text().splitlines()
    (folder / "prompt.json").write_text("\n".join([lines[0], *lines[4:]]))  # the broken one is gone, too
    assert look() == 21 and "0 added, 3 removed" in caplog.text
    assert look() == 21 and not caplog.text
    (folder / "prompt.json").write_text("\n".join(lines[4:]))
    assert look(begun=False) == 20 and not caplog.text


@pytest.mark.parametrize("where", [".", "../fill"])
def test_a_cache_of_data_that_are_named_in_another_way(tmp_path, monkeypatch, where):
    folder = tmp_path / "fill"
    generate_fill(folder, count=4, size=64, palette="clear", progress=False)
    entries = map(json.loads, (folder / "prompt.json").read_text().splitlines())
    whole = [entry | {key: str(folder / entry[key]) for key in ("source", "target")} for entry in entries]
    relative = tutorial_dataset.MyDataset(folder).fingerprint(2)
    (folder / "prompt.json").write_text("\n".join(map(json.dumps, whole)))
    monkeypatch.chdir(folder)
    assert tutorial_dataset.MyDataset(where).fingerprint(2) == relative
    made = []
    monkeypatch.setattr(tutorial_train, "make_cache", lambda model, pairs, path, precision: made.append(path))
    monkeypatch.setattr(tutorial_train, "release_encoders", lambda model: None)
    monkeypatch.setattr(tutorial_train, "CachedPairs", lambda pairs, cache: pairs)
    data = TrainingData(tutorial_dataset.MyDataset(where), 1)
    tutorial_train.use_cache(data, None, RunFolder(tmp_path / "run"), Settings(data=where))
    assert made == [tmp_path / "fill.cache"]


def test_dataset_script(tmp_path, capsys):
    out = tmp_path / "set"
    assert tutorial_dataset.main(["--out", str(out), "--count", "5", "--size", "64"]) == 0
    item = tutorial_dataset.MyDataset(out)[0]
    assert item["jpg"].shape == (64, 64, 3) and item["jpg"].min() >= -1 and item["hint"].max() == 1.0
    assert np.issubdtype(item["jpg"].dtype, np.floating)
    assert tutorial_dataset.main(["--out", str(out), "--count", "5", "--size", "128"]) == 2
    assert "other settings" in capsys.readouterr().err
    assert tutorial_dataset.main(["--out", str(tmp_path / "x"), "--size", "100"]) == 2
    assert "multiple of 64" in capsys.readouterr().err


def test_shards_of_which_none_can_be_held_out(tmp_path, monkeypatch):
    (tmp_path / "0.tar").touch()
    monkeypatch.setattr(TrainingData, "from_shards", lambda shards: "data")
    settings = parse_settings([f"data={tmp_path}", "held_out=3"])
    with pytest.raises(ConfigError, match="held_out=3 needs pairs in a folder"):
        tutorial_train.open_data(settings, SimpleNamespace(path=tmp_path, checkpoint=None))
    # A run that was begun so goes on: another value would be another run's.
    begun = SimpleNamespace(path=tmp_path, checkpoint=tmp_path / "step.ckpt")
    assert tutorial_train.open_data(settings, begun) == "data"


def test_a_run_that_goes_on_with_other_shards_says_so(tmp_path, caplog, monkeypatch):
    note = tmp_path / "data.json"
    note_shards(["a.tar", "b.tar"], note, begun=False)
    note_shards(["./a.tar", "b.tar"], note, begun=True)
    note_shards(["c.tar"], note, begun=False)  # nothing is trained yet
    assert not caplog.records
    note_shards(["c.tar", "d.tar", "e.tar"], note, begun=True)
    assert "shards are not those" in caplog.text and "2 added, 0 removed" in caplog.text
    note_shards(["c.tar", "d.tar", "e.tar"], note, begun=True)
    assert len(caplog.records) == 1

    # The script asks for it; what is in the shards does not matter here.
    monkeypatch.setattr(TrainingData, "from_shards", lambda shards: None)
    shards, run = tmp_path / "shards", SimpleNamespace(path=tmp_path / "run", checkpoint=tmp_path / "step.ckpt")
    shards.mkdir()
    run.path.mkdir()
    for name in ("a.tar", "b.tar"):
        (shards / name).touch()
        tutorial_train.open_data(parse_settings([f"data={shards}"]), run)
    assert "1 added, 0 removed" in caplog.text
