"""TEED, the network: X. Soria et al., "Tiny and Efficient Model for the Edge Detection Generalization", ICCVW 2023.

Three blocks, each with an upsampling branch that gives an edge map, and a fusion of the three. Names of the modules are
those of the published weights.
"""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STRIDE = 4  # of the deepest block


class Smish(nn.Module):
    """x tanh(log(1 + sigmoid(x)))."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.tanh(torch.log1p(torch.sigmoid(x)))


smish = Smish()


def double_conv(channels_in: int, channels: int, stride: int = 1, last_activation: bool = True) -> nn.Sequential:
    """Two 3x3 convolutions, each before an activation, the second's optional."""
    conv1, conv2 = nn.Conv2d(channels_in, channels, 3, stride, 1), nn.Conv2d(channels, channels, 3, 1, 1)
    last = Smish() if last_activation else nn.Identity()
    return nn.Sequential(OrderedDict(conv1=conv1, smish=Smish(), conv2=conv2, last=last))


class DenseLayer(nn.Module):
    """Two 3x3 convolutions, whose result is averaged with a skip connection of the same size."""

    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, padding=2)
        self.conv2 = nn.Conv2d(channels, channels, 3)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return 0.5 * (self.conv2(smish(self.conv1(smish(x)))) + skip)


def up_branch(channels_in: int, doublings: int) -> nn.ModuleDict:
    """An edge map of one channel from features, doubled in size `doublings` times."""
    layers, side = [], 2**doublings
    for step in range(doublings):
        channels = 1 if step == doublings - 1 else 16
        padding = side // 2 - 1
        enlarge = nn.ConvTranspose2d(channels, channels, side, 2, padding)
        layers += [nn.Conv2d(channels_in, channels, 1), Smish(), enlarge]
        channels_in = channels
    return nn.ModuleDict({"features": nn.Sequential(*layers)})


class DoubleFusion(nn.Module):
    """One edge map from three, by depthwise convolutions."""

    def __init__(self, maps: int) -> None:
        super().__init__()
        self.DWconv1 = nn.Conv2d(maps, 8 * maps, 3, padding=1, groups=maps)
        self.DWconv2 = nn.Conv2d(8 * maps, 8 * maps, 3, padding=1, groups=8 * maps)

    def forward(self, x: Tensor) -> Tensor:
        first = self.DWconv1(smish(x))  # (B, 24, H, W)
        second = self.DWconv2(smish(first))  # (B, 24, H, W)
        return smish((first + second).sum(dim=1, keepdim=True))  # (B, 1, H, W)


class TED(nn.Module):
    """Edge maps of a picture, as logits, from fine to coarse, and their fusion last."""

    def __init__(self) -> None:
        super().__init__()
        self.block_1 = double_conv(3, 16, stride=2)
        self.block_2 = double_conv(16, 32, last_activation=False)
        self.dblock_3 = nn.ModuleDict({"denselayer1": DenseLayer(32, 48)})
        self.side_1 = nn.ModuleDict({"conv": nn.Conv2d(16, 32, 1, stride=2)})
        self.pre_dense_3 = nn.ModuleDict({"conv": nn.Conv2d(32, 48, 1)})
        self.up_block_1, self.up_block_2, self.up_block_3 = up_branch(16, 1), up_branch(32, 1), up_branch(48, 2)
        self.block_cat = DoubleFusion(3)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W), RGB, 0 to 255, both sides multiples of 4 -> (B, 4, H, W)."""
        fine = self.block_1(x)  # (B, 16, H/2, W/2)
        middle = self.block_2(fine)  # (B, 32, H/2, W/2)
        halved = F.max_pool2d(middle, 3, 2, 1)  # (B, 32, H/4, W/4)
        skip = self.pre_dense_3["conv"](halved)  # (B, 48, H/4, W/4)
        coarse = self.dblock_3["denselayer1"](halved + self.side_1["conv"](fine), skip)  # (B, 48, H/4, W/4)
        branches = ((self.up_block_1, fine), (self.up_block_2, middle), (self.up_block_3, coarse))
        maps = torch.cat([branch["features"](features) for branch, features in branches], dim=1)  # (B, 3, H, W)
        return torch.cat([maps, self.block_cat(maps)], dim=1)
