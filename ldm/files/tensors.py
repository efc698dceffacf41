"""The lazy tensor, whose shape and dtype are known and whose values are read when asked for; and the open file it is read from."""

from __future__ import annotations

import math
import os
import stat
import threading
from collections import UserDict
from collections.abc import Callable, Container, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.files.errors import CheckpointError, about

# Each dtype's name in a safetensors header, and that of its storage in torch files, which know fewer.
SAFETENSORS_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.complex64: "C64", torch.bool: "BOOL",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8",
}  # fmt: skip
STORAGE_NAMES = {
    torch.float64: "DoubleStorage", torch.float32: "FloatStorage", torch.float16: "HalfStorage",
    torch.bfloat16: "BFloat16Storage", torch.int64: "LongStorage", torch.int32: "IntStorage",
    torch.int16: "ShortStorage", torch.int8: "CharStorage", torch.uint8: "ByteStorage", torch.bool: "BoolStorage",
    torch.complex64: "ComplexFloatStorage", torch.complex128: "ComplexDoubleStorage",
}  # fmt: skip
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (*SAFETENSORS_NAMES, torch.complex128)}
FLOAT_DTYPES = {name: DTYPES[name] for name in ("float32", "float16", "bfloat16")}
_DTYPE_ALIASES = {"fp32": "float32", "fp16": "float16", "half": "float16", "bf16": "bfloat16"}
MAX_DIMENSIONS = 64
MAX_TEXT = 1000  # characters of a key or a name
_MAX_NUMBER = 2**62


@dataclass(frozen=True, eq=False, slots=True)
class LazyTensor:
    """A tensor whose values are read when asked for; `read` gives it on the CPU.

    Attributes:
        gaps: bytes between its numbers in a file, which are read with it.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor] = field(repr=False)
    gaps: int = 0

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    @staticmethod
    def of(tensor: Tensor) -> LazyTensor:
        """A tensor that exists already, of any device."""
        return LazyTensor(tuple(tensor.shape), tensor.dtype, lambda: tensor.detach().cpu())

    def then(
        self, change: Callable[[Tensor], Tensor], shape: tuple[int, ...] | None = None, dtype: torch.dtype | None = None
    ) -> LazyTensor:
        """The tensor changed after it is read, to `shape` and `dtype` if these become others."""
        return LazyTensor(self.shape if shape is None else shape, dtype or self.dtype, lambda: change(self.read()))


Tensors = dict[str, LazyTensor]


def is_size(number: Any) -> bool:
    """Whether what a file gives as a count, size or place may be one."""
    return type(number) is int and 0 <= number < _MAX_NUMBER


def is_shape(numbers: Any, kind: type[list] | type[tuple], product: bool = True) -> bool:
    """Whether what a file gives as a shape, a list or tuple, may be one; strides are no `product`."""
    sizes = type(numbers) is kind and len(numbers) <= MAX_DIMENSIONS and all(map(is_size, numbers))
    return sizes and (not product or math.prod(max(number, 1) for number in numbers) < _MAX_NUMBER)


def parse_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A floating-point dtype by its name, `float32`, `float16` (`fp16`, `half`) or `bfloat16` (`bf16`)."""
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    name = _DTYPE_ALIASES.get(dtype, dtype)
    if name not in FLOAT_DTYPES:
        raise CheckpointError(f"unknown dtype {dtype!r}; known are {', '.join([*FLOAT_DTYPES, *_DTYPE_ALIASES])}")
    return FLOAT_DTYPES[name]


def cast(
    tensors: Mapping[str, Tensor | LazyTensor], dtype: torch.dtype | str | None, keep: Container[str] = ()
) -> Tensors:
    """The floating-point tensors in another dtype, but for the keys in `keep`; reading a value too large for it is an error."""
    wanted = parse_dtype(dtype)

    def convert(key: str, value: Tensor) -> Tensor:
        made = value.to(wanted)
        infinite = ~torch.isfinite(made)
        if infinite.any() and torch.isfinite(value.double()[infinite]).any():
            raise CheckpointError(f"{key!r} has values too large for {wanted}; use bfloat16 or float32")
        return made

    made: Tensors = {}
    for key, given in tensors.items():
        tensor = made[key] = given if isinstance(given, LazyTensor) else LazyTensor.of(given)
        if wanted not in (None, tensor.dtype) and tensor.dtype.is_floating_point and key not in keep:
            made[key] = tensor.then(partial(convert, key), dtype=wanted)
    return made


