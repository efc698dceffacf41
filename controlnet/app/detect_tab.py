"""The Detect tab: the condition of one picture, or of a whole folder, also as a training set."""

import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np

from annotator.pictures import HWC3, find_pictures, read_image
from cldm.data.photos import plan_pairs
from controlnet.app import conditions, lifeline
from controlnet.app.conditions import Chosen, ParameterControls
from controlnet.app.context import Context
from controlnet.app.files import choose, new_name
from controlnet.app.sampling import Stops
from controlnet.app.uploads import guard_picture

MAPS, PAIRS = "maps alone", "pairs to train on"
_POLL = 0.5  # seconds between looks at a running command


class DetectTab:
    """The tab's components and what they do."""

    def __init__(self, context: Context) -> None:
        self.context, self.stops = context, Stops()
        with gr.Row():
            with gr.Column(scale=1):
                self.condition = gr.Dropdown(conditions.choices(), value="canny", label="Condition")
                self.note = gr.Markdown("", elem_classes="note")
                self.parameters = ParameterControls("canny")
            with gr.Column(scale=2), gr.Tabs():
                with gr.Tab("A picture"):
                    with gr.Row(equal_height=True):
                        self.picture = guard_picture(
                            gr.Image(
                                label="Picture", type="numpy", height=400, sources=["upload", "clipboard"], image_mode=None,
                                elem_id="detect-picture", buttons=[],
                            )
                        )  # fmt: skip
                        self.map = gr.Image(
                            label="Map", height=400, interactive=False, format="png", buttons=["download", "fullscreen"],
                            elem_id="detect-map",
                        )  # fmt: skip
                    self.resolution = gr.Slider(
                        0,
                        2048,
                        512,
                        step=64,
                        label="Resolution",
                        info="of the map's shorter side; 0: the picture's own size",
                    )
                    self.detect = gr.Button("Detect", variant="primary", elem_id="detect")
                with gr.Tab("A folder"):
                    folders = list(context.folders.picture_folders())
                    self.folder = gr.Dropdown(
                        folders, label="Folder of pictures", info="one of the server's data folders"
                    )
                    with gr.Row():
                        self.target = gr.Textbox(
                            label="Name of the new folder", placeholder="photos-canny", max_length=80
                        )
                        self.what = gr.Radio([MAPS, PAIRS], value=MAPS, label="Make")
                    with gr.Row():
                        self.size = gr.Number(
                            512, label="Size", precision=0, info="of pairs: pixels a side", minimum=64, maximum=2048
                        )
                        self.prompt = gr.Textbox(
                            label="Prompt for all", max_length=1000, info="of pairs; empty: a.txt beside each a.jpg"
                        )
                    with gr.Row():
                        self.run = gr.Button("Make them", variant="primary")
                        self.stop = gr.Button("Stop", variant="stop")
                    self.progress = gr.HTML("")
                    self.examples = gr.Gallery(
                        label="The newest", columns=6, height=260, object_fit="contain", interactive=False, buttons=[]
                    )
        self._connect()

    def _connect(self) -> None:
        listen, shown = self.context.listen, self.parameters.components
        quick = {"show_progress": "hidden", "queue": False}
        outputs = [*shown, self.note]
        listen(self.condition.select, self._on_condition, self.condition, outputs, **quick)
        listen(
            self.parameters.version.select,
            self._on_condition,
            [self.condition, self.parameters.version],
            outputs,
            **quick,
        )
        inputs = {self.condition, self.picture, self.resolution, *shown}
        listen(self.detect.click, self._detect, inputs, self.map, concurrency_id="detect", concurrency_limit=2)
        inputs = {self.condition, self.folder, self.target, self.what, self.size, self.prompt, *shown}
        made = listen(
            self.run.click, self._run, inputs, [self.progress, self.examples], concurrency_id="folder", concurrency_limit=1,
            show_progress="hidden",
        )  # fmt: skip
        listen(self.stop.click, self._stop, None, None, cancels=[made], **quick)  # one that still waits, too
        listen(made.failure, lambda: "Stopped.", None, self.progress, **quick)  # cancelled, or failed with a message

    def connect_page(self, page: gr.Blocks) -> None:
        """Show the folders as they are when the page opens."""
        self.context.listen(page.load, self._folders, None, self.folder, show_progress="hidden")

    def _folders(self) -> Any:
        return gr.update(choices=list(self.context.folders.picture_folders()))

    def _on_condition(self, name: str, version: str | None = None) -> dict[Any, Any]:
        updates = self.parameters.show(name, version)
        return {**dict(zip(self.parameters.components, updates, strict=True)), self.note: conditions.needs(name)}

    def _detect(self, data: Mapping[Any, Any]) -> np.ndarray:
        if data[self.picture] is None:
            raise ValueError("upload a picture first")
        resolution = int(data[self.resolution]) or None
        chosen = self.parameters.read(data[self.condition], data)
        return self.context.detectors.make_hint(chosen, data[self.picture], resolution).shown

    def _stop(self, request: gr.Request) -> None:
        self.stops.set(request.session_hash or "")

    def _run(self, data: Mapping[Any, Any], request: gr.Request) -> Iterator[dict[Any, Any]]:
        """Let the command do it, and show how far it is; it goes on where it was when it is started again."""
        source = choose(self.context.folders.picture_folders(), data[self.folder], "a folder of pictures")
        target = self.context.folders.data[0] / new_name(data[self.target], "the new folder")
        chosen, pairs = self.parameters.read(data[self.condition], data), data[self.what] == PAIRS
        goals = _goals(source, target, pairs)
        arguments = _arguments(chosen, source, target)
        if pairs:
            arguments += ["--size", str(int(data[self.size] or 512))]
            arguments += [f"--prompt={data[self.prompt]}"] if data[self.prompt] else []
        stop = self.stops.new(request.session_hash or "")
        with tempfile.TemporaryFile() as log:
            module = "tutorial_dataset" if pairs else "annotator"
            process = lifeline.start(module, arguments, stdout=subprocess.DEVNULL, stderr=log)
            try:
                while process.poll() is None and not stop.is_set():
                    yield {self.progress: f"{len(_made(goals))} of {len(goals)} pictures"}
                    time.sleep(_POLL)
                if stop.is_set():
                    process.terminate()
                process.wait()
            finally:
                if process.poll() is None:  # nobody looks any more; the server must not wait here
                    process.terminate()
                    threading.Thread(target=process.wait, daemon=True).start()
                self.stops.done(request.session_hash or "", stop)
            log.seek(0)
            complaints = [
                line.partition(": ")[2] or line for line in log.read().decode("utf-8", "replace").splitlines() if line
            ]
        if stop.is_set():
            yield {self.progress: "Stopped. Started again, it goes on where it was."}
            return
        if process.returncode == 2:
            raise ValueError(complaints[-1] if complaints else "the pictures could not be made")
        made = _made(goals)
        text = f"{len(made)} of {len(goals)} pictures are in {target.name}."
        if complaints:
            reason = "Some failed: " if len(made) < len(goals) else "Note: "
            text += f" {reason}{self.context.folders.hide_paths(complaints[-1])}"
        yield {self.progress: text, self.examples: [HWC3(read_image(path)) for path in _newest(made)]}


