"""Lightning's Trainer for a run: what each step draws, how signals stop it, how its progress is shown."""

import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DDPStrategy, FSDPStrategy
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from pytorch_lightning.utilities.rank_zero import rank_zero_only
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

from cldm.command import Stopped, in_main_thread, signals_to
from cldm.terminal import quiet
from cldm.training.batches import derived_seed
from cldm.training.checkpoints import WholeFiles
from ldm.util import ConfigError

logger = logging.getLogger(__name__)

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
# How a cluster says that a job's time is up: https://slurm.schedmd.com/sbatch.html, --signal.
REQUEUE = getattr(signal, "SIGUSR1", None)
HANDLED = [number for number in (signal.SIGINT, signal.SIGTERM, REQUEUE) if number is not None]


def make_trainer(**options: Any) -> pl.Trainer:
    """Lightning's Trainer; a device, strategy or precision that cannot be had is a ConfigError."""
    with quiet_libraries():
        try:
            trainer = pl.Trainer(**options)
        except (ValueError, MisconfigurationException, ModuleNotFoundError) as error:
            raise ConfigError(f"training cannot be set up: {' '.join(str(error).split())}") from error
    check_sharding(trainer)
    return trainer


def check_sharding(trainer: pl.Trainer) -> None:
    """Raise ConfigError for FSDP without a GPU, at which torch would fail later."""
    if isinstance(trainer.strategy, FSDPStrategy) and trainer.strategy.root_device.type == "cpu":
        raise ConfigError("strategy=fsdp needs GPUs; strategy=ddp trains on CPUs too")


def check_precision(precision: str, name: str = "precision") -> None:
    """Raise ConfigError for a precision, of the setting `name`, in which trained weights would not be float32 and lose small updates."""
    if precision not in PRECISIONS:
        raise ConfigError(
            f"{name} must be one of {', '.join(PRECISIONS)}, found {precision!r}; weights that are trained stay in "
            "float32, so bf16-mixed is what saves time and memory"
        )


def run_options(
    steps: int, accumulate: int, precision: str, strategy: str, processes: int, clip: float
) -> dict[str, Any]:
    """Options of a Trainer for a run whose batches come from `RunBatches`: one epoch, whose length is the run's.

    Args:
        steps: after which training ends, counted from the beginning of the run.
        processes: on all machines together.
        clip: largest norm of the gradient; 0 for no limit.

    Raises:
        ConfigError: see `check_precision`.
    """
    check_precision(precision)
    return {
        "max_steps": steps,
        "max_epochs": 1,
        "accumulate_grad_batches": accumulate,
        "precision": precision,
        "strategy": _strategy(strategy, processes),
        "gradient_clip_val": clip or None,
        "use_distributed_sampler": False,  # RunBatches knows its rank
        "plugins": [WholeFiles()],
        "enable_checkpointing": False,  # Lightning's own; SaveCheckpoints does it
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }


def _strategy(name: str, processes: int) -> Any:
    """Lightning's strategy of this name, with what it needs to know of our models."""
    if name == "ddp" or (name == "auto" and processes > 1):
        # Buffers (the schedule, moving averages) are equal on all processes without being sent in each step.
        return DDPStrategy(broadcast_buffers=False)
    if name == "fsdp":
        from cldm.training.sharding import ShardedStrategy  # with parts of torch that other runs do without

        return ShardedStrategy()
    return name


def make_loader(data: Dataset, batches: Sampler[list[int]] | None, workers: int, pin_memory: bool) -> DataLoader:
    """Loads the batches of a run; what a worker process draws at random depends on nothing but its number.

    Args:
        batches: numbers of the pairs of each batch; None where `data` is a stream that gives batches itself.
    """
    batching: dict[str, Any] = {"batch_size": None} if batches is None else {"batch_sampler": batches}
    return DataLoader(
        data,
        **batching,
        num_workers=workers,
        pin_memory=pin_memory,
        generator=torch.Generator(),
        worker_init_fn=leave_signals_to_the_parent,
    )


def leave_signals_to_the_parent(_: int) -> None:
    """For processes that load data: Ctrl-C and a cluster's signals reach all processes, and the step under way needs its batches."""
    for number in HANDLED:
        signal.signal(number, signal.SIG_IGN)


def _end_workers() -> None:
    """End processes that load data and that Lightning has not ended: they ignore the signal by which Python would do so."""
    for child in multiprocessing.active_children():
        if child.daemon:
            child.join(5)
            if child.is_alive():
                child.kill()


