"""The lazy tensor: its shape and dtype are known, its values are read when asked for."""

from __future__ import annotations

import math
import os
import stat
import threading
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path

import torch
from torch import Tensor

from ldm.files.errors import CheckpointError, about

# Each dtype's name in torch, in a safetensors header, and that of its storage in torch files ("-" where there is none).
_NAMES = """
    float64 F64 DoubleStorage,       float32 F32 FloatStorage,      float16 F16 HalfStorage,
    bfloat16 BF16 BFloat16Storage,   float8_e4m3fn F8_E4M3 -,       float8_e5m2 F8_E5M2 -,
    int64 I64 LongStorage,           int32 I32 IntStorage,          int16 I16 ShortStorage,
    int8 I8 CharStorage,             uint8 U8 ByteStorage,          bool BOOL BoolStorage,
    uint64 U64 -,                    uint32 U32 -,                  uint16 U16 -,
    complex64 C64 ComplexFloatStorage,                              complex128 - ComplexDoubleStorage
"""
_ROWS = [row.split() for row in _NAMES.split(",")]
DTYPES: dict[str, torch.dtype] = {row[0]: getattr(torch, row[0]) for row in _ROWS if hasattr(torch, row[0])}
SAFETENSORS_NAMES = {DTYPES[row[0]]: row[1] for row in _ROWS if row[0] in DTYPES and row[1] != "-"}
STORAGE_NAMES = {DTYPES[row[0]]: row[2] for row in _ROWS if row[0] in DTYPES and row[2] != "-"}

FLOAT_DTYPES = {name: DTYPES[name] for name in ("float32", "float16", "bfloat16")}
_DTYPE_ALIASES = {"fp32": "float32", "fp16": "float16", "half": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True, eq=False)
class LazyTensor:
    """A tensor whose values are read when asked for; `read` gives it on the CPU."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor] = field(repr=False)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    @staticmethod
    def of(tensor: Tensor | LazyTensor) -> LazyTensor:
        """A tensor that exists already, of any device."""
        if isinstance(tensor, LazyTensor):
            return tensor
        return LazyTensor(tuple(tensor.shape), tensor.dtype, lambda: tensor.detach().cpu())

    def then(self, change: Callable[[Tensor], Tensor], shape: tuple[int, ...] | None = None) -> LazyTensor:
        """The tensor changed after it is read, to `shape` if that becomes another."""
        return LazyTensor(self.shape if shape is None else shape, self.dtype, lambda: change(self.read()))


Tensors = dict[str, LazyTensor]


def computed(formula: Callable[..., Tensor], *tensors: LazyTensor) -> LazyTensor:
    """A formula of tensors of one shape, computed in float32 at least; the result has the widest of their dtypes."""
    # torch has no common dtype of a float of one byte and another
    dtypes = (torch.float32 if t.dtype.is_floating_point and t.dtype.itemsize == 1 else t.dtype for t in tensors)
    dtype = reduce(torch.promote_types, dtypes)
    wide = torch.promote_types(dtype, torch.float32)
    return LazyTensor(tensors[0].shape, dtype, lambda: formula(*(t.read().to(wide) for t in tensors)).to(dtype))


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

    def changed(key: str, tensor: LazyTensor) -> LazyTensor:
        if wanted is None or wanted == tensor.dtype or not tensor.dtype.is_floating_point or key in keep:
            return tensor

        def read() -> Tensor:
            value = tensor.read()
            made = value.to(wanted)
            if not torch.isfinite(made).all() and torch.isfinite(value).all():
                raise CheckpointError(f"{key!r} has values too large for {wanted}; use bfloat16 or float32")
            return made

        return LazyTensor(tensor.shape, wanted, read)

    return {key: changed(key, LazyTensor.of(tensor)) for key, tensor in tensors.items()}


class OpenFile:
    """Random access to the bytes of one open file; several threads may read it at once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with about(path):
            try:
                if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for a writer
                    raise CheckpointError("not an ordinary file")
            except ValueError as error:
                raise error if isinstance(error, CheckpointError) else CheckpointError("not a file name") from error
            self.stream = open(path, "rb")  # noqa: SIM115 - closed by the WeightsFile
        self.size = os.fstat(self.stream.fileno()).st_size
        self._lock = threading.Lock()

    def read(self, start: int, count: int) -> bytes:
        """`count` bytes from `start`; fewer only where the file ends."""
        buffer = bytearray(max(0, min(count, self.size - start)))
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
                    raise CheckpointError("ends early; it was changed while being read", self.path)
                done += count
        except CheckpointError:
            raise
        except (OSError, ValueError) as error:  # ValueError: the file is closed
            raise CheckpointError(f"cannot be read: {error}", self.path) from error

    def _read_some(self, start: int, buffer: memoryview) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self.stream.fileno(), [buffer], start)
        with self._lock:
            self.stream.seek(start)
            return self.stream.readinto(buffer) or 0

    def read_tensor(
        self, start: int, dtype: torch.dtype, shape: tuple[int, ...], stride: tuple[int, ...] | None = None
    ) -> Tensor:
        """The tensor whose first number lies at `start`, contiguous in memory of its own.

        Args:
            stride: in the file, counting numbers; without gaps by default.
        """
        count = math.prod(shape)
        if count and stride is not None:  # from the first number to the last, gaps included
            count = 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
        flat = torch.empty(count, dtype=dtype)
        if count:
            self.read_into(start, memoryview(flat.view(torch.uint8).numpy()))
        return flat.view(shape) if stride is None or not count else flat.as_strided(shape, stride).contiguous()
