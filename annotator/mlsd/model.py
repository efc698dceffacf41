"""M-LSD, the large variant (Gu et al., "Towards Light-weight and Real-time Line Segment Detection", AAAI 2022).

A MobileNetV2 trunk, a top-down path that joins its stages, and a head that describes a line at each pixel.
"""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Per stage: expansion of the channels inside a block, channels, number of blocks, stride of the first one.
STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1))
SKIP_FEATURES = (1, 3, 6, 10, 13)  # whose outputs are skip connections to the top-down path
STRIDE = 16
WIDTH = 64  # of the top-down path


class ConvNormReLU6(nn.Sequential):
    """Convolution, batch norm, ReLU6. With stride 2, zeros are added at the bottom and at the right only."""

    def __init__(self, in_channels: int, out_channels: int, size: int, stride: int = 1, groups: int = 1) -> None:
        self.pad = (0, 1, 0, 1) if stride == 2 else (size // 2,) * 4
        conv = nn.Conv2d(in_channels, out_channels, size, stride, groups=groups, bias=False)
        super().__init__(conv, nn.BatchNorm2d(out_channels), nn.ReLU6())

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, self.pad))  # (B, out_channels, h // stride, w // stride)


class InvertedResidual(nn.Module):
    """MobileNetV2's block: widen, convolve each channel for itself, narrow; added to its input where shapes agree."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = in_channels * expansion
        widen = [ConvNormReLU6(in_channels, hidden, 1)] if expansion > 1 else []
        narrow = [nn.Conv2d(hidden, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels)]
        self.conv = nn.Sequential(*widen, ConvNormReLU6(hidden, hidden, 3, stride, groups=hidden), *narrow)
        self.residual = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)  # (B, out_channels, h // stride, w // stride)
        return x + y if self.residual else y


class MobileNetV2(nn.Module):
    """The first fourteen features of MobileNetV2, for pictures of four channels."""

    def __init__(self) -> None:
        super().__init__()
        channels = 32
        features: list[nn.Module] = [ConvNormReLU6(4, channels, 3, stride=2)]
        for expansion, out_channels, blocks, stride in STAGES:
            for block in range(blocks):
                features.append(InvertedResidual(channels, out_channels, stride if block == 0 else 1, expansion))
                channels = out_channels
        self.features = nn.Sequential(*features)

    def forward(self, x: Tensor) -> list[Tensor]:
        skips = []
        for number, feature in enumerate(self.features):
            x = feature(x)
            if number in SKIP_FEATURES:
                skips.append(x)
        return skips  # (B, 16, H/2, W/2), (B, 24, H/4, W/4), (B, 32, H/8, W/8), (B, 64, H/16, W/16), (B, 96, same)


def _conv_norm_relu(in_channels: int, out_channels: int, size: int, dilation: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, out_channels, size, padding=size // 2 * dilation, dilation=dilation)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.ReLU())


class Join(nn.Module):
    """A stage of the trunk beside what comes from above, which is enlarged to its size."""

    def __init__(self, side_channels: int, above_channels: int, enlarge: bool = True) -> None:
        super().__init__()
        self.conv1 = _conv_norm_relu(above_channels, WIDTH, 1)
        self.conv2 = _conv_norm_relu(side_channels, WIDTH, 1)
        self.enlarge = enlarge

    def forward(self, side: Tensor, above: Tensor) -> Tensor:
        above = self.conv1(above)  # (B, 64, h / 2, w / 2)
        if self.enlarge:
            above = F.interpolate(above, scale_factor=2, mode="bilinear", align_corners=True)  # (B, 64, h, w)
        return torch.cat([self.conv2(side), above], dim=1)  # (B, 128, h, w)


class Refine(nn.Module):
    """A residual convolution and one that halves the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = _conv_norm_relu(2 * WIDTH, 2 * WIDTH, 3)
        self.conv2 = _conv_norm_relu(2 * WIDTH, WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(x + self.conv1(x))  # (B, 64, h, w)


def head() -> nn.Sequential:
    """Sixteen channels a pixel: (B, 64, h, w) to (B, 16, h, w)."""
    conv1, conv2 = _conv_norm_relu(WIDTH, WIDTH, 3, dilation=5), _conv_norm_relu(WIDTH, WIDTH, 3)
    return nn.Sequential(OrderedDict(conv1=conv1, conv2=conv2, conv3=nn.Conv2d(WIDTH, 16, 1)))


class MobileV2MLSDLarge(nn.Module):
    """RGB and a fourth channel, all of -1..1, to line maps at half the size.

    The nine channels: score of a line's centre before the sigmoid, displacements from there to both ends (x1, y1, x2,
    y2, in pixels of the map), and four that decoding does not need. Sides must be multiples of 16 (or one more).
    """

    def __init__(self) -> None:
        super().__init__()
        self.backbone = MobileNetV2()
        self.block15 = Join(64, 96, enlarge=False)
        self.block16 = Refine()
        self.block17 = Join(32, WIDTH)
        self.block18 = Refine()
        self.block19 = Join(24, WIDTH)
        self.block20 = Refine()
        self.block21 = Join(16, WIDTH)
        self.block22 = Refine()
        self.block23 = head()

    def forward(self, x: Tensor) -> Tensor:
        c1, c2, c3, c4, c5 = self.backbone(x)
        x = self.block16(self.block15(c4, c5))  # (B, 64, H / 16, W / 16)
        x = self.block18(self.block17(c3, x))  # (B, 64, H / 8, W / 8)
        x = self.block20(self.block19(c2, x))  # (B, 64, H / 4, W / 4)
        x = self.block22(self.block21(c1, x))  # (B, 64, H / 2, W / 2)
        return self.block23(x)[:, 7:]  # (B, 9, H / 2, W / 2); the first seven serve training only
