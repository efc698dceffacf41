"""Detectors with a network: encode a picture, run the network on a batch, decode its output."""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from annotator.detector import Detector, check_version, first_line
from annotator.pictures import HWC3, pad_to_multiple
from annotator.weights import REPOSITORY, Hub, find_weights, fingerprint, load_weights, read_state_dict


def choose_device(device: str | torch.device | None = None) -> torch.device:
    """`device`, or the best one this machine has: an accelerator, else the CPU; ValueError if there is no such device."""
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
        reason = f"({first_line(err)}); use cpu, cuda, cuda:1, mps or xpu"
        raise ValueError(f"this machine has no device {device!s} {reason}") from err
    return device


@contextmanager
def inference(device: torch.device) -> Iterator[None]:
    """Networks compute without gradients, and in float32, as numpy needs it, also where the caller has switched autocast on."""
    enabled = torch.is_autocast_enabled(device.type)
    with torch.no_grad(), torch.autocast(device.type, enabled=False) if enabled else nullcontext():
        yield


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
                network = detector.load_network(self.name, path)
                loaded[self.name] = network.to(detector.device).float().eval().requires_grad_(False)
                detector.loaded_from[path.name] = path
            return loaded[self.name]


class NetworkDetector(Detector):
    """A detector around a network: `encode` makes its input of a picture, `decode` a map of its output.

    A subclass names the published file, `network = LazyNetwork("file.pth")`, and gives `build_network`, `encode` and `decode`.

    Attributes:
        network: in eval mode, on `device`, without gradients.
        build_network: makes the network, with any weights.
        stride, min_side: pictures are padded, by repeating the last row and column, to multiples of `stride`; and, if a side
            is below `min_side`, to multiples of that. The map is that of the picture without the padding.
        repository: of the published file, or the address of the file itself.
        model_types: names of the network that `from_pretrained` is given in controlnet_aux's way.
        max_pixels: larger pictures are refused, as activations would not fit into memory.
        optional: what the keys of entries begin with that the file may lack.
    """

    call = "decode"
    network: Any = LazyNetwork()
    build_network: ClassVar[Callable[..., nn.Module]]
    repository: ClassVar[str] = REPOSITORY
    model_types: ClassVar[tuple[str, ...]] = ()
    optional: ClassVar[str | None] = None
    stride: ClassVar[int] = 1
    min_side: ClassVar[int] = 1
    max_pixels: int = 2**24

    def __init__(
        self,
        device: str | torch.device | None = None,
        weights: "str | os.PathLike | Hub | None" = None,
        version: str | None = None,
        filenames: dict[str, tuple[str, ...]] | None = None,
    ) -> None:
        self.version = check_version(version)
        self.device = choose_device(device)
        self.weights = weights
        self.filenames = filenames or {}
        self.loaded_from: dict[str, Path] = {}
        self.load()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_or_path: str | os.PathLike,
        filename: str | None = None,
        cache_dir: str | None = None,
        local_files_only: bool = False,
        device: str | torch.device | None = "cpu",
        subfolder: str | None = None,
        model_type: str | None = None,
        **options: Any,
    ) -> "NetworkDetector":
        """A detector that is called in controlnet_aux's way.

        Args:
            pretrained_model_or_path: a folder, or a repository of the Hugging Face hub.
            filename: of the weights; `coarse_filename`, `hand_filename`, `face_filename` for further networks.
            device: the CPU, as there, if not given; `.to("cuda")` moves it.
            subfolder: where the files are in the folder or repository.
            model_type: one of `model_types`; it changes nothing, as the file itself says what it is.
        """
        if model_type and model_type not in cls.model_types:
            raise ValueError(f"model_type must be {' or '.join(cls.model_types) or 'left out'}, got {model_type!r}")
        more = {option: options.pop(option) for option in list(options) if option.endswith("_filename")}
        named = {"network": filename} | {option.replace("filename", "network"): file for option, file in more.items()}
        filenames: dict[str, tuple[str, ...]] = {name: (file,) for name, file in named.items() if file}
        if subfolder:
            filenames = {"network": cls.network.filenames} | filenames
            filenames = {name: tuple(f"{subfolder}/{file}" for file in files) for name, files in filenames.items()}
        place = Path(pretrained_model_or_path).expanduser()
        weights = place if place.exists() else Hub(str(pretrained_model_or_path), cache_dir, local_files_only)
        options.setdefault("version", "1.1")  # which that library is made from
        detector = cls(device, weights, filenames=filenames, **options)
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
        return {name: fingerprint(path) for name, path in self.loaded_from.items()}

    def load_network(self, name: str, path: Path) -> nn.Module:
        """The network that is the attribute `name`, with the weights of `path`."""
        network = self.build_network()
        load_weights(network, read_state_dict(path), path, self.optional)
        return network

    def encode(self, image: np.ndarray) -> Tensor:
        """The network's input for a picture (H, W, 3), uint8, RGB: (C, h, w), on the CPU."""
        raise NotImplementedError

    def forward(self, x: Tensor, **parameters: Any) -> Any:
        """The network's output for a batch (B, C, h, w): tensors whose first axis is the batch, alone or in lists or tuples."""
        return self.network(x)

    def decode(self, output: Any, size: tuple[int, int], *args: Any, **parameters: Any) -> Any:
        """The map (H, W) or (H, W, 3), uint8, of one picture of this size, from the network's output without the batch's axis.

        The output still has what was padded. Arguments of the detector's call follow, each with a default.
        """
        raise NotImplementedError

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

    def run(self, x: Tensor, **parameters: Any) -> list[Any]:
        """The network's outputs for a batch (B, C, h, w), one for each picture."""
        with inference(self.device):
            output = self.forward(x.to(self.device), **parameters)
        return [_picture_of(output, index) for index in range(len(x))]

    def finish(self, output: Any, image: np.ndarray, *args: Any, **parameters: Any) -> Any:
        """The map of a picture (H, W, C) from the network's output."""
        return self.decode(output, image.shape[:2], *args, **parameters)

    def detect(self, image: np.ndarray, *args: Any, **parameters: Any) -> Any:
        (output,) = self.run(self.prepare(image)[None], **parameters)
        return self.finish(output, image, *args, **parameters)


def to_tensor(image: np.ndarray) -> Tensor:
    """(H, W, C) or (H, W) numbers as float32 (C, H, W)."""
    image = np.require(np.atleast_3d(image), requirements=["C", "W"])  # torch warns of what it could not write to
    return torch.from_numpy(image).permute(2, 0, 1).to(torch.float32, memory_format=torch.contiguous_format)


def _picture_of(output: Any, index: int) -> Any:
    if isinstance(output, (list, tuple)):
        return [_picture_of(part, index) for part in output]
    return output[index]
