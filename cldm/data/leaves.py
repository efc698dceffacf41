"""Pictures with the statistics of photographs, drawn: the dead leaves model (Lee, Mumford and Huang, IJCV 2001).

Shapes of all sizes cover each other, as things in the world do, so that edges, textures and even parts are spread as in photographs.
From them an autoencoder learns what photographs consist of, without having seen one.
"""

import math

import cv2
import numpy as np

_LEAVES = 36
_RADII = (0.05, 0.7)  # smallest and largest, in units of the side; their density falls with the third power


def draw_leaves(index: int, size: int, seed: int) -> np.ndarray:
    """Picture number `index` of the set with this seed, uint8 (size, size, 3) RGB."""
    rng = np.random.default_rng([seed, index, 2])
    # Colours of a picture go together: all are drawn around one, as under one light.
    middle, spread = rng.uniform(40, 215, 3), rng.uniform(20, 90)
    picture: np.ndarray = np.tile(_colour(rng, middle, spread), (size, size, 1))
    low, high = _RADII[0] ** -2, _RADII[1] ** -2
    # What is drawn later is nearer, and covers.
    for radius in rng.uniform(high, low, _LEAVES) ** -0.5:
        colour, mask = _colour(rng, middle, spread), np.zeros((size, size), np.uint8)
        x, y = rng.uniform(-0.1, 1.1, 2) * size
        axes = (max(radius * size, 1), max(radius * size * rng.uniform(0.3, 1), 1))
        if rng.random() < 0.5:
            cv2.ellipse(mask, ((x, y), (2 * axes[0], 2 * axes[1]), rng.uniform(0, 180)), 255, -1, cv2.LINE_AA)
        else:
            corners = cv2.boxPoints(((x, y), (2 * axes[0], 2 * axes[1]), rng.uniform(0, 180)))
            cv2.fillPoly(mask, [np.rint(corners * 256).astype(np.int32)], 255, cv2.LINE_AA, 8)
        share = mask.astype(np.float32)[..., None] / 255
        leaf = colour + _shade(rng, size, rng.uniform(0, 40))
        picture = share * leaf + (1 - share) * picture
    picture += _texture(rng, size, rng.uniform(0, 12))
    blur = rng.uniform(0, 0.8) * size / 64
    if blur > 0.3:
        picture = cv2.GaussianBlur(picture, (0, 0), blur)
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)


def _colour(rng: np.random.Generator, middle: np.ndarray, spread: float) -> np.ndarray:
    """Brightness varies more than hue, as it does under one light."""
    return np.clip(middle + rng.normal(0, spread) + rng.normal(0, spread / 2, 3), 0, 255).astype(np.float32)


def _shade(rng: np.random.Generator, size: int, strength: float) -> np.ndarray:
    """Light that falls off to one side: (size, size, 1), from -strength to strength."""
    angle, steps = rng.uniform(0, 2 * math.pi), np.linspace(-0.7, 0.7, size, dtype=np.float32)
    return (strength * (math.cos(angle) * steps[None] + math.sin(angle) * steps[:, None]))[..., None]


def _texture(rng: np.random.Generator, size: int, strength: float) -> np.ndarray:
    """Grey noise at three scales, (size, size, 1)."""
    layers = [rng.normal(0, strength, (max(size // scale, 1),) * 2).astype(np.float32) for scale in (1, 2, 6)]
    resized = [cv2.resize(layer, (size, size), interpolation=cv2.INTER_CUBIC) for layer in layers]
    return np.mean(resized, axis=0)[..., None]
