"""A drawn room whose depth, normals, classes, edges and joints are known from its geometry.

The pictures of conditions that need weights show it: each detector draws its map from what a perfect network would find here.
Metres; x is right, y is up, z is away from the viewer. A person waves before a wall with a window, between a box and a ball.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import torch

from annotator.dwpose import decoding
from annotator.openpose.assembly import LIMB_CHANNELS, LIMBS
from annotator.segmentation.colours import stack_masks

EYE, FOCAL = np.array([0.0, 0.98, -3.4], dtype=np.float32), 1.58  # of the camera; focal length in sides of the picture
WALL, MARCH_STEPS = 1.2, 50
LIGHT = np.array([-0.45, 0.75, -0.55])
# Of OpenPose's 18 joints, in its order; the left ones of those that are alike on both sides are mirrored below.
NOSE, NECK = (0.0, 1.57, -0.12), (0.0, 1.43, 0.0)
RIGHT_ARM = (-0.19, 1.42, 0.0), (-0.44, 1.3, -0.05), (-0.5, 1.56, -0.1)
LEFT_ARM = (0.19, 1.42, 0.0), (0.33, 1.16, 0.0), (0.36, 0.9, -0.1)
RIGHT_LEG = (-0.11, 0.9, 0.0), (-0.15, 0.5, -0.03), (-0.19, 0.1, 0.0)
RIGHT_EYE, RIGHT_EAR = (-0.04, 1.62, -0.1), (-0.1, 1.6, 0.0)


Shape = tuple[Callable[[np.ndarray], np.ndarray], int, tuple[int, int, int]]


def mirrored(*points: tuple[float, float, float]) -> list[tuple[float, float, float]]:
    return [(-x, y, z) for x, y, z in points]


JOINTS = np.array([NOSE, NECK, *RIGHT_ARM, *LEFT_ARM, *RIGHT_LEG, *mirrored(*RIGHT_LEG), RIGHT_EYE,
                   *mirrored(RIGHT_EYE), RIGHT_EAR, *mirrored(RIGHT_EAR)])  # fmt: skip
# Objects by number: class in ADE20K and in COCO.
WALL_ID, FLOOR, WINDOW, BOX, BALL, PERSON = range(6)
ADE20K, COCO = np.array([0, 3, 8, 41, 119, 12]), np.array([131, 122, 115, 83, 32, 0])
BOX_CENTRE, BOX_HALF, BOX_TURN = np.array([-0.7, 0.22, 0.3]), np.array([0.22, 0.22, 0.22]), np.radians(28.0)
WINDOW_CENTRE, WINDOW_HALF = np.array([0.62, 1.5, WALL]), np.array([0.3, 0.34, 0.03])


def capsule(points: np.ndarray, a: Any, b: Any, radius: float) -> np.ndarray:
    """Distance of points (..., 3) from a line with round ends."""
    a, b = np.asarray(a, points.dtype), np.asarray(b, points.dtype)
    along = ((points - a) @ (b - a) / max((b - a) @ (b - a), 1e-9)).clip(0, 1)
    return np.linalg.norm(points - a - along[..., None] * (b - a), axis=-1) - radius


def cuboid(points: np.ndarray, centre: np.ndarray, half: np.ndarray, turn: float = 0.0) -> np.ndarray:
    """Distance from a box that is turned about the vertical."""
    beyond = np.abs((points - centre.astype(points.dtype)) @ turned(turn).astype(points.dtype)) - half.astype(
        points.dtype
    )
    return np.linalg.norm(beyond.clip(0), axis=-1) + beyond.max(axis=-1).clip(max=0)


def turned(turn: float) -> np.ndarray:
    return np.array([[np.cos(turn), 0, -np.sin(turn)], [0, 1, 0], [np.sin(turn), 0, np.cos(turn)]])


def body_part(a: Any, b: Any, radius: float, colour: tuple[int, int, int]) -> Shape:
    return partial(capsule, a=a, b=b, radius=radius), PERSON, colour


def further(points: Sequence[Any], share: float) -> np.ndarray:
    """A point beyond the last one of a limb, by a share of its last bone: where the hand ends."""
    return np.array(points[-1]) + share * (np.array(points[-1]) - points[-2])


ARMS, LEGS = (RIGHT_ARM, LEFT_ARM), (RIGHT_LEG, mirrored(*RIGHT_LEG))
SKIN, SHIRT, TROUSERS, SHOES = (224, 172, 140), (62, 105, 170), (70, 70, 84), (40, 36, 36)
# Each shape: its distance from points, its object and its colour.
SHAPES: list[Shape] = [
    (lambda p: WALL - p[..., 2], WALL_ID, (214, 203, 182)),
    (lambda p: p[..., 1], FLOOR, (150, 108, 74)),
    (partial(cuboid, centre=WINDOW_CENTRE, half=WINDOW_HALF), WINDOW, (170, 210, 235)),
    (partial(cuboid, centre=BOX_CENTRE, half=BOX_HALF, turn=BOX_TURN), BOX, (201, 150, 84)),
    (partial(capsule, a=(0.68, 0.2, 0.0), b=(0.68, 0.2, 0.0), radius=0.2), BALL, (205, 62, 52)),
    body_part((0, 1.6, 0), (0, 1.62, 0), 0.115, SKIN),
    body_part(NECK, (0, 1.5, 0), 0.05, SKIN),
    body_part(RIGHT_ARM[0], LEFT_ARM[0], 0.07, SHIRT),
    body_part((0, 1.3, 0), (0, 1.0, 0), 0.165, SHIRT),
    *[body_part(a, b, 0.055, SHIRT) for arm in ARMS for a, b in pairwise(arm)],
    *[body_part(arm[-1], further(arm, 0.2), 0.06, SKIN) for arm in ARMS],
    *[body_part(a, b, 0.08, TROUSERS) for leg in LEGS for a, b in pairwise(leg)],
    *[body_part(leg[-1], np.array(leg[-1]) + (0, -0.03, -0.12), 0.06, SHOES) for leg in LEGS],
]


@dataclass(frozen=True)
class Scene:
    """What is known of the room, for each pixel of a square picture.

    Attributes:
        picture: (S, S, 3), uint8, RGB.
        distance: (S, S), float32, metres along z from the camera.
        normals: (S, S, 3), float32; x is left, y is up, z is towards the viewer, as normal maps have it.
        objects: (S, S), int, numbers of objects.
    """

    picture: np.ndarray
    distance: np.ndarray
    normals: np.ndarray
    objects: np.ndarray

    @property
    def size(self) -> int:
        return len(self.picture)

    def edges(self) -> np.ndarray:
        """Outlines and creases: (S, S), bool."""
        edges = np.zeros(self.objects.shape, dtype=bool)
        for axis in (0, 1):
            here, there = np.s_[:-1, :] if axis == 0 else np.s_[:, :-1], np.s_[1:, :] if axis == 0 else np.s_[:, 1:]
            jump = np.abs(np.log(self.distance[here] / self.distance[there])) > 0.02
            crease = (self.normals[here] * self.normals[there]).sum(axis=2) < 0.85
            edges[here] |= jump | crease | (self.objects[here] != self.objects[there])
        return edges

    def soft_edges(self, width: float) -> torch.Tensor:
        """How likely each pixel is one of an edge of about that width: (S, S), float32, within 0 and 1."""
        away = cv2.distanceTransform(255 - 255 * self.edges().astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
        return torch.from_numpy(np.exp(-((2 * away / width) ** 2)).clip(0.003, 0.997))


def draw_scene(size: int) -> Scene:
    """The room in a picture of `size` x `size` pixels, by following each ray until it meets something."""
    v, u = np.mgrid[:size, :size].astype(np.float32) + 0.5
    rays = np.dstack([(u / size - 0.5) / FOCAL, (0.5 - v / size) / FOCAL, np.ones_like(u)])
    length = np.linalg.norm(rays, axis=2)
    z = np.full((size, size), 1.0, dtype=np.float32)
    for _ in range(MARCH_STEPS):
        z += distances(EYE + rays * z[..., None]).min(axis=0) / length
    points = EYE + rays * z[..., None]  # (size, size, 3)
    nearest = distances(points).argmin(axis=0)
    step = np.float32(1e-3) * np.eye(3, dtype=np.float32)
    slope = [distances(points + s).min(axis=0) - distances(points - s).min(axis=0) for s in step]
    normals = np.stack(slope, axis=2) / np.linalg.norm(slope, axis=0)[..., None].clip(1e-9)
    light = 0.55 + 0.5 * (normals @ (LIGHT / np.linalg.norm(LIGHT))).clip(0)
    colours = np.array([colour for _, _, colour in SHAPES])[nearest]
    picture = (colours * light[..., None]).clip(0, 255).astype(np.uint8)
    seen = normals * np.array([-1, 1, -1])
    return Scene(picture, z, seen.astype(np.float32), np.array([number for _, number, _ in SHAPES])[nearest])


def distances(points: np.ndarray) -> np.ndarray:
    """Of points (..., 3) from every shape: (shapes, ...)."""
    return np.stack([shape(points) for shape, _, _ in SHAPES])


def project(points: Any, size: int) -> np.ndarray:
    """Where points (n, 3) are in the picture: (n, 2), x and y in pixels."""
    beyond = np.asarray(points) - EYE
    return size * (0.5 + FOCAL * beyond[:, :2] * (1, -1) / beyond[:, 2:])


def answers(scene: Scene) -> dict[str, tuple[Any, Any]]:
    """For each condition that needs weights: what of its network its detector asks for, and the output of a perfect one."""
    size, inverse = scene.size, torch.from_numpy(1.0 / scene.distance)
    thick, medium, thin = (scene.soft_edges(width) for width in (size / 75, size / 110, size / 220))
    lines = 1.0 - thin[None]
    relative = SimpleNamespace(config=SimpleNamespace(model_type="depth_anything"))
    ade20k, coco = (SimpleNamespace(config=SimpleNamespace(num_labels=count)) for count in (150, 133))
    logits = torch.nn.functional.one_hot(torch.from_numpy(ADE20K[scene.objects]), 150).permute(2, 0, 1).float()
    objects = stack_masks([scene.objects == number for number in range(6)], scene.objects.shape)
    hed, pidinet, midas = (None, [torch.logit(thick)[None]] * 5), (None, [thick[None]]), (None, 1000 * inverse)
    face, edges = face_contours()
    return {
        "mlsd": (None, line_maps(scene)),
        "hed": hed,
        "fake_scribble": hed,
        "pidinet": pidinet,
        "fake_scribble_pidinet": pidinet,
        "teed": (None, torch.logit(medium)[None]),
        "lineart": (None, lines),
        "lineart_anime": (None, 2 * lines - 1),
        "openpose": (None, pose_maps(size)),
        "dwpose": (None, whole_body(size)),
        "mediapipe_face": (SimpleNamespace(edges=edges), [face]),
        "seg": (None, logits),
        "oneformer_ade20k": (ade20k, ADE20K[scene.objects]),
        "oneformer_coco": (coco, COCO[scene.objects]),
        "segmentation": (coco, objects),
        "segment_anything": (None, objects),
        "depth": midas,
        "normal": midas,
        "depth_anything": (relative, inverse),
        "depth_zoe": (None, torch.from_numpy(scene.distance)),
        "normal_from_depth": (relative, inverse),
        "normalbae": (None, [torch.from_numpy(scene.normals).permute(2, 0, 1)]),
    }


def line_maps(scene: Scene) -> torch.Tensor:
    """M-LSD's output (5, h, w) at half the size: the score of each line's centre, and where its ends are from there."""
    corners = np.array([(x, y, z) for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)])
    sides = [(i, j) for i in range(8) for j in range(i) if np.abs(corners[i] - corners[j]).sum() == 2]
    box = corners * BOX_HALF @ turned(BOX_TURN).T + BOX_CENTRE
    window = corners * WINDOW_HALF + WINDOW_CENTRE
    ends = [(box[i], box[j]) for i, j in sides] + [(window[i], window[j]) for i, j in sides]
    ends += pairwise(np.array([(x, 0, WALL) for x in np.linspace(-1.44, 1.44, 37)]))
    maps = torch.full((5, scene.size // 2, scene.size // 2), -10.0)
    for start, end in ends:
        (x0, y0), (x1, y1), (x, y) = project([start, end, (start + end) / 2], scene.size) / 2
        along = [start + share * (end - start) for share in (0.3, 0.7)]
        pixels = project(along, scene.size).clip(0, scene.size - 1).astype(int)
        seen = [scene.distance[v, u] > point[2] - EYE[2] - 0.1 for point, (u, v) in zip(along, pixels, strict=True)]
        if any(seen):
            maps[:, int(y), int(x)] = torch.tensor([10.0, x0 - int(x), y0 - int(y), x1 - int(x), y1 - int(y)])
    return maps


def pose_maps(size: int) -> list[torch.Tensor]:
    """OpenPose's part affinity fields (38, 23, 23) and heat maps (19, 23, 23)."""
    cells = 23
    joints = project(JOINTS, size) * cells / size - 0.5
    y, x = np.mgrid[:cells, :cells]
    heatmaps = np.exp(-((x - joints[:, 0, None, None]) ** 2 + (y - joints[:, 1, None, None]) ** 2) / 2 / 0.7**2)
    heatmaps = np.concatenate([heatmaps, 1 - heatmaps.max(axis=0, keepdims=True)])
    pafs = np.zeros((2 * len(LIMBS), cells, cells))
    for (a, b), channel in zip(LIMBS, LIMB_CHANNELS, strict=True):
        start, end = np.append(joints[a], 0), np.append(joints[b], 0)
        near = capsule(np.dstack([x, y, np.zeros_like(x)]), start, end, 1.2) < 0
        pafs[channel : channel + 2] = near * ((end - start) / np.linalg.norm(end - start))[:2, None, None]
    return [torch.from_numpy(maps.astype(np.float32)) for maps in (pafs, heatmaps)]


