"""Training of diffusion models, as Lightning modules: in pixels (DDPM) and in an autoencoder's latents (LatentDiffusion).

Ho et al. 2020 ("DDPM"); Rombach et al. 2022 ("LDM"). The process itself is in `process.py`, the samplers in files of their own.

Shapes: B batch, C h w the diffused picture or latent, M tokens of the context.
"""

import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.lr_scheduler import with_schedule
from ldm.models.diffusion.ancestral import AncestralSampling, ConditionalAncestralSampling
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.guidance import Conditioning
from ldm.models.diffusion.process import DiffusionProcess
from ldm.models.weights import load_weights
from ldm.modules.diffusionmodules.util import mean_flat
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.ema import LitEma, ema_weights
from ldm.util import (
    ConfigError,
    MissingEntryError,
    default,
    get_obj_from_str,
    images_to_nchw,
    instantiate_from_config,
    log_txt_as_img,
)

logger = logging.getLogger(__name__)

TEXT_KEYS = ("txt", "caption", "coordinates_bbox")  # entries are taken as they are, encoded texts too
CLASS_KEYS = ("class_label", "cls")  # under these the conditioning's encoder gets the whole batch
LossTerms = dict[str, Tensor]


class DiffusionWrapper(pl.LightningModule):
    """The noise predictor, given its conditioning in the way that `conditioning_key` names.

    Args:
        diff_model_config: the UNet's configuration.
        conditioning_key: None, `concat` (channels), `crossattn` (context tokens), `hybrid` (both), `adm` (class label),
            `hybrid-adm` or `crossattn-adm`.
    """

    KEYS = (None, "concat", "crossattn", "hybrid", "adm", "hybrid-adm", "crossattn-adm")

    def __init__(self, diff_model_config: Mapping[str, Any], conditioning_key: str | None) -> None:
        super().__init__()
        if conditioning_key not in self.KEYS:
            raise ConfigError(f"conditioning_key must be one of {self.KEYS}, found {conditioning_key!r}")
        self.diffusion_model = instantiate_from_config(diff_model_config)
        self.conditioning_key = conditioning_key

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        c_concat: Sequence[Tensor] | None = None,
        c_crossattn: Sequence[Tensor] | None = None,
        c_adm: Tensor | None = None,
    ) -> Tensor:
        """x (B, C, h, w), t (B,), lists of (B, C', h, w) and of (B, M, D), labels (B,) -> (B, C, h, w)."""
        key = self.conditioning_key or ""
        arguments: dict[str, Tensor | None] = {}
        if key.startswith(("concat", "hybrid")):
            x = torch.cat([x, *_given(c_concat, "c_concat", key)], dim=1)
        if key.startswith(("crossattn", "hybrid")):
            arguments["context"] = torch.cat(_given(c_crossattn, "c_crossattn", key), dim=1)
        if key.endswith("adm"):
            in_context = key == "adm" and c_adm is None
            arguments["y"] = _given(c_crossattn, "c_adm", key)[0] if in_context else c_adm
        return self.diffusion_model(x, t, **arguments)


def _given(conditioning: Sequence[Tensor] | None, name: str, key: str) -> list[Tensor]:
    """A conditioning that a model with this `conditioning_key` cannot do without."""
    if conditioning is None:
        raise ValueError(f"a model with conditioning_key {key!r} needs {name} in its conditioning")
    return list(conditioning)


