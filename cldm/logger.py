"""Lightning callback of the public code: pictures of what the model makes while it trains."""

import logging
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor

from cldm.pictures import grid, save_png, to_uint8
from cldm.training.instrument import Instrument, aside, takes_part
from cldm.training.pictures import Encoders

logger = logging.getLogger(__name__)


class ImageLogger(Instrument):
    """Every so many optimizer steps, saves what the model's `log_images` gives, one PNG a kind and one overview with a row a kind.

    Steps are counted over the whole run, and a step of several batches once. (The public class counts batches from the
    beginning of each epoch: with epochs of six batches, one in ten means the first of each epoch.)

    Args:
        batch_frequency: steps between pictures.
        max_images: pictures a row.
        clamp: cut values to [-1, 1].
        increase_log_steps: accepted for compatibility.
        rescale: values are in [-1, 1] rather than [0, 1].
        disabled: do nothing.
        log_on_batch_idx: number the steps from 0 as the public class numbers batches: with a frequency of 10, after the 1st,
            11th, 21st; otherwise after the 10th, 20th, 30th.
        log_first_step: with `log_on_batch_idx`, also after the very first one.
        log_images_kwargs: handed to `log_images`.
        at_once: pictures made at once; fewer take less memory.
        encoders: a context manager that gives a model its encoders, where training has freed them; see `HeldOutPictures`.
    """

    def __init__(
        self,
        batch_frequency: int = 2000,
        max_images: int = 4,
        clamp: bool = True,
        increase_log_steps: bool = True,
        rescale: bool = True,
        disabled: bool = False,
        log_on_batch_idx: bool = True,
        log_first_step: bool = True,
        log_images_kwargs: Mapping[str, Any] | None = None,
        at_once: int = 1,
        encoders: Encoders | None = None,
    ) -> None:
        for name, value in (("batch_frequency", batch_frequency), ("at_once", at_once)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, found {value}")
        super().__init__(batch_frequency)
        self.batch_freq = batch_frequency
        self.max_images = max_images
        self.clamp = clamp
        self.rescale = rescale
        self.disabled = disabled
        self.log_on_batch_idx = log_on_batch_idx
        self.log_first_step = log_first_step
        self.log_images_kwargs = dict(log_images_kwargs or {})
        self.at_once = at_once
        self.encoders = encoders or nullcontext

    def is_due(self, step: int) -> bool:
        return not self.disabled and self.max_images > 0 and self.check_frequency(step - int(self.log_on_batch_idx))

    def check_frequency(self, check_idx: int) -> bool:
        """Whether pictures are due at the step of this number."""
        return check_idx % self.batch_freq == 0 and (check_idx > 0 or self.log_first_step)

    def measure(self, trainer: pl.Trainer, model: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        self.log_img(model, batch, batch_idx, split="train")

    def log_img(self, pl_module: pl.LightningModule, batch: Any, batch_idx: int, split: str = "train") -> None:
        """Save pictures for a batch; the model and torch's random generators are left as they were."""
        trainer = pl_module.trainer
        log_images: Any = getattr(pl_module, "log_images", None)
        if not callable(log_images) or not takes_part(trainer):
            return
        kinds: dict[str, list[Tensor]] = {}
        with aside(trainer, pl_module), self.encoders(pl_module):
            for part in _parts(batch, self.max_images, self.at_once):
                options = {"N": self.at_once} | self.log_images_kwargs
                try:
                    made = log_images(part, split=split, **options)
                except FloatingPointError as error:  # no reason to end a training
                    logger.warning("no pictures of step %d: %s", pl_module.global_step, error)
                    return
                for kind, pictures in made.items():
                    if isinstance(pictures, Tensor):
                        # Rows of steps are one picture, (3, H, W).
                        pictures = pictures if pictures.dim() == 4 else pictures[None]
                        kinds.setdefault(kind, []).append(pictures.detach().float().cpu())
        if trainer.is_global_zero:
            images = {kind: torch.cat(pictures)[: self.max_images] for kind, pictures in kinds.items()}
            folder = self._save_dir(pl_module)
            self.log_local(folder, split, images, pl_module.global_step, pl_module.current_epoch, batch_idx)

    def _save_dir(self, pl_module: pl.LightningModule) -> str:
        folder: Any = getattr(pl_module.logger, "save_dir", None)  # not every logger writes files
        return folder or pl_module.trainer.default_root_dir

    def log_local(
        self,
        save_dir: str | Path,
        split: str,
        images: Mapping[str, Tensor],
        global_step: int,
        current_epoch: int,
        batch_idx: int,
    ) -> None:
        """Write `image_log/<split>/<kind>_gs-<step>_e-<epoch>_b-<batch>.png`, and `overview_...` with those of the first size."""
        folder = Path(save_dir) / "image_log" / split
        name = f"gs-{global_step:06}_e-{current_epoch:06}_b-{batch_idx:06}.png"
        rows: list[list[np.ndarray]] = []
        for kind, tensor in images.items():
            tensor = tensor.clamp(-1.0, 1.0) if self.clamp else tensor
            pictures = list(to_uint8(tensor if self.rescale else tensor * 2 - 1))
            save_png(folder / f"{kind}_{name}", grid([pictures]))
            rows.append(pictures)
        alike = [row for row in rows if row[0].shape == rows[0][0].shape]
        if alike:
            save_png(folder / f"overview_{name}", grid(alike))
        logger.info("pictures of step %d are in %s", global_step, folder)


def _parts(batch: Mapping[str, Any], count: int, size: int) -> list[dict[str, Any]]:
    """The first `count` entries of a batch in batches of `size`."""
    count = min(count, *(len(entries) for entries in batch.values()))
    return [
        {name: entries[start : min(start + size, count)] for name, entries in batch.items()}
        for start in range(0, count, size)
    ]
