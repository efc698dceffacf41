"""The autoencoder's networks in bands of rows: the numbers of a whole pass, up to rounding, with less memory at once.

Cutting a picture into tiles that know nothing of one another leaves seams, because every group norm takes its mean and variance over
the whole map. Here each layer works through the map in bands with the neighbouring rows that its convolution needs, and the norms'
statistics are gathered over all bands first. What is held are the maps between layers, never the copies inside a layer; an enlarged
map is not held either, but computed from the smaller one whenever a band of it is needed.

Shapes: B batch, C channels, H W the height and width of a map; a band is rows `start` to `end` of one.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.modules.diffusionmodules.model import Decoder, Downsample, Encoder, ResnetBlock, Upsample

Rows = Callable[[int, int], Tensor]  # (start, end) -> (B, C, end - start, W)


@dataclass(frozen=True)
class FeatureMap:
    """A map that gives its rows.

    Attributes:
        height, width: H and W.
        rows: (start, end) -> the band (B, C, end - start, W).
        held: the whole map where it is in memory, which a block may then write its result into.
        positions: about how many positions a band should have.
    """

    height: int
    width: int
    rows: Rows
    held: Tensor | None
    positions: int

    def bands(self) -> Iterator[tuple[int, int]]:
        step = max(8, self.positions // self.width)
        for start in range(0, self.height, step):
            yield start, min(start + step, self.height)


def decode_in_bands(decoder: Decoder, z: Tensor, positions: int) -> Tensor:
    """What `decoder(z)` gives, (B, z_channels, h, w) -> (B, out_ch, H, W), in bands of about `positions` positions."""
    current = _held(decoder.mid(decoder.conv_in(z)), positions)
    levels: Iterator[Any] = reversed(decoder.up)
    for level in levels:
        for index, block in enumerate(level.block):
            current = _resnet_block(block, current)
            if len(level.attn):
                current = _held(level.attn[index](current.held), positions)
        if hasattr(level, "upsample"):
            current = _enlarged(level.upsample, current)
    if decoder.give_pre_end:
        return current.rows(0, current.height)
    out = _normed_convolution(decoder.norm_out, decoder.conv_out, current)
    return out.tanh_() if decoder.tanh_out else out


def encode_in_bands(encoder: Encoder, x: Tensor, positions: int) -> Tensor:
    """What `encoder(x)` gives, (B, C, H, W) -> (B, z or 2z, h, w), in bands of about `positions` positions."""
    picture = _held(x, positions)
    current = _held(
        _gather(picture, lambda start, end: _convolve(encoder.conv_in, picture.rows, picture.height, start, end)),
        positions,
    )
    levels: Iterable[Any] = encoder.down
    for level in levels:
        for index, block in enumerate(level.block):
            current = _resnet_block(block, current)
            if len(level.attn):
                current = _held(level.attn[index](current.held), positions)
        if hasattr(level, "downsample"):
            current = _reduced(level.downsample, current)
    return encoder.conv_out(F.silu(encoder.norm_out(encoder.mid(current.rows(0, current.height)))))


def _held(x: Tensor, positions: int) -> FeatureMap:
    return FeatureMap(x.shape[2], x.shape[3], lambda start, end: x[:, :, start:end], x, positions)


def _gather(like: FeatureMap, band: Rows) -> Tensor:
    """All bands of a new map of the height of `like`, in one tensor."""
    whole: Tensor | None = None
    for start, end in like.bands():
        part = band(start, end)
        if whole is None:
            whole = part.new_empty(*part.shape[:2], like.height, part.shape[3])
        whole[:, :, start:end] = part
    assert whole is not None  # a map has at least one band
    return whole


def _convolve(conv: nn.Module, rows: Rows, height: int, start: int, end: int) -> Tensor:
    """A band of what a padded 3x3 convolution gives; it sees one row more on either side."""
    top, bottom = max(start - 1, 0), min(end + 1, height)
    return conv(rows(top, bottom))[:, :, start - top : end - top]


def _statistics(norm: nn.GroupNorm, x: FeatureMap) -> tuple[Tensor, Tensor]:
    """A group norm over the whole map as a factor and a summand for each channel, float32 (B, C, 1, 1).

    Means and variances of the bands are joined as in Chan et al. 1979, which does not lose digits as sums of squares do.
    """
    count = 0  # of all bands so far, as the others; squares of deviations from the mean
    mean: Tensor | float = 0.0
    squares: Tensor | float = 0.0
    for start, end in x.bands():
        band = x.rows(start, end).float()
        band = band.reshape(len(band), norm.num_groups, -1)  # (B, groups, n)
        variance, centre = torch.var_mean(band, dim=2, correction=0)
        n = band.shape[2]
        offset = centre - mean
        squares = squares + variance * n + offset.square() * (count * n / (count + n))
        mean = mean + offset * (n / (count + n))
        count += n
    scale = torch.as_tensor(squares / count + norm.eps).rsqrt()  # (B, groups)
    width = norm.num_channels // norm.num_groups
    factor = scale.repeat_interleave(width, dim=1) * norm.weight.float()  # (B, C)
    centres = torch.as_tensor(mean).repeat_interleave(width, dim=1)  # (B, C)
    return factor[:, :, None, None], (norm.bias.float() - centres * factor)[:, :, None, None]


def _normed(norm: nn.GroupNorm, x: FeatureMap) -> Rows:
    """The rows of silu(norm(x))."""
    factor, summand = _statistics(norm, x)

    def rows(start: int, end: int) -> Tensor:
        band = x.rows(start, end)
        return F.silu((band.float() * factor + summand).to(band.dtype))

    return rows


def _normed_convolution(norm: nn.GroupNorm, conv: nn.Module, x: FeatureMap) -> Tensor:
    """conv(silu(norm(x)))."""
    normed = _normed(norm, x)
    return _gather(x, lambda start, end: _convolve(conv, normed, x.height, start, end))


def _resnet_block(block: ResnetBlock, x: FeatureMap) -> FeatureMap:
    """As the block's own call without a timestep embedding; a held map of the same width is overwritten with the result."""
    hidden = _held(_normed_convolution(block.norm1, block.conv1, x), x.positions)
    normed = _normed(block.norm2, hidden)

    def band(start: int, end: int) -> Tensor:
        change = _convolve(block.conv2, normed, x.height, start, end)
        if block.in_channels == block.out_channels:
            return x.rows(start, end) + change
        if block.use_conv_shortcut:
            return _convolve(block.conv_shortcut, x.rows, x.height, start, end) + change
        return block.nin_shortcut(x.rows(start, end)) + change

    if x.held is None or block.in_channels != block.out_channels:
        return _held(_gather(x, band), x.positions)
    for start, end in x.bands():
        x.held[:, :, start:end] = band(start, end)
    return x


