"""Surface normals by NormalBae (ControlNet 1.1)."""

import numpy as np
import torch

from annotator.detector import NetworkDetector
from annotator.normalbae.model import NNET, STRIDE
from annotator.util import pad_to_multiple, to_uint8

__all__ = ["NNET", "NormalBaeDetector"]

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, RGB


class NormalBaeDetector(NetworkDetector):
    """Normals of a picture's surfaces as colours: x, y, z from -1..1 to 0..255."""

    filename = "scannet.pt"
    wrapper = "model"

    def build_network(self) -> NNET:
        return NNET()

    @torch.no_grad()
    def __call__(self, input_image: np.ndarray) -> np.ndarray:
        """
        Args:
            input_image: (H, W, 3), uint8, RGB.

        Returns:
            (H, W, 3), uint8.
        """
        image = self.prepare(input_image)
        height, width = image.shape[:2]
        x = self.tensor(pad_to_multiple(image, STRIDE)) / 255.0
        mean, deviation = (x.new_tensor(values).view(1, 3, 1, 1) for values in (MEAN, DEVIATION))
        normal = self.network((x - mean) / deviation)[-1][0, :3, :height, :width]  # (3, H, W), -1..1
        colours = ((normal + 1) * 0.5).clamp(0, 1).permute(1, 2, 0)
        return to_uint8(colours.cpu().numpy() * 255.0)
