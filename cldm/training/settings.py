"""The settings of a training run: what each means, what it may be, and what may change when the run goes on."""

import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from cldm.arguments import LIMITS
from cldm.config import override
from cldm.evaluation import check_condition
from cldm.settings import check_counts, setting
from cldm.training.engine import check_precision
from cldm.training.optim import OPTIMIZERS, SCHEDULES
from cldm.training.precision import PRECISIONS as FROZEN
from cldm.training.precision import RECOMPUTE
from cldm.training.presets import PRESETS
from ldm.util import ConfigError

TINY_DATA = "training/fill_tiny"


@dataclass
class Settings:
    """What can be set on the command line of tutorial_train.py."""

    # What is trained, and where
    preset: str = setting("", "settings for a GPU of this size: " + ", ".join(PRESETS) + "; others given beside it win")
    config: str = setting("cldm_tiny", "a packaged configuration or a YAML file")
    base: str = setting("cldm_tiny.safetensors", "model without control; used where `weights` is not given")
    weights: str = setting("", "model with control, as controlnet add-control writes it")
    data: str = setting(TINY_DATA, "folder of pairs, or WebDataset shards; the default is made if absent")
    broken: str = setting("stop", "what to do about pairs that cannot be used: stop or leave_out")
    out: str = setting("runs/tutorial", "folder for everything that is made")
    # How long, and how
    steps: int = setting(750, "optimizer steps")
    batch_size: int = setting(32, "pairs a batch, on each device")
    accumulate: int = setting(1, "batches a step")
    optimizer: str = setting(
        "adamw", f"{' or '.join(OPTIMIZERS)} (bitsandbytes; its state takes a quarter of the memory)"
    )
    learning_rate: float = setting(1.5e-3, "for the tiny model; real weights want 1e-5")
    warmup: int = setting(0, "steps in which the learning rate rises from zero")
    schedule: str = setting("constant", f"of the learning rate after that: {', '.join(SCHEDULES)} (down to zero)")
    clip: float = setting(0.0, "largest norm of the gradient; 0 does not limit it")
    min_snr: float = setting(
        0.0, "gamma of the min-SNR weights of the loss (usual: 5); 0 weighs all noise levels alike"
    )
    noise_offset: float = setting(0.0, "share of noise that is constant over a picture (usual: 0.05)")
    empty_prompts: float = setting(
        0.0, "share of prompts replaced by the empty one; the paper uses 0.5, the released code none"
    )
    ema: float = setting(
        0.0, "decay of a moving average of what is trained (usual: 0.9999), which is then the result; 0 for none"
    )
    # What of the model is trained
    sd_locked: bool = setting(True, "false also trains Stable Diffusion, as `unlock` says")
    only_mid_control: bool = setting(False, "use the control's middle output alone")
    reconnect_at: int = setting(0, "begin with the middle output alone and connect the others after so many steps")
    unlock_at: int = setting(0, "train Stable Diffusion too after so many steps")
    unlock: str = setting("decoder", "what of it: decoder (as the released code) or all of the UNet (as the paper)")
    unlock_learning_rate: float = setting(0.0, "for what is unlocked; 0 for that of the ControlNet")
    # Memory and speed
    precision: str = setting("32-true", "or bf16-mixed, 16-mixed")
    frozen_precision: str = setting(
        "", "of weights that are not trained: fp32, bf16 or fp16; by default as `precision` computes"
    )
    recompute: str = setting(
        "none", "blocks that compute activations again instead of keeping them: none, trained or all"
    )
    cache: bool = setting(False, "encode pictures and prompts once, before training, and keep the result on disk")
    compile: bool = setting(False, "compile UNet and ControlNet (torch.compile)")
    channels_last: bool = setting(False, "lay pictures out channels last; faster on GPUs in bf16 and fp16")
    tf32: bool = setting(True, "let a GPU multiply float32 with 10 bits of mantissa")
    accelerator: str = setting("auto", "cpu, gpu or mps; the best there is by default")
    devices: int = setting(1, "how many of them, on each machine")
    num_nodes: int = setting(1, "machines")
    strategy: str = setting("auto", "Lightning's: ddp, fsdp, ...")
    workers: int = setting(0, "processes that load data")
    # What the run shows and keeps
    log_every: int = setting(50, "steps between pictures, scores and measurements of the control gain")
    pictures: int = setting(16, "held-out hints that are sampled and scored while it trains; 0 for none")
    pictures_at_once: int = setting(16, "of them sampled together; fewer need less memory")
    pictures_before: bool = setting(True, "sample and score the held-out hints before the first step too")
    condition: str = setting(
        "", "what the hints are (canny, hed, ...): its detector scores the pictures; circles need no name"
    )
    sample_steps: int = setting(20, "DDIM steps of the pictures")
    guidance_scale: float = setting(3.0, "of the pictures")
    save_every: int = setting(250, "steps between checkpoints")
    keep: int = setting(2, "checkpoints that are kept")
    export_every: int = setting(0, "steps between exports of the ControlNet alone, which are all kept; 0 for none")
    held_out: int | None = setting(
        None, "pairs at the end of the data that are not trained on; by default 64, at most a tenth"
    )
    seed: int = setting(0, "of the data that is made, the training and the pictures")


