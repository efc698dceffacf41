"""One run of the pipeline in a thread of its own, with its steps as they come; it can be stopped, and nobody has to wait for its end."""

import queue
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np

from cldm.pipeline import ControlPipeline
from cldm.results import Pictures
from controlnet.app.models import untrained_controls

_POLL = 0.2  # seconds between looks at the wish to stop


class Stopped(Exception):
    """The run was stopped before its end."""


@dataclass(frozen=True)
class Begun:
    """The model is there. `untrained` are the numbers of the ControlNets that change nothing."""

    untrained: list[int]


@dataclass(frozen=True)
class Step:
    """A step is done: its number from 1, and what is predicted so far, uint8 (N, h, w, 3)."""

    number: int
    preview: np.ndarray


def sample(
    model: AbstractContextManager[ControlPipeline], arguments: dict[str, Any], stop: threading.Event
) -> Iterator[Begun | Step | Pictures]:
    """What happens while `pipeline(**arguments)` runs, its result last.

    The thread enters and leaves `model` itself, so that others get the model even when this iterator is forgotten.

    Raises:
        Stopped: `stop` was set. Whatever the pipeline raises is raised here, too.
    """
    events: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def look(step: int) -> None:
        if stop.is_set():
            raise Stopped

    def show(step: int, preview: np.ndarray) -> None:
        events.put(Step(step + 1, preview))

    def work() -> None:
        try:
            look(0)
            with model as pipeline:
                look(0)
                events.put(Begun(untrained_controls(pipeline)))
                events.put(pipeline(**arguments, callback=look, preview=show))
        except BaseException as error:
            events.put(error)

    threading.Thread(target=work, name="sampling", daemon=True).start()
    try:
        while True:
            try:
                event = events.get(timeout=_POLL)
            except queue.Empty:
                if stop.is_set():
                    raise Stopped from None  # the thread ends after the step at hand; nobody has to wait for that
                continue
            if isinstance(event, BaseException):
                raise event
            yield event
            if isinstance(event, Pictures):
                return
    finally:
        stop.set()


class Stops:
    """The wish to stop, by session: a browser's tab stops its own runs and no others."""

    def __init__(self) -> None:
        self._events: dict[str, set[threading.Event]] = {}
        self._lock = threading.Lock()

    def new(self, session: str) -> threading.Event:
        event = threading.Event()
        with self._lock:
            self._events.setdefault(session, set()).add(event)
        return event

    def set(self, session: str) -> bool:
        """Stop the session's runs; whether there were any."""
        with self._lock:
            events = self._events.pop(session, set())
        for event in events:
            event.set()
        return bool(events)

    def done(self, session: str, event: threading.Event) -> None:
        """Forget a run that has ended."""
        with self._lock:
            self._events.get(session, set()).discard(event)
            if not self._events.get(session, True):
                del self._events[session]
