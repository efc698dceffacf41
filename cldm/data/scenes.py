"""Scenes to draw: one to three named shapes on a plain or patterned ground, with the hints that a picture of them has.

A scene depends on its number and the seed alone. Lengths are in units of the picture's side, so that it is the same at any size;
shapes are listed from the farthest to the nearest, and nearer ones cover farther ones.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np

from cldm.data.fill import COLOURS, MINIMUM_CONTRAST, PALETTES, Colour, colour_distances, palette_named
from cldm.data.folders import draw_folder, read_note
from cldm.data.pairs import DataError

NOTE = "scenes.json"
# Part of a folder's note: another number when the same seed gives other scenes, so that a folder is not continued with those.
_DRAWING = 2
HINTS = ("lines", "segments", "depth")
_GROUNDS = ("plain", "gradient", "striped", "checkered")


def _regular(corners: int, turn: float = 0.0) -> np.ndarray:
    """The corners (n, 2) of a regular polygon in the unit circle; without a turn one corner is at the top."""
    angles = 2 * math.pi * np.arange(corners) / corners - math.pi / 2 + turn
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _star() -> np.ndarray:
    return _regular(10) * np.where(np.arange(10) % 2, 0.45, 1.0)[:, None]


def _cross() -> np.ndarray:
    arm = np.array([(-0.32, -0.95), (0.32, -0.95), (0.32, -0.32)])
    turns = [np.array([[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]]) for a in np.arange(4) * math.pi / 2]
    return np.concatenate([arm @ turn.T for turn in turns])


def _heart() -> np.ndarray:
    t = np.linspace(0, 2 * math.pi, 60, endpoint=False)
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    return np.stack([16 * np.sin(t) ** 3, y - 2.5], axis=1) / 16


# Corners (n, 2) in units of the radius, x to the right and y down.
SHAPES: dict[str, np.ndarray] = {
    "circle": _regular(90),
    "square": _regular(4, math.pi / 4),
    "triangle": _regular(3),
    "hexagon": _regular(6),
    "star": _star(),
    "diamond": _regular(4) * (0.6, 1.0),
    "cross": _cross(),
    "heart": _heart(),
}
# A colour for each kind of shape in a segmentation map; the ground is black.
SEGMENTS: dict[str, Colour] = dict(
    zip(SHAPES, [colour for colour in PALETTES["clear"].values() if colour != (0, 0, 0)], strict=False)
)


@dataclass(frozen=True)
class Shape:
    """A shape: its kind, the name of its colour, and where it stands.

    Attributes:
        centre: x, y in units of the side, from the top left corner.
        radius: of the circle around it, in units of the side.
        angle: by which it is turned clockwise, in radians.
    """

    kind: str
    colour: str
    centre: tuple[float, float]
    radius: float
    angle: float


@dataclass(frozen=True)
class Scene:
    """What is in a picture, and the prompt that says so.

    Attributes:
        shapes: from the farthest to the nearest.
        ground: plain, gradient, striped or checkered.
        grounds: the names of its colours: one for a plain ground, else two.
        angle: of the pattern, in radians.
        period: of the pattern, in units of the side.
    """

    prompt: str
    shapes: tuple[Shape, ...]
    ground: str
    grounds: tuple[str, ...]
    angle: float = 0.0
    period: float = 0.25


def describe_scene(
    index: int, seed: int, colours: Mapping[str, Colour] = COLOURS, most: int = 3, plain: bool = False
) -> Scene:
    """Scene number `index` of the set with this seed.

    Args:
        colours: to choose from, by name.
        most: shapes in a scene, 1 to 3.
        plain: plain grounds alone.

    Raises:
        DataError: the palette has too few colours that can be told apart.
    """
    names, distances = list(colours), _distances(tuple(tuple(c) for c in colours.values()))
    rng = np.random.default_rng([seed, index, 1])
    ground = "plain" if plain else str(rng.choice(_GROUNDS, p=(0.55, 0.2, 0.15, 0.1)))
    count = 1 + int(rng.integers(most))
    chosen = _choose_colours(rng, distances, count + (1 if ground == "plain" else 2))
    grounds, own = tuple(names[i] for i in chosen[count:]), [names[i] for i in chosen[:count]]
    relation = str(rng.choice(["left of", "right of", "above", "below", "in front of"])) if count > 1 else ""
    places = _place(rng, count, relation)
    shapes = tuple(
        Shape(str(rng.choice(list(SHAPES))), colour, (x, y), radius, float(rng.uniform(-0.35, 0.35)))
        for colour, (x, y, radius) in zip(own, places, strict=True)
    )
    # The second one is the nearer: "red star in front of blue circle" is told from the star's side.
    words = [f"{shape.colour} {shape.kind}" for shape in shapes]
    if count > 1:
        words[:2] = [f"{words[1]} {relation} {words[0]}"]
    pattern = {
        "plain": "{}",
        "gradient": "{} to {} gradient",
        "striped": "{} and {} striped",
        "checkered": "{} and {} checkered",
    }
    prompt = f"{' and '.join(words)} with {pattern[ground].format(*grounds)} background"
    return Scene(prompt, shapes, ground, grounds, float(rng.uniform(0, 2 * math.pi)), float(rng.uniform(0.25, 0.5)))


@lru_cache(maxsize=8)
def _distances(colours: tuple[Colour, ...]) -> np.ndarray:
    return colour_distances(colours)


def _choose_colours(rng: np.random.Generator, distances: np.ndarray, count: int) -> list[int]:
    """Numbers of `count` colours, any two of which can be told apart, by their distances (n, n)."""
    for _ in range(20):
        chosen: list[int] = []
        for number in rng.permutation(len(distances)).tolist():
            if all(distances[number, other] >= MINIMUM_CONTRAST for other in chosen):
                chosen.append(number)
                if len(chosen) == count:
                    return chosen
    raise DataError(f"the palette has no {count} colours that can be told apart")


def _place(rng: np.random.Generator, count: int, relation: str) -> list[tuple[float, float, float]]:
    """x, y and radius of each shape, so that the second one stands to the first as `relation` says and all can be seen."""
    # Large enough that at 64 pixels their kinds can be told apart.
    low, high = {1: (0.2, 0.42), 2: (0.16, 0.27), 3: (0.13, 0.21)}[count]
    directions = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
    while True:
        radii = rng.uniform(low, high, count)
        places = [(*rng.uniform(r + 0.02, 0.98 - r, 2), r) for r in radii]
        if count > 1:
            (x0, y0, r0), (x1, y1, r1) = places[:2]
            apart = math.hypot(x1 - x0, y1 - y0) / (r0 + r1)
            if relation in directions:
                dx, dy = directions[relation]
                along, across = (x1 - x0) * dx + (y1 - y0) * dy, abs((x1 - x0) * dy) + abs((y1 - y0) * dx)
                if apart < 1 or along < 1.3 * across:
                    continue
            elif not 0.55 <= apart <= 0.85:
                continue
        if count > 2:
            x2, y2, r2 = places[2]
            if any(math.hypot(x - x2, y - y2) < 0.9 * (r + r2) for x, y, r in places[:2]):
                continue
        return [(float(x), float(y), float(r)) for x, y, r in places]


# -- pictures of a scene --------------------------------------------------------------------------------------


def cover(shape: Shape, size: int) -> np.ndarray:
    """The share of each pixel that the shape covers, float32 (size, size) in [0, 1]."""
    mask = np.zeros((size, size), np.uint8)
    sine, cosine = math.sin(shape.angle), math.cos(shape.angle)
    corners = SHAPES[shape.kind] @ np.array([[cosine, sine], [-sine, cosine]]) * shape.radius + shape.centre
    # OpenCV counts from the middle of the first pixel, in 1/256 of a pixel.
    points = np.rint((corners * size - 0.5) * 256).astype(np.int32)
    cv2.fillPoly(mask, [points], 255, lineType=cv2.LINE_AA, shift=8)
    return mask.astype(np.float32) / 255


def draw_scene(scene: Scene, size: int) -> np.ndarray:
    """The picture, uint8 (size, size, 3) RGB."""
    picture = _ground(scene, size)
    for shape in scene.shapes:
        share = cover(shape, size)[..., None]
        picture = share * np.array(COLOURS[shape.colour], np.float32) + (1 - share) * picture
    return np.rint(picture).astype(np.uint8)


def _ground(scene: Scene, size: int) -> np.ndarray:
    """float32 (size, size, 3) in [0, 255]."""
    first, *rest = (np.array(COLOURS[name], np.float32) for name in scene.grounds)
    if not rest:
        return np.broadcast_to(first, (size, size, 3))
    middles = (np.arange(size, dtype=np.float32) + 0.5) / size - 0.5
    along = math.cos(scene.angle) * middles[None] + math.sin(scene.angle) * middles[:, None]
    across = math.cos(scene.angle) * middles[:, None] - math.sin(scene.angle) * middles[None]
    if scene.ground == "gradient":
        reach = (abs(math.cos(scene.angle)) + abs(math.sin(scene.angle))) / 2
        share = along / (2 * reach) + 0.5
    else:
        # Waves cut off at their middle: borders one pixel wide, so that they are smooth.
        steep = size * scene.period / math.pi
        share = np.sin(2 * math.pi * along / scene.period)
        if scene.ground == "checkered":
            share = share * np.sin(2 * math.pi * across / scene.period)
        share = np.clip(share * steep / 2 + 0.5, 0, 1)
    share = share[..., None]
    return share * rest[0] + (1 - share) * first


def label_scene(scene: Scene, size: int) -> np.ndarray:
    """What each pixel shows, int64 (size, size): 0 the ground, i the i-th shape."""
    labels = np.zeros((size, size), np.int64)
    for number, shape in enumerate(scene.shapes, 1):
        labels[cover(shape, size) >= 0.5] = number
    return labels


def draw_hint(scene: Scene, size: int, hint: str) -> np.ndarray:
    """A hint of the scene, uint8 (size, size, 3): one of HINTS."""
    labels = label_scene(scene, size)
    if hint == "lines":
        # White where a pixel differs from its right or lower neighbour.
        lines = np.zeros((size, size), bool)
        lines[:, :-1] |= labels[:, :-1] != labels[:, 1:]
        lines[:-1] |= labels[:-1] != labels[1:]
        return np.repeat(lines[..., None] * np.uint8(255), 3, axis=2)
    if hint == "depth":  # nearer is brighter
        levels = np.array([0, *np.linspace(96, 255, len(scene.shapes))]).astype(np.uint8)
        return np.repeat(levels[labels][..., None], 3, axis=2)
    if hint == "segments":
        return np.array([(0, 0, 0), *(SEGMENTS[shape.kind] for shape in scene.shapes)], np.uint8)[labels]
    raise DataError(f"unknown hint {hint!r}; the hints are {', '.join(HINTS)}")


# -- a folder of scenes ---------------------------------------------------------


def generate_scenes(
    folder: str | Path,
    count: int,
    size: int = 512,
    seed: int = 0,
    palette: str = "web",
    hint: str = "lines",
    most: int = 3,
    plain: bool = False,
    workers: int | None = None,
    progress: bool = True,
) -> Path:
    """Write a set of scenes with one kind of hint, as `cldm.data.fill.generate_fill` writes circles.

    Args:
        folder, count, size, seed, palette, workers, progress: as of `generate_fill`.
        hint: `lines` around the shapes, `segments` (a colour for each kind of shape), or `depth` (nearer is brighter).
        most: shapes in a scene, 1 to 3.
        plain: plain grounds alone.

    Returns:
        the path of `prompt.json`.

    Raises:
        DataError: settings out of range, or a folder that holds something else.
    """
    if hint not in HINTS:
        raise DataError(f"unknown hint {hint!r}; the hints are {', '.join(HINTS)}")
    colours = palette_named(palette)
    if not 1 <= most <= 3:
        raise DataError(f"most must be 1 to 3 shapes in a scene, found {most}")

    def describe(index: int) -> Scene:
        return describe_scene(index, seed, colours, most, plain)

    def draw(index: int) -> tuple[np.ndarray, np.ndarray]:
        scene = describe(index)
        return draw_hint(scene, size, hint), draw_scene(scene, size)

    settings = {"size": size, "seed": seed, "palette": palette, "hint": hint, "most": most, "plain": plain}
    settings["drawing"] = _DRAWING
    return draw_folder(
        Path(folder), NOTE, settings, count, draw, lambda index: describe(index).prompt, workers, progress
    )


def read_scenes(targets: Sequence[Path]) -> list[Scene]:
    """What was drawn in pictures of a folder of `generate_scenes`, from its note; empty if any is of another origin."""
    scenes = []
    for path in targets:
        note = read_note(path.parent.parent / NOTE)
        try:
            settings = note["seed"], PALETTES[note["palette"]], note["most"], note["plain"]
            if note["drawing"] != _DRAWING:
                return []
            scenes.append(describe_scene(int(path.stem), *settings))
        except (KeyError, TypeError, ValueError):
            return []
    return scenes
