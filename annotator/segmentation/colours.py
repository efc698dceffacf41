"""Colours for labels and for masks: the palettes that segmentation models of ControlNet were trained with, and others."""

import cv2
import numpy as np

from annotator.uniformer.labels import PALETTE as ADE20K
from annotator.uniformer.labels import colour as colour_labels

__all__ = ["ADE20K", "COCO", "colour_labels", "distinct_colours", "palette_for", "stack_masks"]

# Red, green and blue of the 133 classes of COCO's panoptic segmentation, things before stuff, in the order of its labels.
COCO_HEX = (
    "dc143c770b2000008e0000e66a00e4003c640050640000460000c0faaa1e64aa1edcdc00af74affa001ea52a2aff4dff00e2fcb6b6ff0052"
    "0078a69d6e4c00ae39ffc76400480076ffb3f0007d5cd10097bcd0b600dcb0ff63a45c00498581ff4eb4ff00e400aefff32d59ff86866791"
    "94aeffd0bac5e2ffab86016d3f36cf8aff97005f09503d5469334a4169a6c466d0c3d2ff6d41008f95b300c2d1636a057900e3ffcd93bad0"
    "994501035fa1a3ff007700aa00b6c700a578b782585f20008272876e8185a64a76db8eb94fd272b25a3e41460f7fa7733b696a8e6c2dc4ac"
    "005f3650804cffc93901f6007abfa2d0ffff8093d3cb966464a8abac9270c6d2aa645c8859da58b8f18100d911ff7c4ab5464646ffe4ff9a"
    "d000c1005c4c5b71ffb4c36a9ab0e6968c3c8fff8040805c5237fed47c494daeffa062ffffff68546da9a483e1c7ff89364a879edf07f6e7"
    "6bffc83a2995b7798eff49616b8e23be9999928b8d4682b486c79cd1e28c60246c60606040aa4098fb98d0e5e4cebaab98a1407470000072"
    "8f66669cfa8dff"
)
COCO = np.frombuffer(bytes.fromhex(COCO_HEX), dtype=np.uint8).reshape(-1, 3)
PALETTES = {len(palette): palette for palette in (ADE20K, COCO)}
GOLDEN_ANGLE = 137.508  # degrees: hues that follow each other at this distance never come close to one of the last few


def distinct_colours(count: int) -> np.ndarray:
    """`count` colours that are easy to tell apart, none of them black, the same in every run: (count, 3), uint8, RGB."""
    index = np.arange(count)
    hue = (index * GOLDEN_ANGLE) % 360.0
    saturation = np.choose(index // 3 % 3, [0.9, 0.6, 0.75])
    value = np.choose(index % 3, [1.0, 0.8, 0.6])
    hsv = np.stack([hue, saturation, value], axis=1).astype(np.float32)
    rgb = cv2.cvtColor(hsv[None], cv2.COLOR_HSV2RGB)[0] if count else np.zeros((0, 3))
    return np.rint(rgb * 255.0).astype(np.uint8)


def palette_for(classes: int) -> np.ndarray:
    """The palette of the data set with that many classes (ADE20K 150, COCO 133), else distinct colours."""
    return PALETTES[classes] if classes in PALETTES else distinct_colours(classes)


def stack_masks(masks: list[np.ndarray], size: tuple[int, int]) -> np.ndarray:
    """Masks (H, W), bool, as labels: (H, W), int; 0 is the largest mask, small ones lie over large ones, -1 is nothing."""
    labels = np.full(size, -1)
    for number, mask in enumerate(sorted(masks, key=lambda mask: -int(mask.sum()))):
        labels[mask] = number
    return labels