def take_start(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Take the arguments of `DDPM._start_from` out of `kwargs`.

    Starting weights fill all modules, so a subclass that adds some calls it when these are there, and not its base class.
    """
    names = ("ckpt_path", "ignore_keys", "load_only_unet", "reset_ema", "reset_num_ema_updates")
    return {"ckpt_path": None} | {name: kwargs.pop(name) for name in names if name in kwargs}


class DDPM(AncestralSampling, DiffusionProcess, pl.LightningModule):
    """Gaussian diffusion in picture space.

    Args:
        unet_config: the noise predictor.
        timesteps: number of steps T.
        beta_schedule, linear_start, linear_end, cosine_s, given_betas: see `make_beta_schedule`; or the betas themselves.
        loss_type: `l2` or `l1`.
        ckpt_path, ignore_keys, load_only_unet: weights to start from.
        monitor: metric that checkpoint callbacks should watch.
        use_ema: keep a moving average of the UNet in `model_ema`.
        first_stage_key: name of the pictures in a batch.
        image_size: height and width, or both, of what is diffused.
        channels: of what is diffused.
        log_every_t: how often sampling keeps an intermediate result.
        clip_denoised: clip predicted pictures to [-1, 1] in ancestral sampling.
        original_elbo_weight: weight of the variational bound beside the simple loss.
        v_posterior: see `diffusion_quantities`.
        l_simple_weight: weight of the simple loss.
        conditioning_key: see DiffusionWrapper.
        parameterization: what the network predicts, `eps`, `x0` or `v`.
        scheduler_config: a learning-rate schedule, an object with `schedule(step) -> factor`.
        use_positional_encodings: accepted for compatibility.
        learn_logvar, logvar_init: the log-variance of the loss by timestep, and whether it is trained.
        make_it_fit: accepted for compatibility; must be False.
        ucg_training: conditioning key -> {`p`: probability, `val`: value put in its place} for classifier-free guidance.
        reset_ema, reset_num_ema_updates: start the moving average again after loading weights.
    """

    def __init__(
        self,
        unet_config: Mapping[str, Any],
        timesteps: int = 1000,
        beta_schedule: str = "linear",
        loss_type: str = "l2",
        ckpt_path: str | None = None,
        ignore_keys: Sequence[str] = (),
        load_only_unet: bool = False,
        monitor: str | None = "val/loss",
        use_ema: bool = True,
        first_stage_key: str = "image",
        image_size: int | Sequence[int] = 256,
        channels: int = 3,
        log_every_t: int = 100,
        clip_denoised: bool = True,
        linear_start: float = 1e-4,
        linear_end: float = 2e-2,
        cosine_s: float = 8e-3,
        given_betas: Sequence[float] | None = None,
        original_elbo_weight: float = 0.0,
        v_posterior: float = 0.0,
        l_simple_weight: float = 1.0,
        conditioning_key: str | None = None,
        parameterization: str = "eps",
        scheduler_config: Mapping[str, Any] | None = None,
        use_positional_encodings: bool = False,
        learn_logvar: bool = False,
        logvar_init: float = 0.0,
        make_it_fit: bool = False,
        ucg_training: Mapping[str, Mapping[str, Any]] | None = None,
        reset_ema: bool = False,
        reset_num_ema_updates: bool = False,
    ) -> None:
        super().__init__(
            beta_schedule, timesteps, linear_start, linear_end, cosine_s, given_betas, parameterization, v_posterior
        )
        if loss_type not in ("l1", "l2"):
            raise ConfigError(f"loss_type must be l1 or l2, found {loss_type!r}")
        if make_it_fit:
            raise ConfigError(
                "make_it_fit (resizing weights of another shape) is not supported; convert the checkpoint instead"
            )
        self.loss_type = loss_type
        self.clip_denoised = clip_denoised
        self.log_every_t = log_every_t
        self.first_stage_key = first_stage_key
        self.image_size = image_size
        self.channels = channels
        self.use_positional_encodings = use_positional_encodings
        self.original_elbo_weight = original_elbo_weight
        self.l_simple_weight = l_simple_weight
        self.learn_logvar = learn_logvar
        self.scheduler_config = scheduler_config
        self.ucg_training = dict(ucg_training or {})
        # What training scripts set:
        self.learning_rate = 1e-4
        self.optimizer_config: Mapping[str, Any] | None = None  # AdamW
        self.min_snr = 0.0  # gamma of the min-SNR weights; 0 for equal weights
        self.noise_offset = 0.0  # share of the noise that is constant over a picture
        # Timesteps and unweighted losses (B,) of the last batch.
        self.sample_losses: tuple[Tensor, Tensor] | None = None
        if monitor is not None:
            self.monitor = monitor

        self.model = DiffusionWrapper(unet_config, conditioning_key)
        self.use_ema = use_ema
        if use_ema:
            self.model_ema = LitEma(self.model)
        logvar = np.full(self.num_timesteps, logvar_init, dtype=np.float32)
        if learn_logvar:
            self.logvar = nn.Parameter(torch.from_numpy(logvar))
        else:
            self.register_float32("logvar", logvar)
        self._start_from(ckpt_path, ignore_keys, load_only_unet, reset_ema, reset_num_ema_updates)

    def _start_from(
        self,
        ckpt_path: str | None,
        ignore_keys: Sequence[str] = (),
        load_only_unet: bool = False,
        reset_ema: bool = False,
        reset_num_ema_updates: bool = False,
    ) -> None:
        """Last step of construction, when all modules are there: starting weights, and what becomes of the average."""
        self.restarted_from_ckpt = ckpt_path is not None
        if ckpt_path is not None:
            self.init_from_ckpt(ckpt_path, ignore_keys, load_only_unet)
            if reset_ema and self.use_ema:
                self.model_ema = LitEma(self.averaged_module())
        if reset_num_ema_updates and self.use_ema:
            self.model_ema.reset_num_updates()

    def init_from_ckpt(self, path: str, ignore_keys: Sequence[str] = (), only_model: bool = False) -> None:
        """Load what fits of a weights file; the average begins at the loaded weights where the file has none.

        Args:
            path: safetensors or torch file.
            ignore_keys: beginnings of keys to leave out.
            only_model: load the UNet's entries alone, with or without `model.` before their keys.

        Raises:
            ConfigError: the file cannot be read, has entries of another shape, or none that fits.
        """
        module, prefix = (self.model, "model.") if only_model else (self, "")
        missing = load_weights(module, path, ignore_keys, prefix)
        if self.use_ema and (only_model or "model_ema.num_updates" in missing):
            self.model_ema = LitEma(self.averaged_module())

    # -- loss ---------------------------------------------------------------------------------------

    def get_loss(self, pred: Tensor, target: Tensor, mean: bool = True) -> Tensor:
        """Squared or absolute error, averaged or elementwise."""
        error = (target - pred).abs() if self.loss_type == "l1" else F.mse_loss(target, pred, reduction="none")
        return error.mean() if mean else error

    def draw_steps_and_noise(self, x_start: Tensor) -> tuple[Tensor, Tensor]:
        """What a training step draws for x_start (B, C, h, w): timesteps (B,) and noise (B, C, h, w).

        With `noise_offset`, a share of the noise is constant over each channel of a picture, which lets a model learn very dark
        and very bright pictures (N. Guttenberg, "Diffusion with offset noise", 2023).
        """
        t = torch.randint(0, self.num_timesteps, (x_start.shape[0],), device=self.betas.device)
        noise = torch.randn_like(x_start)
        if self.noise_offset:
            noise = noise + self.noise_offset * torch.randn_like(x_start[:, :, :1, :1])
        return t, noise

    def loss_weights(self, t: Tensor) -> Tensor | None:
        """Weights (B,) of the errors at t (B,): min(SNR, `min_snr`) for an error in x_0 (Hang et al. 2023, eq. 8); None for equal ones."""
        if not self.min_snr:
            return None
        alpha = self.alphas_cumprod[t]
        snr = alpha / (1 - alpha)
        # A squared error in eps is SNR times that in x_0, one in v (SNR + 1) times.
        units: dict[str, Tensor | float] = {"x0": 1.0, "eps": snr, "v": snr + 1}
        return snr.clamp(max=self.min_snr) / units[self.parameterization]

    def p_losses(
        self, x_start: Tensor, t: Tensor, noise: Tensor | None = None, cond: Conditioning = None
    ) -> tuple[Tensor, LossTerms]:
        """The training loss for x_start (B, C, h, w) at t (B,) (DDPM, eq. 14), and its named terms."""
        noise = torch.randn_like(x_start) if noise is None else noise
        output = self.apply_model(self.q_sample(x_start, t, noise), t, cond)
        error = self.get_loss(output, self.loss_target(x_start, noise, t), mean=False)
        return self._total_loss(mean_flat(error), t)

    def _total_loss(self, errors: Tensor, t: Tensor) -> tuple[Tensor, LossTerms]:
        """Errors (B,) at t (B,) -> the loss, and its terms."""
        prefix = "train" if self.training else "val"
        self.sample_losses = t, errors.detach()
        terms = {f"{prefix}/loss_simple": errors.mean()}
        loss, more = self._divide_by_variance(errors, t)
        terms |= {name.format(prefix=prefix): value for name, value in more.items()}
        weights = self.loss_weights(t)
        variational = (self.lvlb_weights[t] * errors).mean()
        loss = loss if weights is None else weights * loss
        loss = self.l_simple_weight * loss.mean() + self.original_elbo_weight * variational
        terms |= {f"{prefix}/loss_vlb": variational, f"{prefix}/loss": loss}
        return loss, {name: value.detach() for name, value in terms.items()}

    def _divide_by_variance(self, errors: Tensor, t: Tensor) -> tuple[Tensor, LossTerms]:
        """Errors (B,) at t (B,) as `logvar` weighs them, and more terms. In pixels `logvar` is not used, as published."""
        return errors, {}

    # -- training with Lightning --------------------------------------------------------------------

    def apply_model(self, x_noisy: Tensor, t: Tensor, cond: Conditioning = None) -> Tensor:
        """The network's output (B, C, h, w) for x_noisy (B, C, h, w) at t (B,)."""
        return self.model(x_noisy, t)

    def forward(self, x: Tensor, noise: Tensor | None = None) -> tuple[Tensor, LossTerms]:
        """The loss at random timesteps."""
        t, drawn = self.draw_steps_and_noise(x)
        return self.p_losses(x, t, default(noise, drawn))

    def get_input(self, batch: Mapping[str, Any], k: str) -> Any:
        """The pictures of a batch, (B, H, W, C) -> float32 (B, C, H, W)."""
        if k not in batch:
            raise MissingEntryError(f"the batch has no {k!r}; it has {', '.join(map(repr, batch))}")
        return images_to_nchw(batch[k])

    def shared_step(self, batch: Mapping[str, Any]) -> tuple[Tensor, LossTerms]:
        """The loss of a batch."""
        return self(self.get_input(batch, self.first_stage_key))

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        loss, terms = self.shared_step(self._drop_conditioning(batch))
        size = batch_size_of(batch)
        self.log_dict(terms, prog_bar=True, logger=True, on_step=True, on_epoch=True, batch_size=size)
        self.log(
            "global_step",
            float(self.global_step),
            prog_bar=False,
            logger=True,
            on_step=True,
            on_epoch=False,
            batch_size=size,
        )
        if self.scheduler_config is not None:
            optimizers = self.optimizers()
            optimizer = optimizers[0] if isinstance(optimizers, list) else optimizers
            self.log(
                "lr_abs",
                optimizer.param_groups[0]["lr"],
                prog_bar=True,
                on_step=True,
                on_epoch=False,
                batch_size=size,
            )
        return loss

    def _drop_conditioning(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        """The batch with conditionings replaced at random, as `ucg_training` says (classifier-free guidance, Ho and Salimans 2021)."""
        rules = {key: rule for key, rule in self.ucg_training.items() if rule["p"] > 0}
        if not rules:
            return batch
        batch = dict(batch)
        for key, rule in rules.items():
            value = default(rule.get("val"), "")
            entries = batch[key]
            drawn = torch.rand(len(entries), device=self.device) < rule["p"]
            if isinstance(entries, Tensor):  # class labels
                drawn = drawn.to(entries.device).reshape(-1, *((1,) * (entries.dim() - 1)))
                batch[key] = torch.where(drawn, torch.as_tensor(value).to(entries), entries)
            else:
                batch[key] = [value if drop else entry for drop, entry in zip(drawn.tolist(), entries, strict=True)]
        return batch

    @torch.no_grad()
    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        size = batch_size_of(batch)
        _, terms = self.shared_step(batch)
        self.log_dict(terms, prog_bar=False, logger=True, on_step=False, on_epoch=True, batch_size=size)
        if self.use_ema:
            with self.ema_scope():
                _, terms = self.shared_step(batch)
        # Without an average these are the plain ones: published configurations watch them all the same.
        averaged = {f"{name}_ema": value for name, value in terms.items()}
        self.log_dict(averaged, prog_bar=False, logger=True, on_step=False, on_epoch=True, batch_size=size)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        # Without gradients the step was left out, and the weights are those that the average has had already.
        if self.use_ema and any(p.grad is not None for p in self.trained_parameters()):
            self.model_ema(self.averaged_module())

    def averaged_module(self) -> nn.Module:
        """Whose trainable parameters `model_ema` averages."""
        return self.model

    def ema_scope(self, context: str | None = None) -> AbstractContextManager[None]:
        """Inside it trained weights are their moving average, if one is kept; `context` is accepted for compatibility."""
        return ema_weights(self.model_ema, self.averaged_module()) if self.use_ema else nullcontext()

    def trained_parameters(self) -> list[nn.Parameter]:
        """What the optimizer changes."""
        return list(self.model.parameters()) + ([self.logvar] if self.learn_logvar else [])

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What the optimizer changes, as groups for it."""
        return [{"params": self.trained_parameters()}]

    def configure_optimizers(self) -> Any:
        """AdamW at `self.learning_rate`, or the optimizer of `optimizer_config` (`target` and `params`), with the learning-rate
        schedule of `scheduler_config` if there is one."""
        groups = self.parameter_groups()
        if self.optimizer_config is not None:
            kind = get_obj_from_str(self.optimizer_config["target"])
            optimizer = kind(groups, lr=self.learning_rate, **self.optimizer_config.get("params", {}))
        else:
            parameters = [p for group in groups for p in group["params"]]
            optimizer = torch.optim.AdamW(
                groups, lr=self.learning_rate, fused=self._fused_step_helps(parameters) or None
            )
        return with_schedule(optimizer, self.scheduler_config)

    def _fused_step_helps(self, parameters: Sequence[nn.Parameter]) -> bool:
        """Whether AdamW's fused step is to be used: three times as fast on a CPU, where torch's default is a plain loop.

        Not with a gradient scaler, which a fused optimizer bypasses, nor where Lightning refuses to clip its gradients.
        """
        try:
            precision, clips = str(self.trainer.precision), bool(self.trainer.gradient_clip_val)
        except RuntimeError:  # no trainer: the caller's own loop
            precision, clips = "", False
        allowed = not precision.startswith("16") and not ("mixed" in precision and clips)
        return allowed and all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in parameters)

    @torch.no_grad()
    def log_images(
        self,
        batch: Mapping[str, Any],
        N: int = 8,
        n_row: int = 2,
        sample: bool = True,
        return_keys: Sequence[str] | None = None,
        split: str | None = None,
    ) -> dict[str, Tensor]:
        """Pictures for a logger: inputs, their noised versions and samples, (B, C, h, w); `split` is accepted for compatibility."""
        x = self.get_input(batch, self.first_stage_key)[:N].to(self.device)
        log = {"inputs": x}
        log["diffusion_row"] = rows_of_steps(self._noised_steps(x[:n_row]))
        if sample:
            with self.ema_scope():
                log["samples"], kept = self.sample(batch_size=len(x), return_intermediates=True)
            log["denoise_row"] = rows_of_steps(kept)
        return chosen(log, return_keys)

    def _noised_steps(self, x: Tensor) -> list[Tensor]:
        """x (B, C, h, w) noised to every `log_every_t`-th timestep, and to the last."""
        last = self.num_timesteps - 1
        steps = [i for i in range(self.num_timesteps) if i % self.log_every_t == 0 or i == last]
        return [self.q_sample(x, torch.full((len(x),), i, device=x.device)) for i in steps]


class LatentDiffusion(ConditionalAncestralSampling, DDPM):
    """Diffusion in the latents of a first stage, conditioned on what a second encoder makes of a batch entry.

    Args:
        first_stage_config: the autoencoder; its weights stay fixed.
        cond_stage_config: the conditioning's encoder, or `__is_first_stage__` or `__is_unconditional__`.
        num_timesteps_cond: accepted for compatibility; must be None or 1.
        cond_stage_key: name of the conditioning in a batch.
        cond_stage_trainable: train that encoder too.
        concat_mode: choose `concat` rather than `crossattn` where no conditioning_key is given.
        cond_stage_forward: name of the method that encodes; by default `encode`, or the call itself.
        conditioning_key: see DiffusionWrapper.
        scale_factor: multiplies latents (0.18215 for Stable Diffusion).
        scale_by_std: set it from the first batch's standard deviation instead.
        force_null_conditioning: keep conditioning_key although the model is unconditional.
        *args, **kwargs: see DDPM.
    """

    scale_factor: float | Tensor  # a buffer with `scale_by_std`

    def __init__(
        self,
        first_stage_config: Mapping[str, Any],
        cond_stage_config: Mapping[str, Any] | str,
        num_timesteps_cond: int | None = None,
        cond_stage_key: str = "image",
        cond_stage_trainable: bool = False,
        concat_mode: bool = True,
        cond_stage_forward: str | None = None,
        conditioning_key: str | None = None,
        scale_factor: float = 1.0,
        scale_by_std: bool = False,
        force_null_conditioning: bool = False,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        if (num_timesteps_cond or 1) != 1:
            raise ConfigError("num_timesteps_cond above 1 (noised conditioning) is not supported")
        if conditioning_key is None:
            conditioning_key = "concat" if concat_mode else "crossattn"
        if cond_stage_config == "__is_unconditional__" and not force_null_conditioning:
            conditioning_key = None
        start = take_start(kwargs)
        super().__init__(*args, **kwargs | {"conditioning_key": conditioning_key})
        self.clip_denoised = False  # latents are not confined to [-1, 1]
        self.num_timesteps_cond = 1
        self.concat_mode = concat_mode
        self.cond_stage_trainable = cond_stage_trainable
        self.cond_stage_key = cond_stage_key
        self.cond_stage_forward = cond_stage_forward
        self.force_null_conditioning = force_null_conditioning
        self.scale_by_std = scale_by_std
        if not scale_factor > 0:
            raise ConfigError(f"scale_factor must be positive, found {scale_factor}")
        if scale_by_std:
            self.register_float32("scale_factor", float(scale_factor))
        else:
            self.scale_factor = scale_factor
        self.instantiate_first_stage(first_stage_config)
        self.instantiate_cond_stage(cond_stage_config)
        self._start_from(**start)

    def instantiate_first_stage(self, config: Mapping[str, Any]) -> None:
        """Build the autoencoder and lock it."""
        self.first_stage_model = instantiate_from_config(config).eval().requires_grad_(False)

    def instantiate_cond_stage(self, config: Mapping[str, Any] | str) -> None:
        """Build the conditioning's encoder, locked unless it is to be trained."""
        if config == "__is_first_stage__":
            self.cond_stage_model = self.first_stage_model
            return
        self.cond_stage_model = instantiate_from_config(config)
        if self.cond_stage_model is not None and not self.cond_stage_trainable:
            self.cond_stage_model.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> "LatentDiffusion":
        """Training mode, but for what stays fixed: the first stage and an untrained conditioning encoder."""
        super().train(mode)
        self.first_stage_model.eval()
        if self.cond_stage_model is not None and not self.cond_stage_trainable:
            self.cond_stage_model.eval()
        return self

    # -- first stage ----------------------------------------------------------------------------------

    @torch.no_grad()
    def on_train_batch_start(self, batch: Mapping[str, Any], batch_idx: int, *args: Any) -> None:
        if (
            self.scale_by_std
            and self.current_epoch == 0
            and self.global_step == 0
            and batch_idx == 0
            and not self.restarted_from_ckpt
        ):
            if float(self.scale_factor) != 1.0:
                raise ConfigError("scale_by_std sets scale_factor itself; leave that at 1.0")
            images = super().get_input(batch, self.first_stage_key).to(self.device)
            latents = self.get_first_stage_encoding(self.encode_first_stage(images)).detach()
            torch.as_tensor(self.scale_factor).fill_(1.0 / latents.std())
            logger.info(
                "scale_factor set to %.5f, the inverse of the latents' standard deviation", float(self.scale_factor)
            )

    def get_first_stage_encoding(self, encoder_posterior: DiagonalGaussianDistribution | Tensor) -> Tensor:
        """A sample of the posterior (B, C, h, w), times `scale_factor`."""
        if isinstance(encoder_posterior, DiagonalGaussianDistribution):
            return self.scale_factor * encoder_posterior.sample()
        return self.scale_factor * encoder_posterior

    @torch.no_grad()
    def encode_first_stage(self, x: Tensor) -> DiagonalGaussianDistribution | Tensor:
        """Pictures (B, C, H, W) in [-1, 1] -> the posterior over latents."""
        return self.first_stage_model.encode(x)

    def differentiable_decode_first_stage(self, z: Tensor) -> Tensor:
        """Scaled latents (B, C, h, w) -> pictures (B, C, H, W), about in [-1, 1]."""
        return self.first_stage_model.decode(z / self.scale_factor)

    @torch.no_grad()
    def decode_first_stage(self, z: Tensor, predict_cids: bool = False, force_not_quantize: bool = False) -> Tensor:
        """The same without gradients; the options, for codebooks, are accepted for compatibility."""
        if predict_cids:
            raise NotImplementedError("there is no first stage with a codebook, whose entries predict_cids would take")
        return self.differentiable_decode_first_stage(z)

    # -- conditioning -----------------------------------------------------------------------------------

    def get_learned_conditioning(self, c: Any) -> Any:
        """What the conditioning's encoder makes of a batch entry, (B, M, D) for texts."""
        if self.cond_stage_forward is not None:
            return getattr(self.cond_stage_model, self.cond_stage_forward)(c)
        encode = getattr(self.cond_stage_model, "encode", None)
        encoded = encode(c) if callable(encode) else self.cond_stage_model(c)
        return encoded.mode() if isinstance(encoded, DiagonalGaussianDistribution) else encoded

    def get_unconditional_conditioning(self, batch_size: int, null_label: Any = None) -> Any:
        """The conditioning of nothing, for `batch_size` items.

        Args:
            null_label: a text, or whatever the conditioning's encoder takes, for one item or for all; by default the empty
                text or, with `cond_stage_key` class_label or cls, what the encoder's `get_unconditional_conditioning` gives.
        """
        if null_label is None and self.cond_stage_key in CLASS_KEYS:
            return self.get_learned_conditioning(
                self.cond_stage_model.get_unconditional_conditioning(batch_size, device=self.device)
            )
        if null_label is None or isinstance(null_label, str):
            return self.get_learned_conditioning([default(null_label, "")] * batch_size)
        label = null_label.to(self.device) if isinstance(null_label, Tensor) else null_label
        label = label if isinstance(label, (Mapping, Tensor)) else list(label)
        encoded = self.get_learned_conditioning(label)
        return encoded if len(encoded) == batch_size else encoded.expand(batch_size, *encoded.shape[1:])

    @torch.no_grad()
    def get_input(
        self,
        batch: Mapping[str, Any],
        k: str,
        return_first_stage_outputs: bool = False,
        force_c_encode: bool = False,
        cond_key: str | None = None,
        return_original_cond: bool = False,
        bs: int | None = None,
        return_x: bool = False,
    ) -> list[Any]:
        """A batch -> [latents (B, C, h, w), conditioning, and what is asked for].

        Args:
            batch: with the pictures (B, H, W, C) under `k` and the conditioning under `cond_key`.
            k: the pictures' name.
            return_first_stage_outputs: append pictures and reconstructions, (B, C, H, W).
            force_c_encode: encode the conditioning also where its encoder is trained; that is else done with the loss.
            cond_key: by default `cond_stage_key`. Texts are taken as they are, pictures as (B, H, W, C), and under
                class_label or cls the encoder gets the whole batch.
            return_original_cond: append what was encoded.
            bs: take only the first few.
            return_x: append the pictures.
        """
        x = super().get_input(batch, k)[:bs].to(self.device)
        z = self.get_first_stage_encoding(self.encode_first_stage(x)).detach()
        original = c = None
        if self.model.conditioning_key is not None and self.cond_stage_model is not None:
            original = c = self._conditioning_of(batch, cond_key or self.cond_stage_key, x)
            if not isinstance(c, Mapping):
                original = c = c[:bs]
            if not self.cond_stage_trainable or force_c_encode:
                c = self.get_learned_conditioning(c)
                c = c[:bs] if isinstance(original, Mapping) else c
        out = [z, c]
        if return_first_stage_outputs:
            out += [x, self.decode_first_stage(z)]
        if return_x:
            out.append(x)
        if return_original_cond:
            out.append(original)
        return out

    def _conditioning_of(self, batch: Mapping[str, Any], key: str, x: Tensor) -> Any:
        """What the conditioning's encoder is to get: texts, the pictures x themselves, others, or the whole batch."""
        if key in CLASS_KEYS:
            return {name: v.to(self.device) if isinstance(v, Tensor) else v for name, v in batch.items()}
        if key == self.first_stage_key:
            return x
        if key not in batch:
            raise MissingEntryError(f"the batch has no {key!r}; it has {', '.join(map(repr, batch))}")
        entry = batch[key]
        if not isinstance(entry, Tensor):
            return list(entry)
        is_picture = key not in TEXT_KEYS and entry.dim() > 2
        return (super().get_input(batch, key) if is_picture else entry).to(self.device)

    def shared_step(self, batch: Mapping[str, Any]) -> tuple[Tensor, LossTerms]:
        """The loss of a batch."""
        x, c = self.get_input(batch, self.first_stage_key)
        return self(x, c)

    def forward(self, x: Tensor, c: Any, noise: Tensor | None = None) -> tuple[Tensor, LossTerms]:
        """The loss at random timesteps; a trainable conditioning encoder is applied here, with gradients."""
        t, drawn = self.draw_steps_and_noise(x)
        if c is not None and self.cond_stage_trainable:
            c = self.get_learned_conditioning(c)
        return self.p_losses(x, c, t, default(noise, drawn))

    def apply_model(self, x_noisy: Tensor, t: Tensor, cond: Conditioning, return_ids: bool = False) -> Tensor:
        """The network's output (B, C, h, w); `cond` is a dict of lists, or what goes under the wrapper's one key.

        `return_ids` is accepted for compatibility.
        """
        if cond is None:
            return self.model(x_noisy, t)
        if isinstance(cond, Mapping):
            return self.model(x_noisy, t, **cond)
        key = "c_concat" if self.model.conditioning_key == "concat" else "c_crossattn"
        return self.model(x_noisy, t, **{key: list(cond) if isinstance(cond, (list, tuple)) else [cond]})

    def p_losses(  # the order of arguments is the public one of this class
        self, x_start: Tensor, cond: Conditioning, t: Tensor, noise: Tensor | None = None
    ) -> tuple[Tensor, LossTerms]:
        """The training loss for latents (B, C, h, w) at t (B,), and its named terms (LDM, eq. 3)."""
        return super().p_losses(x_start, t, noise, cond)

    def _divide_by_variance(self, errors: Tensor, t: Tensor) -> tuple[Tensor, LossTerms]:
        """Errors (B,) divided by their variance at t (B,), plus its logarithm, which `learn_logvar` trains."""
        logvar = self.logvar[t]
        loss = errors / torch.exp(logvar) + logvar
        return loss, {"{prefix}/loss_gamma": loss.mean(), "logvar": self.logvar.mean()} if self.learn_logvar else {}

    def trained_parameters(self) -> list[nn.Parameter]:
        extra = list(self.cond_stage_model.parameters()) if self.cond_stage_trainable else []
        return list(self.model.parameters()) + extra + ([self.logvar] if self.learn_logvar else [])

    # -- pictures for a logger ---------------------------------------------------------------------------

    @torch.no_grad()
    def sample_log(
        self,
        cond: Conditioning,
        batch_size: int,
        ddim: bool,
        ddim_steps: int | None,
        shape: Sequence[int] | None = None,
        **options: Any,
    ) -> tuple[Tensor, Any]:
        """Latents (batch_size, *shape) and intermediates, by DDIM in `ddim_steps` steps or over all steps.

        `shape` (C, h, w) is the configured one by default; other options are those of the sampler.
        """
        shape = tuple(shape) if shape is not None else self.sample_shape()
        if ddim:
            return DDIMSampler(self).sample(ddim_steps, batch_size, shape, cond, verbose=False, **options)
        full_shape = (batch_size, *shape)
        latents, kept = self.sample(cond, shape=full_shape, return_intermediates=True, verbose=False, **options)
        return latents, kept

    @torch.no_grad()
    def log_images(
        self,
        batch: Mapping[str, Any],
        N: int = 8,
        n_row: int = 4,
        sample: bool = True,
        ddim_steps: int | None = 50,
        ddim_eta: float = 0.0,
        return_keys: Sequence[str] | None = None,
        quantize_denoised: bool = True,
        inpaint: bool = True,
        plot_denoise_rows: bool = False,
        plot_progressive_rows: bool = True,
        plot_diffusion_rows: bool = True,
        unconditional_guidance_scale: float = 1.0,
        unconditional_guidance_label: Any = None,
        use_ema_scope: bool = True,
        split: str | None = None,
    ) -> dict[str, Tensor]:
        """Pictures for a logger, (B, C, H, W): what `logged_inputs` gives, and samples with and without guidance.

        Args:
            N: number of pictures.
            n_row: number of pictures in the rows of steps.
            sample: also sample without guidance.
            ddim_steps, ddim_eta: of DDIM; `ddim_steps=None` samples over all steps, without guidance.
            return_keys: only these, where there are any of them.
            plot_diffusion_rows: add `diffusion_row`, pictures noised more and more.
            plot_denoise_rows: with `sample`, add `denoise_row`, the x_0 that DDIM predicts on its way.
            unconditional_guidance_scale: of samples with guidance; 1 or less leaves them out.
            unconditional_guidance_label: what guidance leads away from, see `get_unconditional_conditioning`.
            use_ema_scope: sample with averaged weights, where they are kept.
            quantize_denoised, inpaint, plot_progressive_rows, split: accepted for compatibility.
        """
        z, c, log = self.logged_inputs(batch, N)
        ddim = ddim_steps is not None
        steps: dict[str, Any] = {
            "ddim": ddim,
            "ddim_steps": ddim_steps,
            "shape": z.shape[1:],
            **({"eta": ddim_eta} if ddim else {}),
        }
        if plot_diffusion_rows:
            log["diffusion_row"] = self._decoded_rows(self._noised_steps(z[:n_row]))
        with self.ema_scope() if use_ema_scope else nullcontext():
            if sample:
                latents, kept = self.sample_log(c, len(z), **steps)
                log["samples"] = self.decode_first_stage(latents)
                if plot_denoise_rows and ddim:
                    log["denoise_row"] = self._decoded_rows(kept["pred_x0"])
            if unconditional_guidance_scale > 1.0 and ddim and c is not None:
                guidance: dict[str, Any] = {
                    "unconditional_guidance_scale": unconditional_guidance_scale,
                    "unconditional_conditioning": self.unconditional_like(c, len(z), unconditional_guidance_label),
                }
                latents, _ = self.sample_log(c, len(z), **steps, **guidance)
                log[f"samples_cfg_scale_{unconditional_guidance_scale:.2f}"] = self.decode_first_stage(latents)
        return chosen(log, return_keys)

    def logged_inputs(self, batch: Mapping[str, Any], count: int) -> tuple[Tensor, Any, dict[str, Tensor]]:
        """The first few latents and conditionings of a batch, encoded, and the pictures that show them."""
        z, c, x, reconstruction = self.get_input(
            batch, self.first_stage_key, bs=count, force_c_encode=True, return_first_stage_outputs=True
        )
        log = {"inputs": x, "reconstruction": reconstruction}
        if self.cond_stage_key in ("caption", "txt") and not isinstance(batch[self.cond_stage_key], Tensor):
            log["conditioning"] = drawn_prompts(batch[self.cond_stage_key][:count], x)
        return z, c, log

    def unconditional_like(self, cond: Any, count: int, null_label: Any = None) -> Any:
        """The other half of the guidance for `count` pictures with these conditionings."""
        return self.get_unconditional_conditioning(count, null_label)

    def _decoded_rows(self, steps: Sequence[Tensor]) -> Tensor:
        """Latents (B, C, h, w) of several steps as one picture; see `rows_of_steps`."""
        return rows_of_steps([self.decode_first_stage(z) for z in steps])


def batch_size_of(batch: Mapping[str, Any]) -> int:
    """Number of items in a batch."""
    return len(next(iter(batch.values())))


def drawn_prompts(prompts: Sequence[str], like: Tensor) -> Tensor:
    """Prompts drawn as pictures of the height and width of `like` (B, C, H, W)."""
    height, width = like.shape[2:]
    return log_txt_as_img((width, height), list(prompts), size=max(width // 25, 8))


def rows_of_steps(steps: Sequence[Tensor]) -> Tensor:
    """Pictures (B, C, H, W) of S steps -> one picture (C, B * H, S * W): a row for each item, a column for each step."""
    return torch.cat([torch.cat(list(step), dim=1) for step in steps], dim=2)


def chosen(log: dict[str, Tensor], keys: Sequence[str] | None) -> dict[str, Tensor]:
    """What a logger asked for by `keys`; everything, where it asked for nothing that there is."""
    return {k: v for k, v in log.items() if k in (keys or ())} or log
