"""How well a model solves the Fill task: generate for held-out hints and prompts, and score; also while it trains."""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytorch_lightning as pl

from cldm.cldm import ControlLDM
from cldm.data.fill import FillSample
from cldm.data.pairs import Pair, read_rgb
from cldm.data.score import FillScore, fill_geometry, parse_prompt, score_fill
from cldm.pictures import grid, save_png, to_uint8
from cldm.pipeline import ControlPipeline
from ldm.util import log_txt_as_img

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sampling:
    """How pictures are made for a score; the same noise every time."""

    steps: int = 20
    guidance_scale: float = 3.0
    seed: int = 0
    batch_size: int = 16


def fill_samples(pairs: Sequence[Pair]) -> list[FillSample] | None:
    """What was drawn in pairs of a Fill set, from their files alone; None if any of them is not a Fill pair."""
    samples = []
    for pair in pairs:
        source, target = read_rgb(pair.source), read_rgb(pair.target)
        try:
            circle, ground = parse_prompt(pair.prompt)
            centre, radius = fill_geometry(source)
        except ValueError:
            return None
        samples.append(FillSample(source, target, pair.prompt, centre, radius, circle, ground))
    return samples


def generate(model: ControlLDM, hints: np.ndarray, prompts: Sequence[str], sampling: Sampling) -> np.ndarray:
    """Pictures uint8 (N, H, W, 3) for hints uint8 (N, H, W, 3); leaves the global random state as it was."""
    pipeline = ControlPipeline(model)
    pictures = []
    for start in range(0, len(hints), sampling.batch_size):
        chosen = slice(start, start + sampling.batch_size)
        pictures.append(
            pipeline(
                hints[chosen],
                list(prompts[chosen]),
                steps=sampling.steps,
                guidance_scale=sampling.guidance_scale,
                seed=sampling.seed + start,
            )
        )
    return np.concatenate(pictures)


def evaluate_fill(model: ControlLDM, samples: Sequence[FillSample], sampling: Sampling) -> tuple[FillScore, np.ndarray]:
    """The score on held-out samples, and the pictures that were scored."""
    pictures = generate(model, np.stack([s.source for s in samples]), [s.prompt for s in samples], sampling)
    return score_fill(pictures, samples), pictures


class FillProgress(pl.Callback):
    """Scores a few held-out samples every so many steps and logs `fill/iou` and `fill/colours`.

    Args:
        samples: held out from training.
        every: steps between scores.
        sampling: how pictures are made.
    """

    def __init__(self, samples: Sequence[FillSample], every: int, sampling: Sampling) -> None:
        super().__init__()
        if every < 1:
            raise ValueError(f"every must be at least 1, found {every}")
        self.samples = list(samples)
        self.every = every
        self.sampling = sampling
        self._scored = 0  # the last step scored; with accumulation several batches share a step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: object, **kwargs: object
    ) -> None:
        step = trainer.global_step
        if step % self.every or step == self._scored:
            return
        self._scored = step
        if trainer.is_global_zero:
            score, _ = evaluate_fill(pl_module, self.samples, self.sampling)
            logger.info("step %d: %s", step, score)
            for training_logger in trainer.loggers:
                training_logger.log_metrics({"fill/iou": score.iou, "fill/colours": score.colours}, step=step)


def comparison(
    hints: np.ndarray, targets: np.ndarray, prompts: Sequence[str], versions: Sequence[np.ndarray], scale: int = 1
) -> np.ndarray:
    """One picture, a column a sample: prompt, hint, target, and what each version of the model made of it."""
    height, width = hints.shape[1:3]
    big = (width * scale, height * scale)
    captions = to_uint8(log_txt_as_img(big, prompts, size=max(height * scale // 9, 10)))

    def enlarged(pictures: np.ndarray) -> np.ndarray:
        return pictures.repeat(scale, axis=1).repeat(scale, axis=2)

    return grid([list(captions), *(list(enlarged(row)) for row in (hints, targets, *versions))])


def save_comparison(
    path: str | os.PathLike,
    hints: np.ndarray,
    targets: np.ndarray,
    prompts: Sequence[str],
    versions: Sequence[np.ndarray],
) -> None:
    """`comparison` as PNG, small pictures enlarged to about 128 pixels."""
    save_png(path, comparison(hints, targets, prompts, versions, scale=max(128 // hints.shape[1], 1)))
