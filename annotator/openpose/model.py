"""The networks of OpenPose: convolutional pose machines for bodies, hands and faces.

Cao et al., "Realtime Multi-Person 2D Pose Estimation using Part Affinity Fields" (2017), and Simon et al., "Hand
Keypoint Detection in Single Images using Multiview Bootstrapping" (2017). Features of a VGG, cut to an eighth of the
picture's size, go through six stages; each sees the features and what the stage before it said.

All take (B, 3, H, W), BGR, about -0.5 to 0.5, of any size of at least 8 pixels a side.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STRIDE = 8  # pixels of the picture a pixel of a map
BODY_JOINTS, BODY_PAFS = 18, 38
HAND_POINTS = 21
FACE_MAPS = 71
STAGES = 6

# Output channels of the VGG's convolutions. Each block but the last ends in a 2x2 max pool.
_VGG = {"conv1_1": 64, "conv1_2": 64, "conv2_1": 128, "conv2_2": 128, "conv3_1": 256, "conv3_2": 256, "conv3_3": 256,
        "conv3_4": 256}  # fmt: skip
_BODY_FEATURES = _VGG | {"conv4_1": 512, "conv4_2": 512, "conv4_3_CPM": 256, "conv4_4_CPM": 128}
_POINT_FEATURES = _VGG | {"conv4_1": 512, "conv4_2": 512, "conv4_3": 512, "conv4_4": 512, "conv5_1": 512,
                          "conv5_2": 512, "conv5_3_CPM": 128}  # fmt: skip
_POOLED = ("conv1_2", "conv2_2", "conv3_4")
_FEATURE_CHANNELS = 128


def _features(channels: dict[str, int]) -> dict[str, nn.Conv2d]:
    inputs = [3, *channels.values()]
    return {name: nn.Conv2d(n, m, 3, padding=1) for (name, m), n in zip(channels.items(), inputs, strict=False)}


def _first_stage(names: Iterable[str], outputs: int) -> dict[str, nn.Conv2d]:
    """3x3 convolutions, but for two 1x1 convolutions at the end."""
    *narrow, wide, last = names
    convs = {name: nn.Conv2d(_FEATURE_CHANNELS, _FEATURE_CHANNELS, 3, padding=1) for name in narrow}
    return convs | {wide: nn.Conv2d(_FEATURE_CHANNELS, 512, 1), last: nn.Conv2d(512, outputs, 1)}


def _later_stage(suffix: str, inputs: int, outputs: int) -> dict[str, nn.Conv2d]:
    """Five 7x7 convolutions, then two 1x1."""
    layers = [(inputs, 128, 7)] + [(128, 128, 7)] * 4 + [(128, 128, 1), (128, outputs, 1)]
    return {
        f"Mconv{i}_{suffix}": nn.Conv2d(n, m, kernel, padding=kernel // 2)
        for i, (n, m, kernel) in enumerate(layers, start=1)
    }


def _run(convs: Iterable[tuple[str, nn.Module]], x: Tensor, linear_end: bool = True) -> Tensor:
    """ReLU after every convolution, except after the last if `linear_end`; pooling where the VGG has it."""
    convs = list(convs)
    for i, (name, conv) in enumerate(convs):
        x = conv(x)
        if not (linear_end and i == len(convs) - 1):
            x = F.relu(x)
        if name in _POOLED:
            x = F.max_pool2d(x, 2)
    return x


class BodyPoseModel(nn.Module):
    """Part affinity fields (PAFs), and heat maps of 18 joints and the background.

    The last stage's heat maps go through a ReLU, other than those of all stages before: published weights expect it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.model0 = nn.ModuleDict(_features(_BODY_FEATURES))
        outputs = {1: BODY_PAFS, 2: BODY_JOINTS + 1}
        joined = _FEATURE_CHANNELS + sum(outputs.values())
        for branch, channels in outputs.items():
            first = _first_stage([f"conv5_{i}_CPM_L{branch}" for i in range(1, 6)], channels)
            self.add_module(f"model1_{branch}", nn.ModuleDict(first))
            for stage in range(2, STAGES + 1):
                later = _later_stage(f"stage{stage}_L{branch}", joined, channels)
                self.add_module(f"model{stage}_{branch}", nn.ModuleDict(later))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Fields (B, 38, H / 8, W / 8), x and y along each limb, and heat maps (B, 19, H / 8, W / 8)."""
        features = _run(self.model0.items(), x, linear_end=False)  # (B, 128, h, w)
        joined = features
        for stage in range(1, STAGES + 1):
            branches = (getattr(self, f"model{stage}_{branch}") for branch in (1, 2))
            pafs, heatmaps = (_run(branch.items(), joined) for branch in branches)  # (B, 38, h, w), (B, 19, h, w)
            joined = torch.cat([pafs, heatmaps, features], dim=1)  # (B, 185, h, w)
        return pafs, F.relu(heatmaps)


class HandPoseModel(nn.Module):
    """Heat maps of a hand's 21 points and, the last one, of the background."""

    def __init__(self) -> None:
        super().__init__()
        outputs = HAND_POINTS + 1
        self.model1_0 = nn.ModuleDict(_features(_POINT_FEATURES))
        self.model1_1 = nn.ModuleDict(_first_stage(["conv6_1_CPM", "conv6_2_CPM"], outputs))
        for stage in range(2, STAGES + 1):
            later = _later_stage(f"stage{stage}", outputs + _FEATURE_CHANNELS, outputs)
            self.add_module(f"model{stage}", nn.ModuleDict(later))

    def forward(self, x: Tensor) -> Tensor:
        features = _run(self.model1_0.items(), x, linear_end=False)  # (B, 128, h, w)
        heatmaps = _run(self.model1_1.items(), features)  # (B, 22, h, w)
        for stage in range(2, STAGES + 1):
            joined = torch.cat([heatmaps, features], dim=1)  # (B, 150, h, w)
            heatmaps = _run(getattr(self, f"model{stage}").items(), joined)  # (B, 22, h, w)
        return heatmaps  # at an eighth of the size of x


class FacePoseModel(nn.Module):
    """Heat maps of a face's landmarks; built like the hand's network, with flat names."""

    def __init__(self) -> None:
        super().__init__()
        stages = [_features(_POINT_FEATURES), _first_stage(["conv6_1_CPM", "conv6_2_CPM"], FACE_MAPS)]
        stages += [
            _later_stage(f"stage{stage}", FACE_MAPS + _FEATURE_CHANNELS, FACE_MAPS) for stage in range(2, STAGES + 1)
        ]
        for convs in stages:
            for name, conv in convs.items():
                self.add_module(name, conv)
        self.stages = [list(convs) for convs in stages]  # names of the features' and each stage's convolutions

    def _run_stage(self, stage: int, x: Tensor) -> Tensor:
        return _run([(name, getattr(self, name)) for name in self.stages[stage]], x, linear_end=stage > 0)

    def forward(self, x: Tensor) -> list[Tensor]:
        """The six stages' maps, each (B, 71, H / 8, W / 8)."""
        features = self._run_stage(0, x)  # (B, 128, h, w)
        heatmaps = [self._run_stage(1, features)]  # (B, 71, h, w)
        for stage in range(2, STAGES + 1):
            joined = torch.cat([heatmaps[-1], features], dim=1)  # (B, 199, h, w)
            heatmaps.append(self._run_stage(stage, joined))  # (B, 71, h, w)
        return heatmaps
