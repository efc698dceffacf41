"""Lightning callbacks: pictures of what the model makes while it trains."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor

from cldm.pictures import grid, save_png, to_uint8

logger = logging.getLogger(__name__)


class ImageLogger(pl.Callback):
    """Every so many batches, saves what the model's `log_images` gives, one PNG a kind and one overview with a row a kind.

    Args:
        batch_frequency: batches between pictures.
        max_images: pictures a row.
        clamp: cut values to [-1, 1].
        increase_log_steps: accepted for compatibility.
        rescale: values are in [-1, 1] rather than [0, 1].
        disabled: do nothing.
        log_on_batch_idx: count batches of the epoch (as the reference does); otherwise training steps.
        log_first_step: also at the very first batch.
        log_images_kwargs: handed to `log_images`.
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
    ) -> None:
        super().__init__()
        if batch_frequency < 1:
            raise ValueError(f"batch_frequency must be at least 1, found {batch_frequency}")
        self.batch_freq = batch_frequency
        self.max_images = max_images
        self.clamp = clamp
        self.rescale = rescale
        self.disabled = disabled
        self.log_on_batch_idx = log_on_batch_idx
        self.log_first_step = log_first_step
        self.log_images_kwargs = dict(log_images_kwargs or {})

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self.disabled:
            self.log_img(pl_module, batch, batch_idx, split="train")

    def check_frequency(self, check_idx: int) -> bool:
        """Whether pictures are due at this batch or step."""
        return check_idx % self.batch_freq == 0 and (check_idx > 0 or self.log_first_step)

    def log_img(self, pl_module: pl.LightningModule, batch: Any, batch_idx: int, split: str = "train") -> None:
        """Save pictures for a batch if they are due; the model is in eval mode meanwhile."""
        check_idx = batch_idx if self.log_on_batch_idx else pl_module.global_step
        if not (
            self.check_frequency(check_idx) and self.max_images > 0 and callable(getattr(pl_module, "log_images", None))
        ):
            return
        if pl_module.global_rank != 0:
            return
        was_training = pl_module.training
        pl_module.eval()
        try:
            with torch.no_grad():
                images = pl_module.log_images(batch, split=split, **({"N": self.max_images} | self.log_images_kwargs))
        finally:
            pl_module.train(was_training)
        images = {
            # Rows of steps are one picture, (3, H, W).
            kind: (picture if picture.dim() == 4 else picture[None])[: self.max_images].detach().float().cpu()
            for kind, picture in images.items()
            if isinstance(picture, Tensor)
        }
        folder = Path(self._save_dir(pl_module))
        self.log_local(folder, split, images, pl_module.global_step, pl_module.current_epoch, batch_idx)

    def _save_dir(self, pl_module: pl.LightningModule) -> str:
        training_logger = pl_module.logger
        return (training_logger.save_dir if training_logger is not None else None) or pl_module.trainer.default_root_dir

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
