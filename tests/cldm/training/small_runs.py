"""Short runs of a very small model with instruments, on latents that are given, so that a step takes milliseconds."""

from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, default_collate

from cldm.cldm import ControlLDM
from ldm.util import instantiate_from_config
from tests.cldm.tiny import tiny_config
from tests.parity import fill_

_NETWORK = {
    "image_size": 8,
    "in_channels": 4,
    "model_channels": 32,
    "attention_resolutions": [],
    "num_res_blocks": 1,
    "channel_mult": [1, 2],
    "num_heads": 4,
    "use_spatial_transformer": True,
    "transformer_depth": 1,
    "context_dim": 48,
    "legacy": False,
}


def new_model() -> ControlLDM:
    """Two levels, five control outputs, no autoencoder; random weights, and zero convolutions that are zero."""
    control = {"target": "cldm.cldm.ControlNet", "params": {"hint_channels": 3, **_NETWORK}}
    unet = {"target": "cldm.cldm.ControlledUnetModel", "params": {"out_channels": 4, **_NETWORK}}
    nothing = {"target": "ldm.models.autoencoder.IdentityFirstStage"}
    torch.manual_seed(0)
    return instantiate_from_config(
        tiny_config("sd1", control_stage_config=control, unet_config=unet, first_stage_config=nothing)
    )


def small_model() -> ControlLDM:
    """The same with weights that are the same every time, but for the zero convolutions."""
    model = fill_(new_model())
    for conv in [*model.control_model.zero_convs, model.control_model.middle_block_out]:
        for parameter in conv.parameters():
            torch.nn.init.zeros_(parameter)
    model.learning_rate = 1e-3
    return model


def pairs(count: int, seed: int = 0, followed: bool = False) -> list[dict[str, Any]]:
    """Items as the cache gives them; latents and hints are noise, or each latent is as bright as its hint."""
    generator = torch.Generator().manual_seed(seed)
    items = []
    for _ in range(count):
        latent, hint = torch.randn(4, 8, 8, generator=generator), torch.rand(64, 64, 3, generator=generator)
        if followed:
            brightness = torch.rand(3, generator=generator)
            hint = brightness.expand(64, 64, 3)
            latent = (4 * brightness.mean() - 2).expand(4, 8, 8) / 0.18215
        moments = torch.cat([latent, torch.full((4, 8, 8), -20.0)])  # mean and log-variance
        items.append({"moments": moments, "context": torch.randn(7, 48, generator=generator), "txt": "", "hint": hint})
    return items


def held_out(count: int = 4) -> dict[str, Any]:
    return default_collate(pairs(count, seed=1))


def train(
    model: ControlLDM, steps: int, callbacks: list[pl.Callback], batch_size: int = 1, items: Any = 12, **options: Any
) -> pl.Trainer:
    """Train, the same every time, on so many items of noise or on those given; returns the trainer."""
    pl.seed_everything(0, verbose=False)
    resume = options.pop("ckpt_path", None)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    quiet |= {"log_every_n_steps": 0, "logger": False}
    trainer = pl.Trainer(max_steps=steps, accelerator="cpu", callbacks=callbacks, **(quiet | options))
    trainer.fit(model, DataLoader(pairs(items) if isinstance(items, int) else items, batch_size), ckpt_path=resume)
    return trainer
