"""Line art of photographs, fine or coarse."""

from typing import Annotated, Any

import numpy as np
from torch import Tensor

from annotator.lineart.model import Generator
from annotator.network import LazyNetwork, NetworkDetector, to_tensor
from annotator.pictures import to_uint8

__all__ = ["Generator", "LineartDetector"]


class LineartDetector(NetworkDetector):
    """A drawing of a picture, dark on white; in controlnet_aux's way white on black.

    Each of the two networks is loaded when it is first needed, or by `load`, and not by the constructor.

    Args:
        weights: a folder with `sk_model.pth` (fine) and `sk_model2.pth` (coarse), or a file with the fine weights beside which
            the coarse ones lie.
    """

    network = LazyNetwork("sk_model.pth")
    coarse_network = LazyNetwork("sk_model2.pth")
    min_side = Generator.MIN_SIDE
    build_network = Generator

    def load(self, coarse: bool | None = None, **parameters: Any) -> None:
        if coarse is not None:
            _ = self.coarse_network if coarse else self.network

    def encode(self, image: np.ndarray) -> Tensor:
        return to_tensor(image) / 255.0

    def forward(self, x: Tensor, coarse: bool = False, **parameters: Any) -> Tensor:
        return (self.coarse_network if coarse else self.network)(x)

    def decode(
        self, output: Any, size: tuple[int, int], coarse: Annotated[bool, "fewer, bolder lines (sk_model2.pth)"] = False
    ) -> np.ndarray:
        """(H, W), uint8. As in the reference, a side that is no multiple of 4 comes back as the next one (150 gives 152); but
        where a side has fewer than 5 pixels, where the reference fails, the size is kept."""
        drawing = output[0].cpu().numpy()
        if min(size) < Generator.MIN_SIDE:
            drawing = drawing[: size[0], : size[1]]
        return to_uint8(drawing * 255.0)

    def aux_map(self, view: np.ndarray, size: tuple[int, int], **parameters: Any) -> np.ndarray:
        return 255 - super().aux_map(view, size, **parameters)
