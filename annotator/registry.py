"""All conditions by name: detectors, their parameters, the sizes they work at, and how a map becomes a model's hint.

ControlNet 1.0 and 1.1 treat some conditions differently; `version` chooses ("1.0" where a condition has it, else
"1.1"). In 1.0, Canny and scribbles work on the picture at its final size and white lines on black are shown inverted;
in 1.1 Canny has a size of its own too, every map is resized linearly and shown as it is.

    from annotator import list_annotators, load
    canny = load("canny")
    result = canny.make_hint(image, resolution=512, low_threshold=80)
    result.hint, result.shown
"""

import importlib
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import cv2
import numpy as np

from annotator.inpaint import inpaint_hint
from annotator.scribble import fake_scribble, first_channel
from annotator.util import HWC3, check_image, resize_image

VERSIONS = ("1.0", "1.1")
INTERPOLATIONS = {"nearest": cv2.INTER_NEAREST, "linear": cv2.INTER_LINEAR}

# How a user's array becomes the picture that the detector gets.
INPUTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "picture": HWC3,
    "mask": lambda image: HWC3(first_channel(image)),
    "rgba": lambda image: image if check_image(image).shape[2:] == (4,) else HWC3(image),
}
# What a map undergoes at the size of the result, before anything else.
FINISHES: dict[str, Callable[[np.ndarray], np.ndarray]] = {"map": lambda image: image, "fake scribble": fake_scribble}
# How a uint8 map becomes the float32 hint.
HINTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "map": lambda image: image.astype(np.float32) / 255.0,
    "inverted": lambda image: 1.0 - image.astype(np.float32) / 255.0,
    "channels reversed": lambda image: np.ascontiguousarray(image[:, :, ::-1]).astype(np.float32) / 255.0,
    "hole": lambda image: inpaint_hint(image[:, :, :3], image[:, :, 3] == 0),
}
# How a uint8 map is shown to people.
SHOWN: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "map": lambda image: image,
    "inverted": lambda image: 255 - image,
    "dilated, inverted": lambda image: 255 - cv2.dilate(image, np.ones((3, 3), dtype=np.uint8)),
    "hole": lambda image: np.where(image[:, :, 3:] == 0, 0, image[:, :, :3]).astype(np.uint8),
}


@dataclass(frozen=True)
class Parameter:
    """One argument of a detector's call.

    Attributes:
        default: its type is the parameter's; None stands for an int that may be left out.
        minimum, maximum: what is allowed, both included; None for a bool.
    """

    name: str
    default: bool | int | float | None
    minimum: float | None = None
    maximum: float | None = None
    help: str = ""

    @property
    def kind(self) -> type:
        return int if self.default is None else type(self.default)

    def check(self, value: object) -> object:
        """`value` in the parameter's type.

        Raises:
            ValueError: if it is of another kind or out of range.
        """
        if self.default is None and value is None:
            return None
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


@dataclass(frozen=True)
class Hint:
    """A condition, ready for a model.

    Attributes:
        hint: (H, W, 3), float32, 0..1 (and -1 in the hole of an inpainting hint): what the ControlNet takes.
        shown: (H, W, 3), uint8: what people are shown.
        map: (H, W, 3), uint8 (inpainting: 4 channels): the detector's map at this size.
        picture: (H, W, 3), uint8: the picture that the hint belongs to, at this size.
    """

    hint: np.ndarray
    shown: np.ndarray
    map: np.ndarray
    picture: np.ndarray

    @property
    def source(self) -> np.ndarray:
        """The hint as an image file of a training set holds it: (H, W, 3), uint8, `hint` times 255."""
        return np.rint(self.hint.clip(0.0, 1.0) * 255.0).astype(np.uint8)


