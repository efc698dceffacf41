"""Train the tiny base model from nothing: autoencoder, then text encoder and UNet, then one fp16 safetensors file.

    python tool_train_tiny.py [key=value ...]

Everything is drawn on the fly by the Fill generator; nothing is downloaded. `key=value` sets a field of `Settings` below. The
stages are kept under `work`, so that an interrupted run goes on where it stopped when started again. The base that this project
ships, models/cldm_tiny.safetensors, was made by this script; its metadata says with which settings.
"""

import json
import logging
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from cldm.checkpoint.writing import write_checkpoint
from cldm.config import load_config, override
from cldm.data.fill import PALETTES, draw_fill
from ldm.util import ConfigError, instantiate_from_config


@dataclass
class Settings:
    """What can be set on the command line."""

    out: str = "models/cldm_tiny.safetensors"  # the file to write
    work: str = "runs/train_tiny"  # stages and logs
    config: str = "cldm_tiny"
    size: int = 64  # of the pictures, in pixels
    vae_palette: str = "web"  # the autoencoder sees all colours
    palette: str = "clear"  # the prompts name these
    seed: int = 0
    vae_half_steps: int = (
        3000  # of the autoencoder at half the size with twice the batch, where colours are learnt cheaply
    )
    vae_steps: int = 2500
    vae_batch: int = 16
    vae_lr: float = 6e-4
    vae_kl_weight: float = 0.02
    vae_precision: str = "bf16-mixed"  # on processors without bf16 instructions "32-true" is faster
    latents: int = 40000  # pictures encoded for the second stage
    unet_steps: int = 4000
    unet_batch: int = 32
    unet_lr: float = 6e-4
    unet_precision: str = "32-true"
    empty_prompts: float = 0.1  # share of prompts replaced by the empty one, for guidance
    save_every: int = 500
    threads: int = 0  # 0 leaves torch's choice


class FillPictures(IterableDataset):
    """An endless stream of targets, `{"image": (size, size, 3) float32 in [-1, 1]}`, from picture number `start` on."""

    def __init__(self, settings: Settings, size: int, start: int) -> None:
        self.settings = settings
        self.size = size
        self.start = start

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        index = self.start
        while True:
            sample = draw_fill(index, self.size, self.settings.seed, PALETTES[self.settings.vae_palette])
            yield {"image": torch.from_numpy(sample.target.astype(np.float32) / 127.5 - 1)}
            index += 1


class Latents(IterableDataset):
    """An endless stream of `{"image": scaled latent (h, w, 4), "txt": prompt}`, sampled anew from the cached posteriors."""

    def __init__(self, mean: Tensor, std: Tensor, prompts: list[str], seed: int) -> None:
        self.mean, self.std, self.prompts, self.seed = mean, std, prompts, seed

    def __iter__(self) -> Iterator[dict[str, Tensor | str]]:
        generator = torch.Generator().manual_seed(self.seed)
        while True:
            for i in torch.randperm(len(self.mean), generator=generator).tolist():
                noise = torch.randn(self.mean.shape[1:], generator=generator)
                yield {"image": (self.mean[i] + self.std[i] * noise).permute(1, 2, 0), "txt": self.prompts[i]}


def fit(
    model: pl.LightningModule,
    data: IterableDataset,
    batch_size: int,
    steps: int,
    precision: str,
    folder: Path,
    settings: Settings,
) -> None:
    """Train for `steps` steps in all, going on from the folder's last checkpoint."""
    last = folder / "last.ckpt"
    checkpoint = pl.callbacks.ModelCheckpoint(
        folder, filename="{step}", save_last=True, every_n_train_steps=settings.save_every, save_top_k=1
    )
    trainer = pl.Trainer(
        max_steps=steps,
        logger=pl.loggers.CSVLogger(folder, name="", version=""),
        callbacks=[checkpoint],
        accelerator="auto",
        devices=1,
        precision=precision,
        gradient_clip_val=1.0,
        enable_model_summary=False,
        log_every_n_steps=20,
    )
    trainer.fit(model, DataLoader(data, batch_size=batch_size), ckpt_path=last if last.exists() else None)
    if trainer.interrupted:
        raise KeyboardInterrupt


