"""What the instruments of training share: when they are due, and how they use the model without changing the training."""

import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import FSDPStrategy

LEVELS = 4  # quarters of the noise schedule for which numbers are told apart, from little noise to much

# Seconds that measurements took, by trainer; the speed of the training leaves them out.
_seconds: WeakKeyDictionary[pl.Trainer, float] = WeakKeyDictionary()


class Instrument(pl.Callback):
    """Calls `measure` after every so many optimizer steps, once a step also where several batches make one step.

    Args:
        every: optimizer steps between measurements.
        at_start: also before the first step of a run.

    Raises:
        ValueError: `every` is below 1.
    """

    def __init__(self, every: int, at_start: bool = False) -> None:
        super().__init__()
        if every < 1:
            raise ValueError(f"every must be at least 1, found {every}")
        self.every = every
        self.at_start = at_start
        self._last_step = 0

    def measure(self, trainer: pl.Trainer, model: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Called on every rank, with the step's last batch; the batch is None before the first step."""
        raise NotImplementedError

    def is_due(self, step: int) -> bool:
        """Whether to measure when so many optimizer steps are done."""
        return step % self.every == 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._last_step = trainer.global_step
        if self.at_start and trainer.global_step == 0:
            self._measure(trainer, pl_module, None, 0)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step != self._last_step:
            self._last_step = step
            if self.is_due(step):
                # They have served, and without them a measurement needs less memory than a training step.
                for parameter in pl_module.parameters():
                    parameter.grad = None
                self._measure(trainer, pl_module, batch, batch_idx)

    def _measure(self, trainer: pl.Trainer, model: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)  # else it would wait for the training step, at its own cost
        started = time.perf_counter()
        self.measure(trainer, model, batch, batch_idx)
        _seconds[trainer] = seconds_in_instruments(trainer) + time.perf_counter() - started


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Torch's generators start from `seed` inside, and go on as if nothing had been drawn after."""
    # Torch keeps a random state for each accelerator, and always that of the CPU.
    accelerator = {"devices": []} if device.type == "cpu" else {"devices": [device], "device_type": device.type}
    with torch.random.fork_rng(**accelerator):
        torch.manual_seed(seed)
        yield


@contextmanager
def aside(trainer: pl.Trainer, model: pl.LightningModule, seed: int = 0) -> Iterator[None]:
    """Inside it the model is in eval mode, without gradients, in the precision of the training; afterwards all is as it was.

    Each module gets back its own mode (a locked encoder stays in eval mode), and torch's random generators their states;
    inside they start from `seed`. Where weights are spread over several devices (FSDP), they are whole inside.
    """
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with (
            whole_weights(trainer),
            seeded(seed, model.device),
            torch.no_grad(),
            trainer.precision_plugin.train_step_context(),
        ):
            yield
    finally:
        for module, training in modes:
            module.training = training


def seconds_in_instruments(trainer: pl.Trainer) -> float:
    """Seconds that the measurements of a trainer's instruments have taken so far."""
    return _seconds.get(trainer, 0.0)


def takes_part(trainer: pl.Trainer) -> bool:
    """Whether this rank uses the model for a measurement: rank 0 alone, or all of them where each holds a part of the weights."""
    return trainer.is_global_zero or isinstance(trainer.strategy, FSDPStrategy)


def whole_weights(trainer: pl.Trainer) -> AbstractContextManager[None]:
    """Inside it each rank has all weights, also where each keeps only a part of them (FSDP); every rank must enter it."""
    if not isinstance(trainer.strategy, FSDPStrategy):
        return nullcontext()
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = trainer.strategy.model
    assert model is not None  # it is training
    return FullyShardedDataParallel.summon_full_params(model, writeback=False)


def to_device(trainer: pl.Trainer, model: pl.LightningModule, batch: Any) -> Any:
    """A batch in the precision and on the device of the training."""
    return trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(batch), model.device)


def log_metrics(trainer: pl.Trainer, metrics: Mapping[str, float]) -> None:
    """Hand numbers to all loggers of the trainer, under the number of optimizer steps done; rank 0 alone."""
    if trainer.is_global_zero:
        for logger in trainer.loggers:
            logger.log_metrics(dict(metrics), step=trainer.global_step)
