"""The Generate tab: from a prompt, controls and perhaps a picture to new pictures, with previews, and a gallery to come back to."""

import html
import importlib.util
import json
import operator
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np

from annotator.pictures import read_image, resized_shape
from cldm.arguments import check_numbers, check_yes_or_no
from cldm.data.fill import PALETTES, draw_fill
from cldm.inputs import check_size
from cldm.pipeline import SAMPLER_NAMES, SAMPLERS
from cldm.prompts import ADDED_PROMPT, DEFAULT_PROMPT, NEGATIVE_PROMPT, NO_PROMPT
from cldm.results import Pictures
from controlnet.app import conditions
from controlnet.app.context import MODEL_QUEUE, Context
from controlnet.app.control_unit import Control, ControlUnit, start_of
from controlnet.app.files import choose
from controlnet.app.gallery import DAMAGED, Gallery, read_notes, visitor_key
from controlnet.app.sampling import Begun, Step, Stopped, sample
from controlnet.app.uploads import check_upload, guard_addresses, guard_editor

CONTROLS = 3
_MOST_PICTURES = 8
_RANDOM = -1  # as a seed
_LARGEST_SEED = 2**53 - 1  # browsers hold larger numbers without their last digits
_SECONDS = 20  # that a warning stays
_PREVIEW = 320  # pixels of a preview, at least
OWN_PROMPT, EMPTY, DEFAULT, AUTOMATIC = "your own", "none", "default", "automatic"
IMAGE_TO_IMAGE, INPAINTING = "image to image", "inpainting"
_DENOISE = {IMAGE_TO_IMAGE: 0.75, INPAINTING: 1.0}
_EXAMPLE = (7, 3)  # number and seed of the Fill picture that serves as an example


