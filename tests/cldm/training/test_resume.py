"""A run that is stopped or killed at any moment, and given again, ends bit for bit as one that was left alone."""

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from cldm.command import Stopped
from cldm.data.fill import generate_fill
from cldm.training import engine
from cldm.training.checkpoints import checkpoints_in
from cldm.training.metrics import read_metrics
from tests.cldm.training.runs import arguments, compare, kill_until_done, make_data, newest, run, stop_at


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("resume") / "fill")


@pytest.fixture(scope="module")
def sizes(tmp_path_factory):
    """Pairs of two sizes, so that batches are made by size."""
    folder = make_data(tmp_path_factory.mktemp("resume") / "sizes", count=12)
    wide = tmp_path_factory.mktemp("resume") / "wide"
    generate_fill(wide, count=8, size=128, palette="clear", progress=False)
    lines = [(folder / "prompt.json").read_text()]
    for i, line in enumerate((wide / "prompt.json").read_text().splitlines()):
        for kind in ("source", "target"):
            (wide / kind / f"{i}.png").rename(folder / kind / f"wide-{i}.png")
        lines.append(line.replace(f"/{i}.png", f"/wide-{i}.png") + "\n")
    (folder / "prompt.json").write_text("".join(lines))
    for note in folder.glob("*.json"):
        if note.name != "prompt.json":
            note.unlink()
    return folder


def test_signals_finish_the_step_save_it_and_say_how_to_go_on(data, tmp_path):
    alone = tmp_path / "alone"
    changes = {"steps": 10, "save_every": 4, "ema": 0.9, "empty_prompts": 0.5, "log_every": 2}
    assert run(arguments(data, alone, **changes), tmp_path / "alone.log") == 0
    log = tmp_path / "stopped.log"
    # Another number of pictures on the way: what is logged does not change what is trained.
    argv = arguments(data, tmp_path / "stopped", **changes | {"log_every": 3, "pictures": 1, "keep": 9})
    folder = tmp_path / "stopped" / "checkpoints"
    for number, status in ((signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 143)):
        before = max(checkpoints_in(folder), default=0)
        rows = tmp_path / "stopped" / "metrics.csv"
        begun = time.time()

        def working(rows=rows, begun=begun):
            return rows.exists() and rows.stat().st_mtime > begun

        assert stop_at(argv, log, number, working) in (status, 0)
        said = log.read_text().strip().splitlines()[-1]
        if "stopped after step" not in said:
            break  # it had ended before the signal came
        assert max(checkpoints_in(folder)) > before and "the same command goes on from there" in said
    assert run(argv, log) == 0
    assert compare(alone, tmp_path / "stopped") == []
    steps = [row["step"] for row in read_metrics(tmp_path / "stopped" / "metrics.csv")]
    assert steps == sorted(set(steps))
    # A finished run only says so; a longer one goes on.
    before = newest(tmp_path / "stopped")
    assert run(argv, log) == 0 and "has had its 10 steps" in log.read_text().splitlines()[-1]
    assert newest(tmp_path / "stopped")["global_step"] == before["global_step"] == 10
    assert run(arguments(data, alone, **changes | {"steps": 12}), tmp_path / "alone.log") == 0
    assert newest(alone)["global_step"] == 12


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 143)])
def test_a_signal_to_all_processes_leaves_those_that_load_data_alone(data, tmp_path, number, status):
    """As Ctrl-C in a terminal and a cluster at the end of a job's time send it."""
    argv = arguments(
        data, tmp_path / "run", steps=10_000, save_every=2, pictures=0, workers=2, accumulate=2, batch_size=1
    )
    saved = tmp_path / "run" / "checkpoints" / "step-00000002.ckpt"
    assert stop_at(argv, tmp_path / "log", number, saved.exists, group=True) == status, (tmp_path / "log").read_text()
    said = (tmp_path / "log").read_text().strip().splitlines()[-1]
    assert said.startswith("stopped after step ")
    assert newest(tmp_path / "run")["global_step"] == int(said.split()[3].rstrip(","))


