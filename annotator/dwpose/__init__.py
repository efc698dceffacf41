"""Whole-body poses by DWPose: bodies, hands and faces, by two ONNX networks."""

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from torch import nn

from annotator.detector import first_line
from annotator.dwpose import decoding
from annotator.library import LibraryDetector
from annotator.network import LazyNetwork
from annotator.openpose import draw_pose
from annotator.weights import WeightsError

BOX_SIDE, CROP = 640, (384, 288)  # of the published networks, where the file leaves its input's size open


class OnnxNetwork(nn.Module):
    """A session of onnxruntime, which `to` opens on a device."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def to(self, device: torch.device) -> "OnnxNetwork":  # type: ignore[override]
        """Open the session; ValueError if this build of onnxruntime cannot compute there."""
        import onnxruntime

        providers: list[Any] = ["CPUExecutionProvider"]
        if device.type == "cuda":
            if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
                raise ValueError(f"onnxruntime cannot compute on {device}: pip install onnxruntime-gpu, or use cpu")
            providers.insert(0, ("CUDAExecutionProvider", {"device_id": device.index or 0}))
        try:
            self.session = onnxruntime.InferenceSession(str(self.path), providers=providers)
        except Exception as err:  # onnxruntime has an error class for each cause
            raise WeightsError(f"{self.path} is no ONNX network: {first_line(err)}") from err
        return self

    def input_size(self, otherwise: tuple[int, int]) -> tuple[int, int]:
        """Height and width that the network takes; `otherwise` if it takes any."""
        height, width = self.session.get_inputs()[0].shape[2:]
        return (height, width) if isinstance(height, int) and isinstance(width, int) else otherwise

    def forward(self, x: np.ndarray) -> list[np.ndarray]:
        return self.session.run(None, {self.session.get_inputs()[0].name: x})


class DWposeDetector(LibraryDetector):
    """People in a picture as coloured skeletons on black, with hands and faces (H, W, 3).

    Args:
        weights: a folder that holds yolox_l.onnx and dw-ll_ucoco_384.onnx, or the first one's file, with the other beside it.
    """

    network = LazyNetwork("yolox_l.onnx")
    pose_network = LazyNetwork("dw-ll_ucoco_384.onnx")
    repository = "yzd-v/DWPose"
    library, extra = "onnxruntime", "dwpose"

    def load(self, **parameters: Any) -> None:
        _ = self.network, self.pose_network

    def load_network(self, name: str, path: Path) -> nn.Module:
        return OnnxNetwork(path)

    def predict(self, images: list[np.ndarray], **parameters: Any) -> list[tuple[np.ndarray, np.ndarray]]:
        return [self.find_people(image) for image in images]

    def find_people(self, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The 133 points of each person in a picture (H, W, 3), uint8, RGB: (people, 133, 2) in pixels, and their scores."""
        height, width = self.network.input_size((BOX_SIDE, BOX_SIDE))
        crop_size = self.pose_network.input_size(CROP)
        x, factor = decoding.letterbox(image, height, width)
        points, scores = [], []
        for box in decoding.boxes_of_people(self.network(x)[0], height, width, factor):
            crop, corner, extent = decoding.crop_person(image, box, *crop_size)
            simcc_x, simcc_y = self.pose_network(crop)
            found, score = decoding.points_of_person(simcc_x, simcc_y, corner, extent, *crop_size)
            points.append(found)
            scores.append(score)
        return np.array(points).reshape(-1, 133, 2), np.array(scores).reshape(-1, 133)

    def decode(
        self,
        output: tuple[np.ndarray, np.ndarray],
        size: tuple[int, int],
        include_body: Annotated[bool, "draw bodies"] = True,
        include_hand: Annotated[bool, "draw hands"] = True,
        include_face: Annotated[bool, "draw faces"] = True,
    ) -> np.ndarray:
        pose = decoding.poses(*output, *size)
        return draw_pose(pose, *size, draw_body=include_body, draw_hand=include_hand, draw_face=include_face)