@dataclass(frozen=True)
class AnnotatorInfo:
    """What is to be known about a condition without loading anything.

    Attributes:
        detector: dotted path of the class, imported when it is loaded.
        network: whether it needs weights.
        parameters: arguments of the detector's call, with the defaults of the reference's apps.
        works_at: "detect" (the picture at `detect_resolution`), "image" (at its final size), "input" (as it was given).
        detect_resolution: shorter side of what the detector is given, in pixels; None unless `works_at` is "detect".
        interpolation: how the map is resized to the picture, "linear" or "nearest".
        hint, shown, finish, takes: keys of `HINTS`, `SHOWN`, `FINISHES` and `INPUTS`.
        options: arguments of the detector's constructor besides device and weights.
        output: which of the detector's results is the map, where it gives several.
    """

    name: str
    version: str
    title: str
    detector: str
    network: bool = True
    parameters: tuple[Parameter, ...] = ()
    works_at: str = "detect"
    detect_resolution: int | None = 512
    interpolation: str = "linear"
    hint: str = "map"
    shown: str = "map"
    finish: str = "map"
    takes: str = "picture"
    options: dict[str, Any] = field(default_factory=dict)
    output: int | None = None

    @property
    def defaults(self) -> dict[str, bool | int | float | None]:
        """Parameters with their default values."""
        return {parameter.name: parameter.default for parameter in self.parameters}

    def check_parameters(self, values: dict[str, object]) -> dict[str, object]:
        """All parameters, `values` before defaults.

        Raises:
            ValueError: for an unknown parameter, or a value out of range.
        """
        unknown = sorted(set(values) - set(self.defaults))
        if unknown:
            known = ", ".join(self.defaults) or "none"
            raise ValueError(f"{self.name} {self.version} has no parameter {', '.join(unknown)}; it has: {known}")
        return {p.name: p.check(values.get(p.name, p.default)) for p in self.parameters}

    def to_hint(self, map: np.ndarray) -> np.ndarray:
        """A detector's map, or one from elsewhere in the same convention, as the model's hint: (H, W, 3), float32."""
        return HINTS[self.hint](INPUTS["rgba"](map) if self.hint == "hole" else HWC3(map))

    def to_shown(self, map: np.ndarray) -> np.ndarray:
        """The map as people are shown it: (H, W, 3), uint8."""
        return SHOWN[self.shown](INPUTS["rgba"](map) if self.hint == "hole" else HWC3(map))


class Annotator:
    """A loaded condition: its facts, its detector, and the way from a picture to a hint.

    Attributes:
        info: the facts.
        detector: the detector itself, for calls with arguments that only it knows.
    """

    def __init__(self, info: AnnotatorInfo, device: object = None, weights: str | os.PathLike | None = None) -> None:
        module, _, name = info.detector.rpartition(".")
        self.info = info
        self.detector = getattr(importlib.import_module(module), name)(device=device, weights=weights, **info.options)

    def __call__(self, image: np.ndarray, **parameters: object) -> np.ndarray:
        """The detector's uint8 map of `image`, at the size of `image`, as the detector gives it."""
        result = self.detector(image, **self.info.check_parameters(parameters))
        return result if self.info.output is None else result[self.info.output]

    def make_hint(
        self,
        image: np.ndarray,
        resolution: int | None = 512,
        detect_resolution: int | None = None,
        picture: np.ndarray | None = None,
        **parameters: object,
    ) -> Hint:
        """A picture's condition, with the same steps as in the reference's apps.

        Args:
            image: (H, W), (H, W, 3) or RGBA, uint8.
            resolution: shorter side of the result (see `annotator.util.resize_image`); None keeps the size of `image`.
            detect_resolution: shorter side of what the detector sees, where it has a size of its own.
            picture: `image` at the size of the result, where the caller has resized it; then `resolution` has no say.
            parameters: the detector's, see `info.parameters`.

        Raises:
            ValueError: for what is no picture, and parameters out of range.
        """
        info = self.info
        if detect_resolution is not None and info.works_at != "detect":
            raise ValueError(f"{info.name} {info.version} works on the picture itself and takes no detect_resolution")
        image = INPUTS[info.takes](image)
        if picture is not None:
            picture = INPUTS[info.takes](picture)
        else:
            picture = image if resolution is None else resize_image(image, resolution)
        if info.works_at == "detect":
            view = resize_image(image, info.detect_resolution if detect_resolution is None else detect_resolution)
        else:
            view = picture if info.works_at == "image" else image
        found = self(view, **parameters)
        found = found if found.ndim == 3 and found.shape[2] == 4 else HWC3(found)
        height, width = picture.shape[:2]
        if found.shape[:2] != (height, width):
            found = cv2.resize(found, (width, height), interpolation=INTERPOLATIONS[info.interpolation])
        found = FINISHES[info.finish](found)
        return Hint(info.to_hint(found), info.to_shown(found), found, picture[:, :, :3])


