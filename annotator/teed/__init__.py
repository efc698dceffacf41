"""Soft edges by TEED, a network of 59,000 weights."""

from typing import Annotated

import numpy as np
from torch import Tensor, nn

from annotator.network import LazyNetwork, NetworkDetector, to_tensor
from annotator.pictures import to_uint8
from annotator.teed.model import STRIDE, TED
from annotator.util import safe_step

__all__ = ["TED", "TEEDdetector"]


class TEEDdetector(NetworkDetector):
    """Edges of a picture, white on black, in few levels (H, W)."""

    network = LazyNetwork("5_model.pth", "7_model.pth")
    repository = "fal-ai/teed"
    stride = STRIDE

    def build_network(self) -> nn.Module:
        return TED()

    def encode(self, image: np.ndarray) -> Tensor:
        return to_tensor(image)

    def decode(
        self,
        output: Tensor,
        size: tuple[int, int],
        safe_steps: Annotated[int, 0, 10, "levels above black that the map is quantised to; 0 for all"] = 2,
    ) -> np.ndarray:
        mean = output.mean(dim=0)[: size[0], : size[1]].cpu().numpy().astype(np.float64)
        edge = 1.0 / (1.0 + np.exp(-mean.clip(-700.0)))  # e**709 is the largest in double precision
        return to_uint8((safe_step(edge, safe_steps) if safe_steps else edge) * 255.0)
