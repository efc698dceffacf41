"""Learning-rate schedules that a configuration's `scheduler_config` may name; each gives the factor for a step."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from ldm.util import ConfigError, instantiate_from_config


@runtime_checkable
class Schedule(Protocol):
    """What a `scheduler_config` may name."""

    def schedule(self, n: int) -> float:
        """The factor of the base learning rate at step n."""


def with_schedule(optimizer: Optimizer, scheduler_config: Mapping[str, Any] | None) -> Any:
    """What Lightning's `configure_optimizers` should return: the optimizer, with the configured schedule stepped every step."""
    if scheduler_config is None:
        return optimizer
    schedule = instantiate_from_config(scheduler_config, Schedule).schedule
    return {
        "optimizer": optimizer,
        "lr_scheduler": {"scheduler": LambdaLR(optimizer, lr_lambda=schedule), "interval": "step"},
    }


class LambdaWarmUpCosineScheduler:
    """Linear warm-up, then a half cosine down. Values are factors of the base learning rate.

    Args:
        warm_up_steps: length of the warm-up.
        lr_min, lr_max, lr_start: factors at the end, at the top and at the beginning.
        max_decay_steps: the step at which `lr_min` is reached.
        verbosity_interval: accepted for compatibility.
    """

    def __init__(
        self,
        warm_up_steps: int,
        lr_min: float,
        lr_max: float,
        lr_start: float,
        max_decay_steps: int,
        verbosity_interval: int = 0,
    ) -> None:
        if max_decay_steps <= warm_up_steps:
            raise ConfigError(f"max_decay_steps {max_decay_steps} must be above warm_up_steps {warm_up_steps}")
        self.lr_warm_up_steps = warm_up_steps
        self.lr_min, self.lr_max, self.lr_start = lr_min, lr_max, lr_start
        self.lr_max_decay_steps = max_decay_steps

    def schedule(self, n: int, **kwargs: object) -> float:
        """The factor for step `n`."""
        if n < self.lr_warm_up_steps:
            return self.lr_start + (self.lr_max - self.lr_start) * n / self.lr_warm_up_steps
        progress = min((n - self.lr_warm_up_steps) / (self.lr_max_decay_steps - self.lr_warm_up_steps), 1.0)
        return self.lr_min + 0.5 * (self.lr_max - self.lr_min) * (1 + math.cos(progress * math.pi))

    __call__ = schedule


class LambdaLinearScheduler:
    """Cycles of linear warm-up and linear decay; each argument has one entry a cycle.

    Args:
        warm_up_steps: length of the warm-up.
        f_min, f_max, f_start: factors at the end, at the top and at the beginning.
        cycle_lengths: steps of the cycle; the last cycle goes on at its last value.
        verbosity_interval: accepted for compatibility.
    """

    def __init__(
        self,
        warm_up_steps: Sequence[int],
        f_min: Sequence[float],
        f_max: Sequence[float],
        f_start: Sequence[float],
        cycle_lengths: Sequence[int],
        verbosity_interval: int = 0,
    ) -> None:
        if len({len(a) for a in (warm_up_steps, f_min, f_max, f_start, cycle_lengths)}) != 1:
            raise ConfigError(
                "warm_up_steps, f_min, f_max, f_start and cycle_lengths must have one entry for each cycle"
            )
        self.cycles = list(zip(warm_up_steps, f_min, f_max, f_start, cycle_lengths, strict=True))

    def schedule(self, n: int, **kwargs: object) -> float:
        """The factor for step `n`."""
        cycle = 0
        while cycle < len(self.cycles) - 1 and n > self.cycles[cycle][-1]:
            n -= self.cycles[cycle][-1]
            cycle += 1
        warm_up, low, high, start, length = self.cycles[cycle]
        if n < warm_up:
            return start + (high - start) * n / warm_up
        # As published, the decay is what the whole cycle's would be from here on: it begins a little below `f_max`.
        return low + (high - low) * max(length - n, 0) / length

    __call__ = schedule
