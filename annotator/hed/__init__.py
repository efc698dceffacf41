"""Soft edges by HED, with either of the two networks that were published for ControlNet."""

import os

import cv2
import numpy as np
import torch
from torch import nn

from annotator.detector import NetworkDetector, freeze
from annotator.hed.model import BLOCKS, BSDS500HED, MIN_SIDE, ControlNetHED
from annotator.util import nms, pad_to_multiple, safe_step, to_uint8
from annotator.weights import load_weights, read_state_dict

__all__ = ["BSDS500HED", "ControlNetHED", "HEDdetector", "nms"]


class HEDdetector(NetworkDetector):
    """Edges of a picture, white on black, soft.

    Takes `ControlNetHED.pth` (1.0's last state and 1.1) and `network-bsds500.pth` (1.0 before April 2023), recognised
    by their keys.
    """

    filename = ("ControlNetHED.pth", "network-bsds500.pth")

    def load_network(self, path: str | os.PathLike) -> nn.Module:
        state_dict = read_state_dict(path)
        older = any(key.startswith("moduleVgg") for key in state_dict)
        network = BSDS500HED() if older else ControlNetHED()
        load_weights(network, state_dict, path)
        return freeze(network, self.device)

    @torch.no_grad()
    def __call__(self, input_image: np.ndarray, safe: bool = False) -> np.ndarray:
        """
        Args:
            input_image: (H, W, 3), uint8, RGB.
            safe: quantise to a few levels (1.1), so that the map hides less of the picture.

        Returns:
            (H, W), uint8.
        """
        image = self.prepare(input_image)
        height, width = image.shape[:2]
        if min(height, width) < MIN_SIDE:
            image = pad_to_multiple(image, MIN_SIDE)
        edge = self._edge(image)[:height, :width]
        return to_uint8((safe_step(edge) if safe else edge) * 255.0)

    def _edge(self, image: np.ndarray) -> np.ndarray:
        """Probability of an edge at each pixel of (H, W, 3): (H, W), floats."""
        height, width = image.shape[:2]
        if isinstance(self.network, BSDS500HED):
            return self.network(self.tensor(image[:, :, ::-1]) / 255.0)[0, 0].cpu().numpy()
        mean = np.zeros((height, width), dtype=np.float32)
        for projection in self.network(self.tensor(image)):
            mean += cv2.resize(projection[0, 0].cpu().numpy(), (width, height), interpolation=cv2.INTER_LINEAR)
        mean = (mean / len(BLOCKS)).astype(np.float64)
        return 1.0 / (1.0 + np.exp(-mean.clip(-700.0)))  # e**709 is the largest in double precision
