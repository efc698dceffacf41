"""Human poses by OpenPose: bodies, hands and, in version 1.1, faces.

Reading order: `model` (the networks), `resizing` (what they see, and their maps at the picture's size), `peaks`
(joints), `assembly` (people), `boxes` (where hands and faces are), `drawing`.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import cv2
import numpy as np
import torch.nn.functional as F
from torch import Tensor, nn

from annotator.network import LazyNetwork, NetworkDetector, inference, to_tensor
from annotator.openpose.assembly import assemble_people
from annotator.openpose.boxes import face_boxes, hand_boxes
from annotator.openpose.drawing import draw_body_1_0, draw_hands_1_0, draw_pose
from annotator.openpose.model import BODY_JOINTS, HAND_POINTS, BodyPoseModel, FacePoseModel, HandPoseModel
from annotator.openpose.peaks import find_body_peaks, find_face_peaks, find_hand_peaks
from annotator.openpose.resizing import enlarge, enlarge_one_by_one, network_input, resize, scale
from annotator.pictures import HWC3
from annotator.pictures import resize as resize_picture
from annotator.weights import load_weights, read_state_dict

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

    The versions differ in how pictures are resized, in hands, and in the drawing. The networks of hands and faces are loaded
    when they are first needed.

    Args:
        weights: a folder that holds body_pose_model.pth, hand_pose_model.pth and facenet.pth, of which the last two
            may be absent until they are needed, or the body's file, with the others beside it.

    Attributes:
        network, hand_network, face_network: in eval mode, on `device`, without gradients.
    """

    call = "finish"
    network = LazyNetwork("body_pose_model.pth")
    hand_network = LazyNetwork("hand_pose_model.pth")
    face_network = LazyNetwork("facenet.pth")

    def load_network(self, name: str, path: Path) -> nn.Module:
        """Published names lack the part of ours that says to which stage and branch a convolution belongs."""
        network = {"network": BodyPoseModel, "hand_network": HandPoseModel, "face_network": FacePoseModel}[name]()
        published = read_state_dict(path)
        names = {key if key in published else key.split(".", 1)[1]: key for key in network.state_dict()}
        load_weights(network, {names[key]: tensor for key, tensor in published.items() if key in names}, path)
        return network

    def load(self, hand: bool = False, hand_and_face: bool = False, **parameters: Any) -> None:
        _ = self.network
        if hand or hand_and_face:
            _ = self.hand_network
            if self.version == "1.1":
                _ = self.face_network

    def _view(self, bgr: np.ndarray) -> np.ndarray:
        """The picture at the size of the body's network."""
        height, width = bgr.shape[:2]
        # Long thin pictures would need too much memory, as the height alone decides.
        factor = min(BODY_SCALE * BOX_SIZE / height, math.sqrt(MAX_INPUT_PIXELS / (height * width)))
        return scale(bgr, factor, self.version)

    def encode(self, image: np.ndarray) -> Tensor:
        return to_tensor(network_input(self._view(np.ascontiguousarray(image[:, :, ::-1]))))

    def finish(
        self,
        output: Any,
        image: np.ndarray,
        hand: Annotated[bool, "draw hands too"] = False,
        return_is_index: bool = False,
        *,
        hand_and_face: Annotated[bool, "draw hands and faces too"] = False,
    ) -> np.ndarray | dict | tuple[np.ndarray, dict]:
        """
        Args:
            hand: look for hands too; in 1.1 for hands and faces, as its second argument means.
            return_is_index: 1.1 only: give the poses instead of the drawing.
            hand_and_face: 1.1 only: look for hands and faces too.

        Returns:
            1.0: the drawing (H, W, 3), uint8, RGB, and a dict of lists: `candidate` (n, 4) and `subset` (people, 20).
            1.1: the drawing, or with `return_is_index` a dict, see `Poses.relative`.

        Raises:
            ValueError: for an argument that the version does not have.
        """
        size = image.shape[:2]
        if self.version == "1.0":
            if return_is_index or hand_and_face:
                raise ValueError(
                    "hand_and_face and return_is_index need version 1.1: OpenposeDetector(version='1.1') or use_version('1.1')"
                )
            poses = self._find_poses(output, image, hands=hand)
            canvas = draw_body_1_0(np.zeros((*size, 3), np.uint8), poses.candidates, poses.people)
            draw_hands_1_0(canvas, poses.hands_in_pixels())
            return canvas, {"candidate": poses.candidates.tolist(), "subset": poses.people.tolist()}
        more = hand or hand_and_face
        pose = self._find_poses(output, image, hands=more, faces=more).relative(*size)
        return pose if return_is_index else draw_pose(pose, *size)

    def aux_map(
        self,
        view: np.ndarray,
        size: tuple[int, int],
        include_body: bool = True,
        include_hand: bool = False,
        include_face: bool = False,
        hand_and_face: bool | None = None,
        hand: bool = False,
    ) -> np.ndarray:
        """Drawn person by person, and with points in float32, as there; the other arguments say what is drawn."""
        if hand_and_face is not None:
            include_hand = include_face = hand_and_face
        include_hand = include_hand or hand
        everyone, canvas, (height, width) = self.find_poses(view), np.zeros_like(view), view.shape[:2]
        for person in everyone.people:
            poses = self._add_parts(view, everyone.candidates, person[None], include_hand, include_face)
            pose = poses.relative(height, width)
            # In float64, as 1.1 does it, x = 5 of 192 would be drawn at 4: 5 / 192 was rounded down to a float32.
            pose |= {part: [np.array(points, np.float32) for points in pose[part]] for part in ("hands", "faces")}
            draw_pose(pose, height, width, draw_body=include_body, canvas=canvas)
        return resize_picture(canvas, size)

    def find_poses(self, image: np.ndarray, hands: bool = False, faces: bool = False) -> Poses:
        """The bodies in a picture (H, W, 3), uint8, RGB, with what was asked for besides."""
        (output,) = self.run(self.prepare(image)[None])
        return self._find_poses(output, image, hands, faces)

    def _find_poses(self, output: Any, image: np.ndarray, hands: bool = False, faces: bool = False) -> Poses:
        image = HWC3(image)
        height, width = image.shape[:2]
        pafs, heatmaps = (_channels_last(maps) for maps in output)
        sizes = self._view(image).shape, height, width, self.version
        peaks = find_body_peaks(enlarge_one_by_one(heatmaps, BODY_JOINTS, *sizes))
        candidates, people = assemble_people(
            peaks, lambda channel: enlarge(pafs[:, :, channel : channel + 2], *sizes), height
        )
        return self._add_parts(image, candidates, people, hands, faces)

    def _add_parts(
        self, image: np.ndarray, candidates: np.ndarray, people: np.ndarray, hands: bool, faces: bool
    ) -> Poses:
        """People, some of those that were found in a picture, with their hands and faces."""
        bgr = np.ascontiguousarray(image[:, :, ::-1])
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
            maps = _channels_last(self._run(self.hand_network, view)[0])
            seen = enlarge_one_by_one(maps, HAND_POINTS, view.shape, map_height, map_width, self.version)
            for mean, heatmap in zip(means, seen, strict=True):
                mean += heatmap / len(views)
        peaks = find_hand_peaks(means)
        if self.version == "1.0":
            return peaks
        return (peaks * np.array([float(width), float(height)]) / HAND_MAP_SIZE).astype(np.int64)

    def find_face(self, bgr: np.ndarray) -> np.ndarray:
        """The landmarks of the face in a picture of one face (h, w, 3), uint8, BGR: (n, 2), int64, x, y in pixels."""
        view = resize(bgr, FACE_SIZE, FACE_SIZE, "1.1")
        heatmaps = self._run(self.face_network, view)[-1]  # (1, 71, 48, 48)
        heatmaps = F.interpolate(heatmaps, bgr.shape[:2], mode="bilinear", align_corners=True)
        return find_face_peaks(heatmaps[0].cpu().numpy())

    def _run(self, network: nn.Module, view: np.ndarray) -> Any:
        with inference(self.device):
            return network(to_tensor(network_input(view))[None].to(self.device))


def _channels_last(maps: Tensor) -> np.ndarray:
    """(C, h, w) as float32 (h, w, C)."""
    return maps.float().permute(1, 2, 0).cpu().numpy()
