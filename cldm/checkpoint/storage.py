"""Where a tensor lies in a file, and getting it from there."""

from __future__ import annotations

import math
import mmap
import os
import stat
import threading
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cldm.checkpoint.errors import CheckpointError


class FileBytes:
    """Random access to the bytes of one open file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            if not stat.S_ISREG(os.stat(path).st_mode):
                raise CheckpointError("not an ordinary file")
            self._file = open(path, "rb", buffering=0)  # noqa: SIM115 - closed by close()
        except FileNotFoundError:
            raise CheckpointError("does not exist") from None
        except OSError as error:
            raise CheckpointError(f"cannot be opened: {error.strerror or error}") from error
        self.size = os.fstat(self._file.fileno()).st_size
        self._lock = threading.Lock()
        self._mapping: mmap.mmap | None = None

    def read(self, start: int, count: int) -> bytes:
        """`count` bytes from `start`; fewer only where the file ends."""
        count = max(0, min(count, self.size - start))
        buffer = bytearray(count)
        self.read_into(start, memoryview(buffer))
        return bytes(buffer)

    def read_into(self, start: int, buffer: memoryview) -> None:
        """Fill `buffer` from the bytes at `start`.

        Raises:
            CheckpointError: the file is closed, ends early or cannot be read.
        """
        done = 0
        try:
            while done < len(buffer):
                count = self._read_some(start + done, buffer[done:])
                if not count:
                    raise CheckpointError(f"{self.path}: ends early; it was changed while being read")
                done += count
        except CheckpointError:
            raise
        except (OSError, ValueError) as error:  # ValueError: the file is closed
            raise CheckpointError(f"{self.path}: cannot be read: {error}") from error

    def _read_some(self, start: int, buffer: memoryview) -> int:
        if hasattr(os, "preadv"):  # several threads read at once
            return os.preadv(self._file.fileno(), [buffer], start)
        with self._lock:
            self._file.seek(start)
            return self._file.readinto(buffer) or 0

    def fileno(self) -> int:
        """The system's number of the open file.

        Raises:
            CheckpointError: it is closed.
        """
        try:
            return self._file.fileno()
        except ValueError as error:
            raise CheckpointError(f"{self.path}: cannot be read: {error}") from error

    def map(self) -> mmap.mmap:
        """The whole file as memory: read when touched, and copied, not written, when changed."""
        with self._lock:
            if self._mapping is None:
                try:
                    self._mapping = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_COPY)
                except (OSError, ValueError) as error:
                    raise CheckpointError(f"{self.path}: cannot be mapped into memory: {error}") from error
            return self._mapping

    def close(self) -> None:
        self._file.close()
        self._mapping = None  # tensors made from it keep it alive


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor in a file: `start` is the byte of its first element, `stride` counts elements."""

    file: FileBytes
    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    @property
    def contiguous(self) -> bool:
        return all(
            n == 1 or step == expected
            for n, step, expected in zip(self.shape, self.stride, contiguous_stride(self.shape), strict=True)
        )

    @property
    def reach(self) -> int:
        """Elements from the first to the last, gaps included."""
        return 1 + sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True)) if self.numel else 0

    def read_into(self, out: Tensor) -> None:
        """Fill a tensor of the same shape; straight from the file where dtype and memory layout allow it."""
        if self.contiguous and out.dtype == self.dtype and out.is_contiguous() and out.device.type == "cpu":
            if self.numel:
                self.file.read_into(self.start, memoryview(out.detach().view(-1).view(torch.uint8).numpy()))
        else:
            with torch.no_grad():
                out.copy_(self.read())

    def read(self) -> Tensor:
        """The tensor in memory of its own, contiguous."""
        if self.contiguous:
            out = torch.empty(self.shape, dtype=self.dtype)
            self.read_into(out)
            return out
        flat = torch.empty(self.reach, dtype=self.dtype)
        if self.numel:
            self.file.read_into(self.start, memoryview(flat.view(torch.uint8).numpy()))
        return flat.as_strided(self.shape, self.stride).contiguous()

    def map(self) -> Tensor:
        """The tensor as a view of the mapped file; read where its bytes are not aligned for its dtype."""
        if not self.numel or self.start % self.dtype.itemsize:
            return self.read()
        flat = torch.frombuffer(self.file.map(), dtype=self.dtype, count=self.reach, offset=self.start)
        return flat.as_strided(self.shape, self.stride)


def contiguous_stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides, in elements, of a tensor without gaps whose last dimension is innermost."""
    strides, step = [], 1
    for n in reversed(shape):
        strides.append(step)
        step *= max(n, 1)
    return tuple(reversed(strides))
