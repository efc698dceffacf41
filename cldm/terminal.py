"""Lines for the terminal, from texts that may hold anything, such as names in a file."""

import sys
from typing import TextIO


def printable(text: str) -> str:
    """The text with `?` for control characters and lone surrogates."""
    return "".join(character if character.isprintable() else "?" for character in text)


def show(line: str, stream: TextIO | None = None) -> None:
    """Write one line to the stream, stdout by default, with `?` for what its encoding cannot express."""
    stream = stream or sys.stdout
    encoding = stream.encoding or "utf-8"
    stream.write(printable(line).encode(encoding, "replace").decode(encoding) + "\n")


def fail(message: object, program: str = "") -> None:
    """Write an error to stderr as one line, after the program's name."""
    show((f"{program}: " if program else "") + " ".join(str(message).split()), sys.stderr)
