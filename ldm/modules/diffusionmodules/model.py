"""Encoder and decoder of the autoencoder: convolutional networks with an attention layer in the middle.

Shapes: B batch, C channels, H W pixels, h w the latent's height and width.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.modules.attention import get_attention
from ldm.util import ConfigError

logger = logging.getLogger(__name__)


def Normalize(in_channels: int, num_groups: int = 32) -> nn.GroupNorm:
    """Group normalisation as the autoencoder uses it (epsilon 1e-6)."""
    return nn.GroupNorm(num_groups, in_channels, eps=1e-6)


class Upsample(nn.Module):
    """Doubles height and width by repetition, then a 3x3 convolution if `with_conv`."""

    def __init__(self, in_channels: int, with_conv: bool) -> None:
        super().__init__()
        self.with_conv = with_conv
        if with_conv:
            self.conv = nn.Conv2d(in_channels, in_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, C, 2H, 2W)
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return self.conv(x) if self.with_conv else x


class Downsample(nn.Module):
    """Halves height and width with a strided 3x3 convolution if `with_conv`, else by averaging."""

    def __init__(self, in_channels: int, with_conv: bool) -> None:
        super().__init__()
        self.with_conv = with_conv
        if with_conv:
            self.conv = nn.Conv2d(in_channels, in_channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, C, H / 2, W / 2)
        if self.with_conv:  # the padding is one row and column, at the bottom and right only
            return self.conv(F.pad(x, (0, 1, 0, 1)))
        return F.avg_pool2d(x, 2)


class ResnetBlock(nn.Module):
    """Two convolutions around which the input is added; with `temb_channels`, a timestep embedding between them."""

    def __init__(
        self,
        *,
        in_channels: int,
        out_channels: int | None = None,
        conv_shortcut: bool = False,
        dropout: float = 0.0,
        temb_channels: int = 0,
        num_groups: int = 32,
    ) -> None:
        super().__init__()
        out_channels = out_channels or in_channels
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.use_conv_shortcut = conv_shortcut
        self.norm1 = Normalize(in_channels, num_groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        if temb_channels > 0:
            self.temb_proj = nn.Linear(temb_channels, out_channels)
        self.norm2 = Normalize(out_channels, num_groups)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            if conv_shortcut:
                self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 3, padding=1)
            else:
                self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, temb: Tensor | None = None) -> Tensor:  # (B, C, H, W), (B, E) -> (B, out, H, W)
        h = self.conv1(F.silu(self.norm1(x)))
        if temb is not None:
            h = h + self.temb_proj(F.silu(temb))[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        if self.in_channels != self.out_channels:
            x = self.conv_shortcut(x) if self.use_conv_shortcut else self.nin_shortcut(x)
        return x + h


class AttnBlock(nn.Module):
    """Single-head self-attention over all positions."""

    def __init__(self, in_channels: int, num_groups: int = 32) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.norm = Normalize(in_channels, num_groups)
        self.q = nn.Conv2d(in_channels, in_channels, 1)
        self.k = nn.Conv2d(in_channels, in_channels, 1)
        self.v = nn.Conv2d(in_channels, in_channels, 1)
        self.proj_out = nn.Conv2d(in_channels, in_channels, 1)

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, C, H, W)
        normed = self.norm(x)
        q, k, v = (
            conv(normed).flatten(2).transpose(1, 2)[:, None] for conv in (self.q, self.k, self.v)
        )  # (B, 1, H*W, C)
        out = get_attention()(q, k, v, None)[:, 0].transpose(1, 2).reshape(x.shape)
        return x + self.proj_out(out)


def make_attn(in_channels: int, attn_type: str = "vanilla", num_groups: int = 32) -> nn.Module:
    """The attention layer that a configuration asks for: `vanilla` or `none`.

    `vanilla-xformers`, which some configurations name, is the same function.
    """
    if attn_type in ("vanilla", "vanilla-xformers"):
        return AttnBlock(in_channels, num_groups)
    if attn_type == "none":
        return nn.Identity()
    raise ConfigError(f"attn_type must be vanilla or none, found {attn_type!r}")


class _Middle(nn.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, channels: int, dropout: float, attn_type: str, num_groups: int) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(in_channels=channels, dropout=dropout, num_groups=num_groups)
        self.attn_1 = make_attn(channels, attn_type, num_groups)
        self.block_2 = ResnetBlock(in_channels=channels, dropout=dropout, num_groups=num_groups)

    def forward(self, x: Tensor) -> Tensor:  # (B, C, h, w) -> (B, C, h, w)
        return self.block_2(self.attn_1(self.block_1(x)))


class _Level(nn.Module):
    """The residual blocks of one resolution, each followed by attention where the configuration wants it.

    Downsampling and upsampling modules are set as attributes by Encoder and Decoder: their names are part of the public keys.
    """

    def __init__(
        self, channels: Sequence[int], attention: bool, dropout: float, attn_type: str, num_groups: int
    ) -> None:
        super().__init__()
        self.block = nn.ModuleList(
            ResnetBlock(in_channels=a, out_channels=b, dropout=dropout, num_groups=num_groups)
            for a, b in zip(channels, channels[1:], strict=False)
        )
        self.attn = nn.ModuleList(make_attn(c, attn_type, num_groups) for c in channels[1:] if attention)

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, C', H, W)
        for index, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[index](x)
        return x


def _check_options(use_linear_attn: bool, ignored: Mapping[str, Any]) -> None:
    if use_linear_attn:
        raise ConfigError("linear attention in an autoencoder (use_linear_attn) is not supported")
    if ignored:
        logger.warning("ddconfig: %s have no effect", ", ".join(sorted(ignored)))


class Encoder(nn.Module):
    """Picture to the parameters of the latent's distribution, or to the latent itself.

    Args:
        ch: width of the first level.
        out_ch: channels of the decoder's picture; not used here.
        ch_mult: width of each level in units of `ch`; each level but the last halves height and width.
        num_res_blocks: residual blocks a level.
        attn_resolutions: heights at which attention follows each block, for pictures of height
        resolution: the nominal height.
        dropout: inside the blocks.
        resamp_with_conv: convolutions in the downsampling.
        in_channels: of the picture.
        z_channels: of the latent; twice as many are given with
        double_z: mean and log-variance.
        attn_type: `vanilla` or `none`.
        num_groups: of the group norms. Published models have 32; narrow ones need fewer, because with one channel a group
            the norm forgets a plain picture's colour.
        use_linear_attn: not supported; must be False.
        **ignored: what else a configuration holds, which published ones do; logged.
    """

    def __init__(
        self,
        *,
        ch: int,
        out_ch: int,
        ch_mult: Sequence[int] = (1, 2, 4, 8),
        num_res_blocks: int,
        attn_resolutions: Sequence[int],
        dropout: float = 0.0,
        resamp_with_conv: bool = True,
        in_channels: int,
        resolution: int,
        z_channels: int,
        double_z: bool = True,
        attn_type: str = "vanilla",
        num_groups: int = 32,
        use_linear_attn: bool = False,
        **ignored: Any,
    ) -> None:
        super().__init__()
        _check_options(use_linear_attn, ignored)
        self.conv_in = nn.Conv2d(in_channels, ch, 3, padding=1)
        self.down = nn.ModuleList()
        width = ch
        for i, mult in enumerate(ch_mult):
            widths = [width] + [ch * mult] * num_res_blocks
            width = widths[-1]
            level = _Level(widths, resolution // 2**i in attn_resolutions, dropout, attn_type, num_groups)
            if i != len(ch_mult) - 1:
                level.downsample = Downsample(width, resamp_with_conv)
            self.down.append(level)
        self.mid = _Middle(width, dropout, attn_type, num_groups)
        self.norm_out = Normalize(width, num_groups)
        self.conv_out = nn.Conv2d(width, 2 * z_channels if double_z else z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:  # (B, in_channels, H, W) -> (B, z or 2z, h, w)
        h = self.conv_in(x)
        levels: Iterable[Any] = self.down
        for level in levels:
            h = level(h)
            if hasattr(level, "downsample"):
                h = level.downsample(h)
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))


class Decoder(nn.Module):
    """Latent to picture. Takes the Encoder's arguments, so that one `ddconfig` describes both.

    Args:
        give_pre_end: return the features before the last norm and convolution.
        tanh_out: squash the picture into [-1, 1].
    """

    def __init__(
        self,
        *,
        ch: int,
        out_ch: int,
        ch_mult: Sequence[int] = (1, 2, 4, 8),
        num_res_blocks: int,
        attn_resolutions: Sequence[int],
        dropout: float = 0.0,
        resamp_with_conv: bool = True,
        in_channels: int,
        resolution: int,
        z_channels: int,
        double_z: bool = True,
        give_pre_end: bool = False,
        tanh_out: bool = False,
        attn_type: str = "vanilla",
        num_groups: int = 32,
        use_linear_attn: bool = False,
        **ignored: Any,
    ) -> None:
        super().__init__()
        self.give_pre_end = give_pre_end
        self.tanh_out = tanh_out
        width = ch * ch_mult[-1]
        self.conv_in = nn.Conv2d(z_channels, width, 3, padding=1)
        self.mid = _Middle(width, dropout, attn_type, num_groups)
        levels = []
        for i, mult in reversed(list(enumerate(ch_mult))):
            widths = [width] + [ch * mult] * (num_res_blocks + 1)
            width = widths[-1]
            level = _Level(widths, resolution // 2**i in attn_resolutions, dropout, attn_type, num_groups)
            if i != 0:
                level.upsample = Upsample(width, resamp_with_conv)
            levels.append(level)
        # Public keys count levels from the finest, so the list runs against the order of use.
        self.up = nn.ModuleList(reversed(levels))
        self.norm_out = Normalize(width, num_groups)
        self.conv_out = nn.Conv2d(width, out_ch, 3, padding=1)

    @property
    def last_layer(self) -> Tensor:
        """The weight that adaptive losses take gradients at."""
        return self.conv_out.weight

    def forward(self, z: Tensor) -> Tensor:  # (B, z_channels, h, w) -> (B, out_ch, H, W)
        h = self.mid(self.conv_in(z))
        levels: Iterator[Any] = reversed(self.up)
        for level in levels:
            h = level(h)
            if hasattr(level, "upsample"):
                h = level.upsample(h)
        if self.give_pre_end:
            return h
        h = self.conv_out(F.silu(self.norm_out(h)))
        return torch.tanh(h) if self.tanh_out else h
