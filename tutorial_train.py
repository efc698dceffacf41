"""Train a ControlNet.

    python tutorial_train.py [key=value ...]

With no arguments, everything happens for the tiny model: data is made, control is added to the base, the ControlNet is trained and
scored on hints that it has not seen. With other settings it is the training run for real weights, e.g.

    python tutorial_train.py config=cldm_v15 weights=models/control_sd15_ini.safetensors data=training/fill50k \\
        preset=24gb learning_rate=1e-5 steps=20000 out=runs/fill50k

where `controlnet add-control models/v1-5-pruned.ckpt models/control_sd15_ini.safetensors` (or `python tool_add_control.py` and
the same names) has given the base a ControlNet.

`--help` lists the settings, with their defaults for the tiny model. A run that was interrupted, in whatever way, goes on when the
same command is given again, and ends with the same weights as one that was not.
"""

import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from cldm.checkpoint import add_control
from cldm.cldm import ControlLDM
from cldm.command import help_text, run_command
from cldm.data.fill import generate_fill
from cldm.data.shards import find_shards
from cldm.evaluation import Sampling
from cldm.files import locked
from cldm.low_memory import memory_advice
from cldm.model import create_model
from cldm.settings import explain
from cldm.training.cache import CachedPairs, make_cache, release_encoders
from cldm.training.checkpoints import ExportControl, SaveCheckpoints, load_trained, write_trained
from cldm.training.curves import Curves
from cldm.training.data import TrainingData, check_once, hold_out, note_shards
from cldm.training.dynamics import Dynamics
from cldm.training.engine import (
    SeedSteps,
    ShowProgress,
    StopOnSignal,
    fit,
    make_trainer,
    own_rank,
    requeued,
    run_options,
)
from cldm.training.folder import RunFolder
from cldm.training.health import SkipBadSteps
from cldm.training.held_out import HeldOut
from cldm.training.metrics import run_loggers
from cldm.training.optim import optimizer_config, scheduler_config
from cldm.training.phases import plan_phases
from cldm.training.precision import allow_tf32, cast_frozen, set_recompute, use_channels_last
from cldm.training.settings import TINY_DATA, Settings, parse_settings
from ldm.files.errors import about
from ldm.files.locating import locate
from ldm.util import ConfigError
from tutorial_dataset import MyDataset

PROGRAM = "tutorial_train.py"
HOW_TO_GO_ON = "the same command goes on from there"


