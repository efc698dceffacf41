"""The commands and snippets of the pages: which there are, and what a command runs.

Every fenced block of README.md and docs/*.md says its language. Blocks of `bash` and `python` are executed by
tests/docs/test_pages.py, page by page and in their order, unless the line above says in italics why not:

    *Needs weights.*                      and the like, beginning with Needs, Takes or Runs: options and names are checked only
    *From `cldm/cldm.py`:*                a quotation: these lines are in that file

A comment above the block, which readers do not see, makes a long command short in the tests: `<!-- in tests: steps=2 -->` adds these
arguments to it.
"""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# `text` is what a command prints, or a file holds.
LANGUAGES = ("bash", "python", "text", "json", "yaml", "math")

_FENCE = re.compile(r"^( *)```(.*)$")
_EXCUSE = re.compile(r"^\*((?:Needs|Takes|Runs) .+\.)\*$")
_QUOTATION = re.compile(r"^\*From `([^`]+)`:\*$")
_SHORTER = re.compile(r"^<!-- in tests: (.+) -->$")


class PageError(ValueError):
    """A page that cannot be checked, or a command in it that is wrong."""


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        place: page and line, for messages.
        excuse: why the tests do not execute it; empty where they do.
        quoted: the file that it is taken from, relative to the repository; empty if it is no quotation.
        shorter: arguments that the tests add to its commands.
    """

    place: str
    language: str
    text: str
    excuse: str = ""
    quoted: str = ""
    shorter: tuple[str, ...] = ()


def blocks_of(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order.

    Raises:
        PageError: a block without a known language, one that does not end, or a command in an indented block, where it would not be
            checked.
    """
    blocks: list[Block] = []
    lines = page.read_text(encoding="utf-8").splitlines()
    start: int | None = None
    indent = language = ""
    for number, line in enumerate(lines):
        fence = _FENCE.match(line)
        place = f"{page.name}:{number + 1}"
        if start is None and fence:
            start, indent, language = number, *fence.groups()
            if language not in LANGUAGES:
                raise PageError(
                    f"{place}: a block of {language or 'no language'}; one of {', '.join(LANGUAGES)} is known"
                )
        elif start is None and re.match(r" {4,}(\w+=\S+ )*(python3? |pip |controlnet |apt-get )", line):
            raise PageError(f"{place}: a command in an indented block is not checked; put it between fences")
        elif start is not None and fence and not fence[2]:
            text = "\n".join(one.removeprefix(indent) for one in lines[start + 1 : number])
            blocks.append(Block(f"{page.name}:{start + 1}", language, text, **_remarks(lines[:start])))
            start = None
    if start is not None:
        raise PageError(f"{page.name}:{start + 1}: the block does not end")
    return blocks


def commands_in_text(page: Path) -> list[Block]:
    """The commands that stand between backticks in sentences and tables; names in capitals stand for files of the reader's."""
    text = re.sub(r"^ *```.*?^ *```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    found = re.findall(r"`((?:python3?|torchrun|controlnet|pip) [^`]+)`", text)
    return [Block(page.name, "bash", " ".join(command.split()), "Stands in a sentence.") for command in found]


def _remarks(before: list[str]) -> dict[str, str | tuple[str, ...]]:
    """What the lines directly above a block say about it; there may be an empty one between."""
    found: dict[str, str | tuple[str, ...]] = {}
    for line in reversed(before):
        line = line.strip()
        if excuse := _EXCUSE.match(line):
            found["excuse"] = excuse[1]
        elif quotation := _QUOTATION.match(line):
            found["quoted"] = quotation[1]
        elif shorter := _SHORTER.match(line):
            found["shorter"] = tuple(shlex.split(shorter[1]))
        elif line:
            break
    return found


@dataclass(frozen=True)
class Command:
    """A command of this project: `main(arguments)` of a module."""

    module: str
    arguments: list[str]


def commands_of(block: Block) -> list[Command]:
    """The commands of a `bash` block that run something of this project; others are looked at, and left out.

    Raises:
        PageError: a program, script, module, extra or subcommand that does not exist.
    """
    text = block.text.replace("\\\n", " ")
    found = [_command(shlex.split(line, comments=True), block) for line in text.splitlines()]
    return [command for command in found if command is not None]


def _command(words: list[str], block: Block) -> Command | None:
    while words and re.match(r"\w+=", words[0]):  # a variable of the environment
        words = words[1:]
    if not words:
        return None
    program, *words = words
    if ">" in words[-2:]:  # what it prints goes into a file
        words = words[:-2]
    if {"|", "&&", ";", ">", "..."} & set(words):
        raise PageError(f"{block.place}: one whole command a line, please: {' '.join(words)}")
    if program == "srun":
        return _command(words, block)
    if program == "torchrun":
        while words and words[0].startswith("--"):
            words = words[1:]
        program = "python"
    if program == "pip":
        return _check_pip(words, block)
    if program in ("source", "git", "cd", "mkdir", "apt-get", "mkdocs"):
        return None
    if program == "controlnet":
        from controlnet.command import SUBCOMMANDS

        if not words or words[0].startswith("-"):
            return Command("controlnet.command", words)
        if words[0].isupper():  # any of them
            return None
        if words[0] not in SUBCOMMANDS:
            raise PageError(f"{block.place}: there is no subcommand {words[0]!r}")
        return Command(SUBCOMMANDS[words[0]].module, words[1:])
    if program not in ("python", "python3") or not words:
        raise PageError(f"{block.place}: unknown program {program!r}")
    if words[0] == "-m":
        return _check_module(words[1], words[2:], block)
    if words[0] == "start.py":
        return _check_start(words[1:], block)
    if not (ROOT / words[0]).is_file() or not words[0].endswith(".py"):
        raise PageError(f"{block.place}: there is no script {words[0]!r}")
    return Command(words[0].removesuffix(".py").replace("/", "."), words[1:])


def _check_module(module: str, arguments: list[str], block: Block) -> Command | None:
    if module in ("pip", "mkdocs", "jupyter", "pytest"):
        return None
    path = ROOT / module.replace(".", "/")
    if path.is_dir() and (path / "__main__.py").is_file():
        return Command(f"{module}.__main__", arguments)
    if not path.with_suffix(".py").is_file():
        raise PageError(f"{block.place}: there is no module {module!r}")
    return Command(module, arguments)


def _check_start(words: list[str], block: Block) -> Command | None:
    if not words or f"python3 start.py {words[0]} " not in (ROOT / "start.py").read_text(encoding="utf-8"):
        raise PageError(f"{block.place}: start.py has no command {' '.join(words[:1])!r}")
    return Command("tutorial_train", words[1:]) if words[0] == "train" else None


def _check_pip(words: list[str], block: Block) -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for extras in re.findall(r"(?:controlnet|\.)\[([\w,]+)\]", " ".join(words)):
        for extra in extras.split(","):
            if f"\n{extra} = [" not in project:
                raise PageError(f"{block.place}: this project has no extra {extra!r}")
