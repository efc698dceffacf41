"""What all detectors have in common: how they are called, and what of their arguments can be chosen.

Two conventions of calling meet in one class:

- The published ControlNet's: an array (H, W, 3) in, the map of its size out; everything else is positional.
- controlnet_aux's: a detector made by `from_pretrained`, or given a PIL picture or one of that library's own keywords, resizes
  the picture to `detect_resolution` and its map to `image_resolution` (512 each), and gives a PIL picture.
"""

import importlib
import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Annotated, Any, ClassVar, Literal, get_args, get_origin, get_type_hints

import numpy as np
from PIL import Image

from annotator.pictures import HWC3, Picture, as_array, resize, resize_image, resized_shape

VERSIONS = ("1.0", "1.1")
VERSION_VARIABLE = "ANNOTATOR_VERSION"

Maps = np.ndarray | tuple[np.ndarray, ...]

_version: str | None = None


def use_version(version: str | None) -> None:
    """Choose the version of ControlNet that detectors follow when they are made without one; None takes the choice back.

    Without a choice it is that of the environment variable ANNOTATOR_VERSION, else 1.0.
    """
    global _version
    _version = None if version is None else check_version(version)


def default_version() -> str:
    """The version that `use_version`, or the environment variable ANNOTATOR_VERSION, has chosen, else 1.0."""
    return _version or check_version(os.environ.get(VERSION_VARIABLE) or VERSIONS[0])


def check_version(version: str) -> str:
    """`version` itself; ValueError if ControlNet has no such version."""
    if version not in VERSIONS:
        raise ValueError(f"version must be one of {', '.join(VERSIONS)}, got {version!r}")
    return version


def import_extra(module: str, extra: str) -> ModuleType:
    """An optional library; ImportError with the command that installs it if it is missing."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as err:
        raise ImportError(f"this detector needs {module}: pip install 'controlnet[{extra}]'") from err


@dataclass(frozen=True)
class Parameter:
    """An argument of a detector's call that people may choose."""

    name: str
    kind: type  # bool, int, float or str
    default: bool | int | float | str | None  # None for an argument that may be left out
    help: str
    minimum: float | None = None  # of a number; included, as is the maximum
    maximum: float | None = None
    choices: tuple[str, ...] = ()  # of a str

    def check(self, value: object) -> object:
        """`value` in the parameter's type; ValueError if it is of another kind or out of range."""
        if self.default is None and value is None:
            return None
        if self.kind is str:
            if value not in self.choices:
                raise ValueError(f"{self.name} must be one of {', '.join(self.choices)}, got {value!r}")
            return value
        if self.kind is bool:
            if not isinstance(value, (bool, np.bool_)):
                raise ValueError(f"{self.name} must be True or False, got {value!r}")
            return bool(value)
        if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
            raise ValueError(f"{self.name} must be a number, got {value!r}")
        if not self.minimum <= value <= self.maximum or (self.kind is int and value != int(value)):
            whole = "a whole number" if self.kind is int else "a number"
            raise ValueError(f"{self.name} must be {whole} from {self.minimum:g} to {self.maximum:g}, got {value}")
        return self.kind(value)


def read_parameters(function: Callable) -> dict[str, Parameter]:
    """The arguments of `function` that are annotated with a range and a text, such as `Annotated[int, 1, 255, "what it is"]`.

    A bool has a text only, `Annotated[Literal["a", "b"], "what it is"]` is one of several words.
    """
    hints = get_type_hints(function, include_extras=True)
    parameters = {}
    for name, argument in inspect.signature(function).parameters.items():
        if get_origin(hints.get(name)) is not Annotated:
            continue
        kind, *limits, text = get_args(hints[name])
        choices = get_args(kind) if get_origin(kind) is Literal else ()
        kind = str if choices else next((part for part in get_args(kind) if part is not type(None)), kind)
        parameters[name] = Parameter(name, kind, argument.default, text, *limits, choices=choices)
    return parameters