# Where, how long, how often, on what machine, in how much memory: a run may go on with another value.
MAY_CHANGE = frozenset(
    "preset out steps precision frozen_precision recompute cache compile channels_last tf32 accelerator strategy workers broken "
    "log_every pictures pictures_at_once pictures_before condition sample_steps guidance_scale save_every keep export_every".split()
)
# These may change if the number of pairs in a step, which is their product, does not.
PAIRS_OF_A_STEP = ("batch_size", "accumulate", "devices", "num_nodes")
PATHS = ("config", "base", "weights", "data")


def parse_settings(arguments: Sequence[str]) -> Settings:
    """Settings from `key=value` arguments; those of a preset first.

    Raises:
        ConfigError: an unknown setting or preset, a value of another type or out of its range.
    """
    named = {argument for argument in arguments if re.match("data=.", argument)}
    if len(named) > 1:  # what a shell makes of {0..9} without quotes
        pattern = "data='shards/{0000..0099}.tar'"
        raise ConfigError(f"data is given more than once; put a pattern of shards in quotes, {pattern}")
    settings = override(Settings(), arguments)
    if settings.preset:
        if settings.preset not in PRESETS:
            raise ConfigError(f"preset must be one of {', '.join(PRESETS)}, found {settings.preset!r}")
        of_preset = [f"{key}={value}" for key, value in PRESETS[settings.preset].items()]
        settings = override(Settings(), [*of_preset, *arguments])
    check(settings)
    return settings


def check(s: Settings) -> None:
    """Find values out of range before anything is made.

    Raises:
        ConfigError: names the setting, its value and what it may be.
    """
    counts = "steps batch_size accumulate devices num_nodes log_every pictures_at_once save_every keep sample_steps"
    check_counts(s, counts.split())
    for name in ("warmup", "reconnect_at", "unlock_at", "workers", "pictures", "export_every", "held_out"):
        if (getattr(s, name) or 0) < 0:
            raise ConfigError(f"{name} must not be negative, found {getattr(s, name)}")
    for name in ("clip", "min_snr", "noise_offset", "unlock_learning_rate"):
        if not 0 <= getattr(s, name) < float("inf"):
            raise ConfigError(f"{name} must be zero or a positive number, found {getattr(s, name)}")
    if not 0 < s.learning_rate < float("inf"):
        raise ConfigError(f"learning_rate must be positive, found {s.learning_rate}")
    highest_scale = LIMITS["guidance_scale"][1]
    if not 0 < s.guidance_scale <= highest_scale:
        raise ConfigError(f"guidance_scale must be above 0 and at most {highest_scale:g}, found {s.guidance_scale}")
    for name, highest in (("empty_prompts", 1.0), ("ema", 1.0)):
        if not 0 <= getattr(s, name) <= highest:
            raise ConfigError(f"{name} must be between 0 and {highest:g}, found {getattr(s, name)}")
    check_precision(s.precision)
    choices: dict[str, Sequence[str]] = {
        "broken": ("stop", "leave_out"),
        "optimizer": tuple(OPTIMIZERS),
        "schedule": SCHEDULES,
        "unlock": ("decoder", "all"),
        "frozen_precision": ("", *FROZEN),
        "recompute": RECOMPUTE,
    }
    for name, known in choices.items():
        if getattr(s, name) not in known:
            raise ConfigError(
                f"{name} must be one of {', '.join(k or 'nothing' for k in known)}, found {getattr(s, name)!r}"
            )
    for name in ("reconnect_at", "unlock_at"):
        if getattr(s, name) >= s.steps and getattr(s, name):
            raise ConfigError(f"{name} must be less than the {s.steps} steps of the run, found {getattr(s, name)}")
    if s.unlock_at and not s.sd_locked:
        raise ConfigError(
            "unlock_at says from which step on Stable Diffusion is trained; sd_locked=false trains it from the first"
        )
    if s.only_mid_control and s.reconnect_at:
        raise ConfigError(
            "reconnect_at connects all outputs after so many steps; only_mid_control=true never does. Leave one out"
        )
    unsupported = s.ema or s.export_every or s.reconnect_at or s.unlock_at or s.optimizer == "adamw8bit"
    if s.strategy == "fsdp" and unsupported:
        raise ConfigError(
            "strategy=fsdp goes with none of ema, export_every, reconnect_at, unlock_at and optimizer=adamw8bit; leave them "
            "out, or use ddp"
        )
    if not 0 <= s.seed < 2**32:
        raise ConfigError(f"seed must be between 0 and 2**32 - 1, found {s.seed}")
    if s.condition:
        check_condition(s.condition)


def pairs_of_a_step(values: dict[str, Any]) -> int:
    product = 1
    for name in PAIRS_OF_A_STEP:
        product *= values[name]
    return product


def changes(noted: dict[str, Any], s: Settings) -> list[str]:
    """Settings that differ from those of the run so far, and that it cannot go on with.

    A setting that the note does not name has its default: it may be newer than the note.
    """
    before = asdict(Settings()) | {k: v for k, v in noted.items() if k in {f.name for f in fields(Settings)}}
    now = asdict(s)
    for values in (before, now):  # the same place may be written in several ways
        values.update({name: os.path.normpath(values[name]) for name in PATHS if values[name]})
    changed = [
        name for name in now if name not in MAY_CHANGE and name not in PAIRS_OF_A_STEP and before[name] != now[name]
    ]
    if pairs_of_a_step(before) != pairs_of_a_step(now):
        changed += [name for name in PAIRS_OF_A_STEP if before[name] != now[name]]
    if s.schedule != "constant" and before["steps"] != s.steps:
        changed.append("steps")  # the schedule ends at the last step
    return changed
