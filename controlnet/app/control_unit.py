"""One control of the Generate tab: a ControlNet, the condition it takes, the picture or drawing that this is made of, and when it acts."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np

from annotator.pictures import HWC3
from annotator.registry import list_annotators
from controlnet.app import conditions
from controlnet.app.conditions import READY, Chosen, MapOrigins, Origin, ParameterControls
from controlnet.app.context import Context
from controlnet.app.models import OWN, UNTRAINED
from controlnet.app.uploads import guard_editor, guard_picture

_CANVAS = 512  # pixels of an empty drawing
_BRUSH = 12
_FIRST = "canny"  # condition of a page that was just opened
_HEIGHT = 420
UNTRAINED_TEXT = (
    "**This control is untrained**: its hints change nothing. Train one under *Train*, or choose another file."
)


@dataclass(frozen=True)
class Control:
    """What a unit was set to.

    Attributes:
        hint: what the ControlNet takes, or None where the pipeline makes it with `annotator`.
        made: the map for the editor if it has just been made of the picture, None if it came from the editor.
    """

    network: str
    chosen: Chosen
    hint: np.ndarray | None
    annotator: Any
    made: np.ndarray | None
    strength: float
    start: float
    end: float
    guess_mode: bool


class ControlUnit:
    """The components of control number `number`, from 1."""

    def __init__(self, context: Context, number: int) -> None:
        self.context, self.number, self.origins = context, number, MapOrigins()
        base = context.catalogue.bases()[context.catalogue.default_base()]
        networks = self.networks(base)
        with gr.Row(equal_height=True):
            self.network = gr.Dropdown(networks, value=networks[0] if networks else None, label="ControlNet", scale=3)
            self.condition = gr.Dropdown(conditions.choices(ready=True), value=_FIRST, label="Condition", scale=4)
            self.on = gr.Checkbox(number == 1, label="Use it", scale=1, min_width=100)
        self.note = gr.Markdown(self.note_for(self.network.value, _FIRST), elem_classes="note")
        with gr.Row(equal_height=True):
            self.picture = guard_picture(
                gr.Image(
                    label="Picture", type="numpy", height=_HEIGHT, sources=["upload", "clipboard"], image_mode=None,
                    elem_id=f"picture-{number}", buttons=[],
                )
            )  # fmt: skip
            self.map = guard_editor(
                gr.ImageEditor(
                    label="Map", type="numpy", height=_HEIGHT,
                    format="png", sources=["upload", "clipboard"], transforms=(), layers=False, buttons=[],
                    brush=gr.Brush(
                        default_size=_BRUSH, colors=["#ffffff", "#000000"], default_color="#ffffff", color_mode="defaults"
                    ),
                    canvas_size=(_CANVAS, _CANVAS), elem_id=f"map-{number}",
                )
            )  # fmt: skip
        with gr.Row():
            self.example = gr.Button("Example picture", size="sm")
            self.make = gr.Button("Make the map", size="sm", variant="secondary")
            self.blank = gr.Button("Empty drawing", size="sm")
        with gr.Accordion("How the map is made", open=False):
            with gr.Row():
                self.parameters = ParameterControls(_FIRST)
        with gr.Row():
            self.strength = gr.Slider(0, 2, 1, step=0.05, label="Strength")
            self.start = gr.Slider(0, 1, 0, step=0.05, label="Acts from")
            self.end = gr.Slider(0, 1, 1, step=0.05, label="Acts until")
        self.guess_mode = gr.Checkbox(False, label="Guess mode", info="the map alone says what to paint: for no prompt")

    @property
    def components(self) -> list[gr.components.Component]:
        """All that `read` looks at."""
        own = [self.on, self.network, self.condition, self.picture, self.map]
        return [*own, *self.parameters.components, self.strength, self.start, self.end, self.guess_mode]

    def networks(self, base: Path) -> list[str]:
        """ControlNets that can be chosen for a base."""
        catalogue = self.context.catalogue
        if catalogue.has_control(base):
            return [OWN, *catalogue.controls(base)]
        return [*catalogue.controls(base), *([UNTRAINED] if self.number == 1 else [])]

    def note_for(self, network: str | None, condition: str) -> str:
        """What people should know about what they have chosen."""
        lines = [UNTRAINED_TEXT] if network == UNTRAINED else []
        lines += ["There is no trained ControlNet for this control yet."] if network is None else []
        if condition == "inpaint":
            lines.append("The picture and its hole come from *Start from a picture* below: paint the hole there.")
        return "  \n".join([*lines, *filter(None, [conditions.needs(condition)])])

    def settings_for(
        self, name: str, network: str | None, version: str | None = None, values: Mapping[str, Any] | None = None
    ) -> dict[Any, Any]:
        """Updates for a condition: its parameters, with `values` before defaults, and what people should know about it."""
        updates = dict(zip(self.parameters.components, self.parameters.show(name, version, values), strict=True))
        return {**updates, self.note: self.note_for(network, name)}

    def connect(self, resolution: gr.Slider, start_editor: gr.ImageEditor) -> None:
        """Let the components answer each other."""
        listen, shown = self.context.listen, self.parameters.components
        quick = {"show_progress": "hidden", "queue": False}

        def on_condition(data: dict[Any, Any], version: str | None = None) -> dict[Any, Any]:
            updates = self.settings_for(data[self.condition], data[self.network], version)
            return updates | self._without_stale_map(data)

        def on_version(data: dict[Any, Any]) -> dict[Any, Any]:
            return on_condition(data, data[self.parameters.version])

        def on_network(data: dict[Any, Any]) -> dict[Any, Any]:
            name = _condition_in(data[self.network])
            if name is None or name == data[self.condition]:
                return {self.note: self.note_for(data[self.network], data[self.condition])}
            return {
                self.condition: name,
                **self.settings_for(name, data[self.network]),
                **self._without_stale_map(data),
            }

        def draw(network: str | None) -> dict[Any, Any]:
            ground = np.zeros((_CANVAS, _CANVAS, 3), np.uint8)
            return {self.map: ground, self.picture: None, self.condition: READY, **self.settings_for(READY, network)}

        watched = {self.condition, self.network, self.parameters.version, self.picture}
        outputs = [*shown, self.note, self.map]
        # Not `input`, which lists also send when they are left unchanged.
        listen(self.condition.select, on_condition, watched, outputs, **quick)
        listen(self.parameters.version.select, on_version, watched, outputs, **quick)
        listen(self.network.select, on_network, watched, [*outputs, self.condition], **quick)
        for component in shown:
            if component not in (self.parameters.condition, self.parameters.version):
                changed = component.select if isinstance(component, gr.Dropdown) else component.input
                listen(changed, self._without_stale_map, {self.picture}, [self.map], **quick)
        listen(self.picture.upload, lambda: None, None, self.map, **quick)
        listen(self.blank.click, draw, self.network, [*outputs, self.picture, self.condition], **quick)
        listen(
            self.make.click, lambda data: {self.map: self.make_map(data, resolution, start_editor)},
            {*self.components, resolution, start_editor}, [self.map], concurrency_id="detect", concurrency_limit=2,
        )  # fmt: skip

    def _without_stale_map(self, data: Mapping[Any, Any]) -> dict[Any, Any]:
        """A map that was made of the picture does not belong to other settings; a drawing stays."""
        return {self.map: None} if data[self.picture] is not None else {}

    def read(self, data: Mapping[Any, Any], resolution: gr.Slider, start_editor: gr.ImageEditor) -> Control:
        """What the components hold; the map is made where there is none yet, or one of other settings.

        Raises:
            ValueError: neither a picture nor a map was given.
        """
        chosen = self.parameters.read(data[self.condition], data)
        acts = data[self.strength], data[self.start], data[self.end], data[self.guess_mode]
        if not data[self.network]:
            raise ValueError(
                f"control {self.number} has no ControlNet: train one under Train, or do not use this control"
            )
        if chosen.name == "inpaint":
            annotator = self.context.detectors.get(conditions.record("inpaint"))
            return Control(data[self.network], chosen, None, annotator, None, *acts)
        map, made = drawn(data[self.map]), None
        if map is None or self._is_stale(data, resolution):
            map = made = self.make_map(data, resolution, start_editor)
        hint = chosen.hint_of(map, int(data[resolution]))
        return Control(data[self.network], chosen, hint, None, made, *acts)

    def _origin(self, data: Mapping[Any, Any], resolution: gr.Slider) -> Origin:
        """What a map would be made of now."""
        chosen = self.parameters.read(data[self.condition], data)
        return Origin(chosen, conditions.digest(data[self.picture]), int(data[resolution]))

    def _is_stale(self, data: Mapping[Any, Any], resolution: gr.Slider) -> bool:
        """Whether the map was made of a picture, but of another one, or by other settings.

        One that people have drawn on stays when only the resolution has changed.
        """
        ground = drawn({"composite": data[self.map]["background"]})
        if data[self.picture] is None or ground is None:
            return False
        known, now = self.origins.of(ground), self._origin(data, resolution)
        if _painted(data[self.map], ground.shape[:2]).any():
            known = [replace(origin, resolution=now.resolution) for origin in known]
        return bool(known) and now not in known

    def make_map(self, data: Mapping[Any, Any], resolution: gr.Slider, start_editor: gr.ImageEditor) -> np.ndarray:
        """The map of the picture at the resolution of the result, for the editor.

        Raises:
            ValueError: there is no picture, or no hole where the condition needs one.
        """
        map = conditions.for_editor(self._map(data, resolution, start_editor))
        if data[self.condition] != "inpaint":
            self.origins.add(map, self._origin(data, resolution))
        return map

    def _map(self, data: Mapping[Any, Any], resolution: gr.Slider, start_editor: gr.ImageEditor) -> np.ndarray:
        chosen, picture, mask = self.parameters.read(data[self.condition], data), data[self.picture], None
        if chosen.name == "inpaint":
            picture, mask = start_of(data[start_editor])
            if mask is None:
                raise ValueError("paint the hole first, under Start from a picture")
        if picture is None:
            raise ValueError(f"control {self.number} has no picture: upload one, or draw the map")
        if chosen.name == READY:
            return HWC3(picture)
        hint = self.context.detectors.make_hint(chosen, picture, int(data[resolution]), mask)
        return hint.shown if chosen.name == "inpaint" else hint.map


def drawn(value: Mapping[str, Any] | None) -> np.ndarray | None:
    """What is to be seen in an editor, uint8 (H, W, 3); None where nothing is."""
    picture = value["composite"] if value else None
    if picture is None:
        return None
    if picture.ndim == 3 and picture.shape[2] == 4:
        if not picture[:, :, 3].any():
            return None
        alpha = picture[:, :, 3:].astype(np.float32) / 255  # what is transparent is black, as the ground of maps is
        return np.rint(picture[:, :, :3] * alpha).astype(np.uint8)
    return HWC3(picture)


def start_of(value: Mapping[str, Any] | None) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Picture (H, W, 3) and painted mask (H, W), uint8, of an editor; None for what is not there."""
    background = value["background"] if value else None
    if (
        value is None
        or background is None
        or (background.ndim == 3 and background.shape[2] == 4 and not background[:, :, 3].any())
    ):
        return None, None
    picture = HWC3(background)
    mask = _painted(value, picture.shape[:2])
    return picture, mask if mask.any() else None


def _painted(value: Mapping[str, Any], size: tuple[int, int]) -> np.ndarray:
    """Where people have painted in an editor, uint8 (H, W), 255 there and else 0."""
    mask = np.zeros(size, np.uint8)
    for layer in value.get("layers", ()):
        if layer.ndim == 3 and layer.shape[2] == 4 and layer.shape[:2] == mask.shape:
            mask[layer[:, :, 3] > 0] = 255
    return mask


def _condition_in(name: str | None) -> str | None:
    """The condition that a file is named after, such as `canny` of `control_v11p_sd15_canny.pth`; the longest that fits."""
    stem = Path(name or "").stem
    fitting = [known for known in list_annotators() if stem.endswith(f"_{known}")]
    return max(fitting, key=len, default=None)
