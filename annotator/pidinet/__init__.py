"""Soft edges by PiDiNet."""

from typing import Any

import numpy as np
from torch import Tensor

from annotator.hed import Safe, SoftEdgeDetector, edges_to_map
from annotator.network import LazyNetwork, to_tensor
from annotator.pidinet.model import MIN_SIDE, PiDiNet

__all__ = ["PiDiNet", "PidiNetDetector"]


class PidiNetDetector(SoftEdgeDetector):
    """Edges of a picture, white on black, soft."""

    network = LazyNetwork("table5_pidinet.pth")
    min_side = MIN_SIDE
    build_network = PiDiNet

    def encode(self, image: np.ndarray) -> Tensor:
        return to_tensor(image[:, :, ::-1]) / 255.0

    def decode(self, output: Any, size: tuple[int, int], safe: Safe = False, apply_filter: bool = False) -> np.ndarray:
        edge = output[-1][0, : size[0], : size[1]].cpu().numpy()  # the fused one of five
        return edges_to_map((edge > 0.5).astype(np.float32) if apply_filter else edge, 2 if safe else 0)
