"""The memory that tensors hold, counted as they are made and freed; also of fake tensors, which have no content."""

import weakref
from collections import Counter
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

OTHER = "activations"


class StorageTracker(TorchDispatchMode):
    """Counts the bytes of all storages that live, by part, while it is entered.

    Args:
        device: count only what is there, such as `cuda`.

    Attributes:
        live: bytes by part, now.
        peak: the same at the moment at which their sum was largest.
    """

    def __init__(self, device: str | None = None) -> None:
        super().__init__()
        self.device = device
        self.live: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self._parts: dict[int, tuple[str, int]] = {}  # part and bytes, by storage

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        return out

    def _see(self, tensor: Tensor) -> None:
        if self.device is not None and tensor.device.type != self.device:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._parts:
            self._parts[key] = (OTHER, storage.nbytes())
            self.live[OTHER] += storage.nbytes()
            weakref.finalize(storage, self._forget, key).atexit = False
            if self.live.total() > self.peak.total():
                self.peak = self.live.copy()

    def _forget(self, key: int) -> None:
        part, size = self._parts.pop(key)
        self.live[part] -= size

    def assign(self, part: str, tensors: Iterable[Tensor | None]) -> None:
        """From now on count what these tensors hold under `part`."""
        for tensor in tensors:
            if tensor is None or (self.device is not None and tensor.device.type != self.device):
                continue
            self._see(tensor)
            key = tensor.untyped_storage()._cdata
            before, size = self._parts[key]
            self._parts[key] = (part, size)
            self.live[before] -= size
            self.live[part] += size

    def restart_peak(self) -> None:
        """Forget the peak so far."""
        self.peak = self.live.copy()
