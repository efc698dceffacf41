"""Steps whose loss or gradient is not finite change nothing; a run of them ends the training."""

import logging
from collections.abc import Callable, Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from ldm.util import ConfigError

logger = logging.getLogger(__name__)

NAMED = 8  # samples that a warning names at most


class TrainingError(ConfigError):
    """Training cannot usefully go on; the message says why, and from where it can."""


class SkipBadSteps(pl.Callback):
    """Leaves out the optimizer's step, on all processes, where a loss or a gradient is not finite, and names the samples.

    In 16-mixed precision infinite gradients are a normal event, which Lightning's gradient scaler handles by itself; there
    only the loss counts.

    Args:
        limit: so many bad steps in a row end the training.
        last_good: names the checkpoint to go back to, for the message; None where there is none.

    Attributes:
        skipped: bad steps so far.
        in_a_row: bad steps since the last good one.
    """

    def __init__(self, limit: int = 5, last_good: Callable[[], object | None] = lambda: None) -> None:
        super().__init__()
        self.limit = limit
        self.last_good = last_good
        self.skipped = 0
        self.in_a_row = 0
        self._names: list[str] = []
        self._finite: Tensor | None = None  # of the micro-batches of this step; stays on the device

    def is_good(self) -> bool:
        """Whether the last step was a good one."""
        return not self.in_a_row

    def state_dict(self) -> dict[str, int]:
        return {"skipped": self.skipped}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.skipped = state_dict["skipped"]

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._finite, self._names = None, []
        self._batch = batch

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        finite = torch.isfinite(loss.detach()).all()
        self._finite = finite if self._finite is None else self._finite & finite
        self._names += suspects(self._batch) if not finite else []
        self._batch = None

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        finite = bool(self._finite)
        if finite and getattr(trainer.precision_plugin, "scaler", None) is None:
            finite = all_finite([p.grad for group in optimizer.param_groups for p in group["params"]])
        # A sum: one process with a bad batch stops the step of all.
        if trainer.strategy.reduce_boolean_decision(finite, all=True):
            self.in_a_row = 0
            return
        # Without a gradient an optimizer leaves a parameter, and what it remembers of it, alone.
        optimizer.zero_grad(set_to_none=True)
        self.skipped += 1
        self.in_a_row += 1
        named = f"; samples: {', '.join(self._names[:NAMED])}" if self._names else ""
        logger.warning("step %d is left out: its loss or gradient is not finite%s", trainer.global_step + 1, named)
        if self.in_a_row >= self.limit:
            good = self.last_good()
            where = f"the last good checkpoint is {good}" if good else "no checkpoint has been saved before"
            raise TrainingError(
                f"the loss or its gradient was not finite in {self.in_a_row} steps in a row, up to step "
                f"{trainer.global_step + 1}; {where}. A smaller learning_rate usually helps"
            )


def all_finite(tensors: list[Tensor | None]) -> bool:
    """Whether all of the tensors' values are finite; with one transfer from the device."""
    given = [t for t in tensors if t is not None]
    if not given:
        return True
    # A norm is infinite or NaN if any value is; it takes one pass and no memory.
    norms = torch._foreach_norm(given)
    return bool(torch.isfinite(torch.stack([n.to(norms[0].device) for n in norms])).all())


def suspects(batch: Any) -> list[str]:
    """Names of the samples in a batch that may have made a loss infinite: those with such values, else all of them."""
    if not isinstance(batch, Mapping) or "name" not in batch:
        return []
    names = list(batch["name"])
    pictures = [v for v in batch.values() if isinstance(v, Tensor) and v.is_floating_point() and len(v) == len(names)]
    bad = [name for i, name in enumerate(names) if not all(bool(torch.isfinite(p[i]).all()) for p in pictures)]
    return bad or names
