"""Checkpoints of a run: what is trained, its optimizer, and what going on needs; written whole, found again by their step.

A checkpoint is a file of Lightning's, so that the tools for weights read it too. It leaves out whatever is not trained, and
names the weights file that this belongs to.
"""

import logging
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins import TorchCheckpointIO
from torch.optim.lr_scheduler import LambdaLR

from cldm.checkpoint.converting import pooling_of, prediction_of, write_model
from cldm.checkpoint.opening import open_model
from cldm.files import whole_file
from ldm.files import read_checkpoint, write_weights
from ldm.util import ConfigError

logger = logging.getLogger(__name__)

_NAME = re.compile(r"step-(\d{8,})\.ckpt")


def checkpoints_in(folder: Path) -> dict[int, Path]:
    """The folder's checkpoints by the number of steps they have, oldest first."""
    found = {int(m[1]): path for path in folder.glob("step-*.ckpt") if (m := _NAME.fullmatch(path.name))}
    return dict(sorted(found.items()))


def newest_checkpoint(folder: Path) -> tuple[int, Path | None]:
    """Steps of the newest checkpoint in a folder and its path; (0, None) without one.

    Raises:
        ConfigError: the folder was written by an older version of this library, whose runs cannot be continued.
    """
    found = checkpoints_in(folder)
    if found:
        return list(found.items())[-1]
    if (folder / "last.ckpt").is_file():
        raise ConfigError(
            f"{folder} holds a run of an older version, which this one cannot continue; "
            f"start a new run from it with weights={folder / 'last.ckpt'} and another out"
        )
    return 0, None


class WholeFiles(TorchCheckpointIO):
    """Writes a checkpoint beside its place, flushes it to the disk and renames it; reads without executing anything."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike, storage_options: Any | None = None
    ) -> None:
        try:
            with whole_file(path) as file:
                torch.save(checkpoint, file)
        except (OSError, RuntimeError) as error:
            # Where the disk is full, torch raises an error of its own while it handles the system's.
            cause = error if isinstance(error, OSError) else error.__context__
            if not isinstance(cause, OSError):
                raise
            raise OSError(cause.errno, cause.strerror, str(path)) from error

    def load_checkpoint(
        self, path: str | os.PathLike, map_location: Any = "cpu", weights_only: bool | None = True, **_: Any
    ) -> dict[str, Any]:
        """The checkpoint, on the CPU. `map_location` and `weights_only` are accepted for compatibility: nothing in it is executed."""
        return read_checkpoint(Path(path))


class SaveCheckpoints(pl.Callback):
    """Saves every `every` steps, at the last step, and when the training is asked to stop; keeps the newest few.

    Must come after the callbacks that may stop the training or that change what is saved.

    Args:
        folder: where the files go.
        every: optimizer steps between two of them.
        keep: how many are kept.
        base: name and hash of the weights that the run began with; see `base_of`.
        is_good: whether the last step was a good one. After a bad one nothing is saved but at the end, and no file is deleted: the
            older ones may be better.
    """

    def __init__(
        self, folder: Path, every: int, keep: int, base: Mapping[str, str], is_good: Callable[[], bool] = lambda: True
    ) -> None:
        super().__init__()
        self.folder = folder
        self.every = every
        self.keep = keep
        self.base = dict(base)
        self.is_good = is_good

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08}.ckpt"

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        step = trainer.global_step
        ends = step >= trainer.max_steps or trainer.should_stop
        if ends or (step % self.every == 0 and self.is_good()):
            self.save(trainer)

    def save(self, trainer: pl.Trainer) -> None:
        """Save the present state; every process must call this. The oldest checkpoints beyond `keep` are deleted after it."""
        trainer.save_checkpoint(self.path(trainer.global_step))
        if trainer.is_global_zero and self.is_good():
            for path in list(checkpoints_in(self.folder).values())[: -self.keep]:
                path.unlink(missing_ok=True)

    # -- contents ---------------------------------------------------------------------------------------

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        trained = trained_names(pl_module)
        checkpoint["state_dict"] = {
            name: value
            for name, value in checkpoint["state_dict"].items()
            if name in trained or name.startswith("model_ema.")
        }
        checkpoint["base"] = self.base
        checkpoint["optimizer_names"] = names_in_optimizer(pl_module, trainer.optimizers[0])

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Fit the checkpoint to this trainer, whose micro-batches and trained parameters may differ from those when it was saved."""
        check_base(checkpoint, self.base)
        _restore_position(checkpoint, checkpoint["global_step"] * trainer.accumulate_grad_batches)
        _restore_optimizer(checkpoint, pl_module)


