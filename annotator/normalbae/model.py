"""The network of NormalBae: surface normals with their certainty, refined from an eighth of the picture's size to all of it.

After Bae, Budvytis and Cipolla 2021, "Estimating and exploiting the aleatoric uncertainty in surface normal estimation".
Shapes: B batch, H W the picture (multiples of 8), C channels.
"""

from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

STRIDE = 8  # the picture's sides are multiples of it
SKIP_STAGES = (0, 1, 2, 4)  # whose outputs, at 1/2, 1/4, 1/8 and 1/16 of the picture's size, also go to the decoder
MIN_KAPPA = 0.01  # least concentration of the distribution of normals


class Encoder(nn.Module):
    """EfficientNet-B5 in TensorFlow's arrangement, without its classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.original_model = timm.create_model("tf_efficientnet_b5", pretrained=False, num_classes=0)

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> the outputs of SKIP_STAGES, finest first, then (B, 2048, H/32, W/32)."""
        network: Any = self.original_model
        x = network.bn1(network.conv_stem(x))  # (B, 48, H/2, W/2)
        features = []
        for number, stage in enumerate(network.blocks):
            x = stage(x)
            if number in SKIP_STAGES:
                features.append(x)
        return [*features, network.conv_head(x)]


class UpSampleBN(nn.Module):
    """Doubles the size to that of a skip connection, joins the two, and convolves twice."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width in (in_channels, out_channels):
            layers += [nn.Conv2d(width, out_channels, 3, padding=1), nn.BatchNorm2d(out_channels), nn.LeakyReLU()]
        self._net = nn.Sequential(*layers)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:  # (B, C, h, w), (B, C', 2h, 2w) -> (B, out, 2h, 2w)
        x = F.interpolate(x, skip.shape[2:], mode="bilinear", align_corners=True)
        return self._net(torch.cat([x, skip], dim=1))


def normalise(prediction: Tensor) -> Tensor:
    """Normals of length 1 and a concentration above `MIN_KAPPA`: (B, 4, ...) -> (B, 4, ...)."""
    normal, kappa = prediction[:, :3], prediction[:, 3:]
    length = normal.square().sum(dim=1, keepdim=True).sqrt() + 1e-10
    return torch.cat([normal / length, F.elu(kappa) + 1.0 + MIN_KAPPA], dim=1)


class Decoder(nn.Module):
    """Feature maps up to half the picture's size, and a prediction at each size from the one before and its features."""

    def __init__(self) -> None:
        super().__init__()
        self.conv2 = nn.Conv2d(2048, 2048, 1)
        self.up1 = UpSampleBN(2048 + 176, 1024)
        self.up2 = UpSampleBN(1024 + 64, 512)
        self.up3 = UpSampleBN(512 + 40, 256)
        self.up4 = UpSampleBN(256 + 24, 128)
        self.out_conv_res8 = nn.Conv2d(512, 4, 3, padding=1)
        self.out_conv_res4 = _pixelwise(512 + 4)
        self.out_conv_res2 = _pixelwise(256 + 4)
        self.out_conv_res1 = _pixelwise(128 + 4)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        half, quarter, eighth, sixteenth, x = features
        x = self.up1(self.conv2(x), sixteenth)  # (B, 1024, H/16, W/16)
        eighth = self.up2(x, eighth)  # (B, 512, H/8, W/8)
        quarter = self.up3(eighth, quarter)  # (B, 256, H/4, W/4)
        half = self.up4(quarter, half)  # (B, 128, H/2, W/2)
        outputs = [normalise(self.out_conv_res8(eighth))]
        for x, head in ((eighth, self.out_conv_res4), (quarter, self.out_conv_res2), (half, self.out_conv_res1)):
            known = torch.cat([x, outputs[-1]], dim=1)
            known = F.interpolate(known, scale_factor=2, mode="bilinear", align_corners=True)
            outputs.append(normalise(head(known.flatten(2))).unflatten(2, known.shape[2:]))
        return outputs


def _pixelwise(in_channels: int) -> nn.Sequential:
    """Four layers applied to each pixel alone."""
    layers: list[nn.Module] = []
    for width in (in_channels, 128, 128):
        layers += [nn.Conv1d(width, 128, 1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv1d(128, 4, 1))


class NNET(nn.Module):
    """Normals and their concentration.

    Takes RGB, (B, 3, H, W), 0..1 less the mean, divided by the std of ImageNet. Gives four maps (B, 4, h, w), at an
    eighth, a quarter, half of the picture's size and all of it: x, y, z, concentration.
    """

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder()
        self.decoder = Decoder()

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.decoder(self.encoder(x))
