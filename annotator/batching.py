"""Pictures in batches through any detector: threads work on one picture each, and their network calls are joined.

Detectors stay written for one picture. A call of the network waits until every enrolled thread waits too (or has
finished its picture); then calls with equal shapes run as one batch, and each thread gets its part.
"""

import functools
import threading
from collections import defaultdict
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

Network = Callable[[Tensor], Any]


class _Call:
    def __init__(self, network: Network, x: Tensor) -> None:
        self.network, self.x = network, x
        self.done, self.result, self.error = False, None, None


class Batcher:
    """Where the threads meet. `with batcher:` enrols a thread while it works on a picture."""

    def __init__(self) -> None:
        self._turn = threading.Condition()
        self._enrolled = 0
        self._waiting: list[_Call] = []

    def __enter__(self) -> "Batcher":
        with self._turn:
            self._enrolled += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._turn:
            self._enrolled -= 1
            self._run_when_all_wait()

    def attach(self, detector: object) -> None:
        """Let the networks that `detector` holds as attributes be called through this batcher."""
        for value in vars(detector).values():
            if isinstance(value, nn.Module):
                value.forward = functools.partial(self.call, value.forward)

    def call(self, network: Network, x: Tensor) -> Any:
        """`network(x)`, run together with the other threads' calls; x and the result's tensors have batches first."""
        call = _Call(network, x)
        with self._turn:
            self._waiting.append(call)
            self._run_when_all_wait()
            while not call.done:
                self._turn.wait()
        if call.error is not None:
            raise call.error
        return call.result

    def _run_when_all_wait(self) -> None:
        if not self._waiting or len(self._waiting) < self._enrolled:
            return
        groups = defaultdict(list)
        for call in self._waiting:
            groups[call.network, call.x.shape[1:], call.x.dtype].append(call)
        for calls in groups.values():
            try:
                with torch.no_grad():
                    result = calls[0].network(torch.cat([call.x for call in calls]))
                start = 0
                for call in calls:
                    call.result = _part(result, start, start + len(call.x))
                    start += len(call.x)
            except Exception as error:  # belongs to the threads that called, not to the one that happens to run them
                for call in calls:
                    call.error = error
        for call in self._waiting:
            call.done = True
        self._waiting.clear()
        self._turn.notify_all()


def _part(result: Any, start: int, end: int) -> Any:
    if isinstance(result, Tensor):
        return result[start:end]
    if isinstance(result, (list, tuple)):
        return type(result)(_part(entry, start, end) for entry in result)
    raise TypeError(f"cannot split a network's {type(result).__name__} into pictures")
