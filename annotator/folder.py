"""Many pictures: read by threads, grouped by shape for the network, and written by threads, a few of each at a time."""

import logging
import os
import zlib
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

from annotator.registry import Annotator, Hint, Request

logger = logging.getLogger(__name__)

BATCH = 8  # pictures that a network on an accelerator sees at once


class Job(Protocol):
    """Whatever is made of one picture; reports name the picture's file."""

    @property
    def picture(self) -> Any: ...


def usable_cpus() -> int:
    """Processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def seed_of(seed: int | None, name: str) -> int:
    """The seed of one picture among many, 0 to 2**32 - 1, from the seed of all and the picture's name."""
    return zlib.crc32(f"{seed or 0}/{name}".encode())


def run(
    annotator: Annotator,
    jobs: Sequence[Job],
    read: Callable[[Any], Request],
    write: Callable[[Any, Hint], None],
    batch: int | None = None,
    workers: int | None = None,
) -> Iterator[tuple[Any, str | None]]:
    """Do the jobs; yield each when it is done with None, or with one line that says what went wrong with it.

    Args:
        annotator: its networks should be loaded (`annotator.detector.load`), or each picture reports what is missing.
        read: what the detector is to be called with for a job; called by several threads, as is `write`.
        write: keeps a job's hint.
        batch: pictures that a network sees at once; if not given, 8 on an accelerator and 1 on the CPU, where batches gain
            nothing. A batch that does not fit into memory is halved.
        workers: threads that read and write; as many as there are processors if not given.
    """
    workers = workers or usable_cpus()
    pool = ThreadPoolExecutor(workers)
    try:
        if hasattr(annotator.detector, "prepare"):
            batch = batch or (1 if annotator.detector.device.type == "cpu" else BATCH)
            yield from _run_network(annotator, jobs, read, write, batch, workers, pool)
        else:

            def work(job: Job) -> None:
                request = read(job)
                write(job, annotator.finish(request, annotator.detector.detect(request.view, **request.parameters)))

            for job, (_, complaint) in _ahead(pool, work, jobs, 2 * workers):
                yield job, complaint
    finally:
        pool.shutdown(cancel_futures=True)


def _run_network(
    annotator: Annotator,
    jobs: Sequence[Job],
    read: Callable[[Any], Request],
    write: Callable[[Any, Hint], None],
    batch: int,
    workers: int,
    pool: ThreadPoolExecutor,
) -> Iterator[tuple[Any, str | None]]:
    """Three stations: reading, the network's turn, writing; each holds a few pictures, so that memory stays flat."""
    detector = annotator.detector
    groups: dict[Any, list] = defaultdict(list)  # by shape and what else must be equal: jobs that wait for the network
    writing: deque[tuple[Job, Future]] = deque()

    def encode(job: Job) -> tuple[Request, Any]:
        request = read(job)
        return request, detector.prepare(request.view)

    def write_output(job: Job, request: Request, output: Any) -> None:
        write(job, annotator.finish(request, detector.finish(output, request.view, **request.parameters)))

    def run_group(group: list) -> Iterator[tuple[Any, str | None]]:
        nonlocal batch
        todo = [group]
        while todo:
            part = todo.pop()
            parameters = part[0][1].parameters
            try:
                outputs = detector.run(_stack([x for _, _, x in part]), **parameters)
            except Exception as err:
                if len(part) == 1:
                    yield part[0][0], _complaint(part[0][0], err)
                    continue
                outputs = None
                if "memory" in str(err):
                    batch = max(1, len(part) // 2)
                    logger.warning("a batch of %d does not fit into memory; going on with %d", len(part), batch)
            if outputs is None:  # outside of `except`, whose traceback keeps what the network has allocated
                todo += [part[len(part) // 2 :], part[: len(part) // 2]]
                continue
            for (job, request, _), output in zip(part, outputs, strict=True):
                writing.append((job, pool.submit(_attempt, write_output, job, request, output)))

    def written(limit: int) -> Iterator[tuple[Any, str | None]]:
        while len(writing) > limit:
            job, future = writing.popleft()
            yield job, future.result()[1]

    for job, (item, complaint) in _ahead(pool, encode, jobs, 2 * batch + workers):
        if complaint:
            yield job, complaint
            continue
        request, x = item
        group = groups[x.shape, tuple(request.parameters.items())]
        group.append((job, request, x))
        if len(group) < batch and sum(map(len, groups.values())) > 4 * batch:
            group = max(groups.values(), key=len)  # pictures of many shapes must not pile up
        if len(group) >= batch or sum(map(len, groups.values())) > 4 * batch:
            whole, group[:] = list(group), []
            yield from run_group(whole)
        yield from written(2 * batch)
    for group in groups.values():
        for start in range(0, len(group), batch):
            yield from run_group(group[start : start + batch])
            yield from written(2 * batch)
    yield from written(0)


def _stack(tensors: list) -> Any:
    import torch

    return torch.stack(tensors)


def _ahead(
    pool: ThreadPoolExecutor, work: Callable[[Any], Any], jobs: Iterable[Job], count: int
) -> Iterator[tuple[Any, tuple[Any, str | None]]]:
    """Each job with what the pool has made of it, or a complaint, in order; the pool is at most `count` jobs ahead."""
    waiting: deque[tuple[Job, Future]] = deque()
    for job in jobs:
        waiting.append((job, pool.submit(_attempt, work, job)))
        if len(waiting) >= count:
            job, future = waiting.popleft()
            yield job, future.result()
    for job, future in waiting:
        yield job, future.result()


def _attempt(work: Callable[..., Any], job: Job, *rest: Any) -> tuple[Any, str | None]:
    """What the work gives, or a line about what went wrong."""
    try:
        return work(job, *rest), None
    except Exception as err:  # one picture must not stop the rest, whatever its trouble is
        return None, _complaint(job, err)


def _complaint(job: Job, err: Exception) -> str:
    logger.debug("%s failed", job.picture, exc_info=err)
    reason = (str(err).strip().splitlines() or [""])[0]
    line = reason if isinstance(err, (ValueError, OSError)) else f"{type(err).__name__}: {reason}"
    return line if str(job.picture) in line else f"{job.picture}: {line}"