def train(s: Settings) -> None:
    """Data, model, training, result: read it from top to bottom."""
    run = RunFolder(s.out)
    with run.in_use(), requeued(HOW_TO_GO_ON):
        run.begin(s)
        if run.is_finished(s.steps):
            logging.info(
                "this run has had its %d steps; its result is %s. A larger steps=... trains on", run.step, run.result
            )
            return
        started = time.time()
        is_first = own_rank() == 0
        device = make_trainer(**trainer_options(s, s.steps)).strategy.root_device

        # A configuration that cannot be built, or weights that are not there, are found before all pairs are read.
        create_model(s.config, device="meta")
        given = locate(s.weights or s.base)
        with about(given):
            given.stat()

        # Data: pairs to train on, and the last few held out.
        if s.data == TINY_DATA:
            with locked(s.data):  # of several processes one makes it
                generate_fill(s.data, count=2000 + 64, size=64, seed=s.seed, palette="clear")
        data = open_data(s, run)

        # Model: the configuration, filled from weights with control.
        weights = given
        if not s.weights:  # it is a base without control
            weights = run.initial_weights(
                given, s.config, lambda path: add_control(given, path, s.config, overwrite=True)
            )
        identity = run.identify(weights)
        model: ControlLDM = create_model(s.config, weights=weights)
        phases = plan_phases(s.steps, s.only_mid_control, s.sd_locked, s.reconnect_at, s.unlock_at, s.unlock)
        phases[-1].apply(model)  # which trains the most: what it locks is never trained
        prepare(model, s, device)

        # What is looked at: the held-out hints, before, meanwhile and after.
        sampling = Sampling(s.sample_steps, s.guidance_scale, s.seed, s.pictures_at_once)
        held_out = HeldOut(data, sampling, s.precision, weights, s.condition)
        if s.pictures_before and run.step == 0 and is_first:
            before, scores = held_out.sample(model.to(device), "before training")
            run.note_before(before, scores, held_out.told())
        if s.cache:
            use_cache(data, model.to(device), run, s)

        # Training, in phases that differ in what is trained.
        for phase in phases:
            if phase.last <= run.step:
                continue
            with StopOnSignal() as stop:
                logging.info("steps %d to %d train %s", run.step + 1, phase.last, phase)
                phase.apply(model)
                if s.ema:
                    model.average_weights(s.ema)
                health = SkipBadSteps(last_good=lambda: run.checkpoint)
                instruments = held_out.instruments(run.path, s.log_every, s.pictures, device)
                save = SaveCheckpoints(run.checkpoints, s.save_every, s.keep, identity, health.is_good)
                export = ExportControl(run.path / "exports", s.export_every)
                trainer = make_trainer(
                    **trainer_options(s, phase.last),
                    callbacks=[
                        *(SeedSteps(s.seed), health, Dynamics(), *instruments, Curves(run.path, s.log_every)),
                        *(ShowProgress(), export, stop, save),
                    ],
                    logger=run_loggers(run.path),
                    log_every_n_steps=sys.maxsize,  # the instruments do it
                )
                batch_size = at_most(s.batch_size, data, trainer.world_size)
                micro_batches = run.step * s.accumulate, phase.last * s.accumulate
                loader = data.loader(trainer, batch_size, *micro_batches, s.seed, s.workers)
                fit(trainer, model, loader, run.checkpoint, stop, HOW_TO_GO_ON)

        # Result.
        if s.strategy == "fsdp":  # no process has all weights any more
            model = create_model(s.config, weights=weights)
            phases[-1].apply(model)
        if is_first:
            finish(run, model.to(device), held_out, identity, weights, s)
            logging.info("%.1f minutes in all. What was made:", (time.time() - started) / 60)
            for name, what in {
                "result.png": "prompt, hint, target, and pictures before and after training",
                "curves.png": "loss, control gain, norms and score by step; metrics.csv has the numbers",
                "pictures": "pictures of held-out hints while training",
                "model.safetensors": "the trained model",
                "checkpoints": "to go on training with more steps",
            }.items():
                if (run.path / name).exists():
                    logging.info("  %-40s %s", run.path / name, what)


def trainer_options(s: Settings, steps: int) -> dict[str, Any]:
    """Options of a Trainer that trains up to step `steps`."""
    options = run_options(steps, s.accumulate, s.precision, s.strategy, s.devices * s.num_nodes, s.clip)
    return options | {"accelerator": s.accelerator, "devices": s.devices, "num_nodes": s.num_nodes}


def open_data(s: Settings, run: RunFolder) -> TrainingData:
    """The pairs in a folder, or in shards; those that cannot be used are found now."""
    shards = find_shards(s.data)
    if shards:
        if s.cache:
            raise ConfigError("cache=true needs pairs in a folder, and shards are streamed; leave cache away")
        if s.held_out and run.checkpoint is None:
            raise ConfigError(
                f"held_out={s.held_out} needs pairs in a folder: shards are streamed, and none of their samples are held out; "
                "leave held_out away"
            )
        logging.info(
            "shards are streamed: none of their samples are held out, the pictures show samples that are trained on"
        )
        data = TrainingData.from_shards(shards)
        note_shards(shards, run.path / "data.json", begun=run.checkpoint is not None)
        return data
    dataset = MyDataset(s.data, leave_out=True)  # what is left out is a problem like others, which the check reports
    pairs = check_once(dataset, s.broken, run.path / "data.json", s.held_out, begun=run.checkpoint is not None)
    data = TrainingData(pairs, hold_out(len(pairs), s.held_out))
    few = "" if data.held_out else "; with so few the pictures show pairs that are trained on"
    logging.info("%d pairs to train on, %d held out%s", data.trained, data.held_out, few)
    return data


