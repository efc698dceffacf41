"""Many pictures: read by threads, grouped by shape for the network, and written by threads, a few of each at a time."""

import logging
import os
import zlib
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

from annotator.registry import Annotator, Hint, Request

logger = logging.getLogger(__name__)

BATCH = 8  # pictures that a network on an accelerator sees at once


class Job(Protocol):
    """Whatever is made of one picture; reports name the picture's file."""

    @property
    def picture(self) -> Any: ...


Read, Write = Callable[[Any], Request], Callable[[Any, Hint], None]
Reports = Iterator[tuple[Any, str | None]]  # a job that is done with None, or with one line that says what went wrong


def usable_cpus() -> int:
    """Processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def seed_of(seed: int | None, name: str) -> int:
    """The seed of one picture among many, 0 to 2**32 - 1, from the seed of all and the picture's name."""
    return zlib.crc32(f"{seed or 0}/{name}".encode())


def run(
    annotator: Annotator,
    jobs: Sequence[Job],
    read: Read,
    write: Write,
    batch: int | None = None,
    workers: int | None = None,
) -> Reports:
    """Do the jobs, and report each when it is done.

    Args:
        annotator: its networks should be loaded (`annotator.detector.load`), or each picture reports what is missing.
        read: what the detector is to be called with for a job; called by several threads, as is `write`.
        write: keeps a job's hint.
        batch: pictures that a network sees at once; if not given, 8 on an accelerator and 1 on the CPU, where batches gain
            nothing. A batch that does not fit into memory is halved.
        workers: threads that read and write; as many as there are processors if not given.
    """
    detector, workers = annotator.detector, workers or usable_cpus()
    pool = ThreadPoolExecutor(workers)

    def work(job: Job) -> None:
        request = read(job)
        write(job, annotator.finish(request, detector.detect(request.view, **request.parameters)))

    try:
        if hasattr(detector, "prepare"):
            batch = batch or (1 if detector.device.type == "cpu" else BATCH)
            yield from _run_network(annotator, jobs, read, write, batch, workers, pool)
        else:
            for job, _, complaint in _ahead(pool, work, jobs, 2 * workers):
                yield job, complaint
    finally:
        pool.shutdown(cancel_futures=True)


def _run_network(
    annotator: Annotator,
    jobs: Sequence[Job],
    read: Read,
    write: Write,
    batch: int,
    workers: int,
    pool: ThreadPoolExecutor,
) -> Reports:
    """Three stations: reading, the network's turn, writing; each holds a few pictures, so that memory stays flat."""
    from torch import stack  # which detectors without a network do without

    detector = annotator.detector
    groups: dict[Any, list] = defaultdict(
        list
    )  # what can be one batch: jobs with their requests and the network's inputs
    writing: deque = deque()

    def encode(job: Job) -> tuple[Request, Any]:
        request = read(job)
        return request, detector.prepare(request.view)

    def write_output(job: Job, request: Request, output: Any) -> None:
        write(job, annotator.finish(request, detector.finish(output, request.view, **request.parameters)))

    def run_group(group: list) -> Reports:
        nonlocal batch
        todo = [group[start : start + batch] for start in range(0, len(group), batch)]
        group.clear()
        while todo:
            part, failure = todo.pop(), None
            try:
                outputs = detector.run(stack([x for _, _, x in part]), **part[0][1].parameters)
            except Exception as err:
                failure = err if len(part) == 1 else str(err)  # a traceback would keep what the network has allocated
            if failure is None:
                for (job, request, _), output in zip(part, outputs, strict=True):
                    writing.append((job, pool.submit(_attempt, write_output, job, request, output)))
            elif len(part) == 1:
                yield part[0][0], _complaint(part[0][0], failure)
            else:
                if "memory" in failure:
                    batch = (len(part) + 1) // 2
                    logger.warning("%d pictures at once do not fit into memory; going on with %d", len(part), batch)
                todo += [part[len(part) // 2 :], part[: len(part) // 2]]

    def written(limit: int) -> Reports:
        while len(writing) > limit:
            job, future = writing.popleft()
            yield job, future.result()[1]

    for job, item, complaint in _ahead(pool, encode, jobs, 2 * batch + workers):
        if complaint:
            yield job, complaint
            continue
        request, x = item
        groups[x.shape, tuple(request.parameters.items())].append((job, request, x))
        largest = max(groups.values(), key=len)
        if (
            len(largest) >= batch or sum(map(len, groups.values())) >= 4 * batch
        ):  # pictures of many shapes must not pile up
            yield from run_group(largest)
        yield from written(2 * batch)
    for group in groups.values():
        yield from run_group(group)
    yield from written(0)


def _ahead(
    pool: ThreadPoolExecutor, work: Callable, jobs: Sequence[Job], count: int
) -> Iterator[tuple[Any, Any, str | None]]:
    """Each job with what the pool has made of it and a complaint, in order; the pool is at most `count` jobs ahead."""
    waiting: deque = deque()
    for job in jobs:
        waiting.append((job, pool.submit(_attempt, work, job)))
        if len(waiting) >= count:
            first, future = waiting.popleft()
            yield first, *future.result()
    for job, future in waiting:
        yield job, *future.result()


def _attempt(work: Callable[..., Any], job: Job, *rest: Any) -> tuple[Any, str | None]:
    """What the work gives, and what went wrong."""
    try:
        return work(job, *rest), None
    except Exception as err:  # one picture must not stop the rest, whatever its trouble is
        return None, _complaint(job, err)


def _complaint(job: Job, err: Exception) -> str:
    logger.debug("%s failed", job.picture, exc_info=err)
    reason = (str(err).strip().splitlines() or [""])[0]
    line = reason if isinstance(err, (ValueError, OSError)) else f"{type(err).__name__}: {reason}"
    return line if str(job.picture) in line else f"{job.picture}: {line}"
