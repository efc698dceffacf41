"""Entries that are described now and made when asked for, so that a conversion holds one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path

import torch
from torch import Tensor

from cldm.checkpoint.errors import CheckpointError
from cldm.checkpoint.reading import Checkpoint, TensorInfo
from cldm.checkpoint.storage import Entry


@dataclass(frozen=True)
class LazyTensor:
    """A tensor to be.

    Attributes:
        info: its shape and dtype.
        read: how to get it.
        stored: where its bytes lie in a file, if they lie there as they are; they can then be copied without it.
    """

    info: TensorInfo
    read: Callable[[], Tensor]
    stored: Entry | None = None

    def then(self, change: Callable[[Tensor], Tensor], shape: tuple[int, ...] | None = None) -> LazyTensor:
        """The same tensor changed after it is read, to `shape` if that becomes another."""
        info = self.info if shape is None else replace(self.info, shape=shape)
        return LazyTensor(info, lambda: change(self.read()))


Entries = dict[str, LazyTensor]


class LazyEntries(Mapping[str, Tensor]):
    """Lazy tensors as a mapping from key to tensor, with `info` and `read_into` as an open checkpoint has them.

    `path` is where they come from, for messages.
    """

    def __init__(self, entries: Mapping[str, LazyTensor], path: str | Path = "") -> None:
        self._entries = dict(entries)
        self.path = path

    def __getitem__(self, key: str) -> Tensor:
        return self._entries[key].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: object) -> bool:
        return key in self._entries

    def lazy(self, key: str) -> LazyTensor:
        """The entry itself, not read yet."""
        return self._entries[key]

    def info(self, key: str) -> TensorInfo:
        """Shape and dtype, without making the tensor."""
        return self._entries[key].info

    def read_into(self, key: str, out: Tensor) -> None:
        """Fill `out` with the tensor, converting where dtype or device differ; straight from the file where it can be.

        Raises:
            CheckpointError: `out` has another shape.
        """
        entry = self._entries[key]
        if tuple(out.shape) != entry.info.shape:
            raise CheckpointError(
                f"{self.path}: entry {key!r} has shape {list(entry.info.shape)}, its place has {list(out.shape)}"
            )
        if entry.stored is not None:
            entry.stored.read_into(out)
        else:
            with torch.no_grad():
                out.copy_(entry.read())


def lazy_entries(source: Mapping[str, Tensor]) -> Entries:
    """The entries of an open checkpoint, of `LazyEntries` or of a plain state dict."""
    return {key: _lazy(source, key) for key in source}


def _lazy(source: Mapping[str, Tensor], key: str) -> LazyTensor:
    if isinstance(source, LazyEntries):
        return source.lazy(key)
    if not isinstance(source, Checkpoint):
        return constant(source[key])
    entry = source.entry(key)
    return LazyTensor(source.info(key), entry.read, entry if entry.contiguous else None)


def computed(formula: Callable[..., Tensor], *entries: LazyTensor) -> LazyTensor:
    """A formula of entries of one shape, computed in float32 at least, in the widest of their dtypes."""
    # torch has no common dtype of a float of one byte and another
    dtypes = [torch.float32 if dtype.is_floating_point and dtype.itemsize == 1 else dtype
              for dtype in (entry.info.dtype for entry in entries)]  # fmt: skip
    dtype = reduce(torch.promote_types, dtypes)
    wide = torch.promote_types(dtype, torch.float32)
    info = TensorInfo(entries[0].info.shape, dtype)
    return LazyTensor(info, lambda: formula(*(entry.read().to(wide) for entry in entries)).to(dtype))


def constant(value: Tensor) -> LazyTensor:
    """A tensor that exists already."""
    return LazyTensor(TensorInfo(tuple(value.shape), value.dtype), lambda: value)


def zeros(info: TensorInfo) -> LazyTensor:
    """Zeros, made when asked for."""
    return LazyTensor(info, lambda: torch.zeros(info.shape, dtype=info.dtype))
