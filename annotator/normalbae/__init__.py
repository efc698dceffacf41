"""Surface normals by NormalBae (ControlNet 1.1)."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from annotator.network import LazyNetwork, NetworkDetector, to_tensor
from annotator.normalbae.model import NNET, STRIDE
from annotator.pictures import to_uint8

__all__ = ["NNET", "NormalBaeDetector"]

# Of ImageNet's pictures.
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


class NormalBaeDetector(NetworkDetector):
    """Normals of a picture's surfaces as colours (H, W, 3): x, y, z from -1..1 to 0..255."""

    network = LazyNetwork("scannet.pt")
    stride = STRIDE
    build_network = NNET

    def encode(self, image: np.ndarray) -> Tensor:
        return (to_tensor(image) / 255.0 - MEAN) / STD

    def decode(self, output: Any, size: tuple[int, int]) -> np.ndarray:
        normal = output[-1][:3, : size[0], : size[1]]  # (3, H, W), -1..1
        colours = ((normal + 1) * 0.5).clamp(0, 1).permute(1, 2, 0)
        return to_uint8(colours.cpu().numpy() * 255.0)
