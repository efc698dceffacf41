"""DPT-hybrid, the network of MiDaS 3.0 that ControlNet takes depth from.

After Ranftl, Bochkovskiy and Koltun 2021, "Vision transformers for dense prediction". Shapes: B batch, H W the picture
(multiples of 32), C channels, N tokens of the transformer (one, and one for every 16x16 pixels).
"""

from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

STRIDE = 32  # the picture's sides are multiples of it
HOOKED_BLOCKS = (8, 11)  # transformer blocks whose tokens the decoder takes
WIDTH = 768  # of a token
FEATURES = 256  # channels of the decoder


class ProjectReadout(nn.Module):
    """Joins every token with the class token."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Sequential(nn.Linear(2 * WIDTH, WIDTH), nn.GELU())

    def forward(self, tokens: Tensor) -> Tensor:  # (B, 1 + N, C) -> (B, N, C)
        picture = tokens[:, 1:]
        return self.project(torch.cat([picture, tokens[:, :1].expand_as(picture)], dim=-1))


class Reassemble(nn.ModuleList):
    """Tokens to a feature map; halved in size if `halve`. Numbered as in the published file."""

    def __init__(self, halve: bool) -> None:
        layers: list[nn.Module] = [ProjectReadout(), nn.Identity(), nn.Identity(), nn.Conv2d(WIDTH, WIDTH, 1)]
        super().__init__(layers + [nn.Conv2d(WIDTH, WIDTH, 3, stride=2, padding=1)] if halve else layers)

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:  # (B, 1 + N, C) -> (B, C, *grid)
        x = self[0](tokens).transpose(1, 2).unflatten(2, grid)
        for convolution in list(self)[3:]:
            x = convolution(x)
        return x


class Backbone(nn.Module):
    """A residual network whose output is the tokens of a vision transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.model: Any = timm.create_model("vit_base_r50_s16_384", pretrained=False, num_classes=1000)
        self.act_postprocess3 = Reassemble(halve=False)
        self.act_postprocess4 = Reassemble(halve=True)

    def activations(self, x: Tensor) -> list[Tensor]:
        """The first two stages' maps (B, C, h, w), and the tokens (B, 1 + N, C) after the blocks `HOOKED_BLOCKS`."""
        embed = self.model.patch_embed
        x = embed.backbone.stem(x)  # (B, 64, H/4, W/4)
        features = []
        for stage in embed.backbone.stages:
            x = stage(x)
            features.append(x)  # (B, 256, H/4, W/4), (B, 512, H/8, W/8), (B, 1024, H/16, W/16)
        x = embed.proj(features.pop())
        tokens = torch.cat([self.model.cls_token.expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], dim=1)
        grid = [x.shape[2], x.shape[3]]
        tokens = tokens + resample_abs_pos_embed(self.model.pos_embed, grid, interpolation="bilinear", antialias=False)
        for number, block in enumerate(self.model.blocks):
            tokens = block(tokens)
            if number in HOOKED_BLOCKS:
                features.append(tokens)
        return features

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> four feature maps, at 1/4, 1/8, 1/16 and 1/32 of the picture's size."""
        fine, middle, earlier, later = self.activations(x)
        grid = x.shape[2] // 16, x.shape[3] // 16
        return [fine, middle, self.act_postprocess3(earlier, grid), self.act_postprocess4(later, grid)]


class ResidualConvUnit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(FEATURES, FEATURES, 3, padding=1)
        self.conv2 = nn.Conv2d(FEATURES, FEATURES, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


class FeatureFusion(nn.Module):
    """Adds a finer feature map to what comes from the coarser ones, and doubles the size.

    The coarsest has nothing to add to; its `resConfUnit1` is in the published file, unused.
    """

    def __init__(self) -> None:
        super().__init__()
        self.out_conv = nn.Conv2d(FEATURES, FEATURES, 1)
        self.resConfUnit1 = ResidualConvUnit()
        self.resConfUnit2 = ResidualConvUnit()

    def forward(self, finer: Tensor, coarser: Tensor | None = None) -> Tensor:  # -> (B, C, 2h, 2w)
        x = finer if coarser is None else coarser + self.resConfUnit1(finer)
        return self.out_conv(_double(self.resConfUnit2(x)))


def _double(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)


class Decoder(nn.Module):
    """From four feature maps to one number a pixel."""

    def __init__(self) -> None:
        super().__init__()
        for level, channels in enumerate((256, 512, WIDTH, WIDTH), start=1):
            self.add_module(f"layer{level}_rn", nn.Conv2d(channels, FEATURES, 3, padding=1, bias=False))
            self.add_module(f"refinenet{level}", FeatureFusion())
        self.output_conv = nn.Sequential(
            nn.Conv2d(FEATURES, FEATURES // 2, 3, padding=1),
            nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True),
            nn.Conv2d(FEATURES // 2, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 1, 1),
            nn.ReLU(),
        )

    def forward(self, features: list[Tensor]) -> Tensor:  # -> (B, 1, H, W)
        x = None
        for level in (4, 3, 2, 1):
            finer = self.get_submodule(f"layer{level}_rn")(features[level - 1])
            x = self.get_submodule(f"refinenet{level}")(finer, x)  # (B, 256, H/16, W/16) ... (B, 256, H/2, W/2)
        return self.output_conv(x)


class DPTDepthModel(nn.Module):
    """Inverse depth of a picture, up to scale and shift: RGB (B, 3, H, W) in -1..1 -> (B, H, W), at least 0."""

    def __init__(self) -> None:
        super().__init__()
        self.pretrained = Backbone()
        self.scratch = Decoder()

    def forward(self, x: Tensor) -> Tensor:
        return self.scratch(self.pretrained(x)).squeeze(1)
