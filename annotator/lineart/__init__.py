"""Line art of photographs, fine or coarse."""

import functools
import os
from pathlib import Path

import numpy as np
import torch
from torch import nn

from annotator.detector import NetworkDetector
from annotator.lineart.model import Generator
from annotator.util import pad_to_multiple, to_uint8
from annotator.weights import find_weights

__all__ = ["Generator", "LineartDetector"]


class LineartDetector(NetworkDetector):
    """A drawing of a picture, dark on white.

    Args:
        weights: a folder with `sk_model.pth` (fine) and `sk_model2.pth` (coarse), or a file with the fine weights
            beside which the coarse ones lie. These are looked for when they are first asked for.
    """

    filename = "sk_model.pth"
    coarse_filename = "sk_model2.pth"

    def __init__(self, device: str | torch.device | None = None, weights: str | os.PathLike | None = None) -> None:
        super().__init__(device, weights)
        is_file = weights is not None and Path(weights).expanduser().is_file()
        self._coarse_weights = Path(weights).expanduser().parent if is_file else weights

    def build_network(self) -> nn.Module:
        return Generator()

    @functools.cached_property
    def coarse_network(self) -> nn.Module:
        """The network that draws fewer, bolder lines.

        Raises:
            annotator.weights.WeightsError: if its weights cannot be found or read.
        """
        return self.load_network(find_weights(self.coarse_filename, self._coarse_weights))

    @torch.no_grad()
    def __call__(self, input_image: np.ndarray, coarse: bool = False) -> np.ndarray:
        """
        Args:
            input_image: (H, W, 3), uint8, RGB.
            coarse: fewer, bolder lines.

        Returns:
            (H, W), uint8. As in the reference, a side that is no multiple of 4 comes back as the next one (150 gives
            152); but where a side has fewer than 5 pixels, where the reference fails, the size is kept.
        """
        image = self.prepare(input_image)
        height, width = image.shape[:2]
        tiny = min(height, width) < Generator.MIN_SIDE
        if tiny:
            image = pad_to_multiple(image, 8)
        network = self.coarse_network if coarse else self.network
        drawing = network(self.tensor(image) / 255.0)[0, 0].cpu().numpy()
        return to_uint8((drawing[:height, :width] if tiny else drawing) * 255.0)
