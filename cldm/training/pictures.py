"""Pictures of held-out hints while a model trains, and their score."""

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
from torch import nn

from cldm.evaluation import Sampling, Score, generate, save_comparison
from cldm.training.instrument import Instrument, aside, log_metrics, takes_part

logger = logging.getLogger(__name__)

# Gives a model its encoders for as long as pictures are made, where training has freed them; see `cldm.training.cache`.
Encoders = Callable[[nn.Module], AbstractContextManager[Any]]


class HeldOutPictures(Instrument):
    """Makes pictures of held-out hints every so many optimizer steps, saves them, and logs their score.

    They are made in the precision of the training, a few at once, always from the same noise, and saved as
    `FOLDER/step_000050.png`: prompt, hint, target and picture, one below the other.

    Args:
        hints: uint8 (N, H, W, 3); all of them are sampled.
        targets: uint8 (N, H, W, 3).
        prompts: N texts.
        every: optimizer steps between pictures.
        sampling: how; its `batch_size` is the number made at once.
        score: of all pictures; None for pictures alone.
        folder: where they are saved; None keeps none.
        shown: the first few that the saved picture shows.
        at_start: also before the first step.
        encoders: a context manager that gives a model its encoders; by default it has them.
    """

    def __init__(
        self,
        hints: np.ndarray,
        targets: np.ndarray,
        prompts: Sequence[str],
        every: int,
        sampling: Sampling | None = None,
        score: Score | None = None,
        folder: str | Path | None = None,
        shown: int = 8,
        at_start: bool = False,
        encoders: Encoders | None = None,
    ) -> None:
        super().__init__(every, at_start)
        if not len(hints) == len(targets) == len(prompts) > 0:
            raise ValueError(
                f"expected as many hints as targets and prompts, found {len(hints)}, {len(targets)} and {len(prompts)}"
            )
        self.hints, self.targets, self.prompts = hints, targets, list(prompts)
        self.sampling = sampling or Sampling(batch_size=1)
        self.score = score
        self.folder = None if folder is None else Path(folder)
        self.shown = shown
        self.encoders = encoders or nullcontext

    def measure(self, trainer: pl.Trainer, model: Any, batch: Any, batch_idx: int) -> None:
        if not takes_part(trainer):
            return
        with aside(trainer, model), self.encoders(model), model.ema_scope():
            pictures = generate(model, self.hints, self.prompts, self.sampling)
            scores = self.score(pictures) if self.score and trainer.is_global_zero else {}
        if not trainer.is_global_zero:
            return
        step = trainer.global_step
        if scores:
            logger.info("step %d: %s", step, ", ".join(f"{name} {value:.3f}" for name, value in scores.items()))
            log_metrics(trainer, scores)
        if self.folder is not None:
            n = self.shown
            save_comparison(
                self.folder / f"step_{step:06}.png", self.hints[:n], self.targets[:n], self.prompts[:n], [pictures[:n]]
            )
