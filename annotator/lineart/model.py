"""The generator of "Learning to generate line drawings" (Chan et al., CVPR 2022): a small residual network."""

from torch import Tensor, nn


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with reflected borders and instance norm, added to their input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = [nn.ReflectionPad2d(1), nn.Conv2d(channels, channels, 3), nn.InstanceNorm2d(channels)]
        other = [nn.ReflectionPad2d(1), nn.Conv2d(channels, channels, 3), nn.InstanceNorm2d(channels)]
        self.conv_block = nn.Sequential(*half, nn.ReLU(), *other)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv_block(x)  # (B, C, h, w)


def _normed(conv: nn.Conv2d | nn.ConvTranspose2d) -> list[nn.Module]:
    return [conv, nn.InstanceNorm2d(conv.out_channels), nn.ReLU()]


class Generator(nn.Module):
    """RGB of 0..1 to a drawing of 0..1, dark on light; its sides are the next multiples of 4.

    Sides must have at least `MIN_SIDE` pixels, as a border of a quarter of the size is reflected.
    """

    MIN_SIDE = 5
    BLOCKS = 3

    def __init__(self) -> None:
        super().__init__()
        self.model0 = nn.Sequential(nn.ReflectionPad2d(3), *_normed(nn.Conv2d(3, 64, 7)))
        self.model1 = nn.Sequential(
            *_normed(nn.Conv2d(64, 128, 3, stride=2, padding=1)), *_normed(nn.Conv2d(128, 256, 3, stride=2, padding=1))
        )
        self.model2 = nn.Sequential(*(ResidualBlock(256) for _ in range(self.BLOCKS)))
        self.model3 = nn.Sequential(
            *_normed(nn.ConvTranspose2d(256, 128, 3, stride=2, padding=1, output_padding=1)),
            *_normed(nn.ConvTranspose2d(128, 64, 3, stride=2, padding=1, output_padding=1)),
        )
        self.model4 = nn.Sequential(nn.ReflectionPad2d(3), nn.Conv2d(64, 1, 7), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        x = self.model0(x)  # (B, 64, H, W)
        x = self.model1(x)  # (B, 256, ceil(H / 4), ceil(W / 4))
        x = self.model2(x)  # (B, 256, ceil(H / 4), ceil(W / 4))
        x = self.model3(x)  # (B, 64, 4 * ceil(H / 4), 4 * ceil(W / 4))
        return self.model4(x)  # (B, 1, 4 * ceil(H / 4), 4 * ceil(W / 4))
