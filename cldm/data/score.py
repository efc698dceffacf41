"""How well generated pictures show what was drawn: are circles and shapes where the hint has them, in the prompt's colours?

A painted circle is found in the picture alone, without looking at the hint; shapes of a scene by their colours.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from cldm.data.fill import COLOURS, Colour, FillSample, colour_distances, to_lab
from cldm.data.scenes import Scene, label_scene

# A painted colour counts as right within this CIELAB distance of the named one; the `clear` palette keeps 28 between colours.
COLOUR_TOLERANCE = 14.0
# A circle must stand out from the ground by this much, and cover this share of the picture, to count as painted.
_MINIMUM_CONTRAST = 10.0
_MINIMUM_AREA = 0.002


@dataclass(frozen=True)
class FillScore:
    """Scores by picture, (N,) each; the properties are their means."""

    ious: np.ndarray  # float, of the painted circle with the hint's disc
    circle_right: np.ndarray  # bool
    ground_right: np.ndarray  # bool

    @property
    def iou(self) -> float:
        """Mean intersection over union, 0 to 1."""
        return float(self.ious.mean())

    @property
    def colours(self) -> float:
        """Share of pictures in which both colours are right."""
        return float((self.circle_right & self.ground_right).mean())

    def __str__(self) -> str:
        return f"mean IoU {self.iou:.3f}, both colours right in {self.colours:.0%} of {len(self.ious)} pictures"


def parse_prompt(prompt: str) -> tuple[str, str]:
    """The names of circle and ground colour in "burly wood circle with orange background".

    Raises:
        ValueError: another kind of prompt, or a colour that is not among the web's.
    """
    match = re.fullmatch(r"\s*(.+?) circle with (.+?) background\s*", prompt.lower())
    if not match:
        raise ValueError(f'not a Fill prompt: {prompt!r}; expected "<colour> circle with <colour> background"')
    by_letters = {name.replace(" ", ""): name for name in COLOURS}
    names = []
    for given in match.groups():
        key = given.replace(" ", "").replace("grey", "gray")
        if key not in by_letters:
            raise ValueError(f"unknown colour {given!r} in the prompt {prompt!r}")
        names.append(by_letters[key])
    return names[0], names[1]


def fill_geometry(source: np.ndarray) -> tuple[tuple[float, float], float]:
    """Centre (x, y) and radius, in pixels, of the outline in a hint picture (H, W, 3) uint8, white on black.

    Raises:
        ValueError: the picture holds no outline.
    """
    mask = source.max(axis=2) if source.ndim == 3 else source
    rows, columns = np.nonzero(mask > 64)
    if len(rows) < 8:
        raise ValueError("the hint holds no circle's outline")
    weights = mask[rows, columns].astype(np.float64)
    # Least squares for x^2 + y^2 = 2 a x + 2 b y + c: the centre is (a, b), the radius sqrt(c + a^2 + b^2).
    x, y = columns + 0.5, rows + 0.5
    system = np.stack([2 * x, 2 * y, np.ones_like(x)], axis=1) * weights[:, None]
    a, b, c = np.linalg.lstsq(system, (x**2 + y**2) * weights, rcond=None)[0]
    return (float(a), float(b)), float(np.sqrt(max(c + a * a + b * b, 0.0)))


def disc(height: int, width: int, centre: tuple[float, float], radius: float) -> np.ndarray:
    """The pixels (H, W) whose middle lies inside the circle, bool."""
    x, y = np.arange(width) + 0.5, np.arange(height) + 0.5
    return (x[None] - centre[0]) ** 2 + (y[:, None] - centre[1]) ** 2 <= radius**2


def painted_circle(image: np.ndarray) -> np.ndarray | None:
    """The pixels (H, W), bool, of the shape painted on a plain ground in uint8 (H, W, 3); None where there is none.

    The ground's colour is the median of the border; the shape is the largest connected region nearer to the other main colour.
    """
    lab = to_lab(cv2.medianBlur(image, 3))
    border = np.concatenate([lab[0], lab[-1], lab[1:-1, 0], lab[1:-1, -1]])
    distance = np.linalg.norm(lab - np.median(border, axis=0), axis=2)  # (H, W)
    if distance.max() < _MINIMUM_CONTRAST:
        return None
    # Otsu's threshold splits the distances to the ground into two groups; it needs 8 bits.
    scaled = np.clip(distance / distance.max() * 255, 0, 255).astype(np.uint8)
    _, mask = cv2.threshold(scaled, 0, 1, cv2.THRESH_BINARY + cv2.THRESH_OTSU)
    count, labels, stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=4)
    if count < 2:
        return None
    largest = 1 + int(stats[1:, cv2.CC_STAT_AREA].argmax())
    region = labels == largest
    if region.mean() < _MINIMUM_AREA:
        return None
    return region


def score_fill(images: np.ndarray, samples: Sequence[FillSample], tolerance: float = COLOUR_TOLERANCE) -> FillScore:
    """Score uint8 pictures (N, H, W, 3) against the samples whose hints and prompts they were made from.

    Raises:
        ValueError: not as many pictures as samples, or not uint8.
    """
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or len(images) != len(samples):
        raise ValueError(f"expected uint8 ({len(samples)}, H, W, 3), found {images.dtype} {images.shape}")
    ious, circles, grounds = [], [], []
    for image, sample in zip(images, samples, strict=True):
        height, width, _ = image.shape
        factor = width / sample.source.shape[1]
        wanted = disc(height, width, (sample.centre[0] * factor, sample.centre[1] * factor), sample.radius * factor)
        found = painted_circle(image)
        if found is None:
            found = np.zeros_like(wanted)
        ious.append((wanted & found).sum() / max((wanted | found).sum(), 1))
        circles.append(_is_colour(image[found], COLOURS[sample.circle], tolerance))
        grounds.append(_is_colour(image[~found], COLOURS[sample.ground], tolerance))
    return FillScore(np.array(ious), np.array(circles), np.array(grounds))


def _is_colour(pixels: np.ndarray, wanted: Colour, tolerance: float) -> bool:
    """Whether the median of (n, 3) pixels is within `tolerance` of a colour."""
    if len(pixels) == 0:
        return False
    red, green, blue = (int(v) for v in np.median(pixels, axis=0))
    return float(colour_distances([(red, green, blue), wanted])[0, 1]) <= tolerance


# -- scenes ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SceneScore:
    """Scores by picture, (N,) each; the properties are their means."""

    ious: np.ndarray  # float: of what is painted in each shape's colour with the shape, averaged over the shapes
    colours_right: np.ndarray  # bool: every shape has its colour where it should stand, and the ground one of its own

    @property
    def iou(self) -> float:
        """Mean intersection over union, 0 to 1."""
        return float(self.ious.mean())

    @property
    def colours(self) -> float:
        """Share of pictures in which all colours are right."""
        return float(self.colours_right.mean())

    def __str__(self) -> str:
        return f"mean IoU {self.iou:.3f}, all colours right in {self.colours:.0%} of {len(self.ious)} pictures"


def score_scenes(images: np.ndarray, scenes: Sequence[Scene]) -> SceneScore:
    """Score uint8 pictures (N, H, H, 3) against the scenes whose hints and prompts they were made from.

    A pixel shows the shape, or the ground, whose colour is nearest to its own.

    Raises:
        ValueError: not as many pictures as scenes, or not uint8.
    """
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or len(images) != len(scenes):
        raise ValueError(f"expected uint8 ({len(scenes)}, H, H, 3), found {images.dtype} {images.shape}")
    ious, right = [], []
    for image, scene in zip(images, scenes, strict=True):
        wanted = label_scene(scene, image.shape[0])
        lab = to_lab(cv2.medianBlur(image, 3))
        colours = to_lab(np.array([[COLOURS[s.colour] for s in scene.shapes]], np.uint8))[0]
        ends = to_lab(np.array([[COLOURS[name] for name in scene.grounds]], np.uint8))[0]
        distances = np.stack(
            [_distance_to_segment(lab, ends[0], ends[-1]), *(np.linalg.norm(lab - c, axis=2) for c in colours)]
        )  # (1 + shapes, H, H)
        found = distances.argmin(axis=0)
        visible = [i for i in range(1, len(distances)) if (wanted == i).any()]
        overlaps = [((found == i) & (wanted == i)).sum() / ((found == i) | (wanted == i)).sum() for i in visible]
        ious.append(np.mean(overlaps))
        right.append(all(np.median(distances[i][wanted == i]) <= COLOUR_TOLERANCE for i in (0, *visible)))
    return SceneScore(np.array(ious), np.array(right))


def _distance_to_segment(points: np.ndarray, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Distances (H, W) of points (H, W, 3) from the straight line between two colours: what a gradient may show."""
    along = end - start
    share = np.clip((points - start) @ along / max(float(along @ along), 1e-9), 0, 1)
    return np.linalg.norm(points - (start + share[..., None] * along), axis=2)
