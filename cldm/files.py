"""Files that are whole or not there, and work that one process does while others wait."""

import hashlib
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout


def write_whole(path: str | os.PathLike, data: bytes) -> None:
    """Write beside the target, flush to the disk, rename: nobody ever sees half a file. Folders are made.

    The temporary name is unique, so that two processes that write the same file do not disturb each other; the last one wins.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


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
