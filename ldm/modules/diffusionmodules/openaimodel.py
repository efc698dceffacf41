"""The UNet of latent diffusion and its blocks (Dhariwal and Nichol 2021, with the attention of Rombach et al. 2022).

`UNetEncoder` has the options, the timestep embedding, the contracting path and the middle block; `UNetModel` and the ControlNet build
on it.

Shapes: B batch, C channels, h w the latent's height and width, E width of the timestep embedding, M tokens of the context.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.modules.attention import SpatialTransformer
from ldm.modules.diffusionmodules.util import (
    avg_pool_nd,
    checkpoint,
    conv_nd,
    linear,
    normalization,
    repeat_rows,
    timestep_embedding,
    zero_module,
)
from ldm.util import ConfigError


class TimestepBlock(nn.Module):
    """A block that takes the timestep embedding as its second argument."""

    @abstractmethod
    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x (B, C, h, w), emb (B, E)."""


class TimestepEmbedSequential(nn.Sequential, TimestepBlock):
    """Blocks in a row, each given what it takes: the timestep embedding, the context, or neither.

    x may have fewer rows than the embedding and the context, a fraction of them: what is equal for several contexts is
    computed once, see BasicTransformerBlock.
    """

    def forward(self, x: Tensor, emb: Tensor, context: Tensor | None = None) -> Tensor:
        for layer in self:
            if isinstance(layer, TimestepBlock):
                x = layer(x, emb if emb is None else emb[: len(x)])
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context)
            else:
                x = layer(x)
        return x


class Upsample(nn.Module):
    """Doubles height and width by repetition, then a 3x3 convolution if `use_conv`."""

    def __init__(
        self, channels: int, use_conv: bool, dims: int = 2, out_channels: int | None = None, padding: int = 1
    ) -> None:
        super().__init__()
        self.channels = channels
        self.out_channels = out_channels or channels
        self.use_conv = use_conv
        self.dims = dims
        if use_conv:
            self.conv = conv_nd(dims, channels, self.out_channels, 3, padding=padding)

    def forward(self, x: Tensor) -> Tensor:  # (B, C, h, w) -> (B, out, 2h, 2w)
        _check_channels(self, x)
        if self.dims == 3:  # time keeps its length
            x = F.interpolate(x, (x.shape[2], x.shape[3] * 2, x.shape[4] * 2), mode="nearest")
        else:
            x = F.interpolate(x, scale_factor=2, mode="nearest")
        return self.conv(x) if self.use_conv else x


class Downsample(nn.Module):
    """Halves height and width with a strided 3x3 convolution if `use_conv`, else by averaging."""

    def __init__(
        self, channels: int, use_conv: bool, dims: int = 2, out_channels: int | None = None, padding: int = 1
    ) -> None:
        super().__init__()
        self.channels = channels
        self.out_channels = out_channels or channels
        self.use_conv = use_conv
        self.dims = dims
        stride = (1, 2, 2) if dims == 3 else 2
        if use_conv:
            self.op = conv_nd(dims, channels, self.out_channels, 3, stride=stride, padding=padding)
        elif self.out_channels != channels:
            raise ValueError(
                f"averaging cannot change the channels from {channels} to {self.out_channels}; set use_conv"
            )
        else:
            self.op = avg_pool_nd(dims, kernel_size=stride, stride=stride)

    def forward(self, x: Tensor) -> Tensor:  # (B, C, h, w) -> (B, out, h / 2, w / 2)
        _check_channels(self, x)
        return self.op(x)


def _check_channels(module: Upsample | Downsample, x: Tensor) -> None:
    if x.shape[1] != module.channels:
        raise ValueError(f"{type(module).__name__} was made for {module.channels} channels and got {x.shape[1]}")


