"""Depth by MiDaS, and normals from that depth."""

import math
from typing import Annotated, Any

import cv2
import numpy as np
from torch import Tensor

from annotator.midas.model import STRIDE, DPTDepthModel
from annotator.network import LazyNetwork, NetworkDetector, to_tensor
from annotator.pictures import HWC3, resize, to_uint8

__all__ = ["DPTDepthModel", "MidasDetector", "depth_to_map", "depth_to_normals"]


Maps = np.ndarray | tuple[np.ndarray, np.ndarray]  # depth, or depth and normals
Flatness = Annotated[float, 0.1, 20.0, "what z counts against the slopes; larger is flatter"]
Background = Annotated[float, 0.0, 1.0, "depth, of 0 to 1, below which all is background, facing the viewer"]


class MidasDetector(NetworkDetector):
    """Inverse depth of a picture (H, W), near is light; in version 1.0 beside the normals of its surfaces (H, W, 3; x, y, z)."""

    network = LazyNetwork("dpt_hybrid-midas-501f0c75.pt")
    stride = STRIDE
    model_types = ("dpt_hybrid",)
    output_type = None
    build_network = DPTDepthModel

    def encode(self, image: np.ndarray) -> Tensor:
        return to_tensor(image) / 127.5 - 1.0

    def decode(self, output: Any, size: tuple[int, int], a: Flatness = 2 * math.pi, bg_th: Background = 0.1) -> Maps:
        depth = output[: size[0], : size[1]].cpu().numpy()
        if self.version == "1.1":
            return depth_to_map(depth)
        return depth_to_map(depth), depth_to_normals(depth, a, bg_th)

    def aux_map(
        self, view: np.ndarray, size: tuple[int, int], depth_and_normal: bool = False, **parameters: Any
    ) -> Maps:
        (output,) = self.run(self.prepare(view)[None])
        depth = output[: view.shape[0], : view.shape[1]].cpu().numpy()
        depth_map = resize(HWC3(depth_to_map(depth)), size)
        if not depth_and_normal:
            return depth_map
        return depth_map, resize(depth_to_normals(depth, **parameters)[:, :, ::-1], size)


def relative_depth(depth: np.ndarray) -> np.ndarray:
    """Depth from 0 to 1; all 0 where it is the same everywhere."""
    depth = depth - depth.min()
    farthest = depth.max()
    return depth / farthest if farthest > 0 else depth


def depth_to_map(depth: np.ndarray) -> np.ndarray:
    """Depth (H, W), float32 -> (H, W), uint8, from the least to the greatest."""
    return to_uint8(relative_depth(depth) * 255.0)


def depth_to_normals(depth: np.ndarray, a: float = 2 * math.pi, bg_th: float = 0.1) -> np.ndarray:
    """Normals from the slopes of depth (H, W), float32 -> (H, W, 3), uint8; see `MidasDetector.decode` for `a` and `bg_th`.

    Raises:
        ValueError: a number is out of range.
    """
    if not (a > 0 and math.isfinite(a)):
        raise ValueError(f"a must be a number above 0, got {a}")
    if not 0 <= bg_th <= 1:
        raise ValueError(f"bg_th must lie in 0..1, got {bg_th}")
    x, y = (cv2.Sobel(depth, cv2.CV_32F, *axis, ksize=3) for axis in ((1, 0), (0, 1)))
    background = relative_depth(depth) < bg_th
    x[background] = y[background] = 0.0
    normal = np.stack([x, y, np.full_like(x, a)], axis=2)
    length = np.sum(normal**2, axis=2, keepdims=True) ** 0.5
    return to_uint8(normal / length * 127.5 + 127.5)
