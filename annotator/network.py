"""Detectors with a network: encode a picture, run the network on a batch, decode its output."""

import os
import threading
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from annotator.detector import Detector, Maps, check_version, default_version
from annotator.pictures import HWC3, pad_to_multiple
from annotator.weights import REPOSITORY, Hub, find_weights, fingerprint, load_weights, read_state_dict


def choose_device(device: str | torch.device | None = None) -> torch.device:
    """`device`, or the best one this machine has: an accelerator, else the CPU.

    Raises:
        ValueError: if there is no such device.
    """
    if device is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        if torch.backends.mps.is_available():
            return torch.device("mps")
        return torch.device("xpu" if torch.xpu.is_available() else "cpu")
    try:
        device = torch.device(device)
        if device.type == "meta":
            raise ValueError("nothing can be computed on the device meta")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as err:
        reason = (str(err).strip().splitlines() or [""])[0]
        raise ValueError(
            f"this machine has no device {device!s} ({reason}); use cpu, cuda, cuda:1, mps or xpu"
        ) from err
    return device


def freeze(network: nn.Module, device: torch.device) -> nn.Module:
    """`network` on `device`, in eval mode, without gradients."""
    return network.to(device).eval().requires_grad_(False)


class LazyNetwork:
    """A network of a detector that is loaded when it is first asked for, once, whichever thread asks.

    `filenames` are those of its published weights, any of which serves.
    """

    _lock = threading.RLock()

    def __init__(self, *filenames: str) -> None:
        self.filenames = filenames

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, detector: "NetworkDetector | None", owner: type | None = None) -> Any:
        if detector is None:
            return self
        with self._lock:
            loaded = vars(detector)  # from the second time on, Python itself finds it there
            if self.name not in loaded:
                path = detector.find_file(self.name, detector.filenames.get(self.name, self.filenames))
                loaded[self.name] = freeze(detector.load_network(self.name, path), detector.device)
                detector.loaded_from[Path(path).name] = path
            return loaded[self.name]


