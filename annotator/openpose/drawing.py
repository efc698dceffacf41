"""Poses as pictures: limbs as ellipses, joints as discs, fingers as lines, faces as white dots, on black.

Canvases are (H, W, 3), uint8, RGB, and are drawn on in place. Version 1.0 takes coordinates in pixels and mixes limb
by limb with what is there; 1.1 takes coordinates relative to width and height, and draws opaque limbs in darker colours.
"""

import colorsys
import math

import cv2
import numpy as np

from annotator.openpose.assembly import FOUNDING_LIMBS, LIMBS
from annotator.openpose.model import BODY_JOINTS

COLOURS = ((255, 0, 0), (255, 85, 0), (255, 170, 0), (255, 255, 0), (170, 255, 0), (85, 255, 0), (0, 255, 0),
           (0, 255, 85), (0, 255, 170), (0, 255, 255), (0, 170, 255), (0, 85, 255), (0, 0, 255), (85, 0, 255),
           (170, 0, 255), (255, 0, 255), (255, 0, 170), (255, 0, 85))  # fmt: skip
BLUE, WHITE = (0, 0, 255), (255, 255, 255)
LIMB_OPACITY = 0.6
RADIUS = 4  # of joints and hand points, and half the width of a limb
FACE_RADIUS = 3
# Five fingers of four bones; the first of each starts at the wrist.
BONES = tuple((0 if i % 4 == 1 else i - 1, i) for i in range(1, 21))
BONE_COLOURS = tuple(
    tuple(255 * part for part in colorsys.hsv_to_rgb(i / len(BONES), 1.0, 1.0)) for i in range(len(BONES))
)


def _limb_polygons(points: np.ndarray, people: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """Limb type and outline (n, 2) of every limb, type by type; `points` (n, 2) are in pixels."""
    polygons = []
    for limb in range(FOUNDING_LIMBS):
        for ends in people[:, LIMBS[limb]].astype(int):
            if (ends < 0).any():
                continue
            (x0, y0), (x1, y1) = points[ends].tolist()
            centre = int((x0 + x1) / 2), int((y0 + y1) / 2)
            axes = int(math.sqrt((x0 - x1) ** 2 + (y0 - y1) ** 2) / 2), RADIUS
            angle = int(math.degrees(math.atan2(y0 - y1, x0 - x1)))
            polygons.append((limb, np.asarray(cv2.ellipse2Poly(centre, axes, angle, 0, 360, 1))))
    return polygons


def _draw_joints(canvas: np.ndarray, points: np.ndarray, people: np.ndarray) -> None:
    for joint in range(BODY_JOINTS):
        for index in people[:, joint].astype(int):
            if index >= 0:
                x, y = points[index].tolist()
                cv2.circle(canvas, (int(x), int(y)), RADIUS, COLOURS[joint], thickness=-1)


def draw_body_1_0(canvas: np.ndarray, candidates: np.ndarray, people: np.ndarray) -> np.ndarray:
    """Joints, and over them half transparent limbs; candidates and people as from `assemble_people`."""
    height, width = canvas.shape[:2]
    _draw_joints(canvas, candidates[:, :2], people)
    opaque = canvas.copy()  # differs from the canvas only inside the limb that is being mixed
    for limb, polygon in _limb_polygons(candidates[:, :2], people):
        left, top = np.clip(polygon.min(axis=0), 0, (width, height)).tolist()
        right, bottom = np.clip(polygon.max(axis=0) + 1, 0, (width, height)).tolist()
        if left == right or top == bottom:
            continue
        cv2.fillConvexPoly(opaque, polygon, COLOURS[limb])
        box = np.s_[top:bottom, left:right]
        canvas[box] = cv2.addWeighted(canvas[box], 1 - LIMB_OPACITY, opaque[box], LIMB_OPACITY, 0)
        opaque[box] = canvas[box]
    return canvas


def draw_body_1_1(canvas: np.ndarray, candidates: np.ndarray, people: np.ndarray) -> np.ndarray:
    """Darkened limbs, and over them joints; candidates (n, 2) are relative."""
    height, width = canvas.shape[:2]
    points = candidates * (width, height)
    for limb, polygon in _limb_polygons(points, people):
        cv2.fillConvexPoly(canvas, polygon, [int(part * LIMB_OPACITY) for part in COLOURS[limb]])
    _draw_joints(canvas, points, people)
    return canvas


def _draw_hand(canvas: np.ndarray, points: np.ndarray, bones_shown: np.ndarray, points_shown: np.ndarray) -> None:
    points = points.tolist()
    for (a, b), colour, shown in zip(BONES, BONE_COLOURS, bones_shown, strict=True):
        if shown:
            cv2.line(canvas, points[a], points[b], colour, thickness=2)
    for point, shown in zip(points, points_shown, strict=True):
        if shown:
            cv2.circle(canvas, point, RADIUS, BLUE, thickness=-1)


def draw_hands_1_0(canvas: np.ndarray, hands: list[np.ndarray]) -> np.ndarray:
    """Hands (21, 2), int: bones between points that were found, and discs for all, also at (0, 0) for the others."""
    for points in hands:
        bones_shown = (points[np.array(BONES)] != 0).all(axis=(1, 2))
        _draw_hand(canvas, points, bones_shown, np.ones(len(points), dtype=bool))
    return canvas


def draw_hands_1_1(canvas: np.ndarray, hands: list[np.ndarray]) -> np.ndarray:
    """Hands (21, 2), relative: bones and discs of the points that were found, which are above 0."""
    for points in hands:
        points = _to_pixels(points, canvas)
        shown = np.all(points > 0, axis=1)
        _draw_hand(canvas, points, shown[np.array(BONES)].all(axis=1), shown)
    return canvas


def draw_faces(canvas: np.ndarray, faces: list[np.ndarray]) -> np.ndarray:
    """Faces (n, 2), relative, as white dots."""
    for points in faces:
        for point in _to_pixels(points, canvas).tolist():
            if min(point) > 0:
                cv2.circle(canvas, point, FACE_RADIUS, WHITE, thickness=-1)
    return canvas


def _to_pixels(points: np.ndarray, canvas: np.ndarray) -> np.ndarray:
    """Relative coordinates in whole pixels, cut towards zero after a product in their own precision: (n, 2), int64."""
    points = np.asarray(points)
    return (points * np.array(canvas.shape[1::-1], points.dtype)).astype(np.int64)


def draw_pose(
    pose: dict, H: int, W: int, draw_body: bool = True, draw_hand: bool = True, draw_face: bool = True,
    canvas: np.ndarray | None = None,
) -> np.ndarray:  # fmt: skip
    """The drawing of version 1.1 (H, W, 3), uint8, RGB, of what `annotator.openpose.Poses.relative` gives.

    Args:
        draw_body, draw_hand, draw_face: what is drawn of it.
        canvas: (H, W, 3), uint8, on which to draw; a black one if not given.
    """
    canvas = np.zeros((H, W, 3), dtype=np.uint8) if canvas is None else canvas
    if draw_body:
        candidates = np.array(pose["bodies"]["candidate"], dtype=np.float64).reshape(-1, 2)
        people = np.array(pose["bodies"]["subset"], dtype=np.float64).reshape(-1, BODY_JOINTS + 2)
        draw_body_1_1(canvas, candidates, people)
    if draw_hand:
        draw_hands_1_1(canvas, pose["hands"])
    return draw_faces(canvas, pose["faces"]) if draw_face else canvas
