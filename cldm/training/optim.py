"""Optimizers and learning-rate schedules by the names that the settings use."""

from collections.abc import Mapping
from typing import Any

import torch

from ldm.util import ConfigError

OPTIMIZERS: dict[str, Mapping[str, Any] | None] = {
    "adamw": None,  # the model's own
    "adamw8bit": {"target": "bitsandbytes.optim.AdamW8bit", "params": {}},
}
SCHEDULES = ("constant", "linear", "cosine")


def optimizer_config(name: str, device: torch.device) -> Mapping[str, Any] | None:
    """What `optimizer_config` of a model should be for the optimizer called `name`.

    Raises:
        ConfigError: no such optimizer, or its library is not installed or has no kernels for the device.
    """
    if name not in OPTIMIZERS:
        raise ConfigError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, found {name!r}")
    if name == "adamw8bit":
        if device.type != "cuda":
            raise ConfigError(
                f"optimizer=adamw8bit needs a CUDA device, and this run is on {device.type}; use optimizer=adamw"
            )
        try:
            import bitsandbytes  # noqa: F401
        except ImportError as error:
            raise ConfigError("optimizer=adamw8bit needs bitsandbytes: pip install bitsandbytes") from error
    return OPTIMIZERS[name]


def scheduler_config(schedule: str, warmup: int, steps: int) -> Mapping[str, Any] | None:
    """A configuration of `ldm.lr_scheduler`: `warmup` steps up, then constant, or down to zero at the last step.

    Raises:
        ConfigError: no such schedule, or a warm-up as long as the run.
    """
    if schedule not in SCHEDULES:
        raise ConfigError(f"schedule must be one of {', '.join(SCHEDULES)}, found {schedule!r}")
    if warmup >= steps:
        raise ConfigError(f"warmup must be less than the {steps} steps of the run, found {warmup}")
    if schedule == "constant" and not warmup:
        return None
    first = 1 / (warmup + 1)  # the first step is not lost
    if schedule == "cosine":
        return {
            "target": "ldm.lr_scheduler.LambdaWarmUpCosineScheduler",
            "params": {
                "warm_up_steps": warmup,
                "lr_start": first,
                "lr_max": 1.0,
                "lr_min": 0.0,
                "max_decay_steps": steps,
            },
        }
    return {
        "target": "ldm.lr_scheduler.LambdaLinearScheduler",
        "params": {
            "warm_up_steps": [warmup],
            "f_start": [first],
            "f_max": [1.0],
            "f_min": [1.0 if schedule == "constant" else 0.0],
            "cycle_lengths": [steps],
        },
    }
