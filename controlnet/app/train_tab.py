"""The Train tab: data that is looked at first, settings, and a run that is watched, stopped and gone on with."""

import html
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import gradio as gr
import numpy as np

from annotator.pictures import read_image
from annotator.registry import list_annotators
from cldm.data.checking import abbreviate, check_dataset
from cldm.training.memory import limit_of
from cldm.training.presets import PRESETS
from cldm.training.settings import TINY_DATA, Settings, parse_settings
from controlnet.app import lifeline
from controlnet.app.context import Context
from controlnet.app.files import TINY, choose
from controlnet.app.training import RunState, describe, settings_of
from tutorial_dataset import MyDataset

CIRCLES = "circles, made at the start"
_NO_PRESET, _NO_CONDITION = "none", "none: score circles, or nothing"
_EXAMPLES = 12
_REFRESH = 2  # seconds
_MEMORY_SECONDS = 240
_STATES = {
    "new": "not begun yet", "preparing": "preparing: data, weights and first pictures", "training": "training",
    "stopping": "stopping: it finishes the step and saves", "stopped": "stopped; it can go on", "finished": "finished",
    "failed": "ended with an error",
}  # fmt: skip


class TrainTab:
    """The tab's components and what they do."""

    def __init__(self, context: Context) -> None:
        self.context = context
        plain = Settings()
        with gr.Row():
            with gr.Column(scale=4, min_width=420):
                gr.Markdown("### What is trained")
                with gr.Row():
                    self.data = gr.Dropdown(self._data_names(), value=CIRCLES, label="Data", info="a folder of pairs")
                    self.base = gr.Dropdown(
                        list(context.catalogue.bases()),
                        value=TINY,
                        label="Base model",
                        info="its own ControlNet is trained on, if it has one",
                    )
                self.check = gr.Button("Check the data and show examples", size="sm", elem_id="check-data")
                self.checked = gr.Markdown("", elem_classes="note", elem_id="data-checked")
                self.examples = gr.Gallery(
                    label="Examples: hint and target", columns=4, height=300, object_fit="contain", interactive=False, visible=False,
                    buttons=[],
                )  # fmt: skip
                gr.Markdown("### How")
                with gr.Row():
                    self.name = gr.Textbox("circles", label="Name of the run", max_length=60, elem_id="run-name")
                    self.steps = gr.Number(plain.steps, label="Steps", precision=0, minimum=1, elem_id="run-steps")
                with gr.Row():
                    self.batch_size = gr.Number(
                        plain.batch_size, label="Batch size", info="pairs a step", precision=0, minimum=1
                    )
                    self.learning_rate = gr.Number(
                        plain.learning_rate,
                        label="Learning rate",
                        info="Stable Diffusion: 0.00001",
                        minimum=0,
                    )
                    self.log_every = gr.Number(
                        plain.log_every, label="Pictures every", info="so many steps", precision=0, minimum=1
                    )
                with gr.Row():
                    presets = [(f"{name}: needs {limit_of(name) / 1e9:g} GB at most", name) for name in PRESETS]
                    self.preset = gr.Dropdown(
                        [("none", _NO_PRESET), *presets], value=_NO_PRESET, label="Preset", scale=3,
                        info="for a GPU of this size, SD 1.5 at 512 pixels",
                    )  # fmt: skip
                    self.memory = gr.Button("Compute memory", scale=1, min_width=120)
                self.computed = gr.Markdown("", elem_classes="note")
                with gr.Accordion("Other settings", open=False):
                    self.condition = gr.Dropdown(
                        [_NO_CONDITION, *list_annotators()], value=_NO_CONDITION, label="Condition of the hints",
                        info="its detector scores the pictures while training",
                    )  # fmt: skip
                    self.others = gr.Textbox(
                        label="Settings, one a line", lines=4, max_length=2000, placeholder="empty_prompts=0.5\nema=0.9999",
                        info="any that `controlnet train --help` lists, as key=value", elem_id="other-settings",
                    )  # fmt: skip
                self.start = gr.Button("Start training", variant="primary", elem_id="start-training")
            with gr.Column(scale=5, min_width=460):
                with gr.Row():
                    self.run = gr.Dropdown(context.runs.names(), label="Run", scale=3, elem_id="run")
                    self.go_on = gr.Button("Go on", scale=1, min_width=90, elem_id="go-on")
                    self.stop = gr.Button("Stop", variant="stop", scale=1, min_width=90, elem_id="stop-training")
                self.state = gr.HTML("", elem_id="run-state")
                gr.Markdown(
                    "Hints that are not trained on: prompt, hint, target, and the model's picture", elem_classes="note"
                )
                self.picture = gr.Image(
                    show_label=False, interactive=False, height=380, buttons=["fullscreen"],
                    elem_id="run-picture",
                )  # fmt: skip
                gr.Markdown("Curves over the steps", elem_classes="note")
                self.curves = gr.Image(
                    label="Curves",
                    interactive=False,
                    height=460,
                    buttons=["fullscreen", "download"],
                    elem_id="run-curves",
                )
        self.timer = gr.Timer(_REFRESH, active=False)
        self.seen = gr.State(())  # what of the run is shown already
        self._connect()

    def _connect(self) -> None:
        listen = self.context.listen
        watched = [self.state, self.picture, self.curves, self.seen]
        quick = {"show_progress": "hidden", "queue": False}
        listen(
            self.check.click,
            self._check,
            self.data,
            [self.checked, self.examples],
            concurrency_id="check",
            concurrency_limit=1,
        )
        listen(
            self.memory.click, self._memory, self._fields(), self.computed, concurrency_id="memory", concurrency_limit=1
        )
        listen(self.start.click, self._start, self._fields(), [self.run, self.seen], show_progress="hidden")
        listen(self.go_on.click, self._go_on, [self.run, self.steps], self.seen, show_progress="hidden")
        listen(self.stop.click, self._stop, None, self.state, show_progress="hidden")
        listen(self.run.change, lambda name: self._watch(name, ()), self.run, watched, **quick)
        listen(self.timer.tick, self._watch, [self.run, self.seen], watched, **quick)

    def connect_page(self, page: gr.Blocks, tab: gr.Tab, others: Sequence[gr.Tab]) -> None:
        """Show the run that is going on, or the newest, when the page opens; follow it as long as `tab`, which is this one, is open."""
        listen, lists = self.context.listen, [self.data, self.base, self.run]
        for event in (page.load, tab.select):
            listen(event, self._lists, {*lists}, lists, show_progress="hidden")
        listen(tab.select, lambda: gr.Timer(active=True), None, self.timer, show_progress="hidden", queue=False)
        for other in others:
            listen(other.select, lambda: gr.Timer(active=False), None, self.timer, show_progress="hidden", queue=False)

    # -- what is chosen -------------------------------------------------------------------------------------

    def _fields(self) -> set[gr.components.Component]:
        return {
            self.data, self.base, self.name, self.steps, self.batch_size, self.learning_rate, self.log_every, self.preset,
            self.condition, self.others,
        }  # fmt: skip

    def _data_names(self) -> list[str]:
        return [CIRCLES, *self.context.folders.pairs()]

    def _lists(self, data: Mapping[Any, Any]) -> dict[Any, Any]:
        bases, names, runs = list(self.context.catalogue.bases()), self._data_names(), self.context.runs.names()
        newest = self.context.runs.active or next(iter(runs), None)
        return {
            self.data: gr.update(choices=names, value=data[self.data] if data[self.data] in names else CIRCLES),
            self.base: gr.update(choices=bases, value=data[self.base] if data[self.base] in bases else TINY),
            self.run: gr.update(choices=runs, value=data[self.run] if data[self.run] in runs else newest),
        }

    def _arguments(self, data: Mapping[Any, Any]) -> list[str]:
        """The settings of the run as `key=value`.

        Raises:
            ValueError: something is not in the lists, or not a number.
        """
        catalogue = self.context.catalogue
        base = choose(catalogue.bases(), data[self.base], "a base model")
        report = catalogue.report(base)
        if report is None:
            raise ValueError(f"{data[self.base]} is no model that can be read")
        arguments = [f"config={report.config}", f"{'weights' if catalogue.has_control(base) else 'base'}={base}"]
        if data[self.data] != CIRCLES:
            arguments.append(f"data={choose(self.context.folders.pairs(), data[self.data], 'a folder of pairs')}")
        preset = data[self.preset] if data[self.preset] != _NO_PRESET else ""
        given = {"steps": self.steps, "learning_rate": self.learning_rate}
        # A preset says how large batches are, and how often pictures are made.
        given |= {} if preset else {"batch_size": self.batch_size, "log_every": self.log_every}
        for key, component in given.items():
            if data[component] is None:
                raise ValueError(f"{component.label} is empty")
            arguments.append(f"{key}={data[component]}")
        if preset:
            arguments.append(f"preset={preset}")
        if data[self.condition] != _NO_CONDITION:
            arguments.append(f"condition={data[self.condition]}")
        return [*arguments, *settings_of(data[self.others] or "")]

    # -- data -----------------------------------------------------------------------------------------------

    def _check(self, name: str) -> Iterator[tuple[Any, Any]]:
        """Read every pair as training would, and show some."""
        if name == CIRCLES and not (self.context.folders.pairs().get(TINY_DATA)):
            yield "The circles are made when the run starts: 2,064 pairs of 64 pixels.", gr.update(visible=False)
            return
        path = choose(self.context.folders.pairs(), TINY_DATA if name == CIRCLES else name, "a folder of pairs")
        dataset = MyDataset(path, leave_out=True)
        yield f"Reading {len(dataset):,} pairs ...", gr.skip()
        problems = check_dataset(dataset, progress=False)
        broken = {problem.index for problem in problems}
        usable = [index for index in range(len(dataset)) if index not in broken]
        told = f"**All {len(dataset):,} pairs can be used.**"
        if problems:
            reasons = html.escape(self.context.folders.hide_paths(abbreviate(problems)), quote=False)
            told = f"**{len(usable):,} of {len(dataset):,} pairs can be used.** {reasons}"
        shown = [usable[int(place)] for place in np.linspace(0, len(usable) - 1, min(_EXAMPLES, len(usable)))]
        yield told, gr.update(value=[_example(dataset[index]) for index in shown], visible=bool(shown))

    # -- runs -----------------------------------------------------------------------------------------------

    def _memory(self, data: Mapping[Any, Any]) -> str:
        """What a step takes, computed on fake tensors by the library's own command, in a process of its own."""
        settings = parse_settings(self._arguments(data))
        names = ("batch_size", "precision", "recompute", "cache", "optimizer", "sd_locked", "only_mid_control")
        arguments = [f"{name}={getattr(settings, name)}" for name in names]
        arguments += [f"config={settings.config}", f"frozen_precision={settings.frozen_precision or 'fp32'}"]
        arguments += ["size=64"] if settings.config == "cldm_tiny" else []
        with tempfile.TemporaryFile("w+") as told, tempfile.TemporaryFile("w+") as complaints:
            process = lifeline.start("cldm.training.memory", arguments, stdout=told, stderr=complaints)
            try:
                process.wait(_MEMORY_SECONDS)
            except subprocess.TimeoutExpired:
                raise ValueError(f"this takes longer than {_MEMORY_SECONDS // 60} minutes here") from None
            finally:
                process.kill()
                process.wait()
            told.seek(0)
            complaints.seek(0)
            if process.returncode != 0:
                lines = complaints.read().strip().splitlines()
                raise ValueError(lines[-1] if lines else "the memory could not be computed")
            return told.read()

    def _start(self, data: Mapping[Any, Any]) -> tuple[Any, tuple[()]]:
        settings = self.context.runs.begin(data[self.name], self._arguments(data))
        told = ", ".join(f"{key}={value}" for key, value in describe(settings).items())
        gr.Info(html.escape(f"Training has begun{f' with {told}' if told else ''}.", quote=False))
        return gr.update(choices=self.context.runs.names(), value=data[self.name].strip()), ()

    def _go_on(self, name: str, steps: float | None) -> tuple[()]:
        state = self.context.runs.state(name)
        # A run that is finished goes on to the number of steps above.
        self.context.runs.go_on(
            name, int(steps) if state.state == "finished" and steps and steps > state.steps else None
        )
        return ()

    def _stop(self) -> str:
        name = self.context.runs.stop()
        if name is None:
            raise ValueError("no run is being trained")
        return _state_line(RunState("stopping"))

    def _watch(self, name: str | None, seen: tuple[Any, ...]) -> tuple[Any, ...]:
        """What is new of a run."""
        if name is None or name not in self.context.runs.names():
            return _state_line(None), None, None, ()
        try:
            state = self.context.runs.state(name)
        except ValueError as error:  # said once and quietly, as this is asked for again and again
            state = RunState("failed", message=str(error))
        files = [state.picture, state.curves]
        now = tuple((str(file), file.stat().st_mtime_ns) if file is not None else None for file in files)
        line = _state_line(state, self.context.folders.hide_paths(state.message))
        pictures = [
            gr.skip() if len(seen) == 2 and old == new else None if file is None else read_image(file)
            for file, old, new in zip(files, seen if len(seen) == 2 else (None, None), now, strict=True)
        ]
        return line, *pictures, now


def _example(item: Mapping[str, Any]) -> tuple[np.ndarray, str]:
    """A pair as one picture, hint and target side by side, with its prompt."""
    target = np.rint((item["jpg"] + 1) * 127.5).astype(np.uint8)
    hint = np.rint(item["hint"] * 255).astype(np.uint8)
    return np.concatenate([hint, target], axis=1), item["txt"]


def _state_line(state: RunState | None, message: str = "") -> str:
    """What a run is doing, as HTML."""
    if state is None:
        return '<div class="status"><span>No run yet. Start one on the left.</span></div>'
    told = _STATES[state.state]
    if state.step:
        told += f", step {state.step:,} of {state.steps:,}"
    if state.loss is not None:
        told += f", loss {state.loss:.3f}"
    bar = f'<progress value="{state.step}" max="{max(state.steps, 1)}"></progress>' if state.steps else ""
    shown = state.state in ("preparing", "failed") and message
    last = (
        f'<div class="{"warning" if state.state == "failed" else "last-line"}">{html.escape(message)}</div>'
        if shown
        else ""
    )
    return f'<div class="status"><span>{told[0].upper()}{told[1:]}.</span>{bar}</div>{last}'