HYSTERESIS = (
    Parameter("low_threshold", 100, 1, 255, "gradient above which a pixel continues an edge"),
    Parameter("high_threshold", 200, 1, 255, "gradient above which a pixel starts an edge"),
)
LINES = (
    Parameter("thr_v", 0.1, 0.01, 2.0, "score above which a line is kept"),
    Parameter("thr_d", 0.1, 0.01, 20.0, "shortest line, in pixels of the network's map"),
)
SAFE = Parameter("safe", False, help="quantise the map to three levels, so that it hides less of the picture")
COARSE = Parameter("coarse", False, help="fewer, bolder lines (sk_model2.pth)")
SHUFFLE = (
    Parameter("f", 256, 1, 4096, "size of the bumps of the flow, in pixels"),
    Parameter("seed", None, 0, 2**32 - 1, "makes the shuffle repeatable"),
)
BLUR = Parameter("blur", 5.0, 0.0, 64.0, "sigma that softens the hole's border, in pixels")

NORMALS = (
    Parameter("a", 2 * math.pi, 0.1, 20.0, "what z counts against the slopes; larger is flatter"),
    Parameter("bg_th", 0.4, 0.0, 1.0, "depth below which all is background"),
)
HAND = Parameter("hand", False, help="draw hands too")
HAND_AND_FACE = Parameter("hand_and_face", False, help="draw hands and faces too")

_AT_IMAGE_SIZE = {"network": False, "works_at": "image", "detect_resolution": None}
# Name: title, class below `annotator`, what differs from the usual.
_V10: dict[str, tuple[str, str, dict[str, Any]]] = {
    "canny": ("Canny edges", "canny.CannyDetector", {**_AT_IMAGE_SIZE, "shown": "inverted", "parameters": HYSTERESIS}),
    "mlsd": (
        "straight lines (M-LSD)",
        "mlsd.MLSDdetector",
        {"interpolation": "nearest", "shown": "dilated, inverted", "parameters": LINES},
    ),
    "hed": ("soft edges (HED)", "hed.HEDdetector", {}),
    "scribble": (
        "a user's scribble, dark on light", "scribble.ScribbleDetector", {**_AT_IMAGE_SIZE, "shown": "inverted"}
    ),
    "scribble_interactive": (
        "a drawn mask, light on dark",
        "scribble.InteractiveScribbleDetector",
        {**_AT_IMAGE_SIZE, "shown": "inverted", "takes": "mask"},
    ),
    "fake_scribble": (
        "scribble made from HED edges", "hed.HEDdetector", {"shown": "inverted", "finish": "fake scribble"}
    ),
    "openpose": (
        "human pose (OpenPose)",
        "openpose.OpenposeDetector",
        {"interpolation": "nearest", "parameters": (HAND,), "options": {"version": "1.0"}, "output": 0},
    ),
    "seg": ("semantic segmentation (UniFormer)", "uniformer.UniformerDetector", {"interpolation": "nearest"}),
    "depth": ("depth (MiDaS)", "midas.MidasDetector", {"detect_resolution": 384, "output": 0}),
    "normal": (
        "normals from depth (MiDaS)",
        "midas.MidasDetector",
        {"detect_resolution": 384, "hint": "channels reversed", "parameters": NORMALS, "output": 1},
    ),
}  # fmt: skip
_IN_BOTH: dict[str, dict[str, Any]] = {  # what 1.1 does otherwise, besides linear resizing and showing the map as it is
    "canny": {"works_at": "detect", "detect_resolution": 512},
    "mlsd": {},
    "hed": {"parameters": (SAFE,)},
    "scribble": {},
    "scribble_interactive": {},
    "fake_scribble": {},
    "openpose": {"parameters": (HAND_AND_FACE,), "options": {"version": "1.1"}, "output": None},
    "seg": {},
    "depth": {"detect_resolution": 384},
}
_V11_ONLY: dict[str, tuple[str, str, dict[str, Any]]] = {
    "fake_scribble_pidinet": (
        "scribble made from PiDiNet edges", "pidinet.PidiNetDetector", {"finish": "fake scribble"}
    ),
    "lineart": ("line art", "lineart.LineartDetector", {"hint": "inverted", "parameters": (COARSE,)}),
    "lineart_anime": ("anime line art", "lineart_anime.LineartAnimeDetector", {"hint": "inverted"}),
    "pidinet": ("soft edges (PiDiNet)", "pidinet.PidiNetDetector", {"parameters": (SAFE,)}),
    "normalbae": ("normals (NormalBae)", "normalbae.NormalBaeDetector", {}),
    "shuffle": ("shuffled content", "shuffle.ContentShuffleDetector", {"network": False, "parameters": SHUFFLE}),
    "tile": ("the picture itself", "tile.TileDetector", {**_AT_IMAGE_SIZE, "works_at": "input"}),
    "inpaint": (
        "the picture with a hole",
        "inpaint.InpaintDetector",
        {**_AT_IMAGE_SIZE, "hint": "hole", "shown": "hole", "takes": "rgba", "parameters": (BLUR,)},
    ),
}  # fmt: skip


