"""Short runs of a small model with instruments."""

from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, default_collate

from cldm.cldm import ControlLDM
from ldm.util import instantiate_from_config
from tests.cldm.tiny import tiny_config
from tests.parity import fill_


def small_model(**changes: Any) -> ControlLDM:
    """Weights that are the same every time, but for a fresh ControlNet's zero convolutions, which are zero."""
    model = fill_(instantiate_from_config(tiny_config("sd1", **changes)))
    for conv in [*model.control_model.zero_convs, model.control_model.middle_block_out]:
        for parameter in conv.parameters():
            torch.nn.init.zeros_(parameter)
    model.learning_rate = 1e-3
    return model


def pairs(count: int, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """Items of noise; the text is an embedding, as the small model's text encoder is the identity."""
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "jpg": torch.rand(64, 64, 3, generator=generator) * 2 - 1,
            "txt": torch.randn(77, 48, generator=generator),
            "hint": torch.rand(64, 64, 3, generator=generator),
        }
        for _ in range(count)
    ]


def held_out(count: int = 4) -> dict[str, torch.Tensor]:
    return default_collate(pairs(count, seed=1))


def train(
    model: ControlLDM, steps: int, callbacks: list[pl.Callback], batch_size: int = 1, items: Any = 12, **options: Any
) -> pl.Trainer:
    """Train, the same every time, on so many items of noise or on those given; returns the trainer."""
    pl.seed_everything(0, verbose=False)
    resume = options.pop("ckpt_path", None)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = pl.Trainer(
        max_steps=steps,
        accelerator="cpu",
        callbacks=callbacks,
        log_every_n_steps=0,
        **(quiet | {"logger": False} | options),
    )
    trainer.fit(model, DataLoader(pairs(items) if isinstance(items, int) else items, batch_size), ckpt_path=resume)
    return trainer