class ExportControl(pl.Callback):
    """Writes the ControlNet alone every so many steps, as `control-step-00001000.safetensors`; all of these files are kept.

    Args:
        folder: where the files go.
        every: optimizer steps between two of them; 0 for none.
    """

    def __init__(self, folder: Path, every: int) -> None:
        super().__init__()
        self.folder = folder
        self.every = every

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if not self.every or (batch_idx + 1) % trainer.accumulate_grad_batches or step % self.every:
            return
        if trainer.is_global_zero:
            path = self.folder / f"control-step-{step:08}.safetensors"
            path.parent.mkdir(parents=True, exist_ok=True)
            model: Any = pl_module  # a ControlLDM, or a class written like it
            with model.ema_scope():  # written inside it: tensors of a CPU are not copied
                entries = {f"control_model.{k}": v.cpu() for k, v in model.control_model.state_dict().items()}
                write_weights(path, entries, overwrite=True, progress=False)


def write_trained(path: Path, model: pl.LightningModule, weights: Path) -> None:
    """Write the whole model: what was trained as the model has it, all else as the file has it that the model was filled from.

    It tells of its model what that file told, such as the scale of its latents: a model with another scale refuses it.
    """
    trained = trained_names(model) | {name for name in model.state_dict() if name.startswith("control_model.")}
    with open_model(weights) as opened:
        own = {name: value.cpu() for name, value in model.state_dict().items() if name in trained}
        source = replace(opened, metadata={})  # its title and origin are not those of the trained model
        write_model(path, {**opened.tensors, **own}, source, prediction_of(opened), pooling_of(opened), overwrite=True)


def load_trained(model: pl.LightningModule, path: Path, base: Mapping[str, str]) -> None:
    """Put the trained weights of a checkpoint into the model that its run began with.

    Raises:
        ConfigError: the checkpoint belongs to other weights.
    """
    checkpoint = WholeFiles().load_checkpoint(path)
    check_base(checkpoint, base)
    model.load_state_dict(checkpoint["state_dict"], strict=False)


def trained_names(model: pl.LightningModule) -> set[str]:
    """Names of the parameters that are trained, as the state dict has them."""
    return {_plain(name) for name, p in model.named_parameters() if p.requires_grad}


def names_in_optimizer(model: pl.LightningModule, optimizer: torch.optim.Optimizer) -> list[str]:
    """The parameters' names in the order in which the optimizer numbers them."""
    names = {id(p): _plain(name) for name, p in model.named_parameters()}
    return [names[id(p)] for group in optimizer.param_groups for p in group["params"]]


def _plain(name: str) -> str:
    """A parameter's name without the wrappers that FSDP puts around modules."""
    return name.replace("_fsdp_wrapped_module.", "")


def _restore_position(checkpoint: dict[str, Any], batches: int) -> None:
    """Set the loop's counters to `batches` micro-batches done, and not at the end of the run: it may have been made longer."""
    loop = checkpoint["loops"]["fit_loop"]
    progress = loop["epoch_loop.batch_progress"]
    for part in ("total", "current"):
        progress[part] |= dict.fromkeys(("ready", "started", "processed", "completed"), batches)
    progress["is_last_batch"] = False
    for part in ("total", "current"):
        loop["epoch_progress"][part] |= {"ready": 1, "started": 1, "processed": 0, "completed": 0}
    loop["epoch_loop.state_dict"]["_batches_that_stepped"] = checkpoint["global_step"]


def _restore_optimizer(checkpoint: dict[str, Any], model: pl.LightningModule) -> None:
    """Give each parameter that is trained now the optimizer's memory of it; those trained from here on have none yet."""
    saved = checkpoint["optimizer_states"][0]
    by_name = {name: saved["state"][i] for i, name in enumerate(checkpoint["optimizer_names"]) if i in saved["state"]}
    configured: Any = model.configure_optimizers()
    optimizer = configured["optimizer"] if isinstance(configured, dict) else configured
    names = names_in_optimizer(model, optimizer)
    if names == checkpoint["optimizer_names"]:
        return
    state = {i: by_name[name] for i, name in enumerate(names) if name in by_name}
    if isinstance(configured, dict):  # there may be more groups than the saved schedule knows of
        schedule: LambdaLR = configured["lr_scheduler"]["scheduler"]
        step = checkpoint["lr_schedulers"][0]["last_epoch"]
        rates = [base * factor(step) for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        of_groups = {"base_lrs": schedule.base_lrs, "_last_lr": rates, "lr_lambdas": [None] * len(rates)}
        checkpoint["lr_schedulers"][0] |= of_groups
    checkpoint["optimizer_states"][0] = {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}


def check_base(checkpoint: Mapping[str, Any], base: Mapping[str, str]) -> None:
    """Raise ConfigError unless the checkpoint belongs to these weights."""
    found = checkpoint.get("base", {})
    if found.get("sha256") != base.get("sha256"):
        raise ConfigError(
            f"the run's checkpoint belongs to the weights {found.get('name')!r} "
            f"(SHA-256 {str(found.get('sha256'))[:12]}...), and {base.get('name')!r} is another file "
            f"({str(base.get('sha256'))[:12]}...); give the same weights, or choose another out"
        )