def prepare(model: ControlLDM, s: Settings, device: torch.device) -> None:
    """Hand the model, with everything unlocked that the run will train, what the settings say about its training."""
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
    allow_tf32(s.tf32)
    cast_frozen(model, frozen_precision(s, device))
    set_recompute(model, s.recompute)
    if s.channels_last:
        use_channels_last(model)
    if s.compile:
        model.control_model.compile()
        model.model.diffusion_model.compile()


def frozen_precision(s: Settings, device: torch.device) -> str:
    """In what precision weights are kept that are not trained; ConfigError for one that the device cannot compute with."""
    if s.precision == "16-mixed" and s.frozen_precision == "fp16" and device.type == "cpu":
        raise ConfigError("frozen_precision=fp16 with precision=16-mixed needs a GPU; leave frozen_precision out")
    if s.frozen_precision or s.strategy == "fsdp":  # which joins weights, so that they must be of one precision
        return s.frozen_precision or "fp32"
    # On a CPU float16 weights and 16-mixed do not go together: group normalisation there wants weights in float32.
    half = "fp32" if device.type == "cpu" else "fp16"
    return {"bf16-mixed": "bf16", "16-mixed": half}.get(s.precision, "fp32")


def use_cache(data: TrainingData, model: ControlLDM, run: RunFolder, s: Settings) -> None:
    """Train from what the encoders make of pictures and prompts, kept beside the data if possible, without the encoders in memory."""
    folder = Path(os.path.abspath(s.data))  # "." has no name
    folder = folder.with_name(folder.name + ".cache")
    if not os.access(folder if folder.exists() else folder.parent, os.W_OK):
        folder = run.path / "cache"
        logging.info("nothing can be written beside the data; the cache is kept in %s", folder)
    cache = make_cache(model, data.pairs, folder, s.precision)
    data.pairs = CachedPairs(data.pairs, cache)
    if s.empty_prompts:
        model.ucg_training = {"context": {"p": s.empty_prompts, "val": cache.empty_context}}
    release_encoders(model)


def at_most(batch_size: int, data: TrainingData, processes: int) -> int:
    """The batch size, or what one process can have of a small set."""
    most = max(data.trained // processes, 1)
    if data.shards or batch_size <= most:
        return batch_size
    logging.info("batch_size %d is more than the pairs there are; batches hold %d", batch_size, most)
    return most


def finish(
    run: RunFolder, model: ControlLDM, held_out: HeldOut, identity: dict[str, str], weights: Path, s: Settings
) -> None:
    """Write the trained model, and the picture that shows what it has learned."""
    if s.ema and not model.use_ema:
        model.average_weights(s.ema)
    assert run.checkpoint is not None  # the last step is saved
    load_trained(model, run.checkpoint, identity)
    with model.ema_scope():
        write_trained(run.result, model, weights)  # first: whatever happens to the pictures, it is there
        after, scores = held_out.sample(model, f"after {run.step} steps")
        before, scores_before = run.noted_before(held_out.told())
        held_out.save(run.path / "result.png", [after] if before is None else [before, after])
    run.finish({"steps": run.step, "before": scores_before, "after": scores})


def main(argv: Sequence[str] | None = None, program: str = PROGRAM) -> int:
    logging.basicConfig(level=logging.WARNING if own_rank() else logging.INFO, format="%(message)s")
    arguments = sys.argv[1:] if argv is None else argv
    if any(a in ("-h", "--help") for a in arguments):
        print(help_text(__doc__, PROGRAM, program), explain(Settings), sep="\n")
        return 0

    def work() -> None:
        with memory_advice(
            "a smaller batch_size with a larger accumulate, recompute=all, a preset or smaller pictures"
        ):
            train(parse_settings(arguments))

    return run_command(
        program,
        work,
        interrupted="interrupted; the same command goes on from what was saved last",
    )


if __name__ == "__main__":
    sys.exit(main())
