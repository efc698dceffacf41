"""Train a ControlNet.

    python tutorial_train.py [key=value ...]

With no arguments, everything happens for the tiny model: data is made, control is added to the base, the ControlNet is trained and
scored on hints that it has not seen. With other settings it is the training run for real weights, e.g.

    python tool_add_control.py models/v1-5-pruned.ckpt models/control_sd15_ini.safetensors
    python tutorial_train.py config=cldm_v15 weights=models/control_sd15_ini.safetensors data=training/fill50k \\
        preset=24gb learning_rate=1e-5 steps=20000 out=runs/fill50k

`--help` lists the settings, with their defaults for the tiny model. A run that was interrupted, in whatever way, goes on when the
same command is given again, and ends with the same weights as one that was not.
"""

import logging
import sys
import time

import torch
from pytorch_lightning.utilities.rank_zero import rank_zero_only
from torch.utils.data import Subset

from cldm.checkpoint.control import add_control
from cldm.checkpoint.writing import write_checkpoint
from cldm.cldm import ControlLDM
from cldm.command import MISTAKES, run_command
from cldm.config import resolve
from cldm.data.fill import generate_fill
from cldm.files import locked
from cldm.model import create_model
from cldm.settings import explain
from cldm.training.batches import RunBatches
from cldm.training.checkpoints import SaveCheckpoints
from cldm.training.engine import SeedSteps, ShowProgress, StopOnSignal, fit, make_loader, make_trainer, run_options
from cldm.training.folder import RunFolder
from cldm.training.health import SkipBadSteps, TrainingError
from cldm.training.optim import optimizer_config, scheduler_config
from cldm.training.phases import plan_phases
from cldm.training.settings import TINY_DATA, Settings, parse_settings
from ldm.util import ConfigError
from tutorial_dataset import MyDataset

HOW_TO_GO_ON = "the same command goes on from there"


def train(s: Settings) -> None:
    """Data, model, score before, training, score after: read it from top to bottom."""
    run = RunFolder(s.out)
    with run.in_use():
        goes_on = run.begin(s)
        if run.is_finished(s.steps):
            logging.info(
                "this run has had its %d steps; its result is %s. A larger steps=... trains on", run.step, run.result
            )
            return
        started = time.time()

        # Data: pairs to train on, and the last few held out.
        if s.data == TINY_DATA:
            with locked(s.data):  # of several processes one makes it
                generate_fill(s.data, count=2000 + 64, size=64, seed=s.seed, palette="clear")
        dataset = MyDataset(s.data)
        sizes = dataset.sizes()
        train_on, held_out = split(len(dataset), s)

        # Model: the configuration, filled from weights with control.
        weights = resolve(s.weights) if s.weights else run.path / "control_ini.safetensors"
        if not s.weights:
            with locked(weights):
                if not (goes_on and weights.is_file()):
                    add_control(resolve(s.base), weights, s.config, overwrite=True)
        base = run.identify(weights)
        model = create_model(s.config, weights=weights)

        # Training, in phases that differ in what is trained.
        for phase in plan_phases(s.steps, s.only_mid_control, s.sd_locked, s.reconnect_at, s.unlock_at, s.unlock):
            if phase.last <= run.step:
                continue
            logging.info("steps %d to %d train %s", run.step + 1, phase.last, phase)
            phase.apply(model)
            if s.ema:
                model.average_weights(s.ema)
            stop = StopOnSignal()
            health = SkipBadSteps(last_good=lambda: run.checkpoint)
            save = SaveCheckpoints(run.checkpoints, s.save_every, s.keep, base, is_good=health.is_good)
            trainer = make_trainer(
                **run_options(phase.last, s.accumulate, s.precision, s.strategy, s.devices * s.num_nodes, s.clip),
                accelerator=s.accelerator,
                devices=s.devices,
                num_nodes=s.num_nodes,
                callbacks=[SeedSteps(s.seed), health, ShowProgress(), stop, save],
                logger=False,
            )
            configure(model, s, trainer.strategy.root_device)
            batches = RunBatches(
                sizes[: len(train_on)],
                s.batch_size,
                phase.last * s.accumulate,
                s.seed,
                trainer.global_rank,
                trainer.world_size,
                start=run.step * s.accumulate,
            )
            loader = make_loader(
                Subset(dataset, train_on), batches, s.workers, pin_memory=trainer.accelerator.name() == "cuda"
            )
            fit(trainer, model, loader, run.checkpoint, stop, HOW_TO_GO_ON)
        write_checkpoint(run.result, model.state_dict(), overwrite=True)
        run.finish({"steps": s.steps, "minutes": (time.time() - started) / 60})


def configure(model: ControlLDM, s: Settings, device: torch.device) -> None:
    """Hand the model what the settings say about its training."""
    model.learning_rate = s.learning_rate
    model.unlock_learning_rate = s.unlock_learning_rate or None
    model.optimizer_config = optimizer_config(s.optimizer, device)
    model.scheduler_config = scheduler_config(s.schedule, s.warmup, s.steps)
    model.min_snr = s.min_snr
    model.noise_offset = s.noise_offset
    if s.empty_prompts:
        model.ucg_training = {model.cond_stage_key: {"p": s.empty_prompts, "val": ""}}
    if s.sample_steps > model.num_timesteps:
        raise ConfigError(f"sample_steps must be at most {model.num_timesteps}, found {s.sample_steps}")


def split(count: int, s: Settings) -> tuple[range, range]:
    """Pairs to train on, and pairs held out."""
    held_out = min(64, count // 10) if s.held_out is None else s.held_out
    return range(count - held_out), range(count - held_out, count)


def main(argv: list[str] | None = None) -> int:
    logging.basicConfig(level=logging.WARNING if rank_zero_only.rank else logging.INFO, format="%(message)s")
    arguments = sys.argv[1:] if argv is None else argv
    if any(a in ("-h", "--help") for a in arguments):
        print(__doc__, explain(Settings), sep="\n")
        return 0
    return run_command(
        "tutorial_train.py",
        lambda: train(parse_settings(arguments)),
        interrupted=f"interrupted before the training began; {HOW_TO_GO_ON}",
        mistakes=(*MISTAKES, TrainingError),
    )


if __name__ == "__main__":
    sys.exit(main())
