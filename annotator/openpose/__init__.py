"""Human poses by OpenPose: bodies, hands and, in version 1.1, faces.

Reading order: `model` (the networks), `resizing` (what they see, and their maps at the picture's size), `peaks`
(joints), `assembly` (people), `boxes` (where hands and faces are), `drawing`.
"""

import math
import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from annotator.detector import NetworkDetector, freeze
from annotator.openpose.assembly import assemble_people
from annotator.openpose.boxes import face_boxes, hand_boxes
from annotator.openpose.drawing import draw_body_1_0, draw_hands_1_0, draw_pose
from annotator.openpose.model import BODY_JOINTS, HAND_POINTS, BodyPoseModel, FacePoseModel, HandPoseModel
from annotator.openpose.peaks import find_body_peaks, find_face_peaks, find_hand_peaks
from annotator.openpose.resizing import enlarge, enlarge_one_by_one, network_input, resize, scale
from annotator.weights import find_weights, load_weights, read_state_dict

__all__ = ["BodyPoseModel", "FacePoseModel", "HandPoseModel", "OpenposeDetector", "Poses", "draw_pose"]

BOX_SIZE = 368  # height of the pictures that the networks were trained on
BODY_SCALE = 0.5
HAND_SCALES = (0.5, 1.0, 1.5, 2.0)
HAND_MAP_SIZE = 128  # 1.1 looks for the points of all hands at this size
HAND_BLUR = 0.8
FACE_SIZE = 384
MAX_INPUT_PIXELS = 2**20  # of the body's network: 30 times its usual input


@dataclass(frozen=True)
class Poses:
    """What was found in a picture, in its pixels.

    Attributes:
        candidates: (n, 4), float64: x, y, value, number of every joint found.
        people: (p, 20), float64: for each of 18 joints its candidate or -1, then the total score and how many joints.
        hand_boxes: x, y, side, whether it is a left hand.
        hands: for each box (21, 2), int64, x and y in the box; (0, 0) for what was not found.
        face_boxes: x, y, side.
        faces: for each box (n, 2), int64, x and y in the box.
    """

    candidates: np.ndarray
    people: np.ndarray
    hand_boxes: list[tuple[int, int, int, bool]] = field(default_factory=list)
    hands: list[np.ndarray] = field(default_factory=list)
    face_boxes: list[tuple[int, int, int]] = field(default_factory=list)
    faces: list[np.ndarray] = field(default_factory=list)

    def hands_in_pixels(self) -> list[np.ndarray]:
        """Hands (21, 2) in the picture, as version 1.0 has them: a coordinate that is 0 in its box stays 0."""
        corners = [box[:2] for box in self.hand_boxes]
        return [np.where(hand == 0, 0, hand + corner) for hand, corner in zip(self.hands, corners, strict=True)]

    def relative(self, height: int, width: int) -> dict:
        """Everything relative to the picture's width and height, in plain lists, as version 1.1 hands it out.

        A coordinate of a hand or face that is 0 in its box counts as missing, and is -1 before it is divided.
        """
        size = np.array([width, height], dtype=np.float32)

        def place(points: list[np.ndarray], boxes: list[tuple]) -> list[list]:
            placed = [np.where(p <= 0, -1, p + box[:2]) for p, box in zip(points, boxes, strict=True)]
            return [(p.astype(np.float32) / size).tolist() for p in placed if len(p)]

        candidates = self.candidates[:, :2] / (width, height)
        return {
            "bodies": {"candidate": candidates.tolist(), "subset": self.people.tolist()},
            "hands": place(self.hands, self.hand_boxes),
            "faces": place(self.faces, self.face_boxes),
        }


