"""Train a ControlNet.

    python tutorial_train.py [key=value ...]

With no arguments, everything happens for the tiny model: data is made, control is added to the base, the ControlNet is trained and
scored on hints that it has not seen. With other settings it is the training run for real weights, e.g.

    python tool_add_control.py models/v1-5-pruned.ckpt models/control_sd15_ini.safetensors
    python tutorial_train.py config=cldm_v15 weights=models/control_sd15_ini.safetensors data=training/fill50k \\
        batch_size=4 learning_rate=1e-5 steps=20000 precision=bf16-mixed out=runs/fill50k

`--help` lists the settings, with their defaults for the tiny model. An interrupted run goes on when started again.
"""

import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from torch.utils.data import DataLoader, RandomSampler, Subset

from cldm.checkpoint import add_control
from cldm.command import run_command
from cldm.config import override
from cldm.data.batches import SameSizeBatches
from cldm.data.fill import generate_fill
from cldm.evaluation import FillProgress, Sampling, evaluate_fill, fill_samples, generate, save_comparison
from cldm.logger import ImageLogger
from cldm.model import create_model
from cldm.settings import check_counts, explain, is_continued, make_trainer, setting, write_settings
from ldm.files import write_weights
from ldm.util import ConfigError
from tutorial_dataset import MyDataset

TINY_DATA = "training/fill_tiny"


# What may differ when a run goes on: how long, how often, where and on what machine.
MAY_CHANGE = ("out", "steps", "log_every", "save_every", "workers", "accelerator", "devices")


@dataclass
class Settings:
    """What can be set on the command line."""

    config: str = setting("cldm_tiny", "a packaged configuration or a YAML file")
    base: str = setting("cldm_tiny.safetensors", "model without control; used where `weights` is not given")
    weights: str = setting("", "model with control, as tool_add_control.py writes it")
    data: str = setting(TINY_DATA, "folder with prompt.json; the default is made if absent")
    out: str = setting("runs/tutorial", "folder for everything that is made")
    steps: int = setting(750, "optimizer steps")
    batch_size: int = setting(32, "pairs a batch, on each device")
    accumulate: int = setting(1, "batches a step")
    learning_rate: float = setting(1.5e-3, "for the tiny model; real weights want 1e-5")
    empty_prompts: float = setting(
        0.0, "share of prompts replaced by the empty one; the paper uses 0.5, the released code none"
    )
    sd_locked: bool = setting(True, "false also trains the UNet's decoder")
    only_mid_control: bool = setting(False, "use the control's middle connection alone")
    precision: str = setting("32-true", "or bf16-mixed, 16-mixed")
    accelerator: str = setting("auto", "cpu, gpu or mps; the best there is by default")
    devices: int = setting(1, "how many of them")
    workers: int = setting(0, "processes that load data")
    log_every: int = setting(50, "steps between pictures and scores")
    save_every: int = setting(250, "steps between checkpoints")
    held_out: int = setting(64, "pairs at the end of the data that are not trained on")
    sample_steps: int = setting(20, "DDIM steps of the pictures made while training and for the score")
    guidance_scale: float = setting(3.0, "of the same pictures")
    seed: int = setting(0, "of the data that is made, the training and the pictures")


