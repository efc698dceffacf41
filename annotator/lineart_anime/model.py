"""The line extractor for anime drawings: a U-Net of eight levels (the "U-Net 256" of pix2pix, Isola et al., 2017)."""

import torch
from torch import Tensor, nn

WIDTHS = (64, 128, 256, 512, 512, 512, 512, 512)  # channels of the levels, from the outermost
SIDE = 2 ** len(WIDTHS)  # the smallest picture; sides must be multiples


def _down(in_channels: int, out_channels: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 4, stride=2, padding=1)


def _up(in_channels: int, out_channels: int) -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(in_channels, out_channels, 4, stride=2, padding=1)


class Level(nn.Module):
    """An inner level of the U-Net with all that lie below it: its input, joined with what they make of it.

    Args:
        widths: channels of the level above, of this one, and of those below.
    """

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        above, width, *below = widths
        inner: list[nn.Module] = [nn.ReLU(), _up(width, above)]
        if below:
            inner = [nn.InstanceNorm2d(width), Level(widths[1:]), nn.ReLU(), _up(2 * width, above)]
        self.model = nn.Sequential(nn.LeakyReLU(0.2), _down(above, width), *inner, nn.InstanceNorm2d(above))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.model(x)], dim=1)  # (B, above, h, w) to (B, 2 * above, h, w)


class UnetGenerator(nn.Module):
    """RGB of -1..1 to lines of -1..1, dark on light (B, 1, H, W); sides must be multiples of 256."""

    def __init__(self) -> None:
        super().__init__()
        width = WIDTHS[0]
        layers = nn.Sequential(_down(3, width), Level(WIDTHS), nn.ReLU(), _up(2 * width, 1), nn.Tanh())
        self.model = nn.ModuleDict({"model": layers})

    def forward(self, x: Tensor) -> Tensor:
        return self.model["model"](x)
