"""Depth by MiDaS, and normals from that depth."""

import math

import cv2
import numpy as np
import torch

from annotator.detector import NetworkDetector
from annotator.midas.model import STRIDE, DPTDepthModel
from annotator.util import pad_to_multiple, to_uint8

__all__ = ["DPTDepthModel", "MidasDetector", "depth_to_map", "depth_to_normals"]


class MidasDetector(NetworkDetector):
    """Inverse depth of a picture, near is light, and the normals of its surfaces."""

    filename = "dpt_hybrid-midas-501f0c75.pt"
    wrapper = "model"  # beside `optimizer`, in files that were saved while training

    def build_network(self) -> DPTDepthModel:
        return DPTDepthModel()

    @torch.no_grad()
    def __call__(
        self, input_image: np.ndarray, a: float = 2 * math.pi, bg_th: float = 0.1
    ) -> tuple[np.ndarray, np.ndarray]:
        """
        Args:
            input_image: (H, W, 3), uint8, RGB.
            a: what z counts against the slopes in the normals; larger is flatter. Above 0.
            bg_th: depth, of 0..1, below which all is background, whose normals face the viewer.

        Returns:
            depth (H, W) and normals (H, W, 3; x, y, z), both uint8.
        """
        _check(a, bg_th)
        image = self.prepare(input_image)
        height, width = image.shape[:2]
        x = self.tensor(pad_to_multiple(image, STRIDE)) / 127.5 - 1.0
        depth = self.network(x)[0, :height, :width].cpu().numpy()
        return depth_to_map(depth), depth_to_normals(depth, a, bg_th)


def _check(a: float, bg_th: float) -> None:
    if not (a > 0 and math.isfinite(a)):
        raise ValueError(f"a must be a number above 0, got {a}")
    if not 0 <= bg_th <= 1:
        raise ValueError(f"bg_th must lie in 0..1, got {bg_th}")


def _relative(depth: np.ndarray) -> np.ndarray:
    """Depth from 0 to 1; all 0 where it is the same everywhere."""
    depth = depth - depth.min()
    farthest = depth.max()
    return depth / farthest if farthest > 0 else depth


def depth_to_map(depth: np.ndarray) -> np.ndarray:
    """Depth (H, W), float32 -> (H, W), uint8, from the least to the greatest."""
    return to_uint8(_relative(depth) * 255.0)


def depth_to_normals(depth: np.ndarray, a: float = 2 * math.pi, bg_th: float = 0.1) -> np.ndarray:
    """Normals from the slopes of depth (H, W), float32 -> (H, W, 3), uint8; see `MidasDetector` for `a` and `bg_th`.

    Raises:
        ValueError: a number is out of range.
    """
    _check(a, bg_th)
    x, y = (cv2.Sobel(depth, cv2.CV_32F, *axis, ksize=3) for axis in ((1, 0), (0, 1)))
    background = _relative(depth) < bg_th
    x[background] = y[background] = 0.0
    normal = np.stack([x, y, np.full_like(x, a)], axis=2)
    normal /= np.sum(normal**2, axis=2, keepdims=True) ** 0.5
    return to_uint8(normal * 127.5 + 127.5)
