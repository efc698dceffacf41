"""Every command and snippet of the pages runs, or says why it is not run here; then its names and options are checked."""

import argparse
import ast
import importlib
import inspect
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import cv2
import numpy as np
import pytest

import tutorial_train
from cldm.config import override
from cldm.data.fill import draw_fill, generate_fill
from cldm.pipeline import ControlPipeline
from cldm.training.memory import Plan
from cldm.training.settings import parse_settings
from tests.docs.pages import PAGES, ROOT, Block, Command, PageError, blocks_of, commands_in_text, commands_of
from tool_train_tiny import Settings as TinySettings

# Programs whose arguments are settings, `key=value`, and what checks them.
SETTINGS: dict[str, Any] = {
    "tutorial_train": parse_settings,
    "tool_train_tiny": lambda arguments: override(TinySettings(), arguments),
    "cldm.training.memory": lambda arguments: override(Plan(), arguments),
}


class ArgumentsAreFine(BaseException):
    """Ends a program that has read its arguments; not an Exception, so that no program takes it for an error of its own."""


# -- a folder as a reader has it --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What the pages take for granted: a finished run of the main job (a short one), a data folder and a few pictures."""
    folder = tmp_path_factory.mktemp("reader")
    generate_fill(folder / "training" / "fill_tiny", count=24, size=64, palette="clear", progress=False)
    for name, count in {"hints": 2, "photos": 2}.items():
        (folder / name).mkdir()
        for i in range(count):
            sample = draw_fill(index=i, size=64, seed=9)
            picture = sample.source if name == "hints" else cv2.resize(sample.target, (96, 128))
            cv2.imwrite(str(folder / name / f"{i}.png"), picture[:, :, ::-1])
            (folder / "photos" / f"{i}.txt").write_text(sample.prompt) if name == "photos" else None
    shutil.copyfile(folder / "hints" / "0.png", folder / "hint.png")
    shutil.copyfile(folder / "photos" / "0.png", folder / "photo.png")
    mask = np.zeros((128, 96), np.uint8)
    mask[:, 48:] = 255
    cv2.imwrite(str(folder / "mask.png"), mask)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        # With data of its own name: that of the main job would be drawn in full.
        (folder / "training" / "few").symlink_to("fill_tiny")
        short = (
            "data=training/few held_out=8 batch_size=4 steps=2 log_every=1 sample_steps=2 pictures=2 accelerator=cpu"
        )
        assert tutorial_train.main(short.split()) == 0
    (folder / "training" / "few").unlink()
    return folder


@pytest.fixture
def workplace(folder, tmp_path, monkeypatch) -> Path:
    """A copy of that folder for one page, as the current folder; pictures are sampled in two steps unless the page says more."""
    place = tmp_path / "reader"
    shutil.copytree(folder, place, copy_function=os.link)
    monkeypatch.chdir(place)
    call = ControlPipeline.__call__
    monkeypatch.setattr(ControlPipeline, "__call__", lambda self, *a, **k: call(self, *a, **{"steps": 2, **k}))
    return place


# -- the blocks -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_blocks_of_a_page(page, workplace, capsys):
    names: dict[str, Any] = {}  # what the snippets of a page define is there in the next one
    for block in blocks_of(page):
        check_block(block, names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_commands_within_sentences_and_tables(page, capsys):
    for block in commands_in_text(page):
        check_block(block, {})


def check_block(block: Block, names: dict[str, Any]) -> None:
    """Run a block, or check it.

    Raises:
        PageError: it is wrong.
    """
    if block.quoted:
        check_quotation(block)
    elif block.language == "bash":
        for command in commands_of(block):
            (check_arguments if block.excuse else run)(command, block)
    elif block.language == "python":
        (check_snippet if block.excuse else run_snippet)(block, names)


def run(command: Command, block: Block) -> None:
    status = call(command.module, [*command.arguments, *block.shorter])
    if status:
        raise PageError(f"{block.place}: {command.module} {' '.join(command.arguments)} ended with status {status}")


def call(module: str, arguments: list[str]) -> int | str | None:
    """The exit status of a program."""
    main = importlib.import_module(module).main
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [module, *arguments])
        try:
            return main(arguments) if inspect.signature(main).parameters else main()
        except SystemExit as end:
            return end.code


def check_arguments(command: Command, block: Block) -> None:
    """Let the program read its arguments, and no more; a name without arguments stands for the program itself."""
    if not command.arguments:
        importlib.import_module(command.module)
        return
    if command.module in SETTINGS and "--help" not in command.arguments:
        SETTINGS[command.module](command.arguments)
        return
    parse = argparse.ArgumentParser.parse_args

    def parse_only(self: argparse.ArgumentParser, *args: Any, **options: Any) -> NoReturn:
        parse(self, *args, **options)
        raise ArgumentsAreFine

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
        try:
            status = call(command.module, command.arguments)
        except ArgumentsAreFine:
            return
    if status:
        raise PageError(f"{block.place}: {command.module} does not take {' '.join(command.arguments)}")


