"""Training runs as processes of their own, each in its folder: started, watched, stopped, and gone on with.

What is known of a run is read from its folder (settings, metrics, curves, pictures, checkpoints, and the log that is kept here), so
that it is there after a reload of the page and after a new start of the server.
"""

import subprocess
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from cldm.settings import noted_settings
from cldm.training.curves import PICTURE
from cldm.training.folder import RunFolder
from cldm.training.metrics import FILENAME, read_metrics
from cldm.training.settings import Settings, changes, parse_settings
from controlnet.app import lifeline
from controlnet.app.files import new_name
from ldm.util import ConfigError

LOG = "log.txt"
_TAIL = 4000  # bytes of a log that are looked at for its last lines
_PATIENCE = 60  # seconds that a run may take to save when the server ends
# What the page's own fields say; as free text these would be paths of the server.
OWN_FIELDS = ("preset", "config", "base", "weights", "data", "out")
_STOPPED = (130, 143, -2, -15)


@dataclass(frozen=True)
class RunState:
    """What a run's folder and its process tell.

    Attributes:
        state: "new", "preparing", "training", "stopping", "stopped", "finished" or "failed".
        step, steps: optimizer steps done and planned.
        loss: of the last step.
        message: the last line of the log.
        curves, picture: newest files, if there are any.
    """

    state: str
    step: int = 0
    steps: int = 0
    loss: float | None = None
    message: str = ""
    curves: Path | None = None
    picture: Path | None = None

    @property
    def is_active(self) -> bool:
        return self.state in ("preparing", "training", "stopping")


class Runs:
    """The training runs in a folder, of which one at a time is worked on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        self._name: str | None = None
        self._process: subprocess.Popen | None = None
        self._stopping = False

    def names(self) -> list[str]:
        """Runs with settings, the newest first."""
        if not self.folder.is_dir():
            return []
        runs = [path for path in self.folder.iterdir() if (path / "settings.json").is_file() or path.name == self._name]
        return [path.name for path in sorted(runs, key=lambda path: path.stat().st_mtime, reverse=True)]

    @property
    def active(self) -> str | None:
        """The run whose process is alive."""
        return self._name if self._process is not None and self._process.poll() is None else None

    def begin(self, name: str, arguments: Sequence[str]) -> Settings:
        """Start a run with `key=value` settings, or go on with it.

        Raises:
            ConfigError: settings that are wrong, or differ from those the run was begun with; or another run is going on.
        """
        path = self.folder / new_name(name, "a run")
        settings = parse_settings([*arguments, f"out={path}"])
        noted = noted_settings(path / "settings.json")
        if noted is not None and RunFolder(path).checkpoint is not None and (changed := changes(noted, settings)):
            raise ConfigError(
                f"the run {name} was begun with other settings ({', '.join(changed)}); give this one another name, "
                "or choose the run below and go on with it"
            )
        self._start(path, [*arguments, f"out={path}"])
        return settings

    def go_on(self, name: str, steps: int | None = None) -> None:
        """Start a run again with the settings that it was begun with, perhaps with more steps.

        Raises:
            ConfigError: there is no such run, or another one is going on.
        """
        path = self._path(name)
        noted = noted_settings(path / "settings.json") or {}
        known = {f.name: f.default for f in fields(Settings)}
        arguments = [f"{key}={value}" for key, value in noted.items() if key in known and value != known[key]]
        arguments = [one for one in arguments if not one.startswith(("out=", "steps="))]
        # A preset's settings are noted with all others; naming it again would bring back what was changed beside it.
        arguments = [one for one in arguments if not one.startswith("preset=")]
        self._start(path, [*arguments, f"steps={steps or noted.get('steps', known['steps'])}", f"out={path}"])

    def stop(self) -> str | None:
        """Let the active run finish its step, save and end; its name."""
        with self._lock:
            name, process = self.active, self._process
            if name is not None and process is not None:
                self._stopping = True
                process.terminate()
            return name

    def close(self) -> None:
        """Stop the active run and wait until it has saved."""
        process = self._process
        if self.stop() is None or process is None:
            return
        try:
            process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()  # the last checkpoint is whole, whatever happens
            process.wait()

    def state(self, name: str) -> RunState:
        """What a run is doing.

        Raises:
            ConfigError: there is no such run.
        """
        path = self._path(name)
        rows = read_metrics(path / FILENAME) if (path / FILENAME).is_file() else []
        run = RunFolder(path)
        steps = (noted_settings(run.note) or {}).get("steps", 0)
        trained = [row for row in rows if "train/loss" in row]
        step = int(trained[-1]["step"]) if trained else run.step
        message = _last_line(path / LOG)
        if name == self.active:
            state = "stopping" if self._stopping else "training" if trained else "preparing"
        elif run.is_finished(steps) and steps:
            state = "finished"
        elif name == self._name and self._process is not None and self._process.returncode not in (0, *_STOPPED):
            state = "failed"
        else:
            state = "stopped" if step else "new"
        pictures = sorted((path / "pictures").glob("step_*.png"))
        result = path / "result.png"
        if state == "finished" and result.is_file():
            pictures = [result]
        curves = path / PICTURE
        return RunState(
            state, step, steps, trained[-1]["train/loss"] if trained else None, message,
            curves if curves.is_file() else None, pictures[-1] if pictures else None,
        )  # fmt: skip

    def _path(self, name: object) -> Path:
        if name not in self.names():
            raise ConfigError("choose a run from the list")
        return self.folder / str(name)

    def _start(self, path: Path, arguments: Sequence[str]) -> None:
        with self._lock:
            if self.active is not None:
                raise ConfigError(f"the run {self.active} is being trained; stop it first, or wait for its end")
            path.mkdir(parents=True, exist_ok=True)
            with open(path / LOG, "ab") as log:
                self._process = lifeline.start("tutorial_train", arguments, stdout=log, stderr=subprocess.STDOUT)
            self._name, self._stopping = path.name, False


def settings_of(lines: str) -> list[str]:
    """`key=value` settings, one a line, that somebody typed.

    Raises:
        ConfigError: one that has a field of its own on the page.
    """
    found = [line.strip() for line in lines.splitlines() if line.strip()]
    for line in found:
        key = line.partition("=")[0].strip()
        if key in OWN_FIELDS:
            raise ConfigError(f"{key} has a field of its own; take it out of the other settings")
    return found


def describe(settings: Settings) -> dict[str, Any]:
    """Settings that are not the default, for people."""
    plain = asdict(Settings())
    return {key: value for key, value in asdict(settings).items() if value != plain[key] and key not in OWN_FIELDS}


def _last_line(log: Path) -> str:
    if not log.is_file():
        return ""
    with open(log, "rb") as file:
        file.seek(0, 2)
        file.seek(max(0, file.tell() - _TAIL))
        lines = file.read().decode("utf-8", "replace").replace("\r", "\n").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