def test_ctrl_c_before_the_first_step(data, tmp_path):
    """While a trainer is set up, libraries would swallow it, or end the program without a word."""
    log = tmp_path / "log"
    argv = arguments(data, tmp_path / "run", steps=10_000, pictures=0)

    def setting_up():
        return log.exists() and "steps 1 to 10000 train" in log.read_text()

    assert stop_at(argv, log, signal.SIGINT, setting_up) == 130
    said = log.read_text().strip().splitlines()[-1]
    assert said.startswith("stopped after step ") and checkpoints_in(tmp_path / "run" / "checkpoints")


def test_a_cluster_that_ends_the_job_between_steps_runs_it_again(monkeypatch):
    asked = []
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    monkeypatch.setattr(engine.subprocess, "run", lambda command, check: asked.append(command))
    before = signal.getsignal(signal.SIGUSR1)
    with (
        pytest.raises(Stopped, match="the same command goes on") as stopped,
        engine.requeued("the same command goes on"),
    ):
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(1)
    assert stopped.value.status == 143 and asked == [["scontrol", "requeue", "42"]]
    assert signal.getsignal(signal.SIGUSR1) is before


def test_training_in_a_thread_leaves_signals_to_the_main_one():
    """Notebooks' servers and web pages run what they are given in threads, where Python handles no signals."""

    def train() -> None:
        with engine.requeued("the same command goes on"), engine.StopOnSignal() as stop:
            stop.on_train_start(None, None)

    before = [signal.getsignal(number) for number in engine.HANDLED]
    with ThreadPoolExecutor(1) as pool:
        pool.submit(train).result()
    assert [signal.getsignal(number) for number in engine.HANDLED] == before


def test_a_second_ctrl_c_interrupts_at_once(monkeypatch):
    clock = iter([100.0, 100.9, 101.1])
    monkeypatch.setattr(engine.time, "monotonic", lambda: next(clock))
    stop = engine.StopOnSignal()
    stop._note(signal.SIGINT, None)
    stop._note(signal.SIGINT, None)  # the same one: `torchrun` and `timeout` send two
    with pytest.raises(KeyboardInterrupt):
        stop._note(signal.SIGINT, None)


@pytest.mark.parametrize(
    "changes",
    [
        {"accumulate": 2, "batch_size": 1, "workers": 2, "schedule": "cosine", "warmup": 2, "clip": 1.0},
        {"precision": "bf16-mixed", "min_snr": 5, "noise_offset": 0.1, "cache": True, "empty_prompts": 0.5},
        {
            "reconnect_at": 3,
            "unlock_at": 5,
            "unlock": "all",
            "unlock_learning_rate": 1e-4,
            "ema": 0.9,
            "schedule": "cosine",
            "warmup": 2,
        },
    ],
    ids=["accumulation", "mixed", "phases"],
)
def test_settings_that_resume_must_keep(data, tmp_path, changes):
    changes = {"steps": 7, "save_every": 100, "pictures": 0, **changes}
    assert run(arguments(data, tmp_path / "alone", **changes), tmp_path / "log") == 0, (tmp_path / "log").read_text()
    for steps in (4, 7):  # the schedule's length is part of it
        argv = arguments(data, tmp_path / "parts", **changes | ({"save_every": 4} if steps == 4 else {}))
        if steps == 4:
            saved = tmp_path / "parts" / "checkpoints" / "step-00000004.ckpt"
            assert stop_at(argv, tmp_path / "log", signal.SIGKILL, saved.exists) in (-9, 0)
        else:
            assert run(argv, tmp_path / "log") == 0, (tmp_path / "log").read_text()
    assert compare(tmp_path / "alone", tmp_path / "parts") == []


def test_several_sizes_and_kills_at_random_moments(sizes, tmp_path):
    """A documented command does the same 100 times: python -m tests.cldm.training.runs."""
    changes = {"steps": 30, "save_every": 1, "pictures": 0, "held_out": 2, "batch_size": 2, "ema": 0.9}
    assert run(arguments(sizes, tmp_path / "alone", **changes), tmp_path / "log") == 0, (tmp_path / "log").read_text()
    killed = tmp_path / "killed"
    met = kill_until_done(arguments(sizes, killed, **changes), killed, tmp_path / "killed.log", kills=20, seconds=2.5)
    assert met >= 5
    assert compare(tmp_path / "alone", killed) == []
    assert len(checkpoints_in(killed / "checkpoints")) == 2
    assert {path.suffix for path in killed.rglob(".*")} == {".lock"}  # nothing half-written stays