class OpenFile:
    """Random access to the bytes of one open file; several threads may read it at once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with about(path):
            try:
                if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for a writer
                    raise CheckpointError("not an ordinary file")
            except ValueError as error:  # a zero byte in the name
                raise error if isinstance(error, CheckpointError) else CheckpointError("not a file name") from error
            self.stream = open(path, "rb")  # noqa: SIM115 - closed by the WeightsFile
        self.size = os.fstat(self.stream.fileno()).st_size
        self._lock = threading.Lock()

    def read(self, start: int, count: int) -> bytes:
        """`count` bytes from `start`; fewer only where the file ends."""
        buffer = bytearray(max(0, min(count, self.size - start)))
        self._read_into(start, memoryview(buffer))
        return bytes(buffer)

    def _read_into(self, start: int, buffer: memoryview) -> None:
        """Fill `buffer` from the bytes at `start`."""
        with about(self.path):
            while buffer:
                if self.stream.closed:
                    raise CheckpointError("cannot be read any more: it is closed")
                if hasattr(os, "preadv"):
                    count = os.preadv(self.stream.fileno(), [buffer], start)
                else:  # Windows
                    with self._lock:
                        self.stream.seek(start)
                        count = self.stream.readinto(buffer)
                if not count:
                    raise CheckpointError("ends early; it was changed while being read")
                start, buffer = start + count, buffer[count:]

    def read_tensor(
        self, start: int, dtype: torch.dtype, shape: tuple[int, ...], stride: tuple[int, ...] | None = None
    ) -> Tensor:
        """The tensor whose first number lies at `start`, contiguous in memory of its own.

        Args:
            stride: in the file, counting numbers; without gaps by default.

        Raises:
            CheckpointError: the file is closed, ends early or cannot be read.
        """
        count = math.prod(shape)
        if stride is not None and count:  # from the first number to the last, gaps included
            count = 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
        flat = torch.empty(count, dtype=dtype, device="cpu")  # whatever torch's default device is
        self._read_into(start, flat.view(torch.uint8).numpy().data)
        return flat.view(shape) if stride is None or not count else flat.as_strided(shape, stride).contiguous()


@dataclass(eq=False, repr=False)
class WeightsFile(UserDict[str, LazyTensor]):
    """An open weights file or folder: keys in the file's order, and tensors that are read when asked for.

    Nothing in the file is executed. Use it as a context manager; tensors that were read outlive it.

    Attributes:
        path: the file or folder.
        format: "safetensors", "torch-zip", "torch-legacy", or "folder" (of diffusers).
        data: the tensors by key.
        metadata: texts that a safetensors file carries.
        wrapping: the keys under which the tensors lay, e.g. `("state_dict",)`; not part of the keys here.
        extras: other values beside the tensors, such as `global_step`; a `Placeholder` for what was not built.
        configs: a folder's JSON configurations by component; "" for the folder's own.
        content: the whole object of a torch file, of which the tensors and extras are parts; None for other files.
        foreign: names in the pickle that would have been imported by another reader, and were not.
        opened: what is closed at the end; reading afterwards is an error.
    """

    path: Path
    format: str
    data: Tensors
    metadata: dict[str, str] = field(default_factory=dict)
    wrapping: tuple[str, ...] = ()
    extras: dict[str, Any] = field(default_factory=dict)
    configs: dict[str, dict[str, Any]] = field(default_factory=dict)
    foreign: tuple[str, ...] = ()
    content: dict[str, Any] | None = None
    opened: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> WeightsFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.opened.close()
