"""The one error type of everything that can be wrong with a weights file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class CheckpointError(ValueError):
    """A weights file that cannot be read, trusted, recognised or used as asked; the message names the file."""


@contextmanager
def system_errors(path: str | Path, problem: str) -> Iterator[None]:
    """Turn what the system objects to (a name too long, a folder without permission) into a `CheckpointError`."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path}: {problem}: {error.strerror or error}") from error