def arc(count: int, x: float, y: float, wide: float, high: float, first: float, last: float) -> np.ndarray:
    """`count` points of an ellipse around (x, y), from one angle to another, in degrees: (count, 2)."""
    angles = np.radians(np.linspace(first, last, count))
    return np.stack([x + wide * np.cos(angles), y + high * np.sin(angles)], axis=1)


def eye(count: int, x: float) -> np.ndarray:
    return arc(count + 1, x, -0.2, 0.17, 0.08, 180, 540)[:-1]


def brow(count: int, x: float) -> np.ndarray:
    return arc(count, x, -0.38, 0.25, 0.12, 200, 340)


# The 68 landmarks of a face: x to the right and y down, of a head that reaches from -1 to 1.
FACE = np.concatenate([
    arc(17, 0, -0.1, 0.75, 1.0, 180, 0), brow(5, -0.35), brow(5, 0.35),
    np.stack([np.zeros(4), np.linspace(-0.2, 0.1, 4)], axis=1), arc(5, 0, 0.12, 0.15, 0.08, 180, 0),
    eye(6, -0.35), eye(6, 0.35), arc(13, 0, 0.45, 0.3, 0.14, 180, 540)[:-1], arc(9, 0, 0.45, 0.2, 0.05, 180, 540)[:-1],
])  # fmt: skip


