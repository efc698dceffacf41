"""What the commands on weights files share: lines that any terminal can show, and one line and a status for a mistake."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import TextIO


def printable(text: str) -> str:
    """The text without the control characters and lone surrogates that names in a file might hold."""
    return "".join(character if character.isprintable() else "?" for character in text)


def show(line: str, stream: TextIO) -> None:
    """Print one line, with `?` for what the stream's encoding cannot express."""
    encoding = stream.encoding or "utf-8"
    print(printable(line).encode(encoding, "replace").decode(encoding), file=stream)


def fail(message: object, program: str = "") -> None:
    """Print an error to stderr as one line, after the program's name."""
    show((f"{program}: " if program else "") + " ".join(str(message).split()), sys.stderr)


def run(program: str, work: Callable[[], Iterable[str]]) -> int:
    """Do the work and print the lines that it returns.

    Returns:
        the exit status: 0, 2 if the work raised an error about its input or output, 130 if it was interrupted.
    """
    try:
        lines = work()
    except (ValueError, OSError) as error:
        fail(error, program)
        return 2
    except KeyboardInterrupt:
        fail("interrupted; nothing was written")
        return 130
    for line in lines:
        show(line, sys.stdout)
    return 0
