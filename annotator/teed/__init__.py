"""Soft edges by TEED, a network of 59,000 weights."""

from typing import Annotated, Any

import numpy as np
from PIL import Image
from torch import Tensor, nn

from annotator.network import LazyNetwork, NetworkDetector, to_tensor
from annotator.pictures import HWC3, Picture, as_array, resize, to_uint8
from annotator.teed.model import STRIDE, TED
from annotator.util import safe_step

__all__ = ["TED", "TEEDdetector"]


class TEEDdetector(NetworkDetector):
    """Edges of a picture, white on black, in few levels (H, W)."""

    network = LazyNetwork("5_model.pth", "7_model.pth")
    repository = "fal-ai/teed"
    stride = STRIDE

    @classmethod
    def from_pretrained(
        cls, *args: Any, filename: str | None = None, subfolder: str | None = None, **options: Any
    ) -> "TEEDdetector":
        filename = f"{subfolder}/{filename}" if subfolder and filename else filename
        return super().from_pretrained(*args, filename=filename, **options)

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

    def __call__(self, input_image: Picture | None = None, *args: Any, **parameters: Any) -> Any:
        """As all detectors; but in controlnet_aux's way the map has the size of the picture, as it has there."""
        found = super().__call__(input_image, *args, **parameters)
        if input_image is None:
            return found
        size = as_array(input_image).shape[:2]
        if isinstance(found, Image.Image):
            return Image.fromarray(resize(np.asarray(found), size))
        return found if found.shape[:2] == size else resize(found, size)

    def aux_map(self, view: np.ndarray, size: tuple[int, int], **parameters: Any) -> np.ndarray:
        return HWC3(self.detect(view, **parameters))
