"""Conditions on the page: their names, their parameters as controls that the registry's records fill, and the detectors in memory."""

import hashlib
import threading
from collections import OrderedDict, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import cv2
import gradio as gr
import numpy as np

from annotator.detector import VERSIONS, Parameter
from annotator.network import NetworkDetector
from annotator.options import versions_of
from annotator.pictures import HWC3, resize, resized_shape
from annotator.registry import CONDITIONS, Annotator, AnnotatorInfo, Hint, describe, list_annotators, load, scale

READY = "ready"  # no condition: the map is drawn, or uploaded as it is
_MOST_DETECTORS = 2
_NEWER = VERSIONS[1]
_SMALLEST_EDITOR = 512  # pixels of the longer side of a map in an editor; smaller ones are enlarged
_REMEMBERED = 1000  # maps
_MOST_PIXELS = 2**25  # of a map: 8192 x 4096, for the greatest `--largest`


def choices(ready: bool = False) -> list[tuple[str, str]]:
    """Titles and names of all conditions; first those that need no weights."""
    records = sorted((describe(name) for name in list_annotators()), key=lambda info: (info.network, info.name))
    listed = [(f"{info.name}: {info.title}{' (needs weights)' if info.network else ''}", info.name) for info in records]
    return [("a ready map or drawing", READY), *listed] if ready else listed


def versions(name: str) -> list[str]:
    return [info.version for info in versions_of(name)]


def record(name: str, version: str | None = None) -> AnnotatorInfo:
    """The record of a condition, in a version if it has that."""
    return describe(name, version if version in versions(name) else None)


def needs(name: str) -> str:
    """For people: which file a condition needs, where it is published, and where it belongs; nothing if it needs none."""
    if name == READY or not describe(name).network:
        return ""
    info, detector = describe(name), describe(name).detector_class
    address = getattr(detector, "repository", NetworkDetector.repository)
    place = f" from `huggingface.co/{address}`" if "/" not in info.weights else " of the Hugging Face hub"
    extra = f" It also needs `pip install 'controlnet[{info.extra}]'`." if info.extra else ""
    return (
        f"Needs **{info.weights}**{place}. Put it into `annotator/ckpts`, or into the folder that the variable "
        f"`ANNOTATOR_CKPTS` names; otherwise it is fetched once, if this server has a network.{extra}"
    )


class Detectors:
    """The detectors in memory; the one that was used longest ago goes."""

    def __init__(self, device: Any = None) -> None:
        self.device = device
        self._lock = threading.RLock()
        self._loaded: OrderedDict[tuple[str, str], Annotator] = OrderedDict()

    def get(self, info: AnnotatorInfo) -> Annotator:
        """The loaded condition.

        Raises:
            ValueError: its weights cannot be had; the message says which file, from where and where to.
        """
        key = (info.name, info.version)
        with self._lock:
            if key not in self._loaded:
                while len(self._loaded) >= _MOST_DETECTORS:
                    self._loaded.popitem(last=False)
                self._loaded[key] = load(info.name, self.device, version=info.version)
            self._loaded.move_to_end(key)
            return self._loaded[key]

    def make_hint(
        self, chosen: "Chosen", picture: np.ndarray, resolution: int | None, mask: np.ndarray | None = None
    ) -> Hint:
        """The condition of a picture (H, W[, C]); `resolution` is the shorter side of the result, None for the picture's size."""
        info = record(chosen.name, chosen.version)
        detect_resolution = chosen.detect_resolution if info.works_at == "detect" else None
        for side in filter(None, (resolution, detect_resolution)):
            check_result(picture, side)
        options = {"mask": mask} if mask is not None else {}
        with self._lock:  # a detector's network serves one picture at a time
            annotator = self.get(info)
            return annotator.make_hint(picture, resolution, detect_resolution, **options, **chosen.parameters)


@dataclass(frozen=True)
class Chosen:
    """A condition as it was chosen, with its parameters."""

    name: str
    version: str | None = None
    detect_resolution: int | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)

    def hint_of(self, map: np.ndarray, resolution: int) -> np.ndarray:
        """A map (H, W, 3), uint8, as what a ControlNet takes: float32, its shorter side `resolution`."""
        check_result(map, resolution)
        height, width = map.shape[:2]
        size = resized_shape(height, width, resolution)
        # A map that was enlarged for the editor by a whole number comes back exactly.
        small = map if (height, width) == size else resize(map, size, cv2.INTER_AREA)
        return (scale if self.name == READY else record(self.name, self.version).to_hint)(small)


def check_result(picture: np.ndarray, resolution: int) -> None:
    """See, before anything is made, that a picture whose shorter side becomes `resolution` does not become too large, as of a thin strip.

    Raises:
        ValueError: it does.
    """
    (height, width), longer = picture.shape[:2], max(picture.shape[:2]) * resolution / min(picture.shape[:2])
    if resolution * longer > _MOST_PIXELS:
        raise ValueError(
            f"this picture of {width} x {height} pixels would become one of {longer:,.0f} x {resolution:,}: too large, "
            f"{_MOST_PIXELS:,} pixels are allowed; choose a lower resolution, or a picture that is less thin"
        )