class GenerateTab:
    """The tab's components and what they do."""

    def __init__(self, context: Context, visitor: gr.BrowserState) -> None:
        self.context, self.visitor = context, visitor
        catalogue = context.catalogue
        first = catalogue.default_base()
        side = catalogue.side(catalogue.bases()[first])
        self.files = gr.State([])  # names of the pictures in the gallery
        self.selected = gr.State(None)
        with gr.Row():
            with gr.Column(scale=6, min_width=480):
                with gr.Row():
                    self.prompt = gr.Textbox(
                        label="Prompt",
                        placeholder="what the picture shows",
                        lines=2,
                        max_lines=6,
                        max_length=4000,
                        scale=5,
                    )
                    self.base = gr.Dropdown(list(catalogue.bases()), value=first, label="Base model", scale=3)
                with gr.Accordion("More about the prompt", open=False):
                    self.prompt_setting = gr.Radio(
                        [OWN_PROMPT, EMPTY, DEFAULT, AUTOMATIC], value=OWN_PROMPT, label="Prompt setting",
                        info=f'the paper\'s four: "default" is "{DEFAULT_PROMPT}", "automatic" describes a first picture made without one',
                    )  # fmt: skip
                    self.negative = gr.Textbox(
                        label="Negative prompt", lines=2, max_length=4000, info="what it shall not show"
                    )
                    self.add_words = gr.Checkbox(
                        False, label="Add the published apps' words", info=f'"{ADDED_PROMPT}", and a negative prompt'
                    )
                with gr.Tabs():
                    self.units = []
                    for number in range(1, CONTROLS + 1):
                        with gr.Tab(f"Control {number}", id=f"control-{number}", elem_id=f"control-tab-{number}"):
                            self.units.append(ControlUnit(context, number))
                with gr.Accordion(
                    "Start from a picture: image to image, inpainting", open=False, elem_id="start-section"
                ):
                    with gr.Row():
                        self.use = gr.Radio(list(_DENOISE), value=IMAGE_TO_IMAGE, label="Use it for")
                        self.denoise = gr.Slider(
                            0.05, 1, 0.75, step=0.05, label="Denoise", info="how much is made anew"
                        )
                    self.start_editor = guard_editor(
                        gr.ImageEditor(
                            label="Picture. For inpainting, paint over what shall be new", type="numpy", height=450,
                            format="png", sources=["upload", "clipboard"], transforms=(), layers=False, buttons=[],
                            brush=gr.Brush(default_size=40, colors=["#ffffff"], default_color="#ffffff", color_mode="fixed"),
                            elem_id="start-editor",
                        )
                    )  # fmt: skip
                with gr.Accordion("Sampling", open=True):
                    with gr.Row():
                        self.sampler = gr.Dropdown(_samplers(), value="ddim", label="Sampler")
                        self.seed = gr.Number(_RANDOM, label="Seed", precision=0, info="-1: a new one each time")
                    with gr.Row():
                        self.steps = gr.Slider(1, 150, 20, step=1, label="Steps")
                        self.guidance = gr.Slider(1, 30, _guidance(side), step=0.5, label="Guidance")
                        self.eta = gr.Slider(0, 1, 0, step=0.1, label="Eta of DDIM")
                    with gr.Row():
                        self.resolution = gr.Slider(
                            64, context.largest, min(side, context.largest), step=64, label="Shorter side in pixels"
                        )
                        self.count = gr.Slider(1, _MOST_PICTURES, 1, step=1, label="Pictures")
            with gr.Column(scale=4, min_width=360):
                with gr.Row():
                    self.generate = gr.Button("Generate", variant="primary", scale=3, elem_id="generate")
                    self.stop = gr.Button("Stop", variant="stop", scale=1, min_width=80, elem_id="stop")
                self.status = gr.HTML(_status("Opening ..."), elem_id="status")
                self.result = gr.Image(
                    label="Result",
                    height=420,
                    interactive=False,
                    buttons=["fullscreen"],
                    format="png",
                    elem_id="result",
                )
                self.gallery = gr.Gallery(
                    label="Your pictures, the newest first", columns=4,
                    fit_columns=False, height=250, object_fit="contain", allow_preview=True,
                    preview=False, interactive=False, buttons=["download"], elem_id="gallery",
                )  # fmt: skip
                with gr.Row():
                    self.load = gr.Button("Load its settings", size="sm", min_width=110, elem_id="load-settings")
                    self.reuse = gr.Button("Start from it", size="sm", min_width=110)
                    self.load_file = guard_addresses(
                        gr.UploadButton(
                            "Settings of a file", size="sm", min_width=110, file_types=[".png"], elem_id="load-file"
                        )
                    )
                self.details = gr.JSON(
                    label="Settings of the selected picture", visible=False, open=True, max_height=300
                )
        self._connect()

    def _connect(self) -> None:
        listen = self.context.listen
        quick = {"show_progress": "hidden", "queue": False}
        for unit in self.units:
            unit.connect(self.resolution, self.start_editor)
            outputs = [unit.picture, unit.map, unit.condition, self.prompt, unit.note, *unit.parameters.components]
            listen(
                unit.example.click,
                lambda network, unit=unit: self._example(unit, network),
                unit.network,
                outputs,
                **quick,
            )
        listen(self.use.input, _DENOISE.__getitem__, self.use, self.denoise, **quick)
        chosen = [self.resolution, self.guidance, *(part for unit in self.units for part in (unit.network, unit.note))]
        listen(self.base.select, self._on_base, {self.base, *(unit.condition for unit in self.units)}, chosen, **quick)
        generated = listen(
            self.generate.click, self._generate, {*self._settings(), self.visitor},
            [self.status, self.result, self.gallery, self.files, *(unit.map for unit in self.units)],
            show_progress_on=self.status, show_progress="minimal", concurrency_id=MODEL_QUEUE, concurrency_limit=1,
        )  # fmt: skip
        # Said in the browser itself: what the server says could come after the run's own "Stopped.", and would stay.
        self.stop.click(
            None, None, self.status, js=f"() => {json.dumps(_status('Stopping ...'))}", api_visibility="private"
        )
        # A run that waits for its turn is not known to `stops`: the queue itself has to let it go.
        listen(self.stop.click, self._stop, None, self.status, cancels=[generated], **quick)
        listen(
            generated.failure, lambda: _status("Stopped."), None, self.status, **quick
        )  # cancelled, or failed with a message
        listen(self.gallery.select, self._select, [self.files, self.visitor], [self.selected, self.details], **quick)
        inputs = [self.files, self.selected, self.visitor]
        restored = [component for component in self._settings() if component not in self._pictures()]
        restored += [unit.note for unit in self.units]
        hidden = {"show_progress": "hidden"}  # in the queue, as warnings do not get to the page without it
        listen(self.load.click, self._load_selected, inputs, restored, **hidden)
        listen(self.load_file.upload, self._load_file, self.load_file, restored, **hidden)
        listen(self.reuse.click, self._start_from, inputs, [self.start_editor, self.use, self.denoise], **quick)

    def connect_page(self, page: gr.Blocks, tab: gr.Tab) -> None:
        """Show the visitor's pictures when the page opens, and stop his runs when it closes or is loaded anew."""
        lists = [self.base, *(unit.network for unit in self.units)]
        outputs = [self.status, self.visitor, self.gallery, self.files, *lists]
        self.context.listen(page.load, self._open, {self.visitor, *lists}, outputs, show_progress="hidden")
        # What was trained or converted on another tab of the page can be chosen now.
        self.context.listen(tab.select, self._lists, {*lists}, lists, show_progress="hidden", queue=False)

        def leave(request: gr.Request) -> None:
            self.context.stops.set(request.session_hash or "")

        page.unload(leave)

    # -- what is chosen -------------------------------------------------------------------------------------

    def _pictures(self) -> list[gr.components.Component]:
        return [self.start_editor, *(part for unit in self.units for part in (unit.picture, unit.map))]

    def _settings(self) -> list[gr.components.Component]:
        own = [
            self.prompt, self.base, self.prompt_setting, self.negative, self.add_words, self.use, self.denoise, self.start_editor,
            self.sampler, self.steps, self.guidance, self.resolution, self.count, self.seed, self.eta,
        ]  # fmt: skip
        return [*own, *(component for unit in self.units for component in unit.components)]

    def _lists(self, data: Mapping[Any, Any]) -> dict[Any, Any]:
        """The lists of files as they are now; a choice that is still there stays."""
        bases = self.context.catalogue.bases()
        base = data[self.base] if data[self.base] in [*bases] else self.context.catalogue.default_base()
        updates = {self.base: gr.update(choices=list(bases), value=base)}
        for unit in self.units:
            networks = unit.networks(bases[base])
            kept = data[unit.network] if data[unit.network] in networks else next(iter(networks), None)
            updates[unit.network] = gr.update(choices=networks, value=kept)
        return updates

    def _on_base(self, data: Mapping[Any, Any]) -> dict[Any, Any]:
        path = choose(self.context.catalogue.bases(), data[self.base], "a base model")
        side = self.context.catalogue.side(path)
        updates: dict[Any, Any] = {self.resolution: min(side, self.context.largest), self.guidance: _guidance(side)}
        for unit in self.units:
            networks = unit.networks(path)
            chosen = next(iter(networks), None)
            updates[unit.network] = gr.update(choices=networks, value=chosen)
            updates[unit.note] = unit.note_for(chosen, data[unit.condition])
        return updates

    def _example(self, unit: ControlUnit, network: str | None) -> dict[Any, Any]:
        """A picture to try, for those who have none at hand."""
        index, seed = _EXAMPLE
        drawn = draw_fill(index, 512, seed, PALETTES["clear"])
        shown = unit.settings_for("canny", network)
        return {unit.picture: drawn.target, unit.map: None, unit.condition: "canny", self.prompt: drawn.prompt, **shown}

    def _arguments(self, data: Mapping[Any, Any]) -> tuple[dict[str, Any], list[Control]]:
        """Arguments of the pipeline's call, and the controls that are used.

        Raises:
            ValueError: something is missing, out of range or does not fit together.
        """
        resolution, count = int(data[self.resolution]), int(data[self.count])
        controls = [unit.read(data, self.resolution, self.start_editor) for unit in self.units if data[unit.on]]
        image, mask = start_of(data[self.start_editor])
        if data[self.use] == IMAGE_TO_IMAGE and not any(control.chosen.name == "inpaint" for control in controls):
            mask = None
        elif image is not None and mask is None:
            raise ValueError("paint over what shall be new, under Start from a picture")
        if image is None and any(control.chosen.name == "inpaint" for control in controls):
            raise ValueError("the condition inpaint needs a picture with a painted hole, under Start from a picture")
        sizes = [control.hint.shape[:2] for control in controls if control.hint is not None]
        height, width = image.shape[:2] if image is not None else (resolution, resolution)
        size = sizes[0] if sizes else resized_shape(height, width, resolution)
        if size[0] * size[1] * count > _MOST_PICTURES * self.context.largest**2:
            raise ValueError(f"{count} pictures of {size[1]} x {size[0]} pixels are too many at once")
        seed = data[self.seed]
        prompt = {EMPTY: NO_PROMPT, DEFAULT: DEFAULT_PROMPT}.get(data[self.prompt_setting], data[self.prompt] or "")
        negative = data[self.negative] or ""
        if data[self.add_words]:
            prompt, negative = _joined(prompt, ADDED_PROMPT), _joined(negative, NEGATIVE_PROMPT)
        arguments: dict[str, Any] = {
            "prompt": self.context.captioner() if data[self.prompt_setting] == AUTOMATIC else prompt,
            "negative_prompt": negative, "num_samples": count, "sampler": data[self.sampler], "steps": int(data[self.steps]),
            "guidance_scale": data[self.guidance], "eta": data[self.eta] if data[self.sampler] == "ddim" else 0.0,
            "seed": None if seed in (None, _RANDOM) else int(seed), "size": tuple(map(int, size)),
        }  # fmt: skip
        if image is not None:
            image = image if mask is not None else conditions.from_editor(image, size)
            arguments |= {"image": image, "denoise": data[self.denoise]} | ({} if mask is None else {"mask": mask})
        hints = [control.hint for control in controls]
        arguments["hint"] = hints if len(hints) > 1 else hints[0] if hints else None
        for name in ("annotator", "strength", "start", "end", "guess_mode") if controls else ():
            each = [getattr(control, name) for control in controls]
            arguments[name] = each if len(each) > 1 else each[0]
        return arguments, controls

    # -- the run --------------------------------------------------------------------------------------------

    def _generate(self, data: dict[Any, Any], request: gr.Request) -> Iterator[dict[Any, Any]]:
        """Sample, and show what happens."""
        gallery = Gallery(self.context.folders.outputs, data[self.visitor] or "")
        begun = time.monotonic()
        choose(self.context.catalogue.bases(), data[self.base], "a base model")
        yield {self.status: _status("Making the maps ...")}
        arguments, controls = self._arguments(data)
        steps, base = arguments["steps"], data[self.base]
        used = [unit for unit in self.units if data[unit.on]]
        made = {
            unit.map: control.made for unit, control in zip(used, controls, strict=True) if control.made is not None
        }
        loading = "" if base in self.context.models.loaded else f"Loading {html.escape(base)} ..."
        yield {self.status: _status(loading or "Starting ..."), **made}
        networks = [control.network for control in controls]
        session = request.session_hash or ""
        stop = self.context.stops.new(session)
        warning = ""
        try:
            for event in sample(self.context.models.use(base, networks), arguments, stop):
                if isinstance(event, Begun):
                    warning = _untrained(event.untrained, controls)
                    yield {self.status: _status(f"Step 0 of {steps}", (0, steps), warning)}
                elif isinstance(event, Step):
                    steps = max(steps, event.number)  # DDIM makes one more where the steps do not divide the schedule
                    text = f"Step {event.number} of {steps}"
                    preview = _enlarged(np.concatenate(list(event.preview), axis=1))
                    yield {self.status: _status(text, (event.number, steps), warning), self.result: preview}
                elif isinstance(event, Pictures):
                    result = _enlarged(np.asarray(event[0]))
                    try:
                        saved = gallery.add(event, self._notes(data, controls))
                    except Exception:
                        yield {self.result: result}  # it took long to make, and can be seen at least
                        raise
                    seconds = time.monotonic() - begun
                    text = f"{len(saved)} picture{'s' if len(saved) > 1 else ''} in {seconds:.1f} seconds."
                    yield {
                        self.status: _status(text, None, warning),
                        self.result: result,
                        self.gallery: gallery.shown(self.gallery.GRADIO_CACHE),
                        self.files: [file.name for file in gallery.files()],
                    }
        except Stopped:
            yield {self.status: _status("Stopped.")}
        finally:
            stop.set()
            self.context.stops.done(session, stop)

    def _stop(self, request: gr.Request) -> Any:
        """Stop the tab's run, which then says so itself; one that still waits for its turn, or none, cannot."""
        stopped = self.context.stops.set(request.session_hash or "")
        return gr.skip() if stopped else _status("Stopped.")

    def _notes(self, data: Mapping[Any, Any], controls: list[Control]) -> dict[str, Any]:
        """What a picture's file tells beside the pipeline's settings, so that the page can be set up as it was."""
        return {
            "base": data[self.base],
            "prompt_setting": data[self.prompt_setting],
            "use": data[self.use],
            "controls": [
                {
                    "network": control.network, "condition": control.chosen.name, "version": control.chosen.version,
                    "detect_resolution": control.chosen.detect_resolution, "parameters": control.chosen.parameters,
                }
                for control in controls
            ],
        }  # fmt: skip

    # -- the gallery ----------------------------------------------------------------------------------------

    def _open(self, data: Mapping[Any, Any]) -> dict[Any, Any]:
        gallery = Gallery(self.context.folders.outputs, visitor_key(data[self.visitor]))
        return {
            self.status: _status("Ready."),
            self.visitor: gallery.visitor,
            self.gallery: gallery.shown(self.gallery.GRADIO_CACHE),
            self.files: [file.name for file in gallery.files()],
            **self._lists(data),
        }

    def _select(self, files: list[str], visitor: str | None, event: gr.SelectData) -> tuple[Any, Any]:
        settings, notes = read_notes(self._file(files, event.index, visitor))
        told = {name: value for name, value in settings.items() if value not in (None, "", False)}
        return event.index, gr.update(value=told | ({"page": notes} if notes else {}), visible=True)

    def _file(self, files: list[str], selected: Any, visitor: str | None) -> Path:
        """The selected picture."""
        gallery = Gallery(self.context.folders.outputs, visitor or "")
        if not isinstance(selected, int) or not 0 <= selected < len(files):
            raise ValueError("select a picture in the gallery first")
        return choose({file.name: file for file in gallery.files()}, files[selected], "a picture")

    def _load_selected(self, files: list[str], selected: Any, visitor: str | None) -> dict[Any, Any]:
        return self._restored(*read_notes(self._file(files, selected, visitor)))

    def _load_file(self, file: str) -> dict[Any, Any]:
        check_upload(file)
        return self._restored(*read_notes(file))

    def _start_from(self, files: list[str], selected: Any, visitor: str | None) -> tuple[np.ndarray, str, float]:
        picture = read_image(self._file(files, selected, visitor))
        return conditions.for_editor(picture), IMAGE_TO_IMAGE, _DENOISE[IMAGE_TO_IMAGE]

    def _restored(self, settings: Mapping[str, Any], notes: Mapping[str, Any]) -> dict[Any, Any]:
        """Updates that set the page up as a picture was made. Pictures and maps are not in the file, and stay as they are.

        What the page cannot hold becomes what comes near, or stays as it is, and a warning names it.

        Raises:
            ValueError: the file holds something else than such settings.
        """
        lost: dict[str, Any] = {}  # names and values in the file
        try:
            updates = self._restored_sampling(settings, notes, lost) | self._restored_controls(settings, notes, lost)
            told = ", ".join(f"{name}: {str(value)[:80]}" for name, value in lost.items())
        except (TypeError, KeyError, AttributeError, IndexError, RecursionError) as error:
            raise ValueError(DAMAGED) from error
        if lost:
            text = f"Not everything could be taken over as it is in the picture: {told}"
            gr.Warning(html.escape(self.context.folders.hide_paths(text), quote=False), _SECONDS)
        return updates

    def _restored_sampling(
        self, settings: Mapping[str, Any], notes: Mapping[str, Any], lost: dict[str, Any]
    ) -> dict[Any, Any]:
        updates: dict[Any, Any] = {self.count: 1, self.add_words: False}
        for component, name in ((self.prompt, "prompt"), (self.negative, "negative_prompt")):
            value = settings.get(name)
            updates[component] = value if isinstance(value, str) else ""
            if not isinstance(value, (str, type(None))):
                lost[name] = value
        named = ((self.steps, "steps"), (self.guidance, "guidance_scale"), (self.eta, "eta"), (self.denoise, "denoise"))
        for slider, name in named:
            if settings.get(name) is not None:
                check_numbers(**{name: settings[name]})
                updates[slider] = _within(slider, settings[name], name, lost)
        if settings.get("size") is not None:
            height, width = check_size(settings["size"])
            step = int(self.resolution.step)
            side = max(step, round(min(height, width) / step) * step)  # as a picture's size is rounded
            updates[self.resolution] = _within(self.resolution, side, "size", {})
            if updates[self.resolution] != min(height, width):
                lost["size"] = f"{width} x {height}"
        seed = settings.get("seed")
        if isinstance(seed, int) and not isinstance(seed, bool) and 0 <= seed <= _LARGEST_SEED:
            updates[self.seed] = seed
        elif seed is not None:
            lost["seed"] = seed
        listed: gr.components.Component
        for listed, choices, name, value in (
            (self.sampler, _samplers(), "sampler", settings.get("sampler")),
            (self.use, [*_DENOISE], "use", notes.get("use")),
        ):
            if value in choices:
                updates[listed] = value
            elif value is not None:
                lost[name] = value
        updates[self.prompt_setting] = OWN_PROMPT  # an automatic prompt is a text now
        return updates

    def _restored_controls(
        self, settings: Mapping[str, Any], notes: Mapping[str, Any], lost: dict[str, Any]
    ) -> dict[Any, Any]:
        controls = notes.get("controls", [])
        if len(controls) > CONTROLS:
            lost["number of controls"] = len(controls)
        bases = self.context.catalogue.bases()
        if notes and notes.get("base") not in bases:
            lost["base model"] = notes.get("base")
        updates: dict[Any, Any] = {}
        if notes.get("base") in bases:
            updates[self.base] = gr.update(choices=list(bases), value=notes["base"])
        for number, unit in enumerate(self.units if notes else ()):
            updates[unit.on] = number < len(controls)
            if number >= len(controls):
                continue
            told, of_it = controls[number], f" of control {number + 1}"
            name, network = told["condition"], None
            if notes.get("base") in bases:
                networks = unit.networks(bases[notes["base"]])
                network = told["network"] if told["network"] in networks else next(iter(networks), None)
                if told["network"] != network:
                    lost["ControlNet" + of_it] = told["network"]
                updates[unit.network] = gr.update(choices=networks, value=network)
            if name not in {known for _, known in conditions.choices(ready=True)}:
                raise ValueError("this picture was made with a condition that is not known here")
            values: dict[str, Any] = {}
            if name != conditions.READY:
                values = conditions.record(name, told["version"]).check_parameters(told["parameters"])
                if told["version"] not in (None, *conditions.versions(name)):
                    lost["version" + of_it] = told["version"]
                if told["detect_resolution"] is not None:
                    slider, side = unit.parameters.detect_resolution, operator.index(told["detect_resolution"])
                    values["detect_resolution"] = _within(slider, side, "detect_resolution" + of_it, lost)
            updates |= {unit.condition: name, **unit.settings_for(name, network, told["version"], values)}
            for acts in ("strength", "start", "end", "guess_mode"):
                value = settings.get(acts)
                value = value[number] if isinstance(value, list) else value
                if value is None:
                    continue
                if acts == "guess_mode":
                    check_yes_or_no(guess_mode=value)
                    updates[unit.guess_mode] = value
                else:
                    check_numbers(**{acts: value})
                    updates[getattr(unit, acts)] = _within(getattr(unit, acts), value, acts + of_it, lost)
        return updates


