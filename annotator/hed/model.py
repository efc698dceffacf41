"""Holistically nested edge detection (Xie and Tu, 2015): a VGG-16 trunk with one edge map after each of five blocks.

Two networks were published for ControlNet. They share the trunk and differ in names, input and in how the five maps
become one. Both need pictures of at least `MIN_SIDE` pixels a side, as the trunk halves them four times.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCKS = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))  # channels and number of 3x3 convolutions
MIN_SIDE = 16


class ProjectedBlock(nn.Module):
    """Some 3x3 convolutions, and a projection of what they found to one channel."""

    def __init__(self, in_channels: int, out_channels: int, depth: int) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * depth
        self.convs = nn.ModuleList(
            nn.Conv2d(before, after, 3, padding=1) for before, after in zip(widths[:-1], widths[1:], strict=True)
        )
        self.projection = nn.Conv2d(out_channels, 1, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        for conv in self.convs:
            x = F.relu(conv(x))  # (B, out_channels, H, W)
        return x, self.projection(x)  # and (B, 1, H, W)


class ControlNetHED(nn.Module):
    """The network of `ControlNetHED.pth`: RGB of 0..255 to five edge maps before the sigmoid, each at its own size."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.zeros(1, 3, 1, 1))
        in_channels = 3
        for number, (channels, depth) in enumerate(BLOCKS, start=1):
            self.add_module(f"block{number}", ProjectedBlock(in_channels, channels, depth))
            in_channels = channels

    def forward(self, x: Tensor) -> list[Tensor]:
        x = x - self.norm  # (B, 3, H, W)
        projections = []
        for number in range(1, len(BLOCKS) + 1):
            if number > 1:
                x = F.max_pool2d(x, 2)  # (B, C, H // 2**(number - 1), W // 2**(number - 1))
            x, projection = self.get_submodule(f"block{number}")(x)
            projections.append(projection)  # (B, 1, H // 2**(number - 1), W // 2**(number - 1))
        return projections


class BSDS500HED(nn.Module):
    """The network of `network-bsds500.pth`: BGR of 0..1 to the probability of an edge (B, 1, H, W)."""

    NAMES = ("One", "Two", "Thr", "Fou", "Fiv")
    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        in_channels = 3
        for name, (channels, depth) in zip(self.NAMES, BLOCKS, strict=True):
            layers: list[nn.Module] = [] if name == "One" else [nn.MaxPool2d(2)]
            for _ in range(depth):
                layers += [nn.Conv2d(in_channels, channels, 3, padding=1), nn.ReLU()]
                in_channels = channels
            self.add_module(f"moduleVgg{name}", nn.Sequential(*layers))
            self.add_module(f"moduleScore{name}", nn.Conv2d(channels, 1, 1))
        self.moduleCombine = nn.Sequential(nn.Conv2d(len(BLOCKS), 1, 1), nn.Sigmoid())
        mean = torch.tensor([104.00698793, 116.66876762, 122.67891434]).reshape(1, 3, 1, 1)
        self.register_buffer("mean", mean, persistent=False)  # of ImageNet's pictures, in B, G, R

    def scores(self, x: Tensor) -> list[Tensor]:
        """The five edge maps before they are joined, each at its own size."""
        x = x * 255.0 - self.mean  # (B, 3, H, W)
        scores = []
        for name in self.NAMES:
            x = self.get_submodule(f"moduleVgg{name}")(x)  # (B, C, H // 2**i, W // 2**i)
            scores.append(self.get_submodule(f"moduleScore{name}")(x))  # (B, 1, H // 2**i, W // 2**i)
        return scores

    def forward(self, x: Tensor) -> Tensor:
        scores = [F.interpolate(score, size=x.shape[2:], mode="bilinear") for score in self.scores(x)]
        return self.moduleCombine(torch.cat(scores, dim=1))  # (B, 5, H, W) to (B, 1, H, W)
