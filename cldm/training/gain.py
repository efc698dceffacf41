"""Control gain: how much better the model predicts because it sees the hint, and the step at which it begins to follow it.

A ControlNet does not follow its hint better and better: for a long time it does not at all, and then, within few steps, it
does ("sudden convergence", Zhang et al. 2023, figure 4). The loss hardly shows it, as it depends far more on the timesteps
and the noise that happened to be drawn. The gain shows it, because timesteps and noise are always the same and the loss
without the hint is taken off.
"""

import logging
import math
import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise, takewhile
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from cldm.cldm import ControlLDM
from cldm.training.instrument import LEVELS, Instrument, aside, log_metrics, takes_part, to_device

logger = logging.getLogger(__name__)

EVALUATIONS = 16  # pairs times timesteps, at least
_LARGEST_EVERY = 1000


class ControlGain(Instrument):
    """Logs the loss without the hint minus the loss with it, on fixed pairs with fixed timesteps and noise.

    - `gain/mean`, and `gain/noise_0` to `_3`: of timesteps in each quarter of the schedule, from little noise to much;
    - `gain/over_other_hint`: the loss with the hint of another pair minus the loss with its own. It stays near 0 until the
      model follows the hint, also where the ControlNet has learned something else from the data before that, such as their style;
    - `gain/took_hold`, once: the step at which control took hold, see `JumpDetector`; it is announced, too.

    A measurement costs two forward passes for each pair and timestep (and one more where the UNet is trained too). By
    default there are as many steps between measurements as keep that below about 2% of the training.

    Args:
        batch: held-out pairs as a batch of the data loader, with or without cached latents; 8 are enough.
        every: optimizer steps between measurements; None chooses by `cost`, at the first batch.
        cost: share of the training's computation.
        at_once: pairs evaluated at once; fewer take less memory.
        seed: of the timesteps and the noise.

    Raises:
        ValueError: the batch has no pair, or a count is below 1.
    """

    def __init__(
        self,
        batch: Mapping[str, Any],
        every: int | None = None,
        cost: float = 0.02,
        at_once: int = 4,
        seed: int = 0,
    ) -> None:
        super().__init__(1 if every is None else every, at_start=True)
        count = len(next(iter(batch.values()))) if batch else 0
        if count < 1 or at_once < 1:
            raise ValueError(
                f"control gain needs at least one pair, and at_once of at least 1; found {count} and {at_once}"
            )
        if not 0 < cost <= 1:
            raise ValueError(f"cost must be above 0 and at most 1, found {cost}")
        self.batch = batch
        self.count = count
        self.cost = cost
        self.at_once = at_once
        self.seed = seed
        self.detector = JumpDetector()
        self._chosen = every is not None  # whether `every` is settled
        self._pairs: tuple[Tensor, Any, Tensor] | None = None  # latents, text and hints
        self._without: Tensor | None = None  # losses without the hint, as long as the UNet does not change

    @property
    def took_hold(self) -> int | None:
        """The optimizer step at which control took hold, if it has."""
        return self.detector.step

    def state_dict(self) -> dict[str, Any]:
        return {"every": self.every if self._chosen else None, "detector": self.detector.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict["every"] is not None and not self._chosen:
            self.every, self._chosen = state_dict["every"], True
        self.detector.load_state_dict(state_dict["detector"])

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self._chosen:
            size = len(next(iter(batch.values()))) * trainer.accumulate_grad_batches
            self.every, self._chosen = steps_between(2 * self._draws * self.count, size, self.cost), True
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    @property
    def _draws(self) -> int:
        """Timesteps for each pair."""
        return math.ceil(EVALUATIONS / self.count)

    def measure(self, trainer: pl.Trainer, model: Any, batch: Any, batch_idx: int) -> None:
        if not takes_part(trainer):
            return
        with aside(trainer, model, self.seed):
            latents, text, hints = self._encoded(trainer, model)
            with_hint = self._losses(model, latents, text, hints)
            base = (p for name, p in model.named_parameters() if not name.startswith("control_model."))
            locked = not any(p.requires_grad for p in base)
            if self._without is None or not locked:
                self._without = self._losses(model, latents, text, None)
            gain = self._without - with_hint  # (draws, pairs)
            metrics = {"gain/mean": float(gain.mean())}
            levels = self._levels()
            for level in range(LEVELS):
                if (levels == level).any():
                    metrics[f"gain/noise_{level}"] = float(gain[levels == level].mean())
            than, reference = "without", self._without
            if self.count > 1:
                than = "with another's"
                reference = self._losses(model, latents, text, hints.roll(max(self.count // 2, 1), dims=0))
                metrics["gain/over_other_hint"] = float((reference - with_hint).mean())
        telling = float((reference - with_hint).mean())
        step = self.detector.update(trainer.global_step, telling / float(self._without.mean()))
        if step is not None:
            metrics["gain/took_hold"] = step
            if trainer.is_global_zero:
                logger.info(_ANNOUNCEMENT, step, 100 * telling / float(reference.mean()), than)
        log_metrics(trainer, metrics)

    def _encoded(self, trainer: pl.Trainer, model: ControlLDM) -> tuple[Tensor, Any, Tensor]:
        """Latents, text conditioning and hints of the pairs; encoded once, kept on the CPU."""
        if self._pairs is None:
            latents, text, hints = [], [], []
            for chosen in self._chunks():
                part = {name: entry[chosen] for name, entry in self.batch.items()}
                z, c = model.get_input(to_device(trainer, model, part), model.first_stage_key)
                latents.append(z.cpu())
                text.append(c["c_crossattn"][0])
                hints.append(c["c_concat"][0].cpu())
            # Prompts stay texts where the text encoder is trained.
            joined = (
                torch.cat(text).cpu() if isinstance(text[0], Tensor) else [prompt for part in text for prompt in part]
            )
            self._pairs = torch.cat(latents), joined, torch.cat(hints)
        return self._pairs

    def _chunks(self) -> list[slice]:
        return [slice(start, start + self.at_once) for start in range(0, self.count, self.at_once)]

    def _levels(self) -> Tensor:
        """The quarter of the schedule of each evaluation, (draws, pairs)."""
        return (torch.arange(self._draws)[:, None] + torch.arange(self.count)[None]) % LEVELS

    def _losses(self, model: ControlLDM, latents: Tensor, text: Any, hints: Tensor | None) -> Tensor:
        """Unweighted losses (draws, pairs), the same timesteps and noise in every call."""
        generator = torch.Generator().manual_seed(self.seed)
        steps = model.num_timesteps
        losses = torch.empty(self._draws, self.count)
        for draw, levels in enumerate(self._levels()):
            t = ((levels + torch.rand(self.count, generator=generator)) * steps / LEVELS).long()  # (pairs,)
            noise = torch.randn(latents.shape, generator=generator)
            for chosen in self._chunks():
                z, n, at = (entry[chosen].to(model.device) for entry in (latents, noise, t))
                words = text[chosen].to(model.device) if isinstance(text, Tensor) else text[chosen]
                cond = {"c_crossattn": [words], "c_concat": None if hints is None else [hints[chosen].to(model.device)]}
                output = model.apply_model(model.q_sample(z, at, n), at, model.get_learned_conditioning(cond))
                error = model.get_loss(output.float(), model.loss_target(z, n, at).float(), mean=False)
                losses[draw, chosen] = error.flatten(1).mean(dim=1).cpu()
        return losses


_ANNOUNCEMENT = "control took hold at step %d: with a picture's own hint the loss is now %.0f%% lower than %s"


def steps_between(evaluations: int, batch_size: int, cost: float) -> int:
    """Optimizer steps between measurements of so many forward passes that they cost that share of the training.

    A training step costs about three forward passes for each of its pairs.
    """
    return min(max(math.ceil(evaluations / (3 * batch_size * cost)), 1), _LARGEST_EVERY)


class JumpDetector:
    """Finds the step from which a series of relative gains, given one by one, has left the neighbourhood of zero for good.

    It has where `HELD` values in a row are at least `SMALL` and stand out from all before them by 6 times their noise, or are
    at least `LARGE`, which does for a series that rises slowly. The noise is estimated robustly (median absolute deviation),
    and taken for larger while there are few values. So a single outlier, noise of whatever size, and a slow drift do not count.
    """

    HELD = 3
    SMALL = 0.02
    LARGE = 0.2

    def __init__(self) -> None:
        self.step: int | None = None
        self._steps: list[int] = []
        self._values: list[float] = []

    def update(self, step: int, value: float) -> int | None:
        """Add a value; returns the step of the jump when it is found, once."""
        if self.step is not None or not math.isfinite(value):
            return None
        self._steps.append(step)
        self._values.append(value)
        before, last = self._values[: -self.HELD], self._values[-self.HELD :]
        if len(before) < self.HELD:
            return None
        doubt = 6 * (1 + 4 / len(before))
        jitter = _deviation([b - a for a, b in pairwise(before)]) / math.sqrt(2)
        quiet = statistics.median(before) + doubt * max(_deviation(before), jitter)
        if min(last) > max(self.SMALL, quiet):
            self.step = self._steps[-self.HELD]
        elif len(before) >= 8 and min(last) > max(self.LARGE, doubt * jitter):
            lasting = list(takewhile(lambda at: self._values[at] > self.LARGE, reversed(range(len(self._values)))))
            self.step = self._steps[lasting[-1]]
        return self.step

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "steps": list(self._steps), "values": list(self._values)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.step, self._steps, self._values = state["step"], list(state["steps"]), list(state["values"])


def _deviation(values: Sequence[float]) -> float:
    """Standard deviation by the median absolute deviation, which outliers hardly change."""
    middle = statistics.median(values)
    return 1.4826 * statistics.median(abs(value - middle) for value in values)
