"""Soft edges by TEED, a network of 59,000 weights."""

from typing import Annotated

import numpy as np
from torch import Tensor

from annotator.hed import edges_to_map, sigmoid
from annotator.network import LazyNetwork, NetworkDetector, to_tensor
from annotator.teed.model import STRIDE, TED

__all__ = ["TED", "TEEDdetector"]


class TEEDdetector(NetworkDetector):
    """Edges of a picture, white on black, in few levels (H, W)."""

    network = LazyNetwork("5_model.pth", "7_model.pth")
    repository = "fal-ai/teed"
    build_network = TED
    stride = STRIDE
    image_resolution = None

    def encode(self, image: np.ndarray) -> Tensor:
        return to_tensor(image)

    def decode(
        self,
        output: Tensor,
        size: tuple[int, int],
        safe_steps: Annotated[int, 0, 10, "levels above black that the map is quantised to; 0 for all"] = 2,
    ) -> np.ndarray:
        return edges_to_map(sigmoid(output.mean(dim=0)[: size[0], : size[1]].cpu().numpy()), safe_steps)