def _within(slider: gr.Slider, value: float, name: str, lost: dict[str, Any]) -> float:
    """A file's value, or what comes nearest within a slider's range; then it is noted in `lost`."""
    held = min(max(value, slider.minimum), slider.maximum)
    if held != value:
        lost[name] = value
    return held


def _samplers() -> list[str]:
    """Samplers that work here: most are of diffusers."""
    return list(SAMPLER_NAMES if importlib.util.find_spec("diffusers") else SAMPLERS)


def _guidance(side: int) -> float:
    """The usual scale: of Stable Diffusion, or of the tiny model, whose pictures are small."""
    return 9.0 if side >= 512 else 3.0


def _joined(*texts: str) -> str:
    return ", ".join(filter(None, texts))


def _enlarged(picture: np.ndarray) -> np.ndarray:
    """A picture (H, W, 3) in large pixels, so that a small one is not shown blurred."""
    times = max(1, _PREVIEW // max(picture.shape[:2]))
    return picture.repeat(times, axis=0).repeat(times, axis=1)


def _untrained(numbers: list[int], controls: list[Control]) -> str:
    """A warning of controls whose hints change nothing."""
    used = [number for number in numbers if number <= len(controls)]
    if not used:
        return ""
    which = "The control" if len(controls) == 1 else f"Control {' and '.join(map(str, used))}"
    return f"{which} is untrained: the hint changes nothing. Train one under Train, or choose another file."


def _status(text: str, progress: tuple[int, int] | None = None, warning: str = "") -> str:
    """One line, with a bar and a warning where there are some. Texts are HTML."""
    bar = f'<progress value="{progress[0]}" max="{progress[1]}"></progress>' if progress else ""
    warned = f'<div class="warning">{warning}</div>' if warning else ""
    return f'<div class="status"><span>{text}</span>{bar}</div>{warned}'
