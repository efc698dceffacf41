"""The numbers of a run: one `metrics.csv` from its first step to its last, however often it was interrupted, and TensorBoard."""

import csv
import importlib.util
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from cldm.files import write_whole
from ldm.util import ConfigError

FILENAME = "metrics.csv"


class MetricsFile(Logger):
    """A Lightning logger that writes `metrics.csv`: a row for each optimizer step with news, a column for each number.

    Each row is on the disk as soon as it is logged. A file that is there is continued; `drop_after` takes off what an
    interrupted run had written beyond its last checkpoint. New columns may appear at any time.

    Args:
        folder: of the run.

    Raises:
        ConfigError: there is a `metrics.csv` that no run wrote.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self.path = Path(folder) / FILENAME
        self._rows = read_metrics(self.path) if self.path.exists() else []
        self._columns = list(dict.fromkeys(["step", *(name for row in self._rows for name in row)]))
        self._offset: int | None = None  # of the last row in the file; None: the file is to be written anew

    @property
    def name(self) -> str:
        return "metrics"

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
        return str(self.path.parent)

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Not kept here: a run notes its settings itself."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add numbers to the row of a step, which is the number of optimizer steps done."""
        # A run is one epoch of Lightning's, whose averages over it tell nothing.
        numbers = {k: float(v) for k, v in metrics.items() if k != "epoch" and not k.endswith("_epoch")}
        if not numbers:
            return
        # What a model hands to `self.log` comes with the epoch, under the number of steps before this one.
        step = int(step or 0) + ("epoch" in metrics)
        new = [name for name in numbers if name not in self._columns]
        self._columns += new
        last = self._rows[-1]["step"] if self._rows else -1
        if step > last:
            self._rows.append({"step": step} | numbers)
            self._write(anew=bool(new), replace_last=False)
        else:
            at = next((i for i, row in enumerate(self._rows) if row["step"] >= step), len(self._rows))
            if self._rows[at]["step"] != step:
                self._rows.insert(at, {"step": step})
            self._rows[at] |= numbers
            self._write(anew=bool(new) or step < last, replace_last=True)

    def drop_after(self, step: int) -> None:
        """Take off the rows of later steps, which are about to be trained again."""
        kept = [row for row in self._rows if row["step"] <= step]
        if len(kept) < len(self._rows):
            self._rows = kept
            self._write(anew=True)

    def _write(self, anew: bool, replace_last: bool = False) -> None:
        if anew or self._offset is None or not self.path.exists():
            text = io.StringIO()
            writer = csv.DictWriter(text, self._columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(self._rows[:-1])
            self._offset = len(text.getvalue().encode())
            writer.writerows(self._rows[-1:])
            write_whole(self.path, text.getvalue().encode())
            return
        text = io.StringIO()
        csv.DictWriter(text, self._columns, lineterminator="\n").writerow(self._rows[-1])
        with open(self.path, "r+b") as file:
            if not replace_last:
                self._offset = file.seek(0, io.SEEK_END)
            file.seek(self._offset)
            file.write(text.getvalue().encode())
            file.truncate()


def read_metrics(path: str | Path) -> list[dict[str, float]]:
    """The rows of a `metrics.csv`, each with `step` (int) and the numbers that were logged at it; a half-written last row is left out.

    Raises:
        ConfigError: it is no such file.
    """
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8")
        whole, _, _ = text.rpartition("\n")
        header, *lines = csv.reader(io.StringIO(whole)) if whole else [["step"]]
        if header[:1] != ["step"]:
            raise ValueError("its first column is not step")
        rows = []
        for line in lines:
            values = {name: float(value) for name, value in zip(header, line, strict=True) if value}
            rows.append(values | {"step": int(values["step"])})
    except (OSError, ValueError, KeyError, csv.Error) as error:
        raise ConfigError(f"{path} is not the metrics of a run ({error}); move it or choose another folder") from error
    return rows


def run_loggers(folder: str | Path) -> list[Logger]:
    """The loggers of a run: `metrics.csv`, and TensorBoard (in the folder `tensorboard`) where it is installed."""
    loggers: list[Logger] = [MetricsFile(folder)]
    if importlib.util.find_spec("tensorboard"):
        loggers.append(TensorBoardLogger(folder, name="tensorboard", version=""))
    return loggers


def continue_loggers(trainer: pl.Trainer) -> None:
    """Take back what loggers hold of steps that come again, when a run goes on from a checkpoint; rank 0 alone."""
    if not trainer.is_global_zero:
        return
    for logger in trainer.loggers:
        if isinstance(logger, MetricsFile):
            logger.drop_after(trainer.global_step)
        elif isinstance(logger, TensorBoardLogger) and trainer.global_step and importlib.util.find_spec("tensorboard"):
            from tensorboard.compat.proto.event_pb2 import Event, SessionLog

            # What torch's SummaryWriter does with `purge_step`, which it takes only when it is made.
            restart = SessionLog(status=SessionLog.START)
            logger.experiment.file_writer.add_event(Event(step=trainer.global_step + 1, session_log=restart))
