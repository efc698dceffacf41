"""The Fill task: a circle's outline as the hint, the filled circle on a plain ground as the picture, both colours in the prompt.

A sample depends on its number and the seed alone, so that any part of a set can be made anywhere, in any order.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np
from PIL import ImageColor

from cldm.data.folders import draw_folder
from cldm.data.pairs import DataError

Colour = tuple[int, int, int]

# The web's named colours in words, common names first; of names for the same colour (aqua and cyan, gray and grey) one is here.
_NAMES = """
burly wood, orange, black, white, red, green, blue, yellow, gray, purple, pink, brown, teal, navy, olive, maroon, sky blue,
violet, salmon, turquoise, lime, aqua, fuchsia, gold, khaki, alice blue, antique white, aquamarine, azure, beige, bisque,
blanched almond, blue violet, cadet blue, chartreuse, chocolate, coral, cornflower blue, cornsilk, crimson, dark blue, dark
cyan, dark goldenrod, dark gray, dark green, dark khaki, dark magenta, dark olive green, dark orange, dark orchid, dark red,
dark salmon, dark sea green, dark slate blue, dark slate gray, dark turquoise, dark violet, deep pink, deep sky blue, dim
gray, dodger blue, fire brick, floral white, forest green, gainsboro, ghost white, goldenrod, green yellow, honeydew, hot
pink, indian red, indigo, ivory, lavender, lavender blush, lawn green, lemon chiffon, light blue, light coral, light cyan,
light goldenrod yellow, light gray, light green, light pink, light salmon, light sea green, light sky blue, light slate gray,
light steel blue, light yellow, lime green, linen, medium aquamarine, medium blue, medium orchid, medium purple, medium sea
green, medium slate blue, medium spring green, medium turquoise, medium violet red, midnight blue, mint cream, misty rose,
moccasin, navajo white, old lace, olive drab, orange red, orchid, pale goldenrod, pale green, pale turquoise, pale violet
red, papaya whip, peach puff, peru, plum, powder blue, rebecca purple, rosy brown, royal blue, saddle brown, sandy brown, sea
green, sea shell, sienna, silver, slate blue, slate gray, snow, spring green, steel blue, tan, thistle, tomato, wheat, white
smoke, yellow green
"""
COLOURS: dict[str, Colour] = {
    name: ImageColor.getrgb(name.replace(" ", ""))[:3]
    for name in (n.strip() for n in _NAMES.replace("\n", " ").split(","))
}


def to_lab(picture: np.ndarray) -> np.ndarray:
    """RGB (H, W, 3), 0 to 255, in CIELAB, float32; there a distance of 2 is just noticeable, and black to white is 100."""
    return cv2.cvtColor(picture.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)


def colour_distances(colours: Sequence[Colour]) -> np.ndarray:
    """Euclidean CIELAB distances between colours (n,) -> (n, n)."""
    lab = to_lab(np.asarray([colours]))[0]
    return np.linalg.norm(lab[:, None] - lab[None], axis=-1)


def tellable(colours: Mapping[str, Colour], distance: float) -> dict[str, Colour]:
    """Colours in their order, leaving out each that is nearer than `distance` to one before it."""
    names = list(colours)
    distances = colour_distances([colours[n] for n in names])
    kept: list[int] = []
    for i in range(len(names)):
        if all(distances[i, j] >= distance for j in kept):
            kept.append(i)
    return {names[i]: colours[names[i]] for i in kept}


# `clear`: colours that stay tellable after an autoencoder; `web`: all.
PALETTES: dict[str, dict[str, Colour]] = {"web": COLOURS, "clear": tellable(COLOURS, 28.0)}

# Circle and ground differ by at least this much, so that a circle can be seen on its ground.
MINIMUM_CONTRAST = 30.0


def palette_named(name: str) -> dict[str, Colour]:
    """The palette of a name.

    Raises:
        DataError: there is none.
    """
    if name not in PALETTES:
        raise DataError(f"unknown palette {name!r}; the palettes are {', '.join(PALETTES)}")
    return PALETTES[name]


@dataclass(frozen=True)
class FillSample:
    """One sample: pictures (size, size, 3) uint8 RGB, the prompt, and what was drawn (pixels, from the top left corner)."""

    source: np.ndarray
    target: np.ndarray
    prompt: str
    centre: tuple[float, float]  # x, y
    radius: float
    circle: str
    ground: str


@lru_cache(maxsize=8)
def _contrasting(names: tuple[str, ...], colours: tuple[Colour, ...]) -> list[tuple[str, str]]:
    """All (circle, ground) pairs of names whose colours differ enough."""
    distances = colour_distances(colours)
    return [
        (names[i], names[j])
        for i in range(len(names))
        for j in range(len(names))
        if distances[i, j] >= MINIMUM_CONTRAST
    ]


def draw_fill(index: int, size: int, seed: int, colours: Mapping[str, Colour] = COLOURS) -> FillSample:
    """Sample number `index` of the set with this seed, at `size` pixels a side.

    Circles lie wholly inside the picture; their radius is 0.12 to 0.4 of the side. The same sample at another size is the same scene.

    Raises:
        DataError: the size is under 16, or no two colours contrast.
    """
    if size < 16:
        raise DataError(f"a Fill picture needs at least 16 pixels a side, found {size}")
    prompt, circle, ground, (x, y, radius) = describe_fill(index, seed, colours)
    x, y, radius = x * size, y * size, radius * size
    source = paint_circle(size, (x, y), radius, (255, 255, 255), (0, 0, 0), outline=max(1.5, size / 256))
    target = paint_circle(size, (x, y), radius, colours[circle], colours[ground])
    return FillSample(source, target, prompt, (x, y), radius, circle, ground)


def describe_fill(
    index: int, seed: int, colours: Mapping[str, Colour] = COLOURS
) -> tuple[str, str, str, tuple[float, float, float]]:
    """Prompt, circle and ground colour, and x, y, radius in units of the side, of a sample: what `draw_fill` draws."""
    pairs = _contrasting(tuple(colours), tuple(tuple(c) for c in colours.values()))
    if not pairs:
        raise DataError("the palette has no two colours that can be told apart")
    rng = np.random.default_rng([seed, index])
    circle, ground = pairs[rng.integers(len(pairs))]
    radius = rng.uniform(0.12, 0.4)
    x, y = rng.uniform(radius + 0.02, 1 - radius - 0.02, size=2)
    return f"{circle} circle with {ground} background", circle, ground, (float(x), float(y), float(radius))


def paint_circle(
    size: int, centre: tuple[float, float], radius: float, colour: Colour, ground: Colour, outline: float | None = None
) -> np.ndarray:
    """An antialiased disc, or a ring `outline` pixels wide, on a plain ground: (size, size, 3) uint8."""
    picture = np.empty((size, size, 3), dtype=np.uint8)
    picture[:] = ground
    # Only the square around the circle needs work, which at large sizes is most of the time.
    reach = radius + (outline or 0) / 2 + 1
    left, top = (max(int(c - reach), 0) for c in centre)
    right, bottom = (min(int(c + reach) + 2, size) for c in centre)
    x = np.arange(left, right, dtype=np.float32) + 0.5
    y = np.arange(top, bottom, dtype=np.float32) + 0.5
    distance = np.hypot(x[None] - centre[0], y[:, None] - centre[1])
    inside = radius - distance if outline is None else outline / 2 - np.abs(distance - radius)
    cover = np.clip(inside + 0.5, 0, 1)[..., None]
    picture[top:bottom, left:right] = np.rint(
        cover * np.array(colour, np.float32) + (1 - cover) * np.array(ground, np.float32)
    )
    return picture


def generate_fill(
    folder: str | Path,
    count: int,
    size: int = 512,
    seed: int = 0,
    palette: str = "web",
    workers: int | None = None,
    progress: bool = True,
) -> Path:
    """Write a Fill set, as `cldm.data.folders.draw_folder` writes pairs: it can be interrupted, and goes on.

    Args:
        folder, count, workers, progress: as of `draw_folder`.
        size: pixels a side, a multiple of 64.
        seed: of the set.
        palette: one of PALETTES.

    Returns:
        the path of `prompt.json`.

    Raises:
        DataError: settings out of range, or a folder that holds something else.
    """
    colours = palette_named(palette)

    def draw(index: int) -> tuple[np.ndarray, np.ndarray]:
        sample = draw_fill(index, size, seed, colours)
        return sample.source, sample.target

    def prompt(index: int) -> str:
        return describe_fill(index, seed, colours)[0]

    settings = {"size": size, "seed": seed, "palette": palette}
    return draw_folder(Path(folder), "fill.json", settings, count, draw, prompt, workers, progress)