def _enlarged(upsample: Upsample, x: FeatureMap) -> FeatureMap:
    """The map that `upsample` gives, computed band by band when asked."""

    def repeated(start: int, end: int) -> Tensor:
        first = start // 2
        band = F.interpolate(x.rows(first, (end + 1) // 2), scale_factor=2.0, mode="nearest")
        return band[:, :, start - 2 * first : end - 2 * first]

    def rows(start: int, end: int) -> Tensor:
        return _convolve(upsample.conv, repeated, 2 * x.height, start, end)

    return FeatureMap(2 * x.height, 2 * x.width, rows if upsample.with_conv else repeated, None, x.positions)


def _reduced(downsample: Downsample, x: FeatureMap) -> FeatureMap:
    """The map that `downsample` gives, of half the height and width."""
    height = x.height // 2
    out: Tensor | None = None
    for start, end in FeatureMap(height, x.width, x.rows, None, x.positions // 2).bands():
        if downsample.with_conv:  # padded at the bottom and right only
            band = x.rows(2 * start, min(2 * end + 1, x.height))
            band = downsample.conv(F.pad(band, (0, 1, 0, 2 * (end - start) + 1 - band.shape[2])))
        else:
            band = F.avg_pool2d(x.rows(2 * start, 2 * end), 2)
        if out is None:
            out = band.new_empty(*band.shape[:2], height, band.shape[3])
        out[:, :, start:end] = band
    assert out is not None  # a map has at least one band
    return _held(out, x.positions)
