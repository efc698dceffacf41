"""The first stage: an autoencoder between pictures and latents (Rombach et al. 2022, section 3.1)."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from ldm.lr_scheduler import with_schedule
from ldm.models.weights import load_weights
from ldm.modules.diffusionmodules.bands import decode_in_bands, encode_in_bands
from ldm.modules.diffusionmodules.model import Decoder, Encoder
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.ema import LitEma, ema_weights
from ldm.modules.losses import ReconstructionKL
from ldm.modules.precision import guarded
from ldm.util import ConfigError, construct, images_to_nchw, instantiate_from_config


class AutoencoderKL(pl.LightningModule):
    """Variational autoencoder with a normal posterior; trains with Lightning on batches `{image_key: (B, H, W, C) in [-1, 1]}`.

    Args:
        ddconfig: the Encoder's and Decoder's arguments.
        lossconfig: the training loss, called with (inputs, reconstructions, posterior, split); `torch.nn.Identity`, which
            published configurations name because they do not train it, stands for ReconstructionKL.
        embed_dim: channels of the latent.
        ckpt_path: weights to start from.
        ignore_keys: prefixes of entries not to take from there.
        image_key: name of the pictures in a batch.
        colorize_nlabels: accepted for compatibility with segmentation autoencoders; must be None.
        monitor: metric that checkpoint callbacks should watch.
        ema_decay: keep a moving average of the weights; validation uses it.
        learn_logvar: accepted for compatibility.
        scheduler_config: a learning-rate schedule, an object with `schedule(step) -> factor`.

    Attributes:
        one_at_a_time: encode and decode the pictures of a batch one after the other, for less memory.
        band_positions: encode and decode in bands of about that many pixels of the largest maps, for less memory (see
            `ldm.modules.diffusionmodules.bands`); None for whole pictures.
    """

    def __init__(
        self,
        ddconfig: Mapping[str, Any],
        lossconfig: Mapping[str, Any] | None = None,
        embed_dim: int = 4,
        ckpt_path: str | None = None,
        ignore_keys: Sequence[str] = (),
        image_key: str = "image",
        colorize_nlabels: int | None = None,
        monitor: str | None = None,
        ema_decay: float | None = None,
        learn_logvar: bool = False,
        scheduler_config: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if not ddconfig.get("double_z", True):
            raise ConfigError(
                "AutoencoderKL needs mean and log-variance from its encoder: set ddconfig.double_z to true"
            )
        if colorize_nlabels is not None:
            raise ConfigError(
                "colorize_nlabels belongs to segmentation autoencoders, which are not part of this library"
            )
        self.image_key = image_key
        self.embed_dim = embed_dim
        self.scheduler_config = scheduler_config
        self.learning_rate = 4.5e-6  # set by training scripts
        # They suit training against a discriminator; without one, (0.9, 0.99) is steadier.
        self.adam_betas = (0.5, 0.9)
        if monitor is not None:
            self.monitor = monitor
        self.encoder = construct(Encoder, "ddconfig", ddconfig)
        self.decoder = construct(Decoder, "ddconfig", ddconfig)
        loss = instantiate_from_config(lossconfig) if lossconfig else nn.Identity()
        self.loss = ReconstructionKL() if isinstance(loss, nn.Identity) else loss
        self.one_at_a_time = False
        self.band_positions: int | None = None
        self.quant_conv = nn.Conv2d(2 * ddconfig["z_channels"], 2 * embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, ddconfig["z_channels"], 1)
        self.use_ema = ema_decay is not None
        if ema_decay is not None:
            self.model_ema = LitEma(self, decay=ema_decay)
        if ckpt_path is not None:
            self.init_from_ckpt(ckpt_path, ignore_keys)

    def init_from_ckpt(self, path: str, ignore_keys: Sequence[str] = ()) -> None:
        """Load what fits of a weights file, but for keys that begin as `ignore_keys` say.

        Raises:
            ConfigError: the file cannot be read, has entries of another shape, or none that fits.
        """
        load_weights(self, path, ignore_keys)

    def ema_scope(self, context: str | None = None) -> AbstractContextManager[None]:
        """Inside it the weights are their moving average, if one is kept; `context` is accepted for compatibility."""
        return ema_weights(self.model_ema, self) if self.use_ema else nullcontext()

    def encode(self, x: Tensor) -> DiagonalGaussianDistribution:  # (B, C, H, W) -> (B, embed_dim, h, w)
        """The posterior of pictures in [-1, 1], in their type, whatever the weights' is."""
        return DiagonalGaussianDistribution(self._run(self._encode, x, "encoding"))

    def decode(self, z: Tensor) -> Tensor:  # (B, embed_dim, h, w) -> (B, C, H, W)
        """Pictures, about in [-1, 1], of latents, in their type, whatever the weights' is.

        Where half precision gives NaN or infinity, the work is repeated in float32, and a warning names the module where it began.
        """
        return self._run(self._decode, z, "decoding")

    def _run(self, function: Callable[[Tensor], Tensor], x: Tensor, what: str) -> Tensor:
        """`function` for all pictures, or one at a time, guarded against overflow in half precision."""
        if not self.one_at_a_time or len(x) < 2:
            return guarded(self, function, x, what)
        return torch.cat([guarded(self, function, part, what) for part in x.split(1)])

    def _encode(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, 2 * embed_dim, h, w)
        if self.band_positions is None or torch.is_grad_enabled():
            return self.quant_conv(self.encoder(x))
        return self.quant_conv(encode_in_bands(self.encoder, x, self.band_positions))

    def _decode(self, z: Tensor) -> Tensor:  # (B, embed_dim, h, w) -> (B, C, H, W)
        z = self.post_quant_conv(z)
        if self.band_positions is None or torch.is_grad_enabled():
            return self.decoder(z)
        return decode_in_bands(self.decoder, z, self.band_positions)

    def forward(self, input: Tensor, sample_posterior: bool = True) -> tuple[Tensor, DiagonalGaussianDistribution]:
        """Pictures (B, C, H, W) -> their reconstructions and posteriors."""
        posterior = self.encode(input)
        return self.decode(posterior.sample() if sample_posterior else posterior.mode()), posterior

    def get_input(self, batch: Mapping[str, Any], k: str) -> Tensor:
        """The pictures of a batch, (B, H, W, C) -> float32 (B, C, H, W)."""
        return images_to_nchw(batch[k])

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        return self._step(batch, "train")

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        with self.ema_scope():
            return self._step(batch, "val")

    def _step(self, batch: Mapping[str, Any], split: str) -> Tensor:
        inputs = self.get_input(batch, self.image_key)
        reconstructions, posterior = self(inputs)
        loss, terms = self.loss(inputs, reconstructions, posterior, split=split)
        self.log_dict(terms, prog_bar=True, batch_size=len(inputs))
        return loss

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        if self.use_ema:
            self.model_ema(self)

    def configure_optimizers(self) -> Any:
        """Adam at `self.learning_rate`, with the schedule of `scheduler_config` if there is one."""
        trained = [
            p
            for part in (self.encoder, self.decoder, self.quant_conv, self.post_quant_conv, self.loss)
            for p in part.parameters()
        ]
        return with_schedule(
            torch.optim.Adam(trained, lr=self.learning_rate, betas=self.adam_betas), self.scheduler_config
        )

    def get_last_layer(self) -> Tensor:
        """The weight that adaptive losses take gradients at."""
        return self.decoder.last_layer

    @torch.no_grad()
    def log_images(
        self, batch: Mapping[str, Any], only_inputs: bool = False, log_ema: bool = False, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Pictures for a logger: inputs, reconstructions and decoded noise, (B, C, H, W) in [-1, 1].

        `log_ema` adds what the averaged weights make, under names that end in `_ema`.
        """
        inputs = self.get_input(batch, self.image_key).to(self.device)
        if only_inputs:
            return {"inputs": inputs}
        reconstructions, posterior = self(inputs)
        noise = torch.randn_like(posterior.mean)
        log = {"inputs": inputs, "reconstructions": reconstructions, "samples": self.decode(noise)}
        if log_ema or self.use_ema:
            with self.ema_scope():
                log |= {"reconstructions_ema": self(inputs)[0], "samples_ema": self.decode(noise)}
        return log


class IdentityFirstStage(nn.Module):
    """A first stage that leaves pictures as they are, for diffusion in pixels."""

    def __init__(self, *args: Any, vq_interface: bool = False, **kwargs: Any) -> None:
        super().__init__()
        self.vq_interface = vq_interface

    def encode(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return x

    def decode(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return x

    def quantize(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return (x, None, [None, None, None]) if self.vq_interface else x

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return x
