"""PiDiNet (Su et al., "Pixel Difference Networks for Efficient Edge Detection", ICCV 2021).

Its 3x3 convolutions act on differences between pixels instead of on pixels. A difference of linear terms is a linear
term, so each is a plain convolution whose kernel is computed from the weights as they were trained.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH = 60  # of the first stage
DILATION_WIDTH = 24
STAGES = ((WIDTH, 3), (2 * WIDTH, 4), (4 * WIDTH, 4), (4 * WIDTH, 4))  # channels and number of blocks
MIN_SIDE = 8  # the picture is halved three times

# Flat positions in a 3x3 kernel: for each, the neighbour one step on (anticlockwise) around the centre.
NEXT_AROUND = [3, 0, 1, 6, 4, 2, 7, 8, 5]
# Flat positions in a 5x5 kernel of the eight pixels two steps from the centre, and of those one step from it.
OUTER_RING = [0, 2, 4, 10, 14, 20, 22, 24]
INNER_RING = [6, 7, 8, 11, 13, 16, 17, 18]


def central_difference(weight: Tensor) -> Tensor:
    """Kernel (O, I, 3, 3) that weighs each pixel's difference to the centre."""
    flat = weight.flatten(2).clone()
    flat[:, :, 4] -= weight.sum(dim=(2, 3))
    return flat.reshape(weight.shape)


def angular_difference(weight: Tensor) -> Tensor:
    """Kernel (O, I, 3, 3) that weighs differences between neighbours around the centre."""
    flat = weight.flatten(2)
    return (flat - flat[:, :, NEXT_AROUND]).reshape(weight.shape)


def radial_difference(weight: Tensor) -> Tensor:
    """Kernel (O, I, 5, 5) that weighs differences between the outer and the inner ring.

    The eight places of a ring, row by row, take the last eight of the nine weights: the published network leaves out
    the first, not the middle.
    """
    outer_weights = weight.flatten(2)[:, :, 1:]
    kernel = weight.new_zeros(*weight.shape[:2], 25)
    kernel[:, :, OUTER_RING] = outer_weights
    kernel[:, :, INNER_RING] = -outer_weights
    return kernel.reshape(*weight.shape[:2], 5, 5)


def plain(weight: Tensor) -> Tensor:
    """The kernel itself."""
    return weight


ORDER: tuple[Callable[[Tensor], Tensor], ...] = (central_difference, angular_difference, radial_difference, plain)


class PixelDifferenceConv2d(nn.Conv2d):
    """A 3x3 convolution without bias that keeps the size and whose kernel goes through `to_kernel` first."""

    def __init__(
        self, in_channels: int, out_channels: int, to_kernel: Callable[[Tensor], Tensor], groups: int = 1
    ) -> None:
        super().__init__(in_channels, out_channels, 3, groups=groups, bias=False)
        self.to_kernel = to_kernel

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.to_kernel(self.weight)
        return F.conv2d(x, kernel, padding=kernel.shape[-1] // 2, groups=self.groups)  # (B, out_channels, H, W)


class Block(nn.Module):
    """A depthwise pixel difference, ReLU and 1x1 convolution with a residual; halves the picture first if told to."""

    def __init__(self, in_channels: int, out_channels: int, to_kernel: Callable[[Tensor], Tensor], halve: bool) -> None:
        super().__init__()
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1) if halve else None
        self.conv1 = PixelDifferenceConv2d(in_channels, in_channels, to_kernel, groups=in_channels)
        self.conv2 = nn.Conv2d(in_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.shortcut is not None:
            x = F.max_pool2d(x, 2)  # (B, in_channels, H // 2, W // 2)
        y = self.conv2(F.relu(self.conv1(x)))  # (B, out_channels, h, w)
        return y + (x if self.shortcut is None else self.shortcut(x))


class DilationModule(nn.Module):
    """Sum of four dilated convolutions: what surrounds a pixel, near and far."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 1)
        self.conv2_1, self.conv2_2, self.conv2_3, self.conv2_4 = (
            nn.Conv2d(out_channels, out_channels, 3, padding=dilation, dilation=dilation, bias=False)
            for dilation in (5, 7, 9, 11)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(F.relu(x))  # (B, out_channels, h, w)
        return self.conv2_1(x) + self.conv2_2(x) + self.conv2_3(x) + self.conv2_4(x)


class SpatialAttention(nn.Module):
    """Weighs each pixel by a number in 0..1 that is computed from it and its neighbours."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 4, 1)
        self.conv2 = nn.Conv2d(4, 1, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.conv2(self.conv1(F.relu(x))))  # (B, C, h, w) times (B, 1, h, w)


class PiDiNet(nn.Module):
    """BGR of 0..1 to five edge maps of 0..1 at the size of the picture: one a stage, and the fused one last."""

    def __init__(self) -> None:
        super().__init__()
        self.init_block = PixelDifferenceConv2d(3, WIDTH, ORDER[0])
        self.stages: list[list[str]] = []
        in_channels, layer = WIDTH, 1
        for stage, (channels, blocks) in enumerate(STAGES, start=1):
            # The stem is the first stage's first layer, so its blocks are one fewer, and none of them halves.
            self.stages.append([f"block{stage}_{number}" for number in range(1, blocks + 1)])
            for number, name in enumerate(self.stages[-1]):
                halve = stage > 1 and number == 0
                self.add_module(name, Block(in_channels, channels, ORDER[layer % len(ORDER)], halve))
                in_channels = channels
                layer += 1
        self.dilations = nn.ModuleList(DilationModule(channels, DILATION_WIDTH) for channels, _ in STAGES)
        self.attentions = nn.ModuleList(SpatialAttention(DILATION_WIDTH) for _ in STAGES)
        self.conv_reduces: Any = nn.ModuleList(nn.ModuleDict({"conv": nn.Conv2d(DILATION_WIDTH, 1, 1)}) for _ in STAGES)
        self.classifier = nn.Conv2d(len(STAGES), 1, 1)

    def forward(self, x: Tensor) -> list[Tensor]:
        size = x.shape[2:]
        x = self.init_block(x)  # (B, 60, H, W)
        edges = []
        heads = zip(self.stages, self.dilations, self.attentions, self.conv_reduces, strict=True)
        for names, dilation, attention, reduce in heads:
            for name in names:
                x = self.get_submodule(name)(x)  # (B, C, h, w)
            edge = reduce["conv"](attention(dilation(x)))  # (B, 1, h, w)
            edges.append(F.interpolate(edge, size=size, mode="bilinear"))  # (B, 1, H, W)
        fused = self.classifier(torch.cat(edges, dim=1))  # (B, 1, H, W)
        return [torch.sigmoid(edge) for edge in (*edges, fused)]