def whole_body(size: int) -> tuple[np.ndarray, np.ndarray]:
    """DWPose's 133 points (1, 133, 2) in pixels, and their scores."""
    joints = project(JOINTS, size)
    points = np.zeros((133, 2))
    for joint, place in enumerate(decoding.BODY):
        if place >= 0:
            points[place] = joints[joint]
    metre = size * FOCAL / -EYE[2]
    points[decoding.FACE] = joints[0] + (0, -0.02 * metre) + 0.11 * metre * FACE
    for hand, elbow, wrist in ((decoding.RIGHT_HAND, 3, 4), (decoding.LEFT_HAND, 6, 7)):
        ahead = joints[wrist] - joints[elbow]
        towards = np.degrees(np.arctan2(ahead[1], ahead[0]))
        fingers = [arc(2, 0, 0, 1, 1, towards + turn, 0)[0] for turn in (-55, -22, 0, 18, 38)]
        bones = [joints[wrist] + metre * length * finger for finger in fingers for length in (0.05, 0.09, 0.12, 0.15)]
        points[hand] = [joints[wrist], *bones]
    return points[None], np.ones((1, 133))


def face_contours() -> tuple[np.ndarray, dict[str, list[tuple[int, int]]]]:
    """A face in the middle of the picture as MediaPipe gives it: its points (478, 2), relative; and which of them are joined."""
    contours = [
        ("FACE_OVAL", arc(36, 0, 0, 0.8, 1.05, 0, 360)), ("RIGHT_EYE", eye(16, -0.35)), ("LEFT_EYE", eye(16, 0.35)),
        ("RIGHT_EYEBROW", brow(8, -0.35)), ("LEFT_EYEBROW", brow(8, 0.35)),
        ("LIPS", arc(20, 0, 0.45, 0.3, 0.14, 0, 360)), ("LIPS", arc(20, 0, 0.45, 0.2, 0.05, 0, 360)),
    ]  # fmt: skip
    points, joined, first = np.zeros((478, 2)), dict[str, list[tuple[int, int]]](), 0
    for part, contour in contours:
        points[first : first + len(contour)] = contour
        joined.setdefault(part, []).extend(pairwise(range(first, first + len(contour))))
        first += len(contour)
    points[468], points[473] = (-0.35, -0.2), (0.35, -0.2)
    return 0.5 + 0.4 * points, joined
