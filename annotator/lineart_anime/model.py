"""The line extractor for anime drawings: a U-Net of eight levels (the "U-Net 256" of pix2pix, Isola et al., 2017)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTHS = (64, 128, 256, 512, 512, 512, 512, 512)  # channels of the levels, from the outermost
SIDE = 2 ** len(WIDTHS)  # the smallest picture; sides must be multiples


def _down(in_channels: int, out_channels: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 4, stride=2, padding=1)


def _up(in_channels: int, out_channels: int) -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(in_channels, out_channels, 4, stride=2, padding=1)


class Level(nn.Module):
    """An inner level of the U-Net with all that lie below it: its input, joined with what they make of it.

    The keys of `model` are the places that the published file gives to the parts.

    Args:
        widths: channels of the level above, of this one, and of those below.
    """

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        above, width, *below = widths
        if below:
            parts = {"1": _down(above, width), "3": Level(widths[1:]), "5": _up(2 * width, above)}
        else:
            parts = {"1": _down(above, width), "3": _up(width, above)}
        self.model = nn.ModuleDict(parts)
        self.innermost = not below

    def forward(self, x: Tensor) -> Tensor:
        y = self.model["1"](F.leaky_relu(x, 0.2))  # (B, width, h / 2, w / 2)
        if self.innermost:
            y = self.model["3"](F.relu(y))  # (B, above, h, w)
        else:
            y = self.model["3"](F.instance_norm(y))  # (B, 2 * width, h / 2, w / 2)
            y = self.model["5"](F.relu(y))  # (B, above, h, w)
        return torch.cat([x, F.instance_norm(y)], dim=1)  # (B, 2 * above, h, w)


class UnetGenerator(nn.Module):
    """RGB of -1..1 to lines of -1..1, dark on light (B, 1, H, W); sides must be multiples of 256."""

    def __init__(self) -> None:
        super().__init__()
        width = WIDTHS[0]
        parts = {"0": _down(3, width), "1": Level(WIDTHS), "3": _up(2 * width, 1)}
        self.model = nn.ModuleDict({"model": nn.ModuleDict(parts)})

    def forward(self, x: Tensor) -> Tensor:
        down, level, up = self.model["model"].children()
        x = level(down(x))  # (B, 3, H, W) to (B, 64, H / 2, W / 2), (B, 128, H / 2, W / 2)
        return torch.tanh(up(F.relu(x)))  # (B, 1, H, W)
