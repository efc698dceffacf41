"""Soft edges by HED, with either of the two networks that were published for ControlNet."""

from pathlib import Path
from typing import Annotated, Any

import cv2
import numpy as np
from torch import Tensor, nn

from annotator.hed.model import BLOCKS, BSDS500HED, MIN_SIDE, ControlNetHED
from annotator.network import LazyNetwork, NetworkDetector, to_tensor
from annotator.pictures import to_uint8
from annotator.scribble import fake_scribble
from annotator.util import nms, safe_step
from annotator.weights import load_weights, read_state_dict

__all__ = ["BSDS500HED", "ControlNetHED", "HEDdetector", "nms"]


Safe = Annotated[bool, "quantise the map to three levels, so that it hides less of the picture"]


class SoftEdgeDetector(NetworkDetector):
    """In controlnet_aux's way the edges can become a scribble."""

    def aux_map(self, view: np.ndarray, size: tuple[int, int], scribble: bool = False, **parameters: Any) -> np.ndarray:
        found = super().aux_map(view, size, **parameters)
        return fake_scribble(found) if scribble else found


class HEDdetector(SoftEdgeDetector):
    """Edges of a picture, white on black, soft.

    Takes `ControlNetHED.pth` (1.0's last state and 1.1) and, except in version 1.1, `network-bsds500.pth` (1.0 before April
    2023), recognised by their keys.
    """

    network = LazyNetwork("ControlNetHED.pth", "network-bsds500.pth")
    min_side = MIN_SIDE
    build_network = ControlNetHED

    def find_file(self, name: str, filenames: tuple[str, ...]) -> Path:
        return super().find_file(name, filenames[:1] if self.version == "1.1" else filenames)

    def load_network(self, name: str, path: Path) -> nn.Module:
        state_dict = read_state_dict(path)
        older = any(key.startswith("moduleVgg") for key in state_dict)
        network = BSDS500HED() if older else self.build_network()
        load_weights(network, state_dict, path)
        return network

    def encode(self, image: np.ndarray) -> Tensor:
        if isinstance(self.network, BSDS500HED):
            return to_tensor(image[:, :, ::-1]) / 255.0
        return to_tensor(image)

    def decode(self, output: Any, size: tuple[int, int], safe: Safe = False) -> np.ndarray:
        if isinstance(self.network, BSDS500HED):
            edge = output[0].cpu().numpy()  # (h, w)
        else:
            full = output[0].shape[:0:-1]  # width and height of what the network saw
            mean = sum(cv2.resize(map[0].cpu().numpy(), full, interpolation=cv2.INTER_LINEAR) for map in output)
            edge = sigmoid(mean / len(BLOCKS))
        return edges_to_map(edge[: size[0], : size[1]], 2 if safe else 0)


def sigmoid(x: np.ndarray) -> np.ndarray:
    """In double precision, of which e**709 is the largest."""
    return 1.0 / (1.0 + np.exp(-x.astype(np.float64).clip(-700.0)))


def edges_to_map(edge: np.ndarray, steps: int) -> np.ndarray:
    """Probabilities of an edge (H, W), 0..1, as uint8, quantised to that many levels above black unless it is 0."""
    return to_uint8((safe_step(edge, steps) if steps else edge) * 255.0)