def train(s: Settings) -> None:
    """Data, model, score before, training, score after: read it from top to bottom."""
    check(s)
    out = Path(s.out)
    started = time.time()
    note = out / "settings.json"
    goes_on = is_continued(note, s, MAY_CHANGE)
    pl.seed_everything(s.seed, verbose=False)

    # Data: pairs to train on, and the last few held out.
    if s.data == TINY_DATA:
        generate_fill(s.data, count=2000 + s.held_out, size=64, seed=s.seed, palette="clear")
    dataset = MyDataset(s.data)
    sizes = dataset.sizes()
    if len(dataset) <= s.held_out:
        raise ConfigError(f"{s.data} holds {len(dataset)} pairs, and {s.held_out} are held out; set held_out")
    split = len(dataset) - s.held_out
    loader = make_loader(Subset(dataset, range(split)), sizes[:split], s)
    # Of several sizes, one: pictures are compared side by side.
    held_out = Held(dataset, [i for i in range(split, len(dataset)) if sizes[i] == sizes[split]])

    # Model: the configuration, filled from weights with control.
    weights = s.weights or str(out / "control_ini.safetensors")
    if not s.weights and not (goes_on and Path(weights).is_file()):
        out.mkdir(parents=True, exist_ok=True)
        add_control(s.base, weights, s.config, overwrite=True)
    model = create_model(s.config, weights=weights)
    model.learning_rate = s.learning_rate
    model.sd_locked = s.sd_locked
    model.only_mid_control = s.only_mid_control
    if s.empty_prompts:
        model.ucg_training = {model.cond_stage_key: {"p": s.empty_prompts, "val": ""}}
    if s.sample_steps > model.num_timesteps:
        raise ConfigError(f"sample_steps must be at most {model.num_timesteps}, found {s.sample_steps}")

    # Training.
    sampling = Sampling(steps=s.sample_steps, guidance_scale=s.guidance_scale, seed=s.seed)
    callbacks = [
        ImageLogger(
            batch_frequency=s.log_every,
            log_on_batch_idx=False,
            log_images_kwargs={"ddim_steps": s.sample_steps, "unconditional_guidance_scale": s.guidance_scale},
        ),
        ModelCheckpoint(
            out / "checkpoints", save_last=True, every_n_train_steps=s.save_every, save_on_train_epoch_end=False
        ),
    ]
    if held_out.samples:
        callbacks.append(FillProgress(held_out.samples[:16], s.log_every, sampling))
    trainer = make_trainer(
        max_steps=s.steps,
        accelerator=s.accelerator,
        devices=s.devices,
        precision=s.precision,
        accumulate_grad_batches=s.accumulate,
        callbacks=callbacks,
        logger=CSVLogger(out, name="log"),
        log_every_n_steps=10,
        enable_model_summary=False,
    )
    if trainer.is_global_zero:
        write_settings(note, s)
        # The trainer moves the model to its device only while it fits; pictures are to be made there too.
        before = held_out.sample_and_score(model.to(trainer.strategy.root_device), sampling, "before training")
    last = out / "checkpoints" / "last.ckpt"
    trainer.fit(model, loader, ckpt_path=last if last.exists() else None)
    if trainer.interrupted:
        raise KeyboardInterrupt

    # Results.
    if trainer.is_global_zero:
        model.to(trainer.strategy.root_device)
        after = held_out.sample_and_score(model, sampling, f"after {trainer.global_step} steps")
        write_weights(out / "model.safetensors", model.state_dict(), overwrite=True)
        held_out.picture(out / "result.png", [before, after])
        logging.info("%.1f minutes in all. What was made:", (time.time() - started) / 60)
        for name, what in {
            "result.png": "prompt, hint, target, before, after",
            "image_log": "pictures while training",
            "log/version_*/metrics.csv": "loss" + ", and fill/iou every few steps" * bool(held_out.samples),
            "model.safetensors": "the trained model",
            "checkpoints/last.ckpt": "to go on training with more steps",
        }.items():
            logging.info("  %-40s %s", out / name, what)


def make_loader(data: Subset, sizes: list[tuple[int, int]], s: Settings) -> DataLoader:
    """Shuffled batches, each of pictures of one size."""
    if len(set(sizes)) == 1:
        return DataLoader(data, s.batch_size, shuffle=True, num_workers=s.workers)
    if s.devices > 1:
        raise ConfigError(f"{s.data} holds pictures of several sizes, which is for one device; set devices=1")
    batches = SameSizeBatches(RandomSampler(data), s.batch_size, drop_last=False, sizes=sizes)
    return DataLoader(data, batch_sampler=batches, num_workers=s.workers)


class Held:
    """The held-out pairs; scored if they are circles to fill."""

    def __init__(self, dataset: MyDataset, indices: Sequence[int]) -> None:
        pairs = [dataset.pairs[i] for i in indices]
        self.samples = fill_samples(pairs)
        items = [dataset[i] for i in indices]
        self.prompts = [pair.prompt for pair in pairs]
        self.hints = np.stack([np.rint(item["hint"] * 255).astype(np.uint8) for item in items])
        self.targets = np.stack([np.rint(item["jpg"] * 127.5 + 127.5).astype(np.uint8) for item in items])

    def sample_and_score(self, model, sampling: Sampling, when: str) -> np.ndarray:
        """Pictures for the held-out hints; their score is logged."""
        if self.samples is None:
            return generate(model, self.hints[:8], self.prompts[:8], sampling)
        score, pictures = evaluate_fill(model, self.samples, sampling)
        logging.info("%s: %s", when, score)
        return pictures

    def picture(self, path: Path, versions: list[np.ndarray]) -> None:
        save_comparison(path, self.hints[:8], self.targets[:8], self.prompts[:8], [v[:8] for v in versions])


def check(s: Settings) -> None:
    """Find values out of range before anything is made."""
    check_counts(
        s, ("steps", "batch_size", "accumulate", "devices", "log_every", "save_every", "held_out", "sample_steps")
    )
    if not s.learning_rate > 0:
        raise ConfigError(f"learning_rate must be positive, found {s.learning_rate}")
    if not 0 <= s.empty_prompts <= 1:
        raise ConfigError(f"empty_prompts must be between 0 and 1, found {s.empty_prompts}")
    if s.workers < 0:
        raise ConfigError(f"workers must not be negative, found {s.workers}")
    if not 0 <= s.seed < 2**32:
        raise ConfigError(f"seed must be between 0 and 2**32 - 1, found {s.seed}")


def main(argv: list[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    arguments = sys.argv[1:] if argv is None else argv
    if any(a in ("-h", "--help") for a in arguments):
        print(__doc__, explain(Settings), sep="\n")
        return 0
    return run_command(
        "tutorial_train.py",
        lambda: train(override(Settings(), arguments)),
        interrupted="interrupted; the same command goes on from the last checkpoint",
    )


if __name__ == "__main__":
    sys.exit(main())
