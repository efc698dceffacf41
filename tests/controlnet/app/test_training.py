"""Runs as processes: begun, gone on with, stopped, and never left behind."""

import os
import signal
import subprocess
import sys
from dataclasses import asdict

import pytest

from cldm.settings import write_settings
from cldm.training.metrics import MetricsFile
from cldm.training.settings import parse_settings
from controlnet.app import lifeline
from controlnet.app.training import Runs, describe, settings_of
from ldm.util import ConfigError
from tests.controlnet.app.conftest import ROOT, wait_until

WAITING = "tests.controlnet.app.waiting"


@pytest.fixture
def started(monkeypatch, tmp_path):
    """What `Runs` would start; instead a command that waits is started."""
    commands, start = [], lifeline.start

    def start_waiting(module, arguments, **options):
        commands.append((module, list(arguments)))
        return start(WAITING, [str(tmp_path / "waiting.txt")], **options)

    monkeypatch.setattr(lifeline, "start", start_waiting)
    return commands


def test_a_command_ends_in_order_when_who_started_it_is_killed(tmp_path):
    note = tmp_path / "note.txt"
    code = f"import time; from controlnet.app import lifeline; lifeline.start({WAITING!r}, [{str(note)!r}]); time.sleep(60)"
    starter = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    try:
        wait_until(lambda: note.is_file() and note.read_text() == "waiting")
    finally:
        os.kill(starter.pid, signal.SIGKILL)
        starter.wait()
    wait_until(lambda: note.read_text() == "ended in order")


def test_arguments_output_and_status_are_those_of_the_module(tmp_path):
    process = lifeline.start("annotator", ["canny", "no-such-file", str(tmp_path)], stderr=subprocess.PIPE, cwd=ROOT)
    complaint = process.stderr.read().decode()
    assert process.wait(60) == 2 and "no-such-file" in complaint


def test_one_run_at_a_time_from_its_beginning_to_its_end(started, tmp_path):
    runs = Runs(tmp_path / "runs")
    assert runs.names() == [] and runs.active is None and runs.stop() is None
    settings = runs.begin("first", ["steps=30", "data=some/data"])
    assert settings.steps == 30 and runs.active == "first" == runs.names()[0]
    assert started == [("tutorial_train", ["steps=30", "data=some/data", f"out={tmp_path / 'runs' / 'first'}"])]
    assert runs.state("first").state == "preparing" and runs.state("first").is_active
    with pytest.raises(ConfigError, match="the run first is being trained; stop it first"):
        runs.begin("second", [])
    metrics = MetricsFile(tmp_path / "runs" / "first")
    metrics.log_metrics({"train/loss": 0.25}, 3)
    state = runs.state("first")
    assert (state.state, state.step, state.loss) == ("training", 3, 0.25)
    wait_until(lambda: (tmp_path / "waiting.txt").is_file())
    assert runs.stop() == "first"
    assert runs.state("first").state in ("stopping", "stopped")
    wait_until(lambda: runs.active is None)
    assert runs.state("first").state == "stopped"
    assert (tmp_path / "waiting.txt").read_text() == "ended in order"


def test_the_server_waits_for_a_run_to_save_when_it_ends(started, tmp_path):
    runs = Runs(tmp_path / "runs")
    runs.begin("first", [])
    wait_until(lambda: (tmp_path / "waiting.txt").is_file())
    runs.close()
    assert (tmp_path / "waiting.txt").read_text() == "ended in order" and runs.active is None
    runs.close()


def test_a_run_that_fails_says_why(monkeypatch, tmp_path):
    runs = Runs(tmp_path / "runs")
    runs.begin("first", ["data=/nowhere/at/all", "accelerator=cpu"])
    wait_until(lambda: runs.active is None, 60)
    state = runs.state("first")
    assert state.state == "failed" and "/nowhere/at/all" in state.message


def test_going_on_gives_the_settings_that_the_run_was_begun_with(started, tmp_path):
    runs, path = Runs(tmp_path / "runs"), tmp_path / "runs" / "first"
    settings = parse_settings(["preset=8gb", "batch_size=2", "data=a folder/with, signs", "sd_locked=false", "learning_rate=1e-5",
                               "steps=40", f"out={path}"])  # fmt: skip
    path.mkdir(parents=True)
    write_settings(path / "settings.json", settings)
    runs.go_on("first")
    again = parse_settings(started[0][1])
    assert {**asdict(again), "preset": "8gb"} == asdict(settings)
    runs.close()
    runs.go_on("first", 50)
    assert parse_settings(started[1][1]).steps == 50
    runs.close()
    for name in ("second", "../runs/first", "", None):
        with pytest.raises(ConfigError, match="from the list"):
            runs.go_on(name)


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".x"])
def test_names_of_runs(started, tmp_path, name):
    with pytest.raises(ValueError, match="needs a name"):
        Runs(tmp_path).begin(name, [])
    assert started == []


def test_wrong_settings_start_nothing(started, tmp_path):
    runs = Runs(tmp_path)
    for argument in ("stepz=3", "steps=-1", "precision=none", "no equals sign"):
        with pytest.raises(ConfigError):
            runs.begin("first", [argument])
    assert started == [] and runs.names() == []


def test_free_settings_name_no_path_of_the_server():
    assert settings_of(" ema=0.9 \n\nclip=1\n") == ["ema=0.9", "clip=1"]
    for line in ("out=/x", "weights = hf://a/b", "config=evil.yaml", "base=x", "data=/etc", "preset=8gb"):
        with pytest.raises(ConfigError, match="field of its own"):
            settings_of(f"ema=0.9\n{line}")
    assert describe(parse_settings(["ema=0.9", "data=x", "out=y"])) == {"ema": 0.9}
