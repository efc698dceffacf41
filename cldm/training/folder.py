"""The folder of a run: the settings that it was begun with, its checkpoints, and one process that works in it at a time."""

import io
import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from cldm.files import locked, remove_unfinished, sha256_of, write_whole
from cldm.settings import noted_settings, write_settings
from cldm.training.checkpoints import checkpoints_in, newest_checkpoint
from cldm.training.engine import own_rank
from cldm.training.settings import Settings, changes
from ldm.files import remove_unfinished_weights
from ldm.files.locating import locate
from ldm.util import ConfigError

# What a run writes at the top of its folder, after its settings.
MADE = (
    "model.safetensors", "result.png", "result.json", "curves.png", "metrics.csv", "data.json", "before.npz", "weights.json",
    "control_ini.safetensors", "control_ini.json",
)  # fmt: skip
# Settings that the note of a run names, whatever the version that wrote it.
SIGNS = ("data", "out", "steps")

logger = logging.getLogger(__name__)


class RunFolder:
    """Where a run keeps what it makes.

    Args:
        path: the folder; made when something is written.

    Raises:
        ConfigError: the folder holds a run of an older version.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.note = self.path / "settings.json"
        self.checkpoints = self.path / "checkpoints"
        newest_checkpoint(self.checkpoints)

    @property
    def result(self) -> Path:
        """The trained model, which is there when the run has ended."""
        return self.path / "model.safetensors"

    def is_finished(self, steps: int) -> bool:
        """Whether the run has so many steps, and its result is that of its last one."""
        noted = noted_settings(self.path / "result.json") or {}
        return self.step >= steps and noted.get("steps") == self.step and self.result.is_file()

    def finish(self, numbers: dict[str, Any]) -> None:
        """Note the results of the run's last step, `steps` among them; the last thing that a run does."""
        write_whole(self.path / "result.json", json.dumps(numbers, indent=1).encode())

    def note_before(self, pictures: np.ndarray, scores: dict[str, float], of: str) -> None:
        """Keep pictures (N, H, W, 3) that were made before the first step, and their scores, until the run ends.

        Args:
            of: a text that tells what they were made of, and how.
        """
        file = io.BytesIO()
        np.savez(file, pictures=pictures, scores=json.dumps(scores), of=of)
        write_whole(self.path / "before.npz", file.getvalue())

    def noted_before(self, of: str) -> tuple[np.ndarray | None, dict[str, float]]:
        """What `note_before` kept; (None, {}) if nothing, or if it was made of something else than the text `of` tells."""
        path = self.path / "before.npz"
        if not path.is_file():
            return None, {}
        with np.load(path) as kept:
            if "of" not in kept or str(kept["of"]) != of:
                logger.warning(
                    "the pictures from before training are left out: since then the held-out pairs, or the settings of the "
                    "pictures, have changed"
                )
                return None, {}
            return kept["pictures"], json.loads(str(kept["scores"]))

    @property
    def step(self) -> int:
        """Optimizer steps of the newest checkpoint; 0 without one."""
        return newest_checkpoint(self.checkpoints)[0]

    @property
    def checkpoint(self) -> Path | None:
        """The newest checkpoint."""
        return newest_checkpoint(self.checkpoints)[1]

    def checkpoint_at(self, step: int) -> Path | None:
        return checkpoints_in(self.checkpoints).get(step)

    def begin(self, settings: Settings) -> bool:
        """Note the settings; whether a run with them was begun here before, so that this one goes on with it.

        A run that has not saved a checkpoint yet (it ran out of memory, say) may begin again with any settings.

        Raises:
            ConfigError: a run with other settings is here, or files that are not a run's and would be written over, or the weights
                to begin with are a file that the run writes.
        """
        # Another process of the run may be ahead. It has noted the settings before all else, so what is found before the note is
        # read is foreign if there is no note.
        found = [name for name in MADE if os.path.lexists(self.path / name)]
        noted = noted_settings(self.note)
        self._refuse_foreign(noted, found)
        self._refuse_own(settings)
        changed = changes(noted, settings) if noted is not None else []
        if changed and self.checkpoint is not None:
            more = (
                f"; weights={self.result} out=NEW_FOLDER begins a new run with its result"
                if self.result.is_file()
                else ""
            )
            raise ConfigError(
                f"{self.path} holds a run with different settings ({', '.join(changed)}); "
                f"choose another out for a run of its own{more}"
            )
        if own_rank() == 0 or noted is None:
            write_settings(self.note, settings)
        if own_rank() == 0:
            self._remove_unfinished()
            if self.checkpoint is None:  # what an earlier start made before the first step is made anew
                (self.path / "before.npz").unlink(missing_ok=True)
        return noted is not None and not changed

    def _remove_unfinished(self) -> None:
        """Remove what a kill has left of a checkpoint, an export or the result that was being written; each may take gigabytes."""
        remove_unfinished(self.checkpoints)
        remove_unfinished_weights(self.path / "exports")
        remove_unfinished_weights(self.path, self.result.name)

    def _refuse_foreign(self, noted: dict[str, Any] | None, found: list[str]) -> None:
        """Raise ConfigError if a file in the place of one that the run writes, of which some were `found`, is not a run's."""
        if noted is not None and not all(name in noted for name in SIGNS):
            raise ConfigError(f"{self.note} is not the note of a training run; choose another out")
        if found and noted is None:
            raise ConfigError(
                f"{self.path} holds {', '.join(found)} without a run's settings.json, and training would write over "
                f"{'it' if len(found) == 1 else 'them'}; choose another out"
            )

    def _refuse_own(self, settings: Settings) -> None:
        """Raise ConfigError if the weights to begin with are a file that the run writes, also by another name or a link."""
        name = "weights" if settings.weights else "base"
        written = [self.result, *([] if settings.weights else [self.path / "control_ini.safetensors"])]
        if not any(path.exists() for path in written):
            return
        given = locate(getattr(settings, name))
        # A folder may hold links to the files that it stands for.
        parts = [given, *(given.glob("*") if given.is_dir() else ())]
        for path in written:
            if path.exists() and any(part.exists() and part.samefile(path) for part in parts):
                raise ConfigError(
                    f"{name}={getattr(settings, name)} is {path}, which the run would write over; choose another out, or give "
                    "that file another name first"
                )

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Within it no other run can work in this folder; the processes of one run share it.

        When the run has come to its end, the small files are removed that kills have left half-written.

        Raises:
            ConfigError: another run does.
        """
        if own_rank() != 0:
            yield
            return
        try:
            with locked(self.path / "run", wait=False):
                yield
                # Not earlier: while this process begins, others of the run may be writing their notes.
                for folder in (self.path, self.path / "pictures"):
                    remove_unfinished(folder)
        except BlockingIOError as error:
            raise ConfigError(
                f"another run is working in {self.path}; wait for its end, or choose another out"
            ) from error

    def identify(self, weights: Path) -> dict[str, str]:
        """Name and SHA-256 of a weights file or folder. A file's hash is noted, as long as its size and time stay the same."""
        note = self.path / "weights.json"
        noted = _read_object(note)
        state = {"size": weights.stat().st_size, "modified": weights.stat().st_mtime_ns} if weights.is_file() else {}
        known = noted.get(str(weights.resolve()))
        if state and isinstance(known, dict) and {k: known.get(k) for k in state} == state and "sha256" in known:
            return {"name": weights.name, "sha256": known["sha256"]}
        digest = sha256_of(weights)
        if state and own_rank() == 0:
            noted[str(weights.resolve())] = state | {"sha256": digest}
            write_whole(note, json.dumps(noted, indent=1).encode())
        return {"name": weights.name, "sha256": digest}

    def initial_weights(self, base: Path, config: str, make: Callable[[Path], object]) -> Path:
        """The weights that the run begins with, made from a base at its first start; of several processes one makes them."""
        path = self.path / "control_ini.safetensors"
        note = path.with_suffix(".json")
        wanted = {"base": self.identify(base), "config": config}
        with locked(path):
            if not (path.is_file() and _read_object(note) == wanted):
                note.unlink(missing_ok=True)
                remove_unfinished_weights(path.parent, path.name)
                make(path)
                write_whole(note, json.dumps(wanted, indent=1).encode())
        return path


def _read_object(note: Path) -> dict[str, Any]:
    """What a note holds; nothing if it is missing or unreadable: it only saves work."""
    try:
        found = json.loads(note.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