class ResBlock(TimestepBlock):
    """Two convolutions with the timestep embedding added (or applied as scale and shift) between them.

    Args:
        channels: of the input.
        emb_channels: width E of the timestep embedding.
        dropout: before the second convolution.
        out_channels: of the output; as the input's by default.
        use_conv: the skip connection to other channels is 3x3 rather than 1x1.
        use_scale_shift_norm: the embedding gives scale and shift of the second norm.
        dims: axes of the signal.
        use_checkpoint: recompute activations in the backward pass.
        up, down: resample by two inside the block.
    """

    def __init__(
        self,
        channels: int,
        emb_channels: int,
        dropout: float,
        out_channels: int | None = None,
        use_conv: bool = False,
        use_scale_shift_norm: bool = False,
        dims: int = 2,
        use_checkpoint: bool = False,
        up: bool = False,
        down: bool = False,
    ) -> None:
        super().__init__()
        self.channels = channels
        self.out_channels = out_channels or channels
        self.use_checkpoint = use_checkpoint
        self.use_scale_shift_norm = use_scale_shift_norm
        self.in_layers = nn.Sequential(
            normalization(channels), nn.SiLU(), conv_nd(dims, channels, self.out_channels, 3, padding=1)
        )
        self.updown = up or down
        resample = Upsample if up else Downsample
        self.h_upd = resample(channels, False, dims) if self.updown else nn.Identity()
        self.x_upd = resample(channels, False, dims) if self.updown else nn.Identity()
        self.emb_layers = nn.Sequential(
            nn.SiLU(), linear(emb_channels, 2 * self.out_channels if use_scale_shift_norm else self.out_channels)
        )
        self.out_layers = nn.Sequential(
            normalization(self.out_channels),
            nn.SiLU(),
            nn.Dropout(p=dropout),
            zero_module(conv_nd(dims, self.out_channels, self.out_channels, 3, padding=1)),
        )
        if self.out_channels == channels:
            self.skip_connection: nn.Module = nn.Identity()
        elif use_conv:
            self.skip_connection = conv_nd(dims, channels, self.out_channels, 3, padding=1)
        else:
            self.skip_connection = conv_nd(dims, channels, self.out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:  # (B, C, h, w), (B, E) -> (B, out, h', w')
        return checkpoint(self._forward, (x, emb), self.parameters(), self.use_checkpoint)

    def _forward(self, x: Tensor, emb: Tensor) -> Tensor:
        if self.updown:
            norm_and_act, conv = self.in_layers[:-1], self.in_layers[-1]
            hidden = conv(self.h_upd(norm_and_act(x)))
            x = self.x_upd(x)
        else:
            hidden = self.in_layers(x)  # (B, out, h', w')
        emb = self.emb_layers(emb).to(hidden.dtype)  # (B, out) or (B, 2 * out)
        emb = emb.reshape(*emb.shape, *((1,) * (hidden.dim() - 2)))
        if self.use_scale_shift_norm:
            scale, shift = emb.chunk(2, dim=1)
            hidden = self.out_layers[1:](self.out_layers[0](hidden) * (1 + scale) + shift)
        else:
            hidden = self.out_layers(hidden + emb)
        return self.skip_connection(x) + hidden


class AttentionBlock(nn.Module):
    """Self-attention over all positions, for UNets without a context.

    Args:
        channels: of the feature map.
        num_heads: number of heads, unless
        num_head_channels: gives the width of each.
        use_checkpoint: recompute activations in the backward pass.
        use_new_attention_order: the rows of `qkv` are grouped by q, k, v first rather than by head first.
    """

    def __init__(
        self,
        channels: int,
        num_heads: int = 1,
        num_head_channels: int = -1,
        use_checkpoint: bool = False,
        use_new_attention_order: bool = False,
    ) -> None:
        super().__init__()
        if num_head_channels != -1:
            if channels % num_head_channels:
                raise ValueError(f"num_head_channels does not divide {channels} channels: {num_head_channels}")
            num_heads = channels // num_head_channels
        self.channels = channels
        self.num_heads = num_heads
        self.use_checkpoint = use_checkpoint
        self.new_order = use_new_attention_order
        self.norm = normalization(channels)
        self.qkv = conv_nd(1, channels, channels * 3, 1)
        self.proj_out = zero_module(conv_nd(1, channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:  # (B, C, h, w) -> (B, C, h, w)
        return checkpoint(self._forward, (x,), self.parameters(), self.use_checkpoint)

    def _forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2)  # (B, C, L)
        qkv = self.qkv(self.norm(tokens))  # (B, 3C, L)
        if self.new_order:
            qkv = qkv.unflatten(1, (3, self.num_heads, -1)).transpose(1, 2)
        else:
            qkv = qkv.unflatten(1, (self.num_heads, 3, -1))
        q, k, v = qkv.transpose(3, 4).unbind(2)  # (B, heads, L, d) each
        out = F.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(tokens.shape)
        return (tokens + self.proj_out(out)).reshape(x.shape)


class UNetEncoder(nn.Module):
    """Timestep embedding, contracting path and middle block: what UNetModel and the ControlNet have in common.

    Its arguments are those of both, in their order, and become attributes of the same names.

    Args:
        image_size: accepted for compatibility; any size works whose sides survive the halvings.
        in_channels: of the latent.
        model_channels: width of the first level.
        num_res_blocks: residual blocks a level, or one number for each level.
        attention_resolutions: downsampling factors (1, 2, 4, ...) at which attention follows each residual block.
        dropout: inside the residual blocks.
        channel_mult: width of each level in units of `model_channels`.
        conv_resample: convolutions in up- and downsampling.
        dims: axes of the signal.
        use_checkpoint: recompute activations in the backward pass.
        use_fp16: convert the weights to half precision.
        num_heads, num_head_channels: number or width of attention heads; one of them is set, the other -1.
        num_heads_upsample: heads in the decoder where there is no context; as `num_heads` by default.
        use_scale_shift_norm: see ResBlock.
        resblock_updown: residual blocks do the resampling.
        use_new_attention_order: see AttentionBlock.
        use_spatial_transformer, transformer_depth, context_dim: attention to a context, see SpatialTransformer.
        n_embed: predict codebook ids (UNetModel only).
        legacy: True makes heads of `channels // num_heads` with a context and of `num_head_channels` without; False, as in
            the published configurations of SD, follows the two head options.
        disable_self_attentions, num_attention_blocks: one entry a level.
        disable_middle_self_attn: see BasicTransformerBlock.
        use_linear_in_transformer: see SpatialTransformer.
    """

    def __init__(
        self,
        image_size: int | None = None,
        in_channels: int = 4,
        model_channels: int = 320,
        num_res_blocks: int | Sequence[int] = 2,
        attention_resolutions: Sequence[int] = (4, 2, 1),
        dropout: float = 0,
        channel_mult: Sequence[int] = (1, 2, 4, 8),
        conv_resample: bool = True,
        dims: int = 2,
        use_checkpoint: bool = False,
        use_fp16: bool = False,
        num_heads: int = -1,
        num_head_channels: int = -1,
        num_heads_upsample: int = -1,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        use_new_attention_order: bool = False,
        use_spatial_transformer: bool = False,
        transformer_depth: int = 1,
        context_dim: int | Sequence[int] | None = None,
        n_embed: int | None = None,
        legacy: bool = True,
        disable_self_attentions: Sequence[bool] | None = None,
        num_attention_blocks: Sequence[int] | None = None,
        disable_middle_self_attn: bool = False,
        use_linear_in_transformer: bool = False,
    ) -> None:
        options = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        super().__init__()
        for name, value in options.items():
            setattr(self, name, value)
        self._settle_options()
        self.dtype = (
            torch.float16 if use_fp16 else torch.float32
        )  # public; the weights are converted when all are there
        self.time_embed = nn.Sequential(
            linear(self.model_channels, self.emb_channels), nn.SiLU(), linear(self.emb_channels, self.emb_channels)
        )
        self.input_blocks, self.middle_block, self._block_channels = build_encoder(self)

    def _settle_options(self) -> None:
        """Give options their full form, and check them.

        Raises:
            ConfigError: they describe no network.
        """
        levels = len(self.channel_mult)
        if isinstance(self.num_res_blocks, int):
            self.num_res_blocks = (self.num_res_blocks,) * levels
        if self.num_heads_upsample == -1:
            self.num_heads_upsample = self.num_heads
        for name in ("num_res_blocks", "attention_resolutions", "channel_mult", "context_dim"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, int):  # lists of a YAML file
                setattr(self, name, tuple(value))
        if (
            self.model_channels < 1
            or not levels
            or min(self.channel_mult) <= 0
            or min(self.num_res_blocks, default=0) < 0
        ):
            raise ConfigError(
                f"model_channels {self.model_channels}, channel_mult {self.channel_mult} and num_res_blocks "
                f"{self.num_res_blocks} describe no network"
            )
        for name in ("num_res_blocks", "disable_self_attentions", "num_attention_blocks"):
            entries = getattr(self, name)
            if entries is not None and len(entries) != levels:
                raise ConfigError(f"{name} has {len(entries)} entries for the {levels} levels of channel_mult")
        if self.use_spatial_transformer and self.context_dim is None:
            raise ConfigError("use_spatial_transformer needs context_dim, the width of the text embedding")
        if self.context_dim is not None and not self.use_spatial_transformer:
            raise ConfigError("context_dim is only used with use_spatial_transformer; set that too")
        if self.num_heads == -1 and self.num_head_channels == -1:
            raise ConfigError("set num_heads or num_head_channels")
        if self.num_head_channels != -1 and self.num_head_channels < 1 or self.num_heads != -1 and self.num_heads < 1:
            raise ConfigError(
                f"num_heads {self.num_heads} and num_head_channels {self.num_head_channels} must be positive or -1"
            )

    @property
    def emb_channels(self) -> int:
        """Width E of the timestep embedding."""
        return self.model_channels * 4

    def res_block(self, channels: int, out_channels: int, up: bool = False, down: bool = False) -> ResBlock:
        return ResBlock(
            channels,
            self.emb_channels,
            self.dropout,
            out_channels,
            use_scale_shift_norm=self.use_scale_shift_norm,
            dims=self.dims,
            use_checkpoint=self.use_checkpoint,
            up=up,
            down=down,
        )

    def attention(self, channels: int, disable_self_attn: bool = False, upsampling: bool = False) -> nn.Module:
        """The attention layer for a map of `channels`: with a context, or over the map alone."""
        if self.num_head_channels != -1:
            heads, width = max(channels // self.num_head_channels, 1), self.num_head_channels
        else:
            heads, width = self.num_heads, channels // self.num_heads
        if self.use_spatial_transformer:
            if self.legacy:
                width = channels // heads
            return SpatialTransformer(
                channels,
                heads,
                width,
                depth=self.transformer_depth,
                context_dim=self.context_dim,
                disable_self_attn=disable_self_attn,
                use_linear=self.use_linear_in_transformer,
                use_checkpoint=self.use_checkpoint,
            )
        if self.legacy:
            width = self.num_head_channels
        return AttentionBlock(
            channels,
            use_checkpoint=self.use_checkpoint,
            num_heads=self.num_heads_upsample if upsampling else heads,
            num_head_channels=width,
            use_new_attention_order=self.use_new_attention_order,
        )

    def wants_attention(self, level: int, index: int, downsampling: int) -> bool:
        """Whether the `index`-th residual block of a level is followed by attention."""
        limit = self.num_attention_blocks
        return downsampling in self.attention_resolutions and (limit is None or index < limit[level])

    def level_attention(self, level: int, channels: int, upsampling: bool = False) -> nn.Module:
        disabled = bool(self.disable_self_attentions[level]) if self.disable_self_attentions is not None else False
        return self.attention(channels, disabled, upsampling)

    def embed_timesteps(self, timesteps: Tensor) -> Tensor:
        """timesteps (B,), fractions too -> (B, E)."""
        return self.time_embed(timestep_embedding(timesteps, self.model_channels).to(self.time_embed[0].weight.dtype))


def build_encoder(options: UNetEncoder) -> tuple[nn.ModuleList, TimestepEmbedSequential, list[int]]:
    """The contracting path and the middle block.

    Returns:
        input_blocks: one entry for each output that a decoder consumes.
        middle_block.
        channels: of each input block's output; the middle block keeps the last.
    """
    width = options.model_channels
    blocks = nn.ModuleList([TimestepEmbedSequential(conv_nd(options.dims, options.in_channels, width, 3, padding=1))])
    channels = [width]
    downsampling = 1
    for level, mult in enumerate(options.channel_mult):
        for index in range(options.num_res_blocks[level]):
            out = int(mult * options.model_channels)
            layers: list[nn.Module] = [options.res_block(width, out)]
            width = out
            if options.wants_attention(level, index, downsampling):
                layers.append(options.level_attention(level, width))
            blocks.append(TimestepEmbedSequential(*layers))
            channels.append(width)
        if level != len(options.channel_mult) - 1:
            if options.resblock_updown:
                down: nn.Module = options.res_block(width, width, down=True)
            else:
                down = Downsample(width, options.conv_resample, dims=options.dims, out_channels=width)
            blocks.append(TimestepEmbedSequential(down))
            channels.append(width)
            downsampling *= 2
    middle = TimestepEmbedSequential(
        options.res_block(width, width),
        options.attention(width, options.disable_middle_self_attn),
        options.res_block(width, width),
    )
    return blocks, middle, channels


def build_decoder(options: UNetEncoder, skip_channels: Sequence[int]) -> nn.ModuleList:
    """The expanding path; each block takes one of the encoder's outputs, the last one first."""
    skips = list(skip_channels)
    width = skips[-1]
    blocks = nn.ModuleList()
    downsampling = 2 ** (len(options.channel_mult) - 1)
    for level, mult in reversed(list(enumerate(options.channel_mult))):
        for index in range(options.num_res_blocks[level] + 1):
            out = int(mult * options.model_channels)
            layers: list[nn.Module] = [options.res_block(width + skips.pop(), out)]
            width = out
            if options.wants_attention(level, index, downsampling):
                layers.append(options.level_attention(level, width, upsampling=True))
            if level and index == options.num_res_blocks[level]:
                if options.resblock_updown:
                    layers.append(options.res_block(width, width, up=True))
                else:
                    layers.append(Upsample(width, options.conv_resample, dims=options.dims, out_channels=width))
                downsampling //= 2
            blocks.append(TimestepEmbedSequential(*layers))
    return blocks


class UNetModel(UNetEncoder):
    """The noise predictor: encoder, middle block and decoder with skip connections.

    Takes UNetEncoder's arguments (`out_channels` after `model_channels`, `num_classes` after `dims`, where given by position), and

    Args:
        out_channels: of the output.
        num_classes: number of class labels, or "continuous" for a number; adds `label_emb`.
        n_embed: predict codebook ids; adds `id_predictor`.
    """

    def __init__(
        self,
        image_size: int | None = None,
        in_channels: int = 4,
        model_channels: int = 320,
        out_channels: int = 4,
        num_res_blocks: int | Sequence[int] = 2,
        attention_resolutions: Sequence[int] = (4, 2, 1),
        dropout: float = 0,
        channel_mult: Sequence[int] = (1, 2, 4, 8),
        conv_resample: bool = True,
        dims: int = 2,
        num_classes: int | str | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            image_size,
            in_channels,
            model_channels,
            num_res_blocks,
            attention_resolutions,
            dropout,
            channel_mult,
            conv_resample,
            dims,
            *args,
            **kwargs,
        )
        self.out_channels = out_channels
        self.num_classes = num_classes
        self.predict_codebook_ids = self.n_embed is not None
        if num_classes == "continuous":
            self.label_emb: nn.Module = nn.Linear(1, self.emb_channels)
        elif isinstance(num_classes, int):
            self.label_emb = nn.Embedding(num_classes, self.emb_channels)
        elif num_classes is not None:
            raise ConfigError(f'num_classes must be a number, "continuous" or None, found {num_classes!r}')
        self.output_blocks = build_decoder(self, self._block_channels)
        width = int(self.channel_mult[0] * model_channels)
        self.out = nn.Sequential(
            normalization(width), nn.SiLU(), zero_module(conv_nd(dims, width, out_channels, 3, padding=1))
        )
        if self.predict_codebook_ids:
            self.id_predictor = nn.Sequential(normalization(width), conv_nd(dims, width, self.n_embed, 1))
        if self.use_fp16:
            self.convert_to_fp16()

    def convert_to_fp16(self) -> None:
        """Weights and activations in half precision."""
        self.dtype = torch.float16
        self.half()

    def convert_to_fp32(self) -> None:
        """Weights and activations in single precision."""
        self.dtype = torch.float32
        self.float()

    def embed_timesteps(self, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        """timesteps (B,) and, in class-conditional models, labels y (B,) -> (B, E)."""
        if (y is not None) != (self.num_classes is not None):
            raise ValueError("y must be given if and only if the model is class-conditional")
        emb = super().embed_timesteps(timesteps)
        if y is not None:
            emb = emb + self.label_emb(y.to(emb.dtype).reshape(-1, 1) if self.num_classes == "continuous" else y)
        return emb

    def encode(self, x: Tensor, emb: Tensor, context: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        """The middle block's output (B, C, h', w') and the skip connections, first level first."""
        hidden = x.to(self.input_blocks[0][0].weight.dtype)
        context = None if context is None else context.to(hidden.dtype)
        skips = []
        for block in self.input_blocks:
            hidden = block(hidden, emb, context)  # (B, C_i, h_i, w_i)
            skips.append(hidden)
        return self.middle_block(hidden, emb, context), skips

    def decode(self, hidden: Tensor, skips: Sequence[Tensor], emb: Tensor, context: Tensor | None) -> Tensor:
        """Middle output and skip connections -> (B, out_channels, h, w)."""
        context = None if context is None else context.to(hidden.dtype)
        for block, skip in zip(self.output_blocks, reversed(skips), strict=True):
            hidden = block(
                torch.cat([hidden, repeat_rows(skip, len(hidden))], dim=1), emb, context
            )  # (B, C_i, h_i, w_i)
        return self.id_predictor(hidden) if self.predict_codebook_ids else self.out(hidden)

    def forward(
        self, x: Tensor, timesteps: Tensor | None = None, context: Tensor | None = None, y: Tensor | None = None
    ) -> Tensor:
        """x (B, in_channels, h, w), timesteps (B,), context (B, M, context_dim), labels y (B,) -> (B, out_channels, h, w)."""
        emb = self.embed_timesteps(timesteps, y)
        hidden, skips = self.encode(x, emb, context)
        return self.decode(hidden, skips, emb, context).to(x.dtype)