class OpenposeDetector(NetworkDetector):
    """People in a picture as coloured skeletons on black.

    The networks of hands and faces are loaded when they are first needed.

    Args:
        device: where to compute; the best one of this machine if not given.
        weights: a folder that holds body_pose_model.pth, hand_pose_model.pth and facenet.pth, of which the last two
            may be absent until they are needed, or the body's file, with the others beside it.
        version: "1.0" or "1.1" of ControlNet; they differ in how pictures are resized, in hands and in the drawing.

    Attributes:
        network, hand_network, face_network: in eval mode, on `device`, without gradients.
    """

    filename = "body_pose_model.pth"

    def __init__(
        self,
        device: str | torch.device | None = None,
        weights: str | os.PathLike | None = None,
        version: str = "1.0",
    ) -> None:
        if version not in ("1.0", "1.1"):
            raise ValueError(f"version must be 1.0 or 1.1, got {version!r}")
        self.version = version
        super().__init__(device, weights)
        is_file = weights is not None and Path(weights).expanduser().is_file()
        self._folder = Path(weights).expanduser().parent if is_file else weights

    def load_network(self, path: str | os.PathLike) -> nn.Module:
        return self._load(BodyPoseModel(), path)

    def _load(self, network: nn.Module, path: str | os.PathLike) -> nn.Module:
        """Published names lack the part of ours that says to which stage and branch a convolution belongs."""
        published = read_state_dict(path)
        names = {name if name in published else name.split(".", 1)[1]: name for name in network.state_dict()}
        load_weights(network, {names[name]: tensor for name, tensor in published.items() if name in names}, path)
        return freeze(network, self.device)

    @cached_property
    def hand_network(self) -> nn.Module:
        return self._load(HandPoseModel(), find_weights("hand_pose_model.pth", self._folder, self.repository))

    @cached_property
    def face_network(self) -> nn.Module:
        return self._load(FacePoseModel(), find_weights("facenet.pth", self._folder, self.repository))

    def load_for(self, **parameters: object) -> None:
        if parameters.get("hand") or parameters.get("hand_and_face"):
            _ = self.hand_network
            if self.version == "1.1":
                _ = self.face_network

    def __call__(
        self, image: np.ndarray, hand: bool = False, return_is_index: bool = False, *, hand_and_face: bool = False
    ) -> np.ndarray | dict | tuple[np.ndarray, dict]:
        """
        Args:
            image: (H, W, 3), uint8, RGB.
            hand: look for hands too; in 1.1 for hands and faces, as its second argument means.
            return_is_index: 1.1 only: give the poses instead of the drawing.
            hand_and_face: 1.1 only: look for hands and faces too.

        Returns:
            1.0: the drawing (H, W, 3), uint8, RGB, and a dict of lists: `candidate` (n, 4) and `subset` (people, 20).
            1.1: the drawing, or with `return_is_index` a dict, see `Poses.relative`.

        Raises:
            ValueError: for what is no picture, or an argument that the version does not have.
        """
        image = self.prepare(image)
        if self.version == "1.0":
            if return_is_index or hand_and_face:
                raise ValueError("hand_and_face and return_is_index need OpenposeDetector(version='1.1')")
            poses = self.find_poses(image, hands=hand)
            canvas = draw_body_1_0(np.zeros(image.shape, np.uint8), poses.candidates, poses.people)
            draw_hands_1_0(canvas, poses.hands_in_pixels())
            return canvas, {"candidate": poses.candidates.tolist(), "subset": poses.people.tolist()}
        more = hand or hand_and_face
        pose = self.find_poses(image, hands=more, faces=more).relative(*image.shape[:2])
        return pose if return_is_index else draw_pose(pose, *image.shape[:2])

    @torch.no_grad()
    def find_poses(self, image: np.ndarray, hands: bool = False, faces: bool = False) -> Poses:
        """The bodies in a picture (H, W, 3), uint8, RGB, with what was asked for besides."""
        bgr = np.ascontiguousarray(self.prepare(image)[:, :, ::-1])
        candidates, people = self._find_bodies(bgr)
        around_hands = hand_boxes(candidates, people, *bgr.shape[:2]) if hands else []
        around_faces = face_boxes(candidates, people, *bgr.shape[:2]) if faces else []
        return Poses(
            candidates,
            people,
            around_hands,
            [self.find_hand(bgr[y : y + side, x : x + side]) for x, y, side, _ in around_hands],
            around_faces,
            [self.find_face(bgr[y : y + side, x : x + side]) for x, y, side in around_faces],
        )

    def _find_bodies(self, bgr: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        height, width = bgr.shape[:2]
        # Long thin pictures would need too much memory, as the height alone decides.
        factor = min(BODY_SCALE * BOX_SIZE / height, math.sqrt(MAX_INPUT_PIXELS / (height * width)))
        seen = scale(bgr, factor, self.version)
        fields, heatmaps = (_channels_last(maps) for maps in self.network(self.tensor(network_input(seen))))
        sizes = seen.shape, height, width, self.version
        peaks = find_body_peaks(enlarge_one_by_one(heatmaps, BODY_JOINTS, *sizes))
        return assemble_people(peaks, lambda channel: enlarge(fields[:, :, channel : channel + 2], *sizes), height)

    @torch.no_grad()
    def find_hand(self, bgr: np.ndarray) -> np.ndarray:
        """The points of the hand in a picture of one hand (h, w, 3), uint8, BGR.

        Returns:
            (21, 2), int64: x, y in pixels; (0, 0) for what was not found.
        """
        height, width = bgr.shape[:2]
        if self.version == "1.0":
            views = [scale(bgr, factor * BOX_SIZE / height, "1.0") for factor in HAND_SCALES]
            map_height, map_width = height, width
        else:
            bgr = cv2.GaussianBlur(bgr, (0, 0), HAND_BLUR)
            views = [resize(bgr, factor * BOX_SIZE, factor * BOX_SIZE, "1.1") for factor in HAND_SCALES]
            map_height = map_width = HAND_MAP_SIZE
        means = np.zeros((HAND_POINTS, map_height, map_width))
        for view in views:
            maps = _channels_last(self.hand_network(self.tensor(network_input(view))))
            seen = enlarge_one_by_one(maps, HAND_POINTS, view.shape, map_height, map_width, self.version)
            for mean, heatmap in zip(means, seen, strict=True):
                mean += heatmap / len(views)
        peaks = find_hand_peaks(means)
        if self.version == "1.0":
            return peaks
        return (peaks * np.array([float(width), float(height)]) / HAND_MAP_SIZE).astype(np.int64)

    @torch.no_grad()
    def find_face(self, bgr: np.ndarray) -> np.ndarray:
        """The landmarks of the face in a picture of one face (h, w, 3), uint8, BGR: (n, 2), int64, x, y in pixels."""
        view = resize(bgr, FACE_SIZE, FACE_SIZE, "1.1")
        heatmaps = self.face_network(self.tensor(network_input(view)))[-1]  # (1, 71, 48, 48)
        heatmaps = F.interpolate(heatmaps, bgr.shape[:2], mode="bilinear", align_corners=True)
        return find_face_peaks(heatmaps[0].cpu().numpy())


def _channels_last(maps: Tensor) -> np.ndarray:
    """(1, C, h, w) as float32 (h, w, C)."""
    return maps[0].float().permute(1, 2, 0).cpu().numpy()
