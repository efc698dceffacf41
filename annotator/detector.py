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

from annotator.pictures import HWC3, as_array, resize, resize_image, resized_shape

VERSIONS = ("1.0", "1.1")
VERSION_VARIABLE = "ANNOTATOR_VERSION"
# Of every call in controlnet_aux.
AUX_ARGUMENTS = ("detect_resolution", "image_resolution", "output_type", "return_pil")

_version: str | None = None


def use_version(version: str | None) -> None:
    """Choose the version of ControlNet that detectors follow when they are made without one; None takes the choice back.

    Without a choice it is that of the environment variable ANNOTATOR_VERSION, else 1.0.
    """
    global _version
    _version = None if version is None else check_version(version)


def check_version(version: str | None = None) -> str:
    """`version` itself, or if it is None the chosen one; ValueError if ControlNet has no such version."""
    name = "version"
    if version is None:
        name, version = VERSION_VARIABLE, _version or os.environ.get(VERSION_VARIABLE) or VERSIONS[0]
    if version not in VERSIONS:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, VERSIONS))}, got {version!r}")
    return version


def first_line(err: BaseException) -> str:
    """The first line of an error's text, as `printable`; its class if it has no text."""
    return printable((str(err).strip().splitlines() or [type(err).__name__])[0])


def printable(text: str) -> str:
    """A text with `?` for control characters and lone surrogates, which names in files may hold and which act on the terminal."""
    return "".join(character if character.isprintable() else "?" for character in text)


def import_extra(module: str, extra: str) -> ModuleType:
    """An optional library; ImportError with the command that installs it if it is missing."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as err:
        raise ImportError(f"this detector needs {module}: pip install 'controlnet[{extra}]'") from err


def defaults_of(function: Callable[..., Any]) -> dict[str, Any]:
    """The arguments that may be left out, by name, each with its default."""
    arguments = inspect.signature(function).parameters.items()
    return {name: argument.default for name, argument in arguments if argument.default is not argument.empty}


@dataclass(frozen=True)
class Parameter:
    """An argument of a detector's call that people may choose."""

    name: str
    kind: type  # bool, int, float or str
    default: bool | int | float | str | None  # None for an argument that may be left out
    help: str
    minimum: Any = None  # of a number; included, as is the maximum
    maximum: Any = None
    choices: tuple[str, ...] = ()  # of a str

    def check(self, value: Any) -> Any:
        """`value` in the parameter's type; ValueError if it is of another kind or out of range."""
        if value is None and self.default is None:
            return None
        if self.kind is str:
            fits, wanted = value in self.choices, f"one of {', '.join(self.choices)}"
        elif self.kind is bool:
            fits, wanted = isinstance(value, (bool, np.bool_)), "True or False"
        else:
            whole = "a whole number" if self.kind is int else "a number"
            wanted = f"{whole} from {self.minimum:g} to {self.maximum:g}"
            fits = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
            fits = fits and self.minimum <= value <= self.maximum and self.kind(value) == value
        if not fits:
            raise ValueError(f"{self.name} must be {wanted}, got {value!r}")
        return self.kind(value)


