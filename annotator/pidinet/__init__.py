"""Soft edges by PiDiNet."""

from typing import Any

import numpy as np
from torch import Tensor

from annotator.hed import Safe, edges_to_map
from annotator.network import LazyNetwork, NetworkDetector, to_tensor
from annotator.pidinet.model import MIN_SIDE, PiDiNet
from annotator.scribble import fake_scribble

__all__ = ["PiDiNet", "PidiNetDetector"]


class PidiNetDetector(NetworkDetector):
    """Edges of a picture, white on black, soft."""

    network = LazyNetwork("table5_pidinet.pth")
    min_side = MIN_SIDE
    build_network = PiDiNet

    def encode(self, image: np.ndarray) -> Tensor:
        return to_tensor(image[:, :, ::-1]) / 255.0

    def decode(self, output: Any, size: tuple[int, int], safe: Safe = False, apply_filter: bool = False) -> np.ndarray:
        edge = output[-1][0, : size[0], : size[1]].cpu().numpy()  # the fused one of five
        return edges_to_map((edge > 0.5).astype(np.float32) if apply_filter else edge, 2 if safe else 0)

    def aux_map(self, view: np.ndarray, size: tuple[int, int], scribble: bool = False, **parameters: Any) -> np.ndarray:
        found = super().aux_map(view, size, **parameters)
        return fake_scribble(found) if scribble else found