def warm_up_cosine(steps: int) -> dict:
    """A `scheduler_config`: 3 % of the steps warm-up, then a half cosine down to 1 %."""
    params = {
        "warm_up_steps": max(steps * 3 // 100, 1),
        "lr_min": 0.01,
        "lr_max": 1.0,
        "lr_start": 0.05,
        "max_decay_steps": steps,
    }
    return {"target": "ldm.lr_scheduler.LambdaWarmUpCosineScheduler", "params": params}


def train_autoencoder(config: dict, settings: Settings) -> pl.LightningModule:
    """Stage one: the autoencoder, by reconstruction and KL."""
    params = {
        **config["params"],
        "lossconfig": {
            "target": "ldm.modules.losses.ReconstructionKL",
            "params": {"kl_weight": settings.vae_kl_weight},
        },
    }
    model = instantiate_from_config({"target": config["target"], "params": params})
    model.learning_rate = settings.vae_lr
    model.adam_betas = (0.9, 0.99)
    # The pictures are counted from a million on, far from all data sets, and none comes twice.
    for name, size, batch, steps, start in (
        ("autoencoder_half", settings.size // 2, settings.vae_batch * 2, settings.vae_half_steps, 1_000_000),
        ("autoencoder", settings.size, settings.vae_batch, settings.vae_steps, 2_000_000),
    ):
        model.scheduler_config = warm_up_cosine(steps)
        fit(
            model,
            FillPictures(settings, size, start),
            batch,
            steps,
            settings.vae_precision,
            Path(settings.work) / name,
            settings,
        )
    return model.eval().requires_grad_(False)


@torch.no_grad()
def cache_latents(autoencoder: pl.LightningModule, settings: Settings) -> tuple[Tensor, Tensor, list[str]]:
    """Posterior means and deviations, (N, 4, h, w) each, and prompts of `settings.latents` pictures."""
    path = Path(settings.work) / "latents.pt"
    if path.exists():
        cached = torch.load(path)
        return cached["mean"], cached["std"], cached["prompts"]
    means, stds, prompts = [], [], []
    for start in range(0, settings.latents, 100):
        samples = [
            draw_fill(3_000_000 + i, settings.size, settings.seed, PALETTES[settings.palette])
            for i in range(start, min(start + 100, settings.latents))
        ]
        images = torch.from_numpy(np.stack([s.target for s in samples]).astype(np.float32) / 127.5 - 1).permute(
            0, 3, 1, 2
        )
        posterior = autoencoder.encode(images.to(autoencoder.device))
        means.append(posterior.mean.cpu())
        stds.append(posterior.std.cpu())
        prompts += [s.prompt for s in samples]
    cached = {"mean": torch.cat(means), "std": torch.cat(stds), "prompts": prompts}
    torch.save(cached, path)
    return cached["mean"], cached["std"], prompts


def train_diffusion(
    config: dict, settings: Settings, mean: Tensor, std: Tensor, prompts: list[str], scale: float
) -> pl.LightningModule:
    """Stage two: the UNet and the text encoder on cached latents; the averaged UNet weights are what counts."""
    wanted = config["params"]
    model = instantiate_from_config(
        {
            "target": "ldm.models.diffusion.ddpm.LatentDiffusion",
            "params": {
                **{key: wanted[key] for key in ("linear_start", "linear_end", "timesteps", "image_size", "channels")},
                "first_stage_config": {"target": "ldm.models.autoencoder.IdentityFirstStage"},
                "cond_stage_config": {
                    **wanted["cond_stage_config"],
                    "params": {**wanted["cond_stage_config"]["params"], "freeze": False},
                },
                "unet_config": {
                    **wanted["unet_config"],
                    "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
                },
                "cond_stage_trainable": True,
                "cond_stage_key": "txt",
                "first_stage_key": "image",
                "conditioning_key": "crossattn",
                "use_ema": True,
                "ucg_training": {"txt": {"p": settings.empty_prompts, "val": ""}},
                "scheduler_config": warm_up_cosine(settings.unet_steps),
            },
        }
    )
    model.model_ema.decay.fill_(0.999)
    model.learning_rate = settings.unet_lr
    data = Latents(mean * scale, std * scale, prompts, settings.seed)
    folder = Path(settings.work) / "diffusion"
    fit(model, data, settings.unet_batch, settings.unet_steps, settings.unet_precision, folder, settings)
    model.model_ema.copy_to(model.model)
    return model.eval()


def write_base(
    autoencoder: pl.LightningModule, diffusion: pl.LightningModule, scale: float, settings: Settings
) -> None:
    """One fp16 file with the keys of a Stable Diffusion checkpoint and its provenance in the metadata."""
    entries = {k: v for k, v in diffusion.state_dict().items() if k.startswith(("model.", "cond_stage_model."))}
    entries |= {f"first_stage_model.{k}": v for k, v in autoencoder.state_dict().items() if not k.startswith("loss.")}
    provenance = {
        "title": "tiny base of circles, trained by this project on generated pictures",
        "command": "python " + " ".join([Path(__file__).name, *sys.argv[1:]]),
        "settings": json.dumps(asdict(settings)),
        "scale_factor": f"{scale:.5f}",
        "versions": json.dumps(
            {"torch": torch.__version__, "pytorch_lightning": pl.__version__, "python": sys.version.split()[0]}
        ),
        "license": "Apache-2.0",
    }
    write_checkpoint(settings.out, entries, metadata=provenance, dtype=torch.float16, overwrite=True)


def main(argv: list[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    arguments = sys.argv[1:] if argv is None else argv
    if any(a in ("-h", "--help") for a in arguments):
        print(__doc__, *(f"  {key}={value}" for key, value in asdict(Settings()).items()), sep="\n")
        return 0
    try:
        settings = override(Settings(), arguments)
        config = load_config(settings.config).model
        for palette in (settings.palette, settings.vae_palette):
            if palette not in PALETTES:
                raise ConfigError(f"unknown palette {palette!r}; the palettes are {', '.join(PALETTES)}")
        if settings.threads:
            torch.set_num_threads(settings.threads)
        pl.seed_everything(settings.seed)
        autoencoder = train_autoencoder(config.params.first_stage_config, settings)
        mean, std, prompts = cache_latents(autoencoder, settings)
        measured = float(1.0 / (mean + std * torch.randn_like(std)).std())
        scale = float(config.params.scale_factor)
        logging.info(
            "latents have a standard deviation of %.5f: scale_factor should be near %.5f and is %.5f",
            1 / measured,
            measured,
            scale,
        )
        pl.seed_everything(settings.seed)
        diffusion = train_diffusion(config, settings, mean, std, prompts, scale)
        write_base(autoencoder, diffusion, scale, settings)
    except ValueError as error:
        print(f"tool_train_tiny.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"interrupted; the same command goes on from {settings.work}", file=sys.stderr)
        return 130
    logging.info("wrote %s (%.1f MB)", settings.out, Path(settings.out).stat().st_size / 1e6)
    return 0


if __name__ == "__main__":
    sys.exit(main())