def _build_registry() -> dict[tuple[str, str], AnnotatorInfo]:
    registry = {}
    for version, table in (("1.0", _V10), ("1.1", _V11_ONLY)):
        for name, (title, detector, facts) in table.items():
            registry[name, version] = AnnotatorInfo(name, version, title, f"annotator.{detector}", **facts)
    for name, facts in _IN_BOTH.items():
        changes = {"version": "1.1", "interpolation": "linear", "shown": "map"} | facts
        registry[name, "1.1"] = replace(registry[name, "1.0"], **changes)
    return registry


REGISTRY = _build_registry()


def list_annotators(version: str | None = None) -> list[str]:
    """Names of all conditions, or of those that a version of ControlNet has, in alphabetical order."""
    if version not in (None, *VERSIONS):
        raise ValueError(f"version must be one of {', '.join(VERSIONS)}, got {version!r}")
    return sorted({name for name, known in REGISTRY if version in (None, known)})


def describe(name: str, version: str | None = None) -> AnnotatorInfo:
    """Facts about a condition, in the first version that has it if none is named.

    Raises:
        ValueError: if there is no such condition, with those there are.
    """
    if name not in list_annotators():
        raise ValueError(f"no annotator {name!r}; there are: {', '.join(list_annotators())}")
    for candidate in VERSIONS if version is None else (version,):
        if (name, candidate) in REGISTRY:
            return REGISTRY[name, candidate]
    known = " and ".join(candidate for candidate in VERSIONS if (name, candidate) in REGISTRY)
    raise ValueError(f"{name} exists in version {known}, not in {version!r}")


def load(
    name: str, device: object = None, weights: str | os.PathLike | None = None, version: str | None = None
) -> Annotator:
    """The condition `name` (see `list_annotators`), its detector imported and its weights loaded.

    Args:
        device: where to compute; the best one of this machine if not given.
        weights: a weight file or a folder; see `annotator.weights.find_weights`.
        version: "1.0" or "1.1"; the first that has the condition if not given.

    Raises:
        ValueError: if there is no such condition.
        annotator.weights.WeightsError: if its weights cannot be found or read.
    """
    return Annotator(describe(name, version), device, weights)