def _arguments(chosen: Chosen, source: Path, target: Path) -> list[str]:
    """A condition with its parameters as the commands take them."""
    arguments = [chosen.name, str(source.absolute()), str(target.absolute()), "--version", str(chosen.version)]
    if chosen.detect_resolution:
        arguments += ["--detect-resolution", str(chosen.detect_resolution)]
    defaults = conditions.record(chosen.name, chosen.version).defaults
    for name, value in chosen.parameters.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            if value != defaults[name]:
                arguments.append(f"--{option}" if value else f"--no-{option}")
        elif value is not None and value != defaults[name]:
            arguments.append(f"--{option}={value:g}" if isinstance(value, float) else f"--{option}={value}")
    return arguments


def _goals(source: Path, target: Path, pairs: bool) -> list[Path]:
    """The files that the command makes of the pictures in a folder; of pairs the hints."""
    pictures = find_pictures(source, target)
    if pairs:
        return [target / pair.source for pair in plan_pairs(source, dict.fromkeys(pictures, ""), pictures, None)]
    return [target / path.relative_to(source).with_suffix(".png") for path in pictures]


def _made(goals: list[Path]) -> list[Path]:
    """Those that are there; a folder may hold others, of pictures that have been taken away since."""
    return [path for path in goals if path.is_file()]


def _newest(made: list[Path]) -> list[Path]:
    return sorted(made, key=lambda path: path.stat().st_mtime, reverse=True)[:12]