class Detector:
    """Picture in, map out. A subclass gives `detect`, or is a `annotator.network.NetworkDetector`.

    Args:
        device: where to compute; the best one of this machine if not given.
        weights: a weight file, or a folder that holds the published one.
        version: of ControlNet, "1.0" or "1.1", where they differ; see `use_version` for the default.
    """

    extra: ClassVar[str] = ""  # of this package, that the detector needs
    call: ClassVar[str] = "detect"  # the method whose arguments, after the picture, are those of the detector
    # In controlnet_aux's way: "pil", or None for a result of the kind that was given; shorter side of the map, None for the picture's.
    output_type: ClassVar[str | None] = "pil"
    image_resolution: ClassVar[int | None] = 512
    pretrained = False  # made by `from_pretrained`

    def __init__(
        self, device: Any = None, weights: str | os.PathLike | None = None, version: str | None = None
    ) -> None:
        if weights is not None:
            raise ValueError(f"{type(self).__name__} needs no weights, got {weights}")
        if device is not None:
            from annotator.network import choose_device

            choose_device(device)  # which computes nothing here, but must exist
        self.version = check_version(version)

    def load(self, **parameters: Any) -> None:
        """Load what a call with these arguments needs and is not loaded yet; ValueError if it cannot be had."""

    def detect(self, image: np.ndarray, *args: Any, **parameters: Any) -> Any:
        """The map of a picture (H, W, C), uint8, at its size: (H, W) or (H, W, 3), uint8; or several."""
        raise NotImplementedError

    @classmethod
    @cache
    def arguments(cls) -> dict[str, Any]:
        """The arguments of a call after the picture, by name, each with its default."""
        return defaults_of(getattr(cls, cls.call))

    @classmethod
    @cache
    def parameters(cls) -> dict[str, Parameter]:
        """Those that are annotated with a range and a text, such as `Annotated[int, 1, 255, "what it is"]`, which people may choose.

        A bool has a text only, `Annotated[Literal["a", "b"], "what it is"]` is one of several words.
        """
        hints = get_type_hints(getattr(cls, cls.call), include_extras=True)
        parameters = {}
        for name, default in cls.arguments().items():
            if get_origin(hints.get(name)) is Annotated:
                kind, *limits, text = get_args(hints[name])
                choices = get_args(kind) if get_origin(kind) is Literal else ()
                kind = str if choices else next((part for part in get_args(kind) if part is not type(None)), kind)
                minimum, maximum = limits or (None, None)
                parameters[name] = Parameter(name, kind, default, text, minimum, maximum, choices)
        return parameters

    def __call__(self, input_image: Any = None, *args: Any, **parameters: Any) -> Any:
        """The map of a picture; see the module's text for the two conventions and `detect` or `decode` for the arguments.

        Args:
            input_image: (H, W), (H, W, 3) or (H, W, 4), uint8, RGB; a PIL picture; or a path.
            detect_resolution, image_resolution, output_type ("pil" or "np"): controlnet_aux's; see `aux_map` for more.

        Returns:
            (H, W) or (H, W, 3), uint8, or several; in controlnet_aux's way a PIL picture or (h, w, 3), uint8.
        """
        known = self.arguments()
        given = dict(zip(known, args, strict=False))
        if len(args) > len(known) or given.keys() & parameters.keys():
            raise TypeError(f"{type(self).__name__} takes {', '.join(known) or 'nothing'} after the picture, each once")
        parameters |= given
        takes = (*(known | defaults_of(self.aux_map)), *AUX_ARGUMENTS)
        if unknown := [name for name in parameters if name not in takes]:
            raise TypeError(f"{type(self).__name__} takes no {', '.join(unknown)}; it takes {', '.join(takes)}")
        image = as_array(input_image)
        if not self.pretrained and not isinstance(input_image, Image.Image) and parameters.keys() <= known.keys():
            return self.detect(image, **parameters)

        view = resize_image(HWC3(image), parameters.pop("detect_resolution", 512))
        resolution = parameters.pop("image_resolution", self.image_resolution)
        output_type = parameters.pop("output_type", None) or self.output_type
        if "return_pil" in parameters:  # its older name
            output_type = "pil" if parameters.pop("return_pil") else "np"
        if output_type is None:
            output_type = "np" if isinstance(input_image, np.ndarray) else "pil"
        if output_type not in ("pil", "np"):
            raise ValueError(f"output_type must be pil or np, got {output_type!r}")
        height, width = view.shape[:2]
        shape = image.shape[:2] if resolution is None else resized_shape(height, width, resolution)
        found = self.aux_map(view, shape, **parameters)
        if output_type == "np":
            return found
        return tuple(map(Image.fromarray, found)) if isinstance(found, tuple) else Image.fromarray(found)

    def aux_map(self, view: np.ndarray, size: tuple[int, int], *args: Any, **parameters: Any) -> Any:
        """What controlnet_aux gives for a picture (H, W, 3) at the detector's size: (*size, 3), uint8; maybe several."""
        found = self.detect(view, *args, **parameters)
        if isinstance(found, tuple):
            return tuple(resize(HWC3(one), size) for one in found)
        return resize(HWC3(found), size)
