"""What all detectors have in common: the call's contract, and for those with a network, device and weights.

A detector takes a uint8 picture (H, W, 3) in RGB, also grey or RGBA, and gives a uint8 map (H, W) or (H, W, 3).
"""

import os

import numpy as np
import torch
from torch import Tensor, nn

from annotator.util import HWC3
from annotator.weights import REPOSITORY, find_weights, load_weights, read_state_dict


def choose_device(device: str | torch.device | None = None) -> torch.device:
    """`device`, or the best one this machine has: CUDA, else Apple's, else the CPU.

    Raises:
        ValueError: if there is no such device.
    """
    if device is not None:
        try:
            device = torch.device(device)
        except RuntimeError as err:
            raise ValueError(f"unknown device {device!r}; use cpu, cuda, cuda:1 or mps") from err
        if device.type not in ("cpu", "cuda", "mps"):
            raise ValueError(f"no detector runs on {device}; use cpu, cuda, cuda:1 or mps")
        if device.type == "mps" and not torch.backends.mps.is_available():
            raise ValueError("this machine has no device mps")
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise ValueError(f"this machine has no device {device}; CUDA devices found: {torch.cuda.device_count()}")
        return device
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def freeze(network: nn.Module, device: torch.device) -> nn.Module:
    """`network` on `device`, in eval mode, without gradients."""
    return network.to(device).eval().requires_grad_(False)


class NetworkDetector:
    """A detector around one network whose weights are published as a file.

    A subclass names `filename` (several names: any of them serves), perhaps `repository`, `folder`, `wrapper` and
    `strict`, and gives `build_network`, perhaps `rename`. A detector with several networks overrides `__init__` and
    calls `load_network` once for each.

    Args:
        device: where to compute; the best one of this machine if not given.
        weights: a weight file, or a folder that holds the published file; see `annotator.weights.find_weights`.

    Attributes:
        network: in eval mode, on `device`, without gradients.
        max_pixels: larger pictures are refused, as activations would not fit into memory.
    """

    filename: str | tuple[str, ...]
    repository: str = REPOSITORY
    folder: str = ""
    wrapper: str | None = None
    strict: bool = True
    max_pixels: int = 2**24

    def __init__(self, device: str | torch.device | None = None, weights: str | os.PathLike | None = None) -> None:
        self.device = choose_device(device)
        self.network = self.load_network(find_weights(self.filename, weights, self.repository, self.folder))

    def build_network(self) -> nn.Module:
        """The network, with any weights."""
        raise NotImplementedError

    def load_for(self, **parameters: object) -> None:
        """Load now what a call with these arguments would load when it is made; before threads make many."""

    def rename(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Entries of the published file under the network's own names."""
        return state_dict

    def load_network(self, path: str | os.PathLike) -> nn.Module:
        """The network with the weights of `path`, ready to run on `self.device`."""
        state_dict = self.rename(read_state_dict(path, self.wrapper))
        network = self.build_network()
        load_weights(network, state_dict, path, self.strict)
        return freeze(network, self.device)

    def prepare(self, image: np.ndarray) -> np.ndarray:
        """The picture as (H, W, 3), uint8, RGB.

        Raises:
            ValueError: for what is no such picture, or is too large for a network.
        """
        image = HWC3(image)
        height, width = image.shape[:2]
        if height * width > self.max_pixels:
            raise ValueError(
                f"a picture of {height}x{width} pixels is too large for {type(self).__name__} (at most "
                f"{self.max_pixels} pixels); make it smaller first, e.g. with annotator.util.resize_image"
            )
        return image

    def tensor(self, image: np.ndarray) -> Tensor:
        """(H, W, C) or (H, W) numbers as a float32 batch of one on `self.device`: (1, C, H, W)."""
        image = np.require(np.atleast_3d(image), requirements=["C", "W"])  # torch warns of what it could not write to
        return torch.from_numpy(image).to(self.device, torch.float32).permute(2, 0, 1)[None]