def for_editor(map: np.ndarray) -> np.ndarray:
    """A map at a size that people can draw on: each pixel a square of several, so that nothing is lost."""
    times = max(1, _SMALLEST_EDITOR // max(map.shape[:2]))
    return HWC3(map).repeat(times, axis=0).repeat(times, axis=1)


def from_editor(picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A picture of `size` (height, width) that was enlarged for the editor as it was before; any other one as it is."""
    small = picture[:: max(1, picture.shape[0] // size[0]), :: max(1, picture.shape[1] // size[1])]
    return small if np.array_equal(for_editor(small), picture) else picture


def digest(picture: np.ndarray) -> str:
    """By which a picture is recognised."""
    return hashlib.sha256(f"{picture.shape} ".encode() + np.ascontiguousarray(picture).tobytes()).hexdigest()


@dataclass(frozen=True)
class Origin:
    """What a map was made of: the condition with its parameters, the digest of the picture, and the resolution."""

    chosen: Chosen
    picture: str
    resolution: int


class MapOrigins:
    """The origins of the newest maps, found by the map's pixels.

    A page may still show the map of the settings before when its visitor is quick, or get it late. Pixels are all that comes back
    from a browser, and by them such a map is told from the right one, and from a drawing, whose pixels are not known here.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: deque[tuple[str, Origin]] = deque(maxlen=_REMEMBERED)

    def add(self, map: np.ndarray, origin: Origin) -> None:
        with self._lock:
            self._known.append((digest(map), origin))

    def of(self, map: np.ndarray) -> list[Origin]:
        """What a map can have been made of; nothing for a drawing."""
        found = digest(map)
        with self._lock:
            return [origin for known, origin in self._known if known == found]


class ParameterControls:
    """Controls for the parameters of any condition: as many of each kind as one condition needs, shown and named as it wants."""

    def __init__(self, name: str) -> None:
        most = {kind: max(len(_of_kind(info, kind)) for info in CONDITIONS) for kind in _KINDS}
        condition, version, detect, *slots = self._settings(name, None, {}, most)
        # Whose values the other components hold: the list of conditions in the browser may be ahead of them.
        self.condition = gr.Textbox(**condition, visible="hidden")
        self.version = gr.Radio(
            **{"choices": list(VERSIONS), **version}, label="ControlNet version", info="whose conventions hold"
        )
        self.detect_resolution = gr.Slider(
            64, 2048, step=64, label="Detect at", info="pixels of the shorter side of what the detector sees", **detect
        )
        made = iter(slots)
        self.slots = {
            kind: [make(**next(made), interactive=True) for _ in range(most[kind])] for kind, make in _KINDS.items()
        }

    @property
    def components(self) -> list[Any]:
        """Sliders, lists and boxes, each with the event `input`, after the name of the condition that they are set for."""
        slots = [slot for slots in self.slots.values() for slot in slots]
        return [self.condition, self.version, self.detect_resolution, *slots]

    def show(self, name: str, version: str | None, values: Mapping[str, Any] | None = None) -> list[Any]:
        """Updates of all components for a condition; `values` before defaults."""
        counts = {kind: len(slots) for kind, slots in self.slots.items()}
        return [gr.update(**settings) for settings in self._settings(name, version, values or {}, counts)]

    @staticmethod
    def _settings(
        name: str, version: str | None, values: Mapping[str, Any], counts: Mapping[str, int]
    ) -> list[dict[str, Any]]:
        """What each of the components is set to."""
        hidden: dict[str, Any] = {"visible": False}
        if name == READY:
            return [{"value": READY}, *[hidden] * (2 + sum(counts.values()))]
        info, known = record(name, version), versions(name)
        found = {**info.defaults, **values}
        detect_resolution = found.get("detect_resolution") or info.detect_resolution or 512
        settings: list[dict[str, Any]] = [
            {"value": name},
            {"choices": known, "value": info.version, "visible": len(known) > 1},
            {"value": detect_resolution, "visible": info.works_at == "detect"},
        ]
        for kind, count in counts.items():
            parameters = _of_kind(info, kind)
            settings += [_about(parameter, found[parameter.name]) for parameter in parameters]
            settings += [hidden] * (count - len(parameters))
        return settings

    def read(self, name: str, data: Mapping[Any, Any]) -> Chosen:
        """What the components hold, for a condition; `data` is the values by component. Values of another condition are not used."""
        if name == READY:
            return Chosen(READY)
        if data[self.condition] != name:
            info = record(name)
            return Chosen(name, info.version, info.detect_resolution, info.defaults)
        info = record(name, data[self.version])
        parameters = {
            parameter.name: _typed(parameter, data[slot])
            for kind, slots in self.slots.items()
            for parameter, slot in zip(_of_kind(info, kind), slots, strict=False)
        }
        detects = info.works_at == "detect"
        detect_resolution = int(data[self.detect_resolution]) if detects else None
        return Chosen(name, info.version, detect_resolution, info.check_parameters(parameters))


# What shows a parameter: a number that may be left out has no slider, as that would always hold some number.
_KINDS = {"slider": gr.Slider, "number": gr.Number, "switch": gr.Checkbox, "choice": gr.Dropdown}


def _kind(parameter: Parameter) -> str:
    if parameter.kind is bool:
        return "switch"
    if parameter.kind is str:
        return "choice"
    return "number" if parameter.default is None else "slider"


def _of_kind(info: AnnotatorInfo, kind: str) -> list[Parameter]:
    return [parameter for parameter in info.parameters if _kind(parameter) == kind]


def _about(parameter: Parameter, value: Any) -> dict[str, Any]:
    """What a component is set to that shows a parameter."""
    kind = _kind(parameter)
    about = {"label": parameter.name, "info": parameter.help, "value": value, "visible": True}
    if kind == "choice":
        return {"choices": list(parameter.choices), **about}
    if kind == "switch":
        return about
    step = 1 if parameter.kind is int else 0.01
    return {"minimum": parameter.minimum, "maximum": parameter.maximum, "step": step, **about}


def _typed(parameter: Parameter, value: Any) -> Any:
    """A browser's number as the parameter's kind of number."""
    whole = parameter.kind is int and isinstance(value, float) and value == int(value)
    return int(value) if whole else value
