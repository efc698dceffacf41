"""Straight lines by M-LSD."""

import numpy as np
import torch
from torch import nn

from annotator.detector import NetworkDetector
from annotator.mlsd.decode import decode_lines, draw_lines
from annotator.mlsd.model import STRIDE, MobileV2MLSDLarge
from annotator.util import pad_to_multiple

__all__ = ["MLSDdetector", "MobileV2MLSDLarge", "decode_lines", "draw_lines"]


class MLSDdetector(NetworkDetector):
    """Straight lines of a picture, white on black, one pixel thick.

    The reference swallows every failure and gives a black map then: also for sides that its network cannot take. Here
    such pictures are padded, and only a picture without lines gives a black map.
    """

    filename = "mlsd_large_512_fp32.pth"

    def build_network(self) -> nn.Module:
        return MobileV2MLSDLarge()

    @torch.no_grad()
    def lines(self, input_image: np.ndarray, thr_v: float = 0.1, thr_d: float = 0.1) -> np.ndarray:
        """Line segments by falling score: (n, 4), float64, x1, y1, x2, y2 in pixels; see `decode_lines`.

        Raises:
            ValueError: for thresholds that are negative or no numbers, besides what is no picture.
        """
        for name, threshold in (("thr_v", thr_v), ("thr_d", thr_d)):
            if not threshold >= 0:
                raise ValueError(f"{name} must be a number of at least 0, got {threshold}")
        image = self.prepare(input_image)
        if any(side < STRIDE or side % STRIDE > 1 for side in image.shape[:2]):
            image = pad_to_multiple(image, STRIDE)
        ones = np.ones_like(image[:, :, :1])
        x = self.tensor(np.concatenate([image, ones], axis=2)) / 127.5 - 1.0  # (1, 4, H, W)
        return decode_lines(self.network(x)[0], thr_v, thr_d)

    def __call__(self, input_image: np.ndarray, thr_v: float = 0.1, thr_d: float = 0.1) -> np.ndarray:
        """
        Args:
            input_image: (H, W, 3), uint8, RGB.
            thr_v: lines have a score above this, 0 to 1.
            thr_d: lines are longer than this, in pixels of a map of half the size.

        Returns:
            (H, W), uint8.
        """
        lines = self.lines(input_image, thr_v, thr_d)
        return draw_lines(lines, *input_image.shape[:2])
