"""The error of everything that can be wrong with a weights file."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_MAX_MESSAGE = 1000  # characters; what a message quotes of a file may be of any length


class CheckpointError(ValueError):
    """A weights file that cannot be read, recognised, used as asked, or written.

    Attributes:
        problem: what is wrong, and what to do.
        path: the file that it is about; None where the code that raises does not know (see `about`).
    """

    def __init__(self, problem: str, path: str | Path | None = None) -> None:
        if len(problem) > _MAX_MESSAGE:
            problem = f"{problem[: _MAX_MESSAGE // 2]} ... {problem[-_MAX_MESSAGE // 2 :]}"
        super().__init__(problem)
        self.problem, self.path = problem, path

    def __str__(self) -> str:
        return self.problem if self.path is None else f"{self.path}: {self.problem}"


class MissingFileError(CheckpointError, FileNotFoundError):
    """There is no such file."""


@contextmanager
def about(path: str | Path, doing: str = "read") -> Iterator[None]:
    """Give errors raised inside the file that they are about; an error of the system becomes a `CheckpointError`."""
    try:
        yield
    except CheckpointError as error:
        error.path = path if error.path is None else error.path
        raise
    except OSError as error:
        if error.errno == errno.ENOENT and doing == "read":
            raise MissingFileError("does not exist", error.filename or path) from error
        raise CheckpointError(f"cannot be {doing}: {error.strerror or error}", path) from error
