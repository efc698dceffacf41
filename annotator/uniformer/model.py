"""Semantic segmentation: a UniFormer backbone (Li et al., 2022) under a UPerNet head (Xiao et al., 2018), 150 classes.

The backbone's first two stages mix pixels by 5x5 depthwise convolutions, the last two by attention between all of them.
The head pools the coarsest map over grids of several sizes, adds coarse maps to finer ones from the top down, and
classifies what all four have found. Inputs need at least `STRIDE` pixels a side.
"""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from timm.layers import ConvNormAct, LayerNorm, LayerNorm2d, Mlp
from timm.models.vision_transformer import Block
from torch import Tensor, nn

CLASSES = 150
DEPTHS = (3, 4, 8, 3)
WIDTHS = (64, 128, 320, 512)
CONVOLUTIONAL_STAGES = 2
HEAD_WIDTH = 64  # of attention
DECODER_WIDTH = 512
AUXILIARY_WIDTH = 256
POOL_SIZES = (1, 2, 3, 6)
STRIDE = 32  # input pixels to one of the coarsest map


def patch_embed(in_channels: int, width: int, patch: int) -> nn.Sequential:
    """Each `patch` by `patch` pixels become one: (B, in_channels, H, W) to (B, width, H // patch, W // patch)."""
    proj = nn.Conv2d(in_channels, width, patch, stride=patch)
    return nn.Sequential(OrderedDict(proj=proj, norm=LayerNorm2d(width, eps=1e-5)))


def position_embedding(width: int) -> nn.Conv2d:
    """A 3x3 depthwise convolution: the borders' zeros tell where a pixel is."""
    return nn.Conv2d(width, width, 3, padding=1, groups=width)


class ConvolutionBlock(nn.Module):
    """A transformer block whose attention is a 5x5 depthwise convolution, with batch norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.pos_embed = position_embedding(width)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv1 = nn.Conv2d(width, width, 1)
        self.conv2 = nn.Conv2d(width, width, 1)
        self.attn = nn.Conv2d(width, width, 5, padding=2, groups=width)
        self.norm2 = nn.BatchNorm2d(width)
        self.mlp = Mlp(width, 4 * width, use_conv=True)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.pos_embed(x)  # (B, C, H, W)
        x = x + self.conv2(self.attn(self.conv1(self.norm1(x))))
        return x + self.mlp(self.norm2(x))


class AttentionBlock(Block):
    """A transformer block over all pixels."""

    def __init__(self, width: int) -> None:
        super().__init__(width, width // HEAD_WIDTH, qkv_bias=True, norm_layer=LayerNorm)
        self.pos_embed = position_embedding(width)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]  # its base takes masks, too
        x = x + self.pos_embed(x)  # (B, D, H, W)
        tokens = super().forward(x.flatten(2).transpose(1, 2))  # (B, L, D) with L = H * W
        return tokens.transpose(1, 2).unflatten(2, x.shape[2:])  # (B, D, H, W)


class UniFormer(nn.Module):
    """Four maps of a picture (B, 3, H, W): `WIDTHS` channels, at a 4th, 8th, 16th and 32nd of its size."""

    def __init__(self) -> None:
        super().__init__()
        in_channels = 3
        for stage, (depth, width) in enumerate(zip(DEPTHS, WIDTHS, strict=True)):
            block = ConvolutionBlock if stage < CONVOLUTIONAL_STAGES else AttentionBlock
            self.add_module(f"patch_embed{stage + 1}", patch_embed(in_channels, width, 4 if stage == 0 else 2))
            self.add_module(f"blocks{stage + 1}", nn.Sequential(*(block(width) for _ in range(depth))))
            self.add_module(f"norm{stage + 1}", LayerNorm2d(width))
            in_channels = width

    def forward(self, x: Tensor) -> list[Tensor]:
        features = []
        for stage in range(1, len(DEPTHS) + 1):
            x = self.get_submodule(f"patch_embed{stage}")(x)
            x = self.get_submodule(f"blocks{stage}")(x)  # (B, WIDTHS[i], H // 2**(i + 2), W // 2**(i + 2))
            features.append(self.get_submodule(f"norm{stage}")(x))  # what the next stage gets is not normalised
        return features


def resize_like(x: Tensor, other: Tensor) -> Tensor:
    """`x` at the height and width of `other`."""
    return F.interpolate(x, size=other.shape[2:], mode="bilinear")


class UPerHead(nn.Module):
    """The four maps of `UniFormer` to the classes' logits, at the size of the finest."""

    def __init__(self) -> None:
        super().__init__()
        width, coarsest, fine = DECODER_WIDTH, WIDTHS[-1], WIDTHS[:-1]
        self.conv_seg = nn.Conv2d(width, CLASSES, 1)
        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(size), ConvNormAct(coarsest, width, 1)) for size in POOL_SIZES
        )
        self.bottleneck = ConvNormAct(coarsest + len(POOL_SIZES) * width, width, 3)
        self.lateral_convs = nn.ModuleList(ConvNormAct(channels, width, 1) for channels in fine)
        self.fpn_convs = nn.ModuleList(ConvNormAct(width, width, 3) for _ in fine)
        self.fpn_bottleneck = ConvNormAct(len(WIDTHS) * width, width, 3)

    def forward(self, features: list[Tensor]) -> Tensor:
        *fine, coarsest = features
        pooled = [resize_like(pool(coarsest), coarsest) for pool in self.psp_modules]
        x = self.bottleneck(torch.cat([coarsest, *pooled], dim=1))  # (B, 512, H / 8, W / 8) of the finest map
        found = [x]  # from coarse to fine
        levels = zip(fine, self.lateral_convs, self.fpn_convs, strict=True)
        for feature, lateral, conv in reversed(list(levels)):
            x = lateral(feature) + resize_like(x, feature)  # (B, 512, H / 4, W / 4), then H / 2, then H
            found.append(conv(x))
        found = [resize_like(level, found[-1]) for level in reversed(found)]
        return self.conv_seg(self.fpn_bottleneck(torch.cat(found, dim=1)))  # (B, 2048, H, W) to (B, CLASSES, H, W)


class UPerNet(nn.Module):
    """The network of `upernet_global_small.pth`: a normalised picture to logits at a quarter of its size."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = UniFormer()
        self.decode_head = UPerHead()
        # Logits from the third of the four maps alone. They helped training, and segmenting does without them.
        convs = nn.Sequential(ConvNormAct(WIDTHS[2], AUXILIARY_WIDTH, 3))
        conv_seg = nn.Conv2d(AUXILIARY_WIDTH, CLASSES, 1)
        self.auxiliary_head = nn.Sequential(OrderedDict(convs=convs, conv_seg=conv_seg))

    def forward(self, x: Tensor) -> Tensor:
        return self.decode_head(self.backbone(x))  # (B, 3, H, W) to (B, CLASSES, H // 4, W // 4)