def run_snippet(block: Block, names: dict[str, Any]) -> None:
    try:
        exec(compile(block.text, block.place, "exec"), names)
    except Exception as error:
        raise PageError(f"{block.place}: {type(error).__name__}: {error}") from error


def check_snippet(block: Block, names: dict[str, Any]) -> None:
    """Import what a snippet imports, and compare the keywords of its calls with the signatures of what they call."""
    tree = ast.parse(block.text, block.place)
    imports = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = dict(names)
    exec(compile(ast.Module(imports, []), block.place, "exec"), names)
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        if not isinstance(call.func, (ast.Name, ast.Attribute)):
            continue
        try:
            called = eval(compile(ast.Expression(call.func), block.place, "eval"), dict(names))
            parameters = inspect.signature(called).parameters
        except (NameError, AttributeError, ValueError, TypeError):
            continue  # of an object that the snippet makes
        if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            continue
        for keyword in call.keywords:
            if keyword.arg is not None and keyword.arg not in parameters:
                raise PageError(f"{block.place}: {ast.unparse(call.func)} takes no {keyword.arg!r}")


def check_quotation(block: Block) -> None:
    """The quoted lines stand in their file in this order; a line `...` stands for any that are left out."""
    there = [line.strip() for line in (ROOT / block.quoted).read_text(encoding="utf-8").splitlines()]
    position = 0
    for line in (line.strip() for line in block.text.splitlines()):
        if line in ("", "..."):
            continue
        if line not in there[position:]:
            raise PageError(f"{block.place}: {block.quoted} does not have this line there: {line}")
        position = there.index(line, position) + 1


# -- links ------------------------------------------------------------------------------------------------


def test_links_of_the_front_page_lead_somewhere():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    targets = [target for target in re.findall(r"\]\(([^)]+)\)", text) if not target.startswith("http")]
    assert len(targets) > 10
    for target in targets:
        path, _, anchor = target.partition("#")
        assert (ROOT / path).exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", one).lower().replace(" ", "-") for one in headings}, target


# -- the checks themselves --------------------------------------------------------------------------------


def page(tmp_path: Path, text: str) -> Iterator[Block]:
    path = tmp_path / "page.md"
    path.write_text(text)
    yield from blocks_of(path)


WRONG = {
    "an unknown script": (
        "*Needs weights.*\n```bash\npython tool_ad_control.py A B\n```",
        "no script 'tool_ad_control.py'",
    ),
    "an unknown module": ("*Needs weights.*\n```bash\npython -m cldm.generat A B\n```", "no module 'cldm.generat'"),
    "an unknown option": (
        "*Needs weights.*\n```bash\npython tool_add_control.py A B --overwrite\n```",
        "does not take A B",
    ),
    "an unknown value": ("*Needs weights.*\n```bash\npython tool_convert_control.py A B --to x\n```", "does not take"),
    "an unknown setting": ("*Takes a day.*\n```bash\npython tutorial_train.py step=9\n```", "step"),
    "a value of another type": ("*Takes a day.*\n```bash\npython tutorial_train.py steps=many\n```", "steps"),
    "an unknown command": ("```bash\npython3 start.py trian\n```", "no command 'trian'"),
    "an unknown extra": ("```bash\npip install 'controlnet[nothing]'\n```", "no extra 'nothing'"),
    "an unknown program": ("```bash\nmake all\n```", "unknown program 'make'"),
    "half a command": ("*Takes a day.*\n```bash\npython tutorial_train.py ...\n```", "one whole command"),
    "no language": ("```\npython tutorial_train.py\n```", "no language"),
    "an indented command": ("    python tutorial_train.py\n", "indented block"),
    "no end": ("```bash\npython tutorial_train.py\n", "does not end"),
    "a snippet that fails": ("```python\n1 / 0\n```", "ZeroDivisionError"),
    "an unknown keyword": (
        "*Needs weights.*\n```python\nfrom cldm.model import create_model\ncreate_model('x', weight='y')\n```",
        "create_model takes no 'weight'",
    ),
    "an unknown import": ("*Needs weights.*\n```python\nfrom cldm.model import nothing\n```", "nothing"),
    "code that is no quotation": (
        "*From `cldm/cldm.py`:*\n```python\nhidden = hidden + 1\n```",
        "does not have this line",
    ),
}


@pytest.mark.parametrize("text, message", WRONG.values(), ids=WRONG)
def test_what_is_wrong_in_a_page_is_found(text, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, ImportError), match=message):
        for block in page(tmp_path, text):
            check_block(block, {})


def test_what_is_excused_does_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = "*Needs weights.*\n\n```bash\npython tool_add_control.py A B  # x\n```\n*Takes a day.*\n```python\nopen('x', 'w')\n```"
    for block in page(tmp_path, text):
        assert block.excuse
        check_block(block, {})
    assert [path.name for path in tmp_path.iterdir()] == ["page.md"]


def test_a_command_that_fails_fails(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (block,) = page(tmp_path, "```bash\npython tool_add_control.py nothing.safetensors out.safetensors\n```")
    with pytest.raises(PageError, match="ended with status 2"):
        check_block(block, {})