class SeedSteps(pl.Callback):
    """Seeds torch's generators before each micro-batch from the seed, the step, the micro-batch and the rank.

    What a step draws (the sample of the autoencoder's posterior, time steps, noise, dropped prompts) then depends on these alone:
    not on what was logged before, nor on where the run was interrupted.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        step, micro_batch = divmod(batch_idx, trainer.accumulate_grad_batches)
        torch.manual_seed(derived_seed(self.seed, step, micro_batch, trainer.global_rank))


class StopOnSignal(pl.Callback):
    """On SIGINT, SIGTERM or SLURM's requeue signal, lets the step finish and then stops the training, on all processes.

    Within it (`with StopOnSignal() as stop`) signals are noted, from before the Trainer is made: while things are set up and imported,
    KeyboardInterrupt may be swallowed by some library, and Lightning ends the program without a word.

    A second Ctrl-C interrupts at once, unless it comes within a second of the first: `torchrun` and `timeout` send each signal
    twice. `SaveCheckpoints`, which must come after this callback, saves the last step.

    Attributes:
        received: the signal's number; None as long as none has come.
    """

    def __init__(self) -> None:
        super().__init__()
        self.received: int | None = None
        self._since = 0.0

    def __enter__(self) -> "StopOnSignal":
        self._handled = ExitStack()
        self._handled.enter_context(signals_to(self._note, *HANDLED))
        return self

    def __exit__(self, *_: object) -> None:
        self._handled.close()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for number in HANDLED if in_main_thread() else ():  # again: Lightning has put its own in place
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self._receive(number)
        elif number == signal.SIGINT and time.monotonic() > self._since + 1:
            raise KeyboardInterrupt

    def _receive(self, number: int) -> None:
        if self.received is None:
            self._since = time.monotonic()
        self.received = number

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        if trainer.world_size > 1:  # any process may have got it
            number = torch.tensor(float(self.received or 0), device=trainer.strategy.root_device)
            if received := int(trainer.strategy.reduce(number, reduce_op="max")):
                self._receive(received)
        if self.received is not None:
            trainer.should_stop = True


class ShowProgress(pl.Callback):
    """A bar that counts optimizer steps with the time left; in a file, a line now and then instead.

    Args:
        seconds: between two lines, where stderr is no terminal.
    """

    def __init__(self, seconds: float = 30.0) -> None:
        super().__init__()
        self.seconds = seconds
        self._bar: tqdm | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        self._begun = self._shown = time.monotonic()
        self._first = trainer.global_step
        if sys.stderr.isatty():
            self._bar = tqdm(
                desc="training", unit="step", initial=self._first, total=trainer.max_steps, dynamic_ncols=True
            )

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not trainer.is_global_zero or (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update()
            if now - self._shown >= 1:  # reading the loss waits for the device
                self._shown = now
                self._bar.set_postfix(loss=f"{_loss(outputs):.4f}")
        elif now - self._shown >= self.seconds:
            self._shown = now
            done = trainer.global_step
            rate = (done - self._first) / (now - self._begun)
            logger.info(
                "step %d of %d, loss %.4f, %.2f steps a second, %s left",
                done, trainer.max_steps, _loss(outputs), rate, tqdm.format_interval((trainer.max_steps - done) / rate),
            )  # fmt: skip

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _loss(outputs: Any) -> float:
    loss = outputs["loss"] if isinstance(outputs, Mapping) else outputs
    return float("nan") if loss is None else float(loss)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keeps tips, deprecations and notes of Lightning and torch out of the console, which is for what the run has to say."""
    names = ("pytorch_lightning", "lightning.pytorch", "lightning_fabric", "lightning.fabric", "torch")
    with warnings.catch_warnings(), quiet(*names):
        for module in ("pytorch_lightning", "lightning", "lightning_fabric", "torch"):
            warnings.filterwarnings("ignore", module=rf"{module}(\.|$)")
        yield


@contextmanager
def ctrl_c_is_an_exception(trainer: pl.Trainer) -> Iterator[None]:
    """Ctrl-C within `trainer.fit` is KeyboardInterrupt, as it is elsewhere; Lightning ends the program without a word."""
    try:
        yield
    except SystemExit as end:
        if trainer.interrupted:
            raise KeyboardInterrupt from end
        raise


def fit(
    trainer: pl.Trainer,
    model: pl.LightningModule,
    loader: DataLoader,
    resume: Path | None,
    stop: StopOnSignal,
    how_to_go_on: str,
) -> None:
    """Train until the Trainer's last step, from the checkpoint `resume` if there is one.

    Raises:
        Stopped: a signal asked for it; the last step has been saved.
        KeyboardInterrupt: a second Ctrl-C; what came after the newest checkpoint is lost.
    """
    # What is trained is in the checkpoint, the rest came with the weights.
    model.strict_loading = False
    try:
        with quiet_libraries(), ctrl_c_is_an_exception(trainer):
            trainer.fit(model, loader, ckpt_path=resume)
    finally:
        _end_workers()
    if stop.received is not None:
        if stop.received == REQUEUE and trainer.is_global_zero:
            _requeue()
        raise Stopped(
            signal.SIGINT if stop.received == signal.SIGINT else signal.SIGTERM,
            f"stopped after step {trainer.global_step}, which is saved; {how_to_go_on}",
        )


@contextmanager
def requeued(how_to_go_on: str) -> Iterator[None]:
    """Within it SLURM's requeue signal stops the program in order and has the job run again, also where no step is under way.

    Raises:
        Stopped: the signal has come, outside of a `StopOnSignal`.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_IGN)  # one is enough
        if own_rank() == 0:
            _requeue()
        raise Stopped(signal.SIGTERM, f"stopped before the next step; {how_to_go_on}")

    with signals_to(stop, *([] if REQUEUE is None else [REQUEUE])):
        yield


def own_rank() -> int:
    """This process's number among those of the run; 0 where it is the only one."""
    return getattr(rank_zero_only, "rank", 0)


def _requeue() -> None:
    """Ask SLURM to run this job again, if it is one."""
    job = os.environ.get("SLURM_ARRAY_JOB_ID")
    job = f"{job}_{os.environ['SLURM_ARRAY_TASK_ID']}" if job else os.environ.get("SLURM_JOB_ID")
    if job is None:
        return
    try:
        subprocess.run(["scontrol", "requeue", job], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        logger.warning("SLURM could not be asked to run job %s again: %s", job, error)
