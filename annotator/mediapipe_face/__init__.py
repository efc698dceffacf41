"""Faces by MediaPipe's face mesh, as the face model of CrucibleAI was trained on."""

from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from torch import nn

from annotator.library import LibraryDetector
from annotator.mediapipe_face.drawing import COLOURS, draw_face
from annotator.network import LazyNetwork
from annotator.weights import WeightsError

FILE = "face_landmarker.task"
MODELS = "https://storage.googleapis.com/mediapipe-models"


class FaceMesh(nn.Module):
    """MediaPipe's landmarker, which computes on the CPU."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        import mediapipe

        self.path, self.mediapipe, self.vision = path, mediapipe, mediapipe.tasks.vision
        edges = {part: getattr(self.vision.FaceLandmarksConnections, f"FACE_LANDMARKS_{part}") for part in COLOURS}
        self.edges = {part: [(edge.start, edge.end) for edge in edges[part]] for part in COLOURS}
        self.landmarker = lru_cache(maxsize=1)(self._landmarker)  # made anew only when the call's arguments change

    def _landmarker(self, max_faces: int, min_confidence: float) -> Any:
        base = self.mediapipe.tasks.BaseOptions(model_asset_path=str(self.path))
        options = self.vision.FaceLandmarkerOptions(
            base_options=base, num_faces=max_faces, min_face_detection_confidence=min_confidence
        )
        try:
            return self.vision.FaceLandmarker.create_from_options(options)
        except (RuntimeError, ValueError) as err:
            raise WeightsError(f"{self.path} is no model of MediaPipe's face landmarker: {err}") from err

    def forward(self, image: np.ndarray, max_faces: int, min_confidence: float) -> list[np.ndarray]:
        """(H, W, 3), uint8, RGB -> for each face (478, 2), x and y relative to width and height."""
        picture = self.mediapipe.Image(image_format=self.mediapipe.ImageFormat.SRGB, data=np.ascontiguousarray(image))
        faces = self.landmarker(max_faces, min_confidence).detect(picture).face_landmarks
        return [np.array([(point.x, point.y) for point in face]) for face in faces]


class MediapipeFaceDetector(LibraryDetector):
    """Contours of faces, eyes, eyebrows and lips, and pupils, each in its colour on black (H, W, 3).

    Args:
        weights: MediaPipe's face_landmarker.task, or a folder that holds it.
    """

    network = LazyNetwork(FILE)
    library, extra = "mediapipe", "face"
    repository = f"{MODELS}/face_landmarker/face_landmarker/float16/latest/{FILE}"

    def load_network(self, name: str, path: Path) -> nn.Module:
        return FaceMesh(path)

    def predict(self, images: list[np.ndarray], max_faces: int, min_confidence: float) -> list[list[np.ndarray]]:
        return [self.network(image, max_faces, min_confidence) for image in images]

    def decode(
        self,
        output: list[np.ndarray],
        size: tuple[int, int],
        max_faces: Annotated[int, 1, 100, "faces that are looked for"] = 1,
        min_confidence: Annotated[float, 0.0, 1.0, "score above which a face counts"] = 0.5,
    ) -> np.ndarray:
        canvas = np.zeros((*size, 3), dtype=np.uint8)
        for face in output:
            draw_face(canvas, face, self.network.edges)
        return canvas
