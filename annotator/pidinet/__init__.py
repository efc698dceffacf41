"""Soft edges by PiDiNet."""

import numpy as np
import torch
from torch import nn

from annotator.detector import NetworkDetector
from annotator.pidinet.model import MIN_SIDE, PiDiNet
from annotator.util import pad_to_multiple, safe_step, to_uint8

__all__ = ["PiDiNet", "PidiNetDetector"]


class PidiNetDetector(NetworkDetector):
    """Edges of a picture, white on black, soft."""

    filename = "table5_pidinet.pth"
    wrapper = "state_dict"

    def build_network(self) -> nn.Module:
        return PiDiNet()

    @torch.no_grad()
    def __call__(self, input_image: np.ndarray, safe: bool = False) -> np.ndarray:
        """
        Args:
            input_image: (H, W, 3), uint8, RGB.
            safe: quantise to a few levels, so that the map hides less of the picture.

        Returns:
            (H, W), uint8.
        """
        image = self.prepare(input_image)
        height, width = image.shape[:2]
        if min(height, width) < MIN_SIDE:
            image = pad_to_multiple(image, MIN_SIDE)
        *_, fused = self.network(self.tensor(image[:, :, ::-1]) / 255.0)
        edge = fused[0, 0, :height, :width].cpu().numpy()
        return to_uint8((safe_step(edge) if safe else edge) * 255.0)
