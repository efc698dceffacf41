"""Files that are whole or not there, and work that one process does while others wait."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from annotator.pictures import remove_unfinished, whole_file, write_whole

__all__ = ["locked", "remove_unfinished", "sha256_of", "whole_file", "write_whole"]


@contextmanager
def locked(path: str | os.PathLike, wait: bool = True) -> Iterator[None]:
    """Within it no other process is inside `locked(path)`. The lock, a file `.NAME.lock` beside `path`, ends with its process.

    Raises:
        BlockingIOError: another process is inside, and `wait` is false.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        lock.acquire(timeout=-1 if wait else 0)
    except Timeout as error:
        raise BlockingIOError(f"{path} is in use by another process") from error
    try:
        yield
    finally:
        lock.release()


def sha256_of(path: str | os.PathLike) -> str:
    """SHA-256 of a file, or of all files of a folder with their names, in hexadecimal digits."""
    path = Path(path)
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file())
        text = "".join(f"{p.relative_to(path).as_posix()} {sha256_of(p)}\n" for p in files)
        return hashlib.sha256(text.encode()).hexdigest()
    with open(path, "rb") as file:
        if hasattr(hashlib, "file_digest"):  # Python 3.11
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
        return digest.hexdigest()
