"""The Models tab: what a weights file is, loading one, giving a base a ControlNet, and converting."""

import html
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gradio as gr

from cldm.checkpoint import TARGETS, add_control, convert, identify
from cldm.checkpoint.__main__ import table
from controlnet.app.context import MODEL_QUEUE, Context
from controlnet.app.files import choose, new_name
from controlnet.app.models import OWN, UNTRAINED
from ldm.files.locating import SUFFIXES
from ldm.files.tensors import FLOAT_DTYPES
from tool_add_control import summary

_AS_IT_IS, _NONE = "as it is", "none"


class ModelsTab:
    """The tab's components and what they do."""

    def __init__(self, context: Context) -> None:
        self.context = context
        names = list(context.folders.weights())
        first = context.folders.models[0].absolute().name
        with gr.Row():
            with gr.Column(scale=2):
                gr.Markdown(
                    f"Weights lie in the server's folder{'s' if len(context.folders.models) > 1 else ''} "
                    f"{', '.join(f'`{root.absolute().name}`' for root in context.folders.models)}, and results of training in "
                    f"`{context.folders.runs.absolute().name}`. A file put there appears in the list. Files are read, never executed.",
                    elem_classes="note",
                )
                self.file = gr.Dropdown(names, value=names[0], label="File or folder", elem_id="weights-file")
                with gr.Row():
                    self.look = gr.Button("What is it?", min_width=100, elem_id="what-is-it")
                    self.load = gr.Button("Load it", min_width=100)
                    self.refresh_lists = gr.Button("Refresh", min_width=100)
                with gr.Accordion("Add a ControlNet to it, to be trained", open=False):
                    self.control_from = gr.Dropdown([_NONE, *names], value=_NONE, label="Start from the ControlNet of",
                                                    info="none: copies of the base's encoder and new zero convolutions")  # fmt: skip
                    self.added_name = gr.Textbox(
                        label=f"New file in {first}", placeholder="control_sd15_ini.safetensors", max_length=80
                    )
                    self.add = gr.Button("Add", elem_id="add-control")
                with gr.Accordion("Convert it", open=False):
                    layouts = [(f"{name}: {what}", name) for name, what in TARGETS.items()]
                    self.layout = gr.Dropdown(layouts, value="control", label="To")
                    with gr.Row():
                        self.base = gr.Dropdown(
                            [_NONE, *names], value=_NONE, label="Base model", info="supplies what the file lacks"
                        )
                        self.dtype = gr.Dropdown([_AS_IT_IS, *FLOAT_DTYPES], value=_AS_IT_IS, label="Precision")
                        self.ema = gr.Checkbox(False, label="Take the EMA weights")
                    self.converted_name = gr.Textbox(
                        label=f"New file or folder in {first}", placeholder="control.safetensors", max_length=80
                    )
                    self.convert = gr.Button("Convert", elem_id="convert")
            with gr.Column(scale=3):
                self.report = gr.HTML("", label="What it is", elem_id="report")
                self.done = gr.Markdown("", elem_classes="note", elem_id="models-done")
        self._connect()

    def _connect(self) -> None:
        listen = self.context.listen
        lists = [self.file, self.control_from, self.base]
        listen(self.look.click, self._look, self.file, [self.report, self.done])
        listen(self.load.click, self._load, self.file, self.done, concurrency_id=MODEL_QUEUE, concurrency_limit=1)
        listen(self.refresh_lists.click, self._lists, {*lists}, lists, show_progress="hidden")
        writing = {"concurrency_id": "writing", "concurrency_limit": 1}
        add = listen(self.add.click, self._add, {self.file, self.control_from, self.added_name}, self.done, **writing)
        inputs = {self.file, self.layout, self.base, self.dtype, self.ema, self.converted_name}
        converted = listen(self.convert.click, self._convert, inputs, self.done, **writing)
        for done in (add, converted):
            listen(done.success, self._lists, {*lists}, lists, show_progress="hidden")

    def connect_page(self, page: gr.Blocks) -> None:
        """Show the files that are there when the page opens."""
        lists = [self.file, self.control_from, self.base]
        self.context.listen(page.load, self._lists, {*lists}, lists, show_progress="hidden")

    def _lists(self, data: Mapping[Any, Any]) -> dict[Any, Any]:
        names = list(self.context.folders.weights())
        updates = {}
        for dropdown, choices in (
            (self.file, names),
            (self.control_from, [_NONE, *names]),
            (self.base, [_NONE, *names]),
        ):
            kept = data[dropdown] if data[dropdown] in choices else choices[0]
            updates[dropdown] = gr.update(choices=choices, value=kept)
        return updates

    def _path(self, name: object) -> Path:
        return choose(self.context.folders.weights(), name, "a file")

    def _look(self, name: str) -> tuple[str, str]:
        """The report as a table; names in a file may hold anything."""
        lines = [self.context.folders.hide_paths(line) for line in table(identify(self._path(name)))]
        cells = [(line[:11].strip(), line[12:].strip()) for line in lines[1:]]
        rows = "".join(f"<tr><td>{html.escape(what)}</td><td>{html.escape(told)}</td></tr>" for what, told in cells)
        return f'<table class="report">{rows}</table>', ""

    def _load(self, name: str) -> str:
        """Load a model as Generate would, so that the first picture need not wait for it."""
        catalogue, models = self.context.catalogue, self.context.models
        path = choose(catalogue.bases(), name, "a base model, or a model with control; others are chosen in Generate")
        control = OWN if catalogue.has_control(path) else next(iter(catalogue.controls(path)), UNTRAINED)
        begun = time.monotonic()
        with models.use(name, [control]) as pipeline:
            size = sum(parameter.nbytes for parameter in pipeline.model.parameters())
        seconds = time.monotonic() - begun
        return f"**{name}** is loaded on `{models.device}` with the ControlNet {control}: {size / 1e9:.2f} GB in {seconds:.1f} seconds."

    def _target(self, text: str, suffixes: tuple[str, ...] = ()) -> Path:
        """A new file or folder among the models.

        Raises:
            ValueError: its name is none, or is taken: nothing is overwritten on the page.
        """
        folder = self.context.folders.models[0]
        target = folder / new_name(text, "the new file", suffixes)
        if os.path.lexists(target):  # also a link that leads nowhere: it would be written through
            raise ValueError(f"{target.name} exists already; choose another name")
        folder.mkdir(parents=True, exist_ok=True)
        return target

    def _add(self, data: Mapping[Any, Any]) -> str:
        target = self._target(data[self.added_name], SUFFIXES)
        control = None if data[self.control_from] == _NONE else self._path(data[self.control_from])
        added = add_control(self._path(data[self.file]), target, control_from=control, progress=False)
        return self._told(summary(str(target), added))

    def _convert(self, data: Mapping[Any, Any]) -> str:
        target = self._target(data[self.converted_name])
        base = None if data[self.base] == _NONE else self._path(data[self.base])
        dtype = None if data[self.dtype] == _AS_IT_IS else data[self.dtype]
        lines = convert(
            self._path(data[self.file]),
            target,
            data[self.layout],
            base=base,
            dtype=dtype,
            ema=data[self.ema],
            progress=False,
        )
        return self._told(lines)

    def _told(self, lines: list[str]) -> str:
        return "\n".join(f"- {self.context.folders.hide_paths(line)}" for line in lines)
