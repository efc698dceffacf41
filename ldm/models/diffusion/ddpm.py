"""Denoising diffusion models as Lightning modules: in pixels (DDPM) and in an autoencoder's latents (LatentDiffusion).

Ho et al. 2020 ("DDPM"); Rombach et al. 2022 ("LDM"); v as in Salimans and Ho 2022.

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
from tqdm import tqdm

from ldm.lr_scheduler import with_schedule
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.schedule import (
    diffusion_quantities,
    extract_into_tensor,
    make_beta_schedule,
    noise_like,
    variational_weights,
)
from ldm.models.weights import load_weights
from ldm.modules.diffusionmodules.util import mean_flat
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution, normal_kl
from ldm.modules.ema import LitEma, ema_weights
from ldm.util import ConfigError, default, images_to_nchw, instantiate_from_config, log_txt_as_img

logger = logging.getLogger(__name__)

Conditioning = Tensor | Mapping[str, Sequence[Tensor] | None] | Sequence[Tensor] | None


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
        arguments: dict[str, Tensor] = {}
        if key.startswith(("concat", "hybrid")):
            x = torch.cat([x, *c_concat], dim=1)
        if key.startswith(("crossattn", "hybrid")):
            arguments["context"] = torch.cat(list(c_crossattn), dim=1)
        if key.endswith("adm"):
            arguments["y"] = c_crossattn[0] if key == "adm" and c_adm is None else c_adm
        return self.diffusion_model(x, t, **arguments)


class DDPM(pl.LightningModule):
    """Gaussian diffusion in picture space: schedule, loss, training and ancestral sampling.

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
        super().__init__()
        if parameterization not in ("eps", "x0", "v"):
            raise ConfigError(f"parameterization must be eps, x0 or v, found {parameterization!r}")
        if loss_type not in ("l1", "l2"):
            raise ConfigError(f"loss_type must be l1 or l2, found {loss_type!r}")
        if make_it_fit:
            raise ConfigError(
                "make_it_fit (resizing weights of another shape) is not supported; convert the checkpoint instead"
            )
        self.parameterization = parameterization
        self.loss_type = loss_type
        self.clip_denoised = clip_denoised
        self.log_every_t = log_every_t
        self.first_stage_key = first_stage_key
        self.image_size = image_size
        self.channels = channels
        self.use_positional_encodings = use_positional_encodings
        self.v_posterior = v_posterior
        self.original_elbo_weight = original_elbo_weight
        self.l_simple_weight = l_simple_weight
        self.learn_logvar = learn_logvar
        self.scheduler_config = scheduler_config
        self.ucg_training = dict(ucg_training or {})
        self.learning_rate = 1e-4  # set by training scripts
        if monitor is not None:
            self.monitor = monitor

        self.model = DiffusionWrapper(unet_config, conditioning_key)
        self.use_ema = use_ema
        if use_ema:
            self.model_ema = LitEma(self.model)
        self.register_schedule(given_betas, beta_schedule, timesteps, linear_start, linear_end, cosine_s)
        logvar = _float32(np.full(self.num_timesteps, logvar_init))
        if learn_logvar:
            self.logvar = nn.Parameter(logvar)
        else:
            self.register_buffer("logvar", logvar)
        if ckpt_path is not None:
            load_weights(self.model if load_only_unet else self, ckpt_path, ignore_keys)
            if reset_ema and use_ema:
                self.model_ema = LitEma(self.model)
        if reset_num_ema_updates and use_ema:
            self.model_ema.reset_num_updates()

    # -- schedule ---------------------------------------------------------------------------------

    def register_schedule(
        self,
        given_betas: Sequence[float] | None = None,
        beta_schedule: str = "linear",
        timesteps: int = 1000,
        linear_start: float = 1e-4,
        linear_end: float = 2e-2,
        cosine_s: float = 8e-3,
    ) -> None:
        """Compute the schedule and keep it as float32 buffers (T,), which are part of the state dict."""
        if given_betas is not None:
            betas = np.asarray(given_betas, dtype=np.float64)
        else:
            betas = make_beta_schedule(beta_schedule, timesteps, linear_start, linear_end, cosine_s)
        quantities = diffusion_quantities(betas, self.v_posterior)
        self.num_timesteps = len(betas)
        self.linear_start = linear_start
        self.linear_end = linear_end
        for name, values in quantities.items():
            self.register_buffer(name, _float32(values))
        weights = variational_weights(quantities, self.parameterization)
        self.register_buffer("lvlb_weights", _float32(weights), persistent=False)

    def _at(self, quantity: Tensor, t: Tensor, like: Tensor) -> Tensor:
        return extract_into_tensor(quantity, t, like.shape)

    # -- the forward process and its inversions -------------------------------------------------

    def q_mean_variance(self, x_start: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and log-variance of q(x_t | x_0) (DDPM, eq. 4)."""
        return (
            self._at(self.sqrt_alphas_cumprod, t, x_start) * x_start,
            self._at(1.0 - self.alphas_cumprod, t, x_start),
            self._at(self.log_one_minus_alphas_cumprod, t, x_start),
        )

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """x_t = sqrt(alpha-bar) x_0 + sqrt(1 - alpha-bar) eps (DDPM, eq. 4); (B, C, h, w) with t (B,)."""
        noise = torch.randn_like(x_start) if noise is None else noise
        return (
            self._at(self.sqrt_alphas_cumprod, t, x_start) * x_start
            + self._at(self.sqrt_one_minus_alphas_cumprod, t, x_start) * noise
        )

    def predict_start_from_noise(self, x_t: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_0 from x_t and eps."""
        return (
            self._at(self.sqrt_recip_alphas_cumprod, t, x_t) * x_t
            - self._at(self.sqrt_recipm1_alphas_cumprod, t, x_t) * noise
        )

    def predict_noise_from_start(self, x_t: Tensor, t: Tensor, x_start: Tensor) -> Tensor:
        """eps from x_t and x_0."""
        return (self._at(self.sqrt_recip_alphas_cumprod, t, x_t) * x_t - x_start) / self._at(
            self.sqrt_recipm1_alphas_cumprod, t, x_t
        )

    def get_v(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """v = sqrt(alpha-bar) eps - sqrt(1 - alpha-bar) x_0."""
        return self._at(self.sqrt_alphas_cumprod, t, x) * noise - self._at(self.sqrt_one_minus_alphas_cumprod, t, x) * x

    def predict_start_from_z_and_v(self, x_t: Tensor, t: Tensor, v: Tensor) -> Tensor:
        """x_0 = sqrt(alpha-bar) x_t - sqrt(1 - alpha-bar) v."""
        return (
            self._at(self.sqrt_alphas_cumprod, t, x_t) * x_t - self._at(self.sqrt_one_minus_alphas_cumprod, t, x_t) * v
        )

    def predict_eps_from_z_and_v(self, x_t: Tensor, t: Tensor, v: Tensor) -> Tensor:
        """eps = sqrt(alpha-bar) v + sqrt(1 - alpha-bar) x_t."""
        return (
            self._at(self.sqrt_alphas_cumprod, t, x_t) * v + self._at(self.sqrt_one_minus_alphas_cumprod, t, x_t) * x_t
        )

    def predict_eps(self, x_t: Tensor, t: Tensor, output: Tensor) -> Tensor:
        """eps from whatever the network predicts."""
        if self.parameterization == "v":
            return self.predict_eps_from_z_and_v(x_t, t, output)
        return output if self.parameterization == "eps" else self.predict_noise_from_start(x_t, t, output)

    def predict_x0(self, x_t: Tensor, t: Tensor, output: Tensor) -> Tensor:
        """x_0 from whatever the network predicts."""
        if self.parameterization == "v":
            return self.predict_start_from_z_and_v(x_t, t, output)
        return output if self.parameterization == "x0" else self.predict_start_from_noise(x_t, t, output)

    def q_posterior(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and clipped log-variance of q(x_{t-1} | x_t, x_0) (DDPM, eq. 7)."""
        mean = self._at(self.posterior_mean_coef1, t, x_t) * x_start + self._at(self.posterior_mean_coef2, t, x_t) * x_t
        return mean, self._at(self.posterior_variance, t, x_t), self._at(self.posterior_log_variance_clipped, t, x_t)

    # -- ancestral sampling -----------------------------------------------------------------------

    def predict(self, x: Tensor, t: Tensor, cond: Conditioning = None) -> Tensor:
        """The network's output for x (B, C, h, w) at t (B,)."""
        return self.model(x, t)

    def p_mean_variance(
        self, x: Tensor, t: Tensor, clip_denoised: bool, cond: Conditioning = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and log-variance of p(x_{t-1} | x_t)."""
        x_start = self.predict_x0(x, t, self.predict(x, t, cond))
        return self.q_posterior(x_start.clamp(-1, 1) if clip_denoised else x_start, x, t)

    @torch.no_grad()
    def p_sample(
        self, x: Tensor, t: Tensor, clip_denoised: bool = True, repeat_noise: bool = False, cond: Conditioning = None
    ) -> Tensor:
        """One step of ancestral sampling (DDPM, algorithm 2)."""
        mean, _, log_variance = self.p_mean_variance(x, t, clip_denoised, cond)
        noise = noise_like(x.shape, x.device, repeat_noise)
        return mean + (t > 0).reshape(-1, *((1,) * (x.dim() - 1))) * torch.exp(0.5 * log_variance) * noise

    @torch.no_grad()
    def p_sample_loop(
        self,
        shape: Sequence[int],
        return_intermediates: bool = False,
        x_T: Tensor | None = None,
        cond: Conditioning = None,
        verbose: bool = True,
        timesteps: int | None = None,
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Ancestral sampling over all steps, from noise of `shape` (B, C, h, w) or from `x_T`."""
        img = torch.randn(tuple(shape), device=self.betas.device) if x_T is None else x_T
        intermediates = [img]
        for i in tqdm(
            reversed(range(timesteps or self.num_timesteps)), total=timesteps or self.num_timesteps, disable=not verbose
        ):
            t = torch.full((shape[0],), i, device=img.device, dtype=torch.long)
            img = self.p_sample(img, t, clip_denoised=self.clip_denoised, cond=cond)
            if i % self.log_every_t == 0:
                intermediates.append(img)
        return (img, intermediates) if return_intermediates else img

    @torch.no_grad()
    def sample(self, batch_size: int = 16, return_intermediates: bool = False) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Unconditional ancestral samples (batch_size, C, h, w)."""
        return self.p_sample_loop(self._sample_shape(batch_size), return_intermediates)

    def _sample_shape(self, batch_size: int) -> tuple[int, int, int, int]:
        size = self.image_size
        height, width = (size, size) if isinstance(size, int) else size
        return batch_size, self.channels, height, width

    # -- loss ---------------------------------------------------------------------------------------

    def get_loss(self, pred: Tensor, target: Tensor, mean: bool = True) -> Tensor:
        """Squared or absolute error, averaged or elementwise."""
        error = (target - pred).abs() if self.loss_type == "l1" else F.mse_loss(target, pred, reduction="none")
        return error.mean() if mean else error

    def loss_target(self, x_start: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network should predict."""
        if self.parameterization == "v":
            return self.get_v(x_start, noise, t)
        return noise if self.parameterization == "eps" else x_start

    def p_losses(
        self, x_start: Tensor, t: Tensor, noise: Tensor | None = None, cond: Conditioning = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The training loss for x_start (B, C, h, w) at t (B,) (DDPM, eq. 14), and its named terms."""
        noise = torch.randn_like(x_start) if noise is None else noise
        output = self.predict(self.q_sample(x_start, t, noise), t, cond)
        return self._weigh(self.get_loss(output, self.loss_target(x_start, noise, t), mean=False), t)

    def _weigh(self, error: Tensor, t: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Elementwise errors (B, C, h, w) -> the loss with log-variance and variational weights."""
        prefix = "train" if self.training else "val"
        simple = mean_flat(error)  # (B,)
        logvar = self.logvar[t]
        terms = {f"{prefix}/loss_simple": simple.mean()}
        loss = simple / torch.exp(logvar) + logvar
        if self.learn_logvar:
            terms |= {f"{prefix}/loss_gamma": loss.mean(), "logvar": self.logvar.detach().mean()}
        variational = (self.lvlb_weights[t] * simple).mean()
        loss = self.l_simple_weight * loss.mean() + self.original_elbo_weight * variational
        terms |= {f"{prefix}/loss_vlb": variational, f"{prefix}/loss": loss}
        return loss, {name: value.detach() for name, value in terms.items()}

    # -- training with Lightning --------------------------------------------------------------------

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss at random timesteps."""
        t = torch.randint(0, self.num_timesteps, (x.shape[0],), device=self.betas.device)
        return self.p_losses(x, t, *args, **kwargs)

    def get_input(self, batch: Mapping[str, Any], k: str) -> Any:
        """The pictures of a batch, (B, H, W, C) -> float32 (B, C, H, W)."""
        if k not in batch:
            raise KeyError(f"the batch has no {k!r}; it has {', '.join(map(repr, batch))}")
        return images_to_nchw(batch[k])

    def shared_step(self, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch."""
        return self(self.get_input(batch, self.first_stage_key))

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        loss, terms = self.shared_step(self._drop_conditioning(batch))
        size = len(batch[self.first_stage_key])
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
            self.log(
                "lr_abs",
                self.optimizers().param_groups[0]["lr"],
                prog_bar=True,
                on_step=True,
                on_epoch=False,
                batch_size=size,
            )
        return loss

    def _drop_conditioning(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        """The batch with conditionings replaced at random, as `ucg_training` says (classifier-free guidance, Ho and Salimans 2021)."""
        if not self.ucg_training:
            return batch
        batch = dict(batch)
        for key, rule in self.ucg_training.items():
            value = rule.get("val") or ""
            drawn = torch.rand(len(batch[key])) < rule["p"]
            batch[key] = [value if drop else entry for drop, entry in zip(drawn.tolist(), batch[key], strict=True)]
        return batch

    @torch.no_grad()
    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        size = len(batch[self.first_stage_key])
        _, terms = self.shared_step(batch)
        self.log_dict(terms, prog_bar=False, logger=True, on_step=False, on_epoch=True, batch_size=size)
        if self.use_ema:
            with self.ema_scope():
                _, terms = self.shared_step(batch)
            averaged = {f"{name}_ema": value for name, value in terms.items()}
            self.log_dict(averaged, prog_bar=False, logger=True, on_step=False, on_epoch=True, batch_size=size)

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        if self.use_ema:
            self.model_ema(self.model)

    def ema_scope(self, context: str | None = None) -> AbstractContextManager[None]:
        """Inside it the UNet's weights are their moving average, if one is kept; `context` is accepted for compatibility."""
        return ema_weights(self.model_ema, self.model) if self.use_ema else nullcontext()

    def trained_parameters(self) -> list[nn.Parameter]:
        """What the optimizer changes."""
        return list(self.model.parameters()) + ([self.logvar] if self.learn_logvar else [])

    def configure_optimizers(self) -> Any:
        """AdamW at `self.learning_rate`, with the learning-rate schedule of `scheduler_config` if there is one."""
        parameters = self.trained_parameters()
        optimizer = torch.optim.AdamW(
            parameters, lr=self.learning_rate, fused=self._fused_step_helps(parameters) or None
        )
        return with_schedule(optimizer, self.scheduler_config)

    def _fused_step_helps(self, parameters: Sequence[nn.Parameter]) -> bool:
        """Whether AdamW's fused step is to be used: three times as fast on a CPU, where torch's default is a plain loop.

        Not in mixed precision, where Lightning refuses to clip the gradients of a fused optimizer.
        """
        try:
            mixed = "mixed" in str(self.trainer.precision)
        except RuntimeError:  # no trainer: the caller's own loop
            mixed = False
        return not mixed and all(p.device.type == "cpu" and p.is_floating_point() for p in parameters)

    @torch.no_grad()
    def log_images(
        self,
        batch: Mapping[str, Any],
        N: int = 8,
        n_row: int = 2,
        sample: bool = True,
        return_keys: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """Pictures for a logger: inputs, their noised versions and samples, (B, C, h, w)."""
        x = self.get_input(batch, self.first_stage_key)[:N].to(self.device)
        log = {"inputs": x}
        steps = [i for i in range(self.num_timesteps) if i % self.log_every_t == 0 or i == self.num_timesteps - 1]
        log["diffusion_row"] = torch.cat(
            [self.q_sample(x[:n_row], torch.full((len(x[:n_row]),), i, device=x.device)) for i in steps]
        )
        if sample:
            with self.ema_scope():
                log["samples"] = self.sample(batch_size=len(x))
        return {k: v for k, v in log.items() if not return_keys or k in return_keys}


class LatentDiffusion(DDPM):
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
        ckpt_path = kwargs.pop("ckpt_path", None)
        ignore_keys = kwargs.pop("ignore_keys", ())
        reset_ema = kwargs.pop("reset_ema", False)
        super().__init__(*args, conditioning_key=conditioning_key, **kwargs)
        self.num_timesteps_cond = 1
        self.concat_mode = concat_mode
        self.cond_stage_trainable = cond_stage_trainable
        self.cond_stage_key = cond_stage_key
        self.cond_stage_forward = cond_stage_forward
        self.scale_by_std = scale_by_std
        if scale_by_std:
            self.register_buffer("scale_factor", torch.tensor(float(scale_factor)))
        else:
            self.scale_factor = scale_factor
        self.instantiate_first_stage(first_stage_config)
        self.instantiate_cond_stage(cond_stage_config)
        self.restarted_from_ckpt = ckpt_path is not None
        if ckpt_path is not None:
            load_weights(self, ckpt_path, ignore_keys)
            if reset_ema and self.use_ema:
                self.model_ema = LitEma(self.model)

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
            self.scale_factor.fill_(1.0 / latents.std())
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
    def decode_first_stage(self, z: Tensor) -> Tensor:
        """The same without gradients."""
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
        """The conditioning of nothing: empty texts by default."""
        return self.get_learned_conditioning([default(null_label, "")] * batch_size)

    @torch.no_grad()
    def get_input(
        self,
        batch: Mapping[str, Any],
        k: str,
        bs: int | None = None,
        return_first_stage_outputs: bool = False,
        **kwargs: Any,
    ) -> list[Any]:
        """A batch -> [latents (B, C, h, w), conditioning] and, if asked for, pictures and reconstructions.

        Args:
            batch: with the pictures under `k` and the conditioning under `cond_stage_key`.
            k: the pictures' name.
            bs: take only the first few.
        """
        x = super().get_input(batch, k)[:bs].to(self.device)
        z = self.get_first_stage_encoding(self.encode_first_stage(x)).detach()
        c = None
        if self.model.conditioning_key is not None:
            entry = batch[self.cond_stage_key] if self.cond_stage_key != self.first_stage_key else x
            c = entry[:bs].to(self.device) if isinstance(entry, Tensor) else list(entry)[:bs]
            if not self.cond_stage_trainable:
                c = self.get_learned_conditioning(c)
        return [z, c, x, self.decode_first_stage(z)] if return_first_stage_outputs else [z, c]

    def shared_step(self, batch: Mapping[str, Any], **kwargs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch."""
        x, c = self.get_input(batch, self.first_stage_key)
        return self(x, c)

    def forward(self, x: Tensor, c: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss at random timesteps; a trainable conditioning encoder is applied here, with gradients."""
        t = torch.randint(0, self.num_timesteps, (x.shape[0],), device=self.betas.device)
        if c is not None and self.cond_stage_trainable:
            c = self.get_learned_conditioning(c)
        return self.p_losses(x, c, t, *args, **kwargs)

    def apply_model(self, x_noisy: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """The network's output (B, C, h, w); `cond` is a dict of lists, or what goes under the wrapper's one key."""
        if cond is None:
            return self.model(x_noisy, t)
        if not isinstance(cond, Mapping):
            key = "c_concat" if self.model.conditioning_key == "concat" else "c_crossattn"
            cond = {key: list(cond) if isinstance(cond, (list, tuple)) else [cond]}
        return self.model(x_noisy, t, **cond)

    def predict(self, x: Tensor, t: Tensor, cond: Conditioning = None) -> Tensor:
        return self.apply_model(x, t, cond)

    def p_losses(  # the order of arguments is the public one of this class
        self, x_start: Tensor, cond: Conditioning, t: Tensor, noise: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The training loss for latents (B, C, h, w) at t (B,), and its named terms (LDM, eq. 3)."""
        return super().p_losses(x_start, t, noise, cond)

    def _prior_bpd(self, x_start: Tensor) -> Tensor:
        """KL divergence of q(x_T | x_0) from the standard normal in bits per dimension, (B,)."""
        t = torch.full((x_start.shape[0],), self.num_timesteps - 1, device=x_start.device)
        mean, _, log_variance = self.q_mean_variance(x_start, t)
        return mean_flat(normal_kl(mean, log_variance, 0.0, 0.0)) / np.log(2.0)

    def trained_parameters(self) -> list[nn.Parameter]:
        extra = list(self.cond_stage_model.parameters()) if self.cond_stage_trainable else []
        return list(self.model.parameters()) + extra + ([self.logvar] if self.learn_logvar else [])

    # -- sampling ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(
        self,
        cond: Conditioning,
        batch_size: int = 16,
        return_intermediates: bool = False,
        x_T: Tensor | None = None,
        verbose: bool = True,
        timesteps: int | None = None,
        shape: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Ancestral samples of latents (batch_size, C, h, w) over all steps."""
        shape = tuple(shape) if shape is not None else self._sample_shape(batch_size)
        return self.p_sample_loop(shape, return_intermediates, x_T, cond, verbose, timesteps)

    @torch.no_grad()
    def sample_log(
        self,
        cond: Conditioning,
        batch_size: int,
        ddim: bool,
        ddim_steps: int,
        shape: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Any]:
        """Latents (batch_size, *shape) and intermediates, by DDIM in `ddim_steps` steps or over all steps.

        `shape` (C, h, w) is the configured one by default.
        """
        shape = tuple(shape) if shape is not None else self._sample_shape(batch_size)[1:]
        if ddim:
            return DDIMSampler(self).sample(ddim_steps, batch_size, shape, cond, verbose=False, **kwargs)
        return self.sample(cond=cond, shape=(batch_size, *shape), return_intermediates=True, verbose=False, **kwargs)

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
        unconditional_guidance_scale: float = 1.0,
        unconditional_guidance_label: Any = None,
        use_ema_scope: bool = True,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """Pictures for a logger, (B, C, H, W): inputs, reconstructions, prompts, and samples with and without guidance.

        `ddim_steps=None` samples over all steps, without guidance. `n_row` is accepted for compatibility.
        """
        z, c, x, reconstruction = self.get_input(batch, self.first_stage_key, bs=N, return_first_stage_outputs=True)
        if c is not None and self.cond_stage_trainable:
            c = self.get_learned_conditioning(c)
        log = {"inputs": x, "reconstruction": reconstruction}
        if self.cond_stage_key in ("caption", "txt"):
            log["conditioning"] = log_txt_as_img(
                (x.shape[3], x.shape[2]), batch[self.cond_stage_key][:N], size=max(x.shape[3] // 25, 8)
            )
        ddim = ddim_steps is not None
        options = {"eta": ddim_eta} if ddim else {}
        with self.ema_scope() if use_ema_scope else nullcontext():
            if sample:
                latents, _ = self.sample_log(c, len(z), ddim, ddim_steps, shape=z.shape[1:], **options)
                log["samples"] = self.decode_first_stage(latents)
            if unconditional_guidance_scale > 1.0 and ddim and c is not None:
                latents, _ = self.sample_log(
                    c,
                    len(z),
                    ddim,
                    ddim_steps,
                    shape=z.shape[1:],
                    unconditional_guidance_scale=unconditional_guidance_scale,
                    unconditional_conditioning=self.get_unconditional_conditioning(
                        len(z), unconditional_guidance_label
                    ),
                    **options,
                )
                log[f"samples_cfg_scale_{unconditional_guidance_scale:.2f}"] = self.decode_first_stage(latents)
        return {k: v for k, v in log.items() if not return_keys or k in return_keys}


def _float32(values: np.ndarray) -> Tensor:
    """A float32 tensor in memory, also while a model is being made on the meta device: the schedule is not read from a file."""
    return torch.from_numpy(np.asarray(values, dtype=np.float32))
