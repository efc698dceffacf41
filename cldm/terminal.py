"""Lines for the terminal, from texts that may hold anything, such as names in a file."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO


def printable(text: str) -> str:
    """The text with `?` for control characters and lone surrogates."""
    return "".join(character if character.isprintable() else "?" for character in text)


def show(line: str, stream: TextIO | None = None) -> None:
    """Write one line to the stream, stdout by default, with `?` for what its encoding cannot express.

    Nothing is written where nobody reads it: the stream was closed before the program began, or `head` has seen enough.
    """
    stream = stream or sys.stdout
    if stream is None:
        return
    encoding = stream.encoding or "utf-8"
    try:
        stream.write(printable(line).encode(encoding, "replace").decode(encoding) + "\n")
        stream.flush()
    except BrokenPipeError:  # at its end Python would try once more to write the line
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def fail(message: object, program: str = "") -> None:
    """Write an error to stderr as one line, after the program's name."""
    show((f"{program}: " if program else "") + " ".join(str(message).split()), sys.stderr)


@contextmanager
def quiet(*loggers: str) -> Iterator[None]:
    """Within it the named loggers report errors alone; afterwards they do as before."""
    levels = {name: logging.getLogger(name).level for name in loggers}
    try:
        for name in levels:
            logging.getLogger(name).setLevel(logging.ERROR)
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