class NetworkDetector(Detector):
    """A detector around a network: `encode` makes its input of a picture, `decode` a map of its output.

    A subclass names the published file, `network = LazyNetwork("file.pth")`, and gives `build_network`, `encode` and `decode`;
    where it needs them, `stride`, `min_side`, `wrapper`, `forward`.

    Attributes:
        network: in eval mode, on `device`, without gradients.
        stride, min_side: pictures are padded, by repeating the last row and column, to multiples of `stride`; and, if a side
            is below `min_side`, to multiples of that. The map is that of the picture without the padding.
        max_pixels: larger pictures are refused, as activations would not fit into memory.
        wrapper: entry of the published file that holds the weights.
    """

    call = "decode"
    network = LazyNetwork()
    repository: ClassVar[str] = REPOSITORY
    wrapper: ClassVar[str | None] = None
    stride: ClassVar[int] = 1
    min_side: ClassVar[int] = 1
    max_pixels: int = 2**24

    def __init__(
        self,
        device: str | torch.device | None = None,
        weights: "str | os.PathLike | Hub | None" = None,
        version: str | None = None,
        filenames: dict[str, str] | None = None,
    ) -> None:
        self.version = default_version() if version is None else check_version(version)
        self.device = choose_device(device)
        self.weights = weights
        self.filenames: dict[str, Any] = {name: (file,) for name, file in (filenames or {}).items()}
        self.loaded_from: dict[str, Path | str] = {}
        self.load()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_or_path: str | os.PathLike,
        filename: str | None = None,
        cache_dir: str | None = None,
        local_files_only: bool = False,
        device: str | torch.device | None = "cpu",
        **options: Any,
    ) -> "NetworkDetector":
        """A detector that is called in controlnet_aux's way.

        Args:
            pretrained_model_or_path: a folder, or a repository of the Hugging Face hub.
            filename: of the weights; `coarse_filename`, `hand_filename`, `face_filename` for further networks.
            device: the CPU, as there, if not given; `.to("cuda")` moves it.
        """
        options.setdefault("version", "1.1")  # which that library is made from
        filenames = {"network": filename}
        for option in [option for option in options if option.endswith("_filename")]:
            filenames[option.removesuffix("_filename") + "_network"] = options.pop(option)
        weights = pretrained_model_or_path
        if not Path(weights).exists():
            weights = Hub(str(weights), cache_dir, local_files_only)
        detector = cls(device, weights, filenames={name: file for name, file in filenames.items() if file}, **options)
        detector.pretrained = True
        return detector

    def to(self, device: str | torch.device) -> "NetworkDetector":
        self.device = choose_device(device)
        for value in vars(self).values():
            if isinstance(value, nn.Module):
                value.to(self.device)
        return self

    def load(self, **parameters: Any) -> None:
        _ = self.network

    def find_file(self, name: str, filenames: tuple[str, ...]) -> Path:
        """The weight file of the network that is the attribute `name`, on this machine."""
        weights = self.weights
        if name != "network" and isinstance(weights, (str, os.PathLike)) and Path(weights).expanduser().is_file():
            weights = Path(weights).expanduser().parent  # beside the file of the first network
        return find_weights(filenames, weights, self.repository)

    @property
    def sources(self) -> dict[str, str]:
        """Which weights were loaded: by file name, a fingerprint of the content, which takes a second for each gigabyte."""
        return {name: self.source_of(path) for name, path in self.loaded_from.items()}

    def source_of(self, path: Path | str) -> str:
        return fingerprint(Path(path)) if Path(path).exists() else str(path)

    def load_network(self, name: str, path: Path) -> nn.Module:
        """The network that is the attribute `name`, with the weights of `path`."""
        network = self.build_network()
        load_weights(network, read_state_dict(path, self.wrapper), path)
        return network

    def build_network(self) -> nn.Module:
        """The network, with any weights."""
        raise NotImplementedError

    def encode(self, image: np.ndarray) -> Tensor:
        """The network's input for a picture (H, W, 3), uint8, RGB: (C, h, w), on the CPU."""
        raise NotImplementedError

    def forward(self, x: Tensor, **parameters: Any) -> Any:
        """The network's output for a batch (B, C, h, w): tensors whose first axis is the batch, alone or in lists or tuples."""
        return self.network(x)

    def decode(self, output: Any, size: tuple[int, int]) -> Maps:
        """The map (H, W) or (H, W, 3), uint8, of one picture of this size, from the network's output without the batch's axis.

        The output still has what was padded. Arguments of the detector's call follow, each with a default.
        """
        raise NotImplementedError

    # What follows joins these steps; `annotator.folder` takes them one by one, with many pictures at once.

    def prepare(self, image: np.ndarray) -> Tensor:
        """The network's input (C, h, w) for any picture: checked, padded, encoded; ValueError if it is none, or too large."""
        image = HWC3(image)
        height, width = image.shape[:2]
        if height * width > self.max_pixels:
            raise ValueError(
                f"a picture of {height}x{width} pixels is too large for {type(self).__name__} (at most "
                f"{self.max_pixels} pixels); make it smaller first, e.g. with annotator.util.resize_image"
            )
        if min(image.shape[:2]) < self.min_side:
            image = pad_to_multiple(image, self.min_side)
        return self.encode(pad_to_multiple(image, self.stride))

    @torch.no_grad()
    def run(self, x: Tensor, **parameters: Any) -> list[Any]:
        """The network's outputs for a batch (B, C, h, w), one for each picture."""
        output = self.forward(x.to(self.device), **parameters)
        return [_picture_of(output, index) for index in range(len(x))]

    @torch.no_grad()
    def finish(self, output: Any, image: np.ndarray, **parameters: Any) -> Maps:
        """The map of a picture (H, W, C) from the network's output."""
        return self.decode(output, image.shape[:2], **parameters)

    def detect(self, image: np.ndarray, **parameters: Any) -> Maps:
        (output,) = self.run(self.prepare(image)[None], **parameters)
        return self.finish(output, image, **parameters)


def to_tensor(image: np.ndarray) -> Tensor:
    """(H, W, C) or (H, W) numbers as float32 (C, H, W)."""
    image = np.require(np.atleast_3d(image), requirements=["C", "W"])  # torch warns of what it could not write to
    return torch.from_numpy(image).permute(2, 0, 1).to(torch.float32, memory_format=torch.contiguous_format)


def _picture_of(output: Any, index: int) -> Any:
    if isinstance(output, (list, tuple)):
        return [_picture_of(part, index) for part in output]
    return output[index]
