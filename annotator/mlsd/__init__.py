"""Straight lines by M-LSD."""

from typing import Annotated, Any

import numpy as np
from torch import Tensor

from annotator.mlsd.decode import decode_lines, draw_lines
from annotator.mlsd.model import STRIDE, MobileV2MLSDLarge
from annotator.network import LazyNetwork, NetworkDetector, to_tensor
from annotator.pictures import pad_to_multiple

__all__ = ["MLSDdetector", "MobileV2MLSDLarge", "decode_lines", "draw_lines"]


class MLSDdetector(NetworkDetector):
    """Straight lines of a picture (H, W), white on black, one pixel thick.

    The reference swallows every failure and gives a black map then: also for sides that its network cannot take. Here
    such pictures are padded, and only a picture without lines gives a black map.
    """

    network = LazyNetwork("mlsd_large_512_fp32.pth")
    build_network = MobileV2MLSDLarge

    def encode(self, image: np.ndarray) -> Tensor:
        if any(side < STRIDE or side % STRIDE > 1 for side in image.shape[:2]):  # one pixel more does no harm
            image = pad_to_multiple(image, STRIDE)
        ones = np.ones_like(image[:, :, :1])
        return to_tensor(np.concatenate([image, ones], axis=2)) / 127.5 - 1.0  # (4, H, W)

    def lines(self, image: np.ndarray, thr_v: float = 0.1, thr_d: float = 0.1) -> np.ndarray:
        """Line segments by falling score: (n, 4), float64, x1, y1, x2, y2 in pixels; see `decode_lines`."""
        (output,) = self.run(self.prepare(image)[None])
        return decode_lines(output, thr_v, thr_d)

    def decode(
        self,
        output: Any,
        size: tuple[int, int],
        thr_v: Annotated[float, 0.01, 2.0, "score above which a line is kept"] = 0.1,
        thr_d: Annotated[float, 0.01, 20.0, "shortest line, in pixels of a map of half the size"] = 0.1,
    ) -> np.ndarray:
        return draw_lines(decode_lines(output, thr_v, thr_d), *size)
