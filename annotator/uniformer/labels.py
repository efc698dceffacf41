"""From logits to labels at the size of a picture, and from labels to colours."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from annotator.uniformer.model import STRIDE

VALUES_AT_ONCE = 2**23  # of logits, at the size of the picture

# Red, green and blue of the 150 classes of ADE20K, in the order of its labels.
PALETTE_HEX = (
    "787878b4787806e6e650323204c8037878508c8c8ccc05ffe6e6e604fa07e005ffebff0796053d78784608ff33ff06528fff8cccff04"
    "ff3307cc46030066c83de6faff06330b66ffff0747ff09e00907e6dcdcdcff095c7009ff08ffd607ffe0ffb8060aff47ff290a07ffff"
    "e0ff086608ffff3d06ffc207ff7a0800ff14ff0829ff05990633ffeb0cffa0961400a3ff8c8c8cfa0a0f14ff001fff00ff1f00ffe000"
    "99ff000000ffff470000ebff00adff1f00ff0bc8c8ff520000fff5003dff00ff7000ff85ff0000ffa300ff6600c2ff00008fff33ff00"
    "0052ff00ff2900ffad0a00ffadff0000ff99ff5c00ff00ffff00f5ff0066ffad00ff0014ffb8b8001fff00ff3d0047ffff00cc00ffc2"
    "00ff52000aff0070ff3300ff00c2ff007aff00ffa3ff990000ff0aff70008fff005200ffa3ff00ffeb0008b8aa8500ff00ff5cb800ff"
    "ff001f00b8ff00d6ffff00705cff0000e0ff70e0ff46b8a0a300ff9900ff47ff00ff00a3ffcc00ff008f00ffeb85ff00ff00ebf500ff"
    "ff007afff5000abed4d6ff0000ccff1400ffffff000099ff0029ff00ffcc2900ff29ff00ad00ff00f5ff4700ff7a00ff00ffb8005cff"
    "b8ff000085ffffd60019c2c266ff005c00ff"
)
PALETTE = np.frombuffer(bytes.fromhex(PALETTE_HEX), dtype=np.uint8).reshape(-1, 3)


def colour(labels: np.ndarray, palette: np.ndarray = PALETTE) -> np.ndarray:
    """The colours of labels (H, W), integers: (H, W, 3), uint8, RGB. What is not in the palette is black."""
    known = (labels >= 0) & (labels < len(palette))
    lookup = np.concatenate([palette, np.zeros((1, 3), dtype=np.uint8)])
    return lookup[np.where(known, labels, len(palette))]


def label_map(logits: Tensor, network: tuple[int, int], picture: tuple[int, int]) -> np.ndarray:
    """The likeliest class of each pixel, with the logits resized bilinearly twice: to the network's input, to the picture.

    A few classes are resized at a time, as all classes of a large picture would take gigabytes.

    Args:
        logits: (classes, h, w).
        network: height and width of the picture in the network's input, which may have been padded to multiples of 32.
        picture: height and width of the result.

    Returns:
        (height, width), uint8.
    """
    padded = network if min(network) >= STRIDE else tuple(side + -side % STRIDE for side in network)
    count = max(1, VALUES_AT_ONCE // max(math.prod(picture), math.prod(padded)))
    best = torch.full(picture, -math.inf, device=logits.device)
    labels = torch.zeros(picture, dtype=torch.uint8, device=logits.device)
    for start in range(0, len(logits), count):
        some = F.interpolate(logits[None, start : start + count].float(), size=padded, mode="bilinear")
        some = F.interpolate(some[:, :, : network[0], : network[1]], size=picture, mode="bilinear")[0]
        value, label = some.max(dim=0)  # (height, width)
        better = value > best
        labels[better] = (label[better] + start).to(torch.uint8)
        best[better] = value[better]
    return labels.cpu().numpy()
