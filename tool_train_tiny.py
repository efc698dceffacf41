"""Train the tiny base model from nothing: autoencoder, then text encoder and UNet, then one fp16 safetensors file.

    python tool_train_tiny.py [key=value ...]

Everything is drawn on the fly: circles to fill, scenes of shapes, and for the autoencoder pictures that resemble photographs. Nothing
is downloaded. `--help` lists the settings. The stages are kept under `work`, so that an interrupted run goes on where it stopped when
started again. The base that this project ships, models/cldm_tiny.safetensors, was made by this script, and its metadata says with which
settings; a new one is written to runs/train_tiny and takes its place when it is copied over it.
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

from cldm.checkpoint.recognising import SCHEDULE_KEYS
from cldm.command import run_command
from cldm.config import load_config, override
from cldm.data.fill import PALETTES, draw_fill, palette_named
from cldm.data.leaves import draw_leaves
from cldm.data.scenes import describe_scene, draw_scene
from cldm.settings import check_counts, explain, is_continued, setting, write_settings
from cldm.training.engine import check_precision, ctrl_c_is_an_exception, make_trainer
from cldm.training.metrics import MetricsFile
from ldm.files import check_output, open_weights, write_weights
from ldm.models.autoencoder import AutoencoderKL
from ldm.util import ConfigError, instantiate_from_config

# What may differ when a run goes on.
MAY_CHANGE = ("out", "work", "save_every", "compile", "threads")


@dataclass
class Settings:
    """What can be set on the command line."""

    out: str = setting("runs/train_tiny/cldm_tiny.safetensors", "the file to write")
    work: str = setting("runs/train_tiny", "folder for stages and logs")
    config: str = setting("cldm_tiny", "a packaged configuration or a YAML file")
    size: int = setting(64, "of the pictures, in pixels")
    vae_palette: str = setting("web", "colours that the autoencoder sees: all")
    palette: str = setting("clear", "colours that the prompts name")
    seed: int = setting(0, "of pictures, weights and noise")
    # Colours are learnt cheaply at half the size.
    vae_half_steps: int = setting(1500, "of the autoencoder at half the size with twice the batch")
    vae_steps: int = setting(16000, "of the autoencoder at the whole size")
    vae_batch: int = setting(16, "pictures a step")
    vae_lr: float = setting(6e-4, "learning rate")
    vae_kl_weight: float = setting(0.02, "of the divergence from a normal distribution, beside the reconstruction")
    vae_precision: str = setting("bf16-mixed", "on processors without bf16 instructions 32-true is faster")
    latents: int = setting(48000, "pictures encoded for the second stage")
    unet_steps: int = setting(8000, "of UNet and text encoder")
    unet_batch: int = setting(32, "latents a step")
    unet_lr: float = setting(6e-4, "learning rate")
    unet_precision: str = setting("32-true", "or bf16-mixed, 16-mixed")
    empty_prompts: float = setting(0.1, "share of prompts replaced by the empty one, for guidance")
    save_every: int = setting(500, "steps between checkpoints")
    compile: bool = setting(False, "the networks with torch.compile: faster, and needs a C++ compiler")
    threads: int = setting(0, "of torch; 0 leaves its choice")


def draw_for_autoencoder(index: int, size: int, settings: Settings) -> np.ndarray:
    """Picture number `index`, uint8 (size, size, 3): of six, one circle, four scenes, and one that resembles a photograph."""
    palette = PALETTES[settings.vae_palette]
    if index % 6 == 0:
        return draw_fill(index, size, settings.seed, palette).target
    if index % 6 < 5:
        return draw_scene(describe_scene(index, settings.seed, palette), size)
    return draw_leaves(index, size, settings.seed)


def draw_with_prompt(index: int, settings: Settings) -> tuple[np.ndarray, str]:
    """Picture number `index`, uint8 (size, size, 3), and its prompt: of six, two circles and four scenes, one in all colours."""
    palette = PALETTES[settings.palette]
    if index % 3 == 0:
        sample = draw_fill(index, settings.size, settings.seed, palette)
        return sample.target, sample.prompt
    scene = describe_scene(index, settings.seed, PALETTES[settings.vae_palette] if index % 6 == 1 else palette)
    return draw_scene(scene, settings.size), scene.prompt


class Pictures(IterableDataset):
    """An endless stream of pictures, `{"image": (size, size, 3) float32 in [-1, 1]}`, from number `start` on."""

    def __init__(self, settings: Settings, size: int, start: int) -> None:
        self.settings = settings
        self.size = size
        self.start = start

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        index = self.start
        while True:
            picture = draw_for_autoencoder(index, self.size, self.settings)
            yield {"image": torch.from_numpy(picture.astype(np.float32) / 127.5 - 1)}
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
    trainer = make_trainer(
        max_steps=steps,
        logger=MetricsFile(folder),
        callbacks=[checkpoint],
        accelerator="auto",
        devices=1,
        precision=precision,
        gradient_clip_val=1.0,
        enable_model_summary=False,
        log_every_n_steps=20,
    )
    with ctrl_c_is_an_exception(trainer):
        trainer.fit(model, DataLoader(data, batch_size=batch_size), ckpt_path=last if last.exists() else None)


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


def train_autoencoder(config: dict, settings: Settings) -> AutoencoderKL:
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
    if settings.compile:
        model.encoder.compile()
        model.decoder.compile()
    # The pictures are counted from a million on, far from all data sets, and none comes twice.
    for name, size, batch, steps, start in (
        ("autoencoder_half", settings.size // 2, settings.vae_batch * 2, settings.vae_half_steps, 1_000_000),
        ("autoencoder", settings.size, settings.vae_batch, settings.vae_steps, 2_000_000),
    ):
        model.scheduler_config = warm_up_cosine(steps)
        fit(
            model,
            Pictures(settings, size, start),
            batch,
            steps,
            settings.vae_precision,
            Path(settings.work) / name,
            settings,
        )
    return model.eval().requires_grad_(False)


@torch.no_grad()
def cache_latents(autoencoder: AutoencoderKL, settings: Settings) -> tuple[Tensor, Tensor, list[str]]:
    """Posterior means and deviations, (N, 4, h, w) each, and prompts of `settings.latents` pictures."""
    path = Path(settings.work) / "latents.safetensors"
    numbers = range(3_000_000, 3_000_000 + settings.latents)
    if not path.is_file():
        means, stds, prompts = [], [], list[str]()
        for start in range(0, settings.latents, 100):
            targets, texts = zip(*(draw_with_prompt(i, settings) for i in numbers[start : start + 100]), strict=True)
            prompts += texts
            images = torch.from_numpy(np.stack(targets).astype(np.float32) / 127.5 - 1).permute(0, 3, 1, 2)
            posterior = autoencoder.encode(images.to(autoencoder.device))
            means.append(posterior.mean.cpu())
            stds.append(posterior.std.cpu())
        tensors = {"mean": torch.cat(means), "std": torch.cat(stds)}
        write_weights(path, tensors, {"prompts": json.dumps(prompts)}, progress=False)
    with open_weights(path) as cached:
        return cached["mean"].read(), cached["std"].read(), json.loads(cached.metadata["prompts"])


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
    if settings.compile:
        model.model.diffusion_model.compile()
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
        "title": "tiny base of circles and scenes of shapes, trained by this project on generated pictures",
        "command": "python " + " ".join([Path(__file__).name, *sys.argv[1:]]),
        "settings": json.dumps(asdict(settings)),
        "scale_factor": f"{scale:.5f}",
        "versions": json.dumps(
            {"torch": torch.__version__, "pytorch_lightning": pl.__version__, "python": sys.version.split()[0]}
        ),
        "license": "Apache-2.0",
    }
    write_weights(settings.out, entries, provenance, torch.float16, keep=SCHEDULE_KEYS, overwrite=True)


def train(settings: Settings) -> None:
    """Both stages, and the file."""
    check_counts(
        settings,
        ("vae_half_steps", "vae_steps", "vae_batch", "latents", "unet_steps", "unet_batch", "save_every"),
    )
    if settings.size < 64 or settings.size % 64:
        raise ConfigError(f"size must be a multiple of 64, found {settings.size}")
    for name in ("vae_precision", "unet_precision"):
        check_precision(getattr(settings, name), name)
    for name in ("vae_lr", "unet_lr"):
        if not 0 < getattr(settings, name) < float("inf"):
            raise ConfigError(f"{name} must be positive, found {getattr(settings, name)}")
    for name, highest in (("vae_kl_weight", float("inf")), ("empty_prompts", 1), ("threads", 1024)):
        if not 0 <= getattr(settings, name) <= highest:
            raise ConfigError(f"{name} must be between 0 and {highest}, found {getattr(settings, name)}")
    for name in ("vae_half_steps", "vae_steps", "unet_steps"):
        if getattr(settings, name) < 2:
            raise ConfigError(f"{name} must be at least 2, of which one warms up, found {getattr(settings, name)}")
    config = load_config(settings.config).model
    for palette in (settings.palette, settings.vae_palette):
        palette_named(palette)
    out, work = Path(settings.out), Path(settings.work)
    # Stages build on one another, so that all in `work` must be of the same settings.
    stages = [*work.glob("*/last.ckpt"), *work.glob("latents.*")]
    if stages and not is_continued(work / "settings.json", settings, MAY_CHANGE):
        raise ConfigError(f"{work} holds stages of unknown settings; choose another folder with work=")
    out.parent.mkdir(parents=True, exist_ok=True)
    check_output(out, overwrite=True)
    write_settings(work / "settings.json", settings)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    pl.seed_everything(settings.seed)
    autoencoder = train_autoencoder(config.params.first_stage_config, settings)
    mean, std, prompts = cache_latents(autoencoder, settings)
    # Latents of standard deviation 1: mean + std * noise has the variance of the means plus the mean of the variances.
    scale = round(float((mean.var() + std.square().mean()).rsqrt()), 4)
    pl.seed_everything(settings.seed)
    diffusion = train_diffusion(config, settings, mean, std, prompts, scale)
    write_base(autoencoder, diffusion, scale, settings)
    logging.info(
        "wrote %s (%.1f MB); to use it, set scale_factor: %g in the YAML of %s and copy it over models/cldm_tiny.safetensors, or name it "
        "in base= of training, and your copy of the YAML in config=",
        out,
        out.stat().st_size / 1e6,
        scale,
        settings.config,
    )


def main(argv: list[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    arguments = sys.argv[1:] if argv is None else argv
    if any(a in ("-h", "--help") for a in arguments):
        print(__doc__, explain(Settings), sep="\n")
        return 0
    return run_command(
        "tool_train_tiny.py",
        lambda: train(override(Settings(), arguments)),
        interrupted="interrupted; the same command goes on where it stopped",
    )


if __name__ == "__main__":
    sys.exit(main())