class Detector:
    """Picture in, map out. A subclass gives `detect`, or is a `annotator.network.NetworkDetector`.

    Args:
        device: where to compute; the best one of this machine if not given.
        weights: a weight file, or a folder that holds the published one.
        version: of ControlNet, "1.0" or "1.1", where they differ; see `use_version` for the default.
    """

    call: ClassVar[str] = "detect"  # the method whose arguments, after the picture, are those of the detector
    output_type: ClassVar[str | None] = "pil"  # of a call in controlnet_aux's way; None: as the picture that was given
    pretrained = False  # made by `from_pretrained`

    def __init__(
        self, device: Any = None, weights: str | os.PathLike | None = None, version: str | None = None
    ) -> None:
        if weights is not None:
            raise ValueError(f"{type(self).__name__} needs no weights, got {weights}")
        if device is not None:
            from annotator.network import choose_device

            choose_device(device)  # which computes nothing here, but must exist
        self.version = default_version() if version is None else check_version(version)

    @classmethod
    def from_pretrained(cls, pretrained_model_or_path: str | os.PathLike | None = None, **options: Any) -> "Detector":
        """A detector that is called in controlnet_aux's way."""
        detector = cls(**options)
        detector.pretrained = True
        return detector

    def to(self, device: Any) -> "Detector":
        """The detector itself, with its networks on `device`."""
        return self

    def load(self, **parameters: Any) -> None:
        """Load what a call with these arguments needs and is not loaded yet; ValueError if it cannot be had."""

    def detect(self, image: np.ndarray, **parameters: Any) -> Maps:
        """The map of a picture (H, W, C), uint8, at its size: (H, W) or (H, W, 3), uint8; or several."""
        raise NotImplementedError

    @classmethod
    @cache
    def arguments(cls) -> dict[str, Any]:
        """The arguments of a call after the picture, by name, each with its default."""
        signature = inspect.signature(getattr(cls, cls.call)).parameters.items()
        return {name: argument.default for name, argument in signature if argument.default is not argument.empty}

    @classmethod
    @cache
    def parameters(cls) -> dict[str, Parameter]:
        """Those of the arguments that people may choose; see `read_parameters`."""
        return read_parameters(getattr(cls, cls.call))

    def __call__(self, input_image: Picture | None = None, *args: Any, **parameters: Any) -> Any:
        """The map of a picture; see the module's text for the two conventions and `detect` or `decode` for the arguments.

        Args:
            input_image: (H, W), (H, W, 3) or (H, W, 4), uint8, RGB; a PIL picture; or a path.
            detect_resolution, image_resolution, output_type ("pil" or "np"): controlnet_aux's; see `aux_map` for more.

        Returns:
            (H, W) or (H, W, 3), uint8, or several; in controlnet_aux's way a PIL picture or (h, w, 3), uint8.
        """
        for other_name in ("img", "oriImg"):
            input_image = parameters.pop(other_name, None) if input_image is None else input_image
        known = self.arguments()
        given = dict(zip(known, args, strict=False))
        if len(args) > len(known) or given.keys() & parameters.keys():
            raise TypeError(f"{type(self).__name__} takes {', '.join(known) or 'nothing'} after the picture, each once")
        parameters |= given
        if not self.pretrained and not isinstance(input_image, Image.Image) and parameters.keys() <= known.keys():
            return self.detect(as_array(input_image), **parameters)

        detect_resolution, image_resolution = (
            parameters.pop(f"{name}_resolution", 512) for name in ("detect", "image")
        )
        output_type = parameters.pop(
            "output_type", parameters.pop("return_pil", None)
        )  # the latter is deprecated, and in use
        if output_type is None:
            output_type = self.output_type or ("np" if isinstance(input_image, np.ndarray) else "pil")
        if output_type not in ("pil", "np", True, False):
            raise ValueError(f"output_type must be pil or np, got {output_type!r}")
        view = resize_image(HWC3(as_array(input_image)), detect_resolution)
        found = self.aux_map(view, resized_shape(*view.shape[:2], image_resolution), **parameters)
        if output_type in ("np", False):
            return found
        return tuple(map(Image.fromarray, found)) if isinstance(found, tuple) else Image.fromarray(found)

    def aux_map(self, view: np.ndarray, size: tuple[int, int], **parameters: Any) -> Maps:
        """What controlnet_aux gives for a picture (H, W, 3) at the detector's size: (*size, 3), uint8; maybe several."""
        found = self.detect(view, **parameters)
        if isinstance(found, tuple):
            return tuple(resize(HWC3(one), size) for one in found)
        return resize(HWC3(found), size)
