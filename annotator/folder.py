"""Many pictures: read by threads, grouped by shape for the network, and written by threads, a few of each at a time."""

import logging
import os
import zlib
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

from annotator.detector import first_line
from annotator.registry import Annotator, Hint, Request

logger = logging.getLogger(__name__)

BATCH = 8  # pictures that a network on an accelerator sees at once


class Job(Protocol):
    """Whatever is made of one picture; reports name the picture's file."""

    @property
    def picture(self) -> Any: ...


Read = Callable[[Any], Request]
Write = Callable[[Any, Hint], None]
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
    detector: Any = annotator.detector
    workers = workers or usable_cpus()
    pool = ThreadPoolExecutor(workers)

    def detect_and_write(job: Job) -> None:
        request = read(job)
        write(job, annotator.finish(request, detector.detect(request.view, **request.parameters)))

    try:
        if hasattr(detector, "prepare"):
            batch = batch or (1 if detector.device.type == "cpu" else BATCH)
            yield from _run_network(annotator, jobs, read, write, batch, 2 * batch + workers, pool)
        else:
            for job, done in _ahead(jobs, lambda job: pool.submit(detect_and_write, job), 2 * workers):
                yield job, _complaint(job, done.exception())
    finally:
        pool.shutdown(cancel_futures=True)


def _run_network(
    annotator: Annotator,
    jobs: Sequence[Job],
    read: Read,
    write: Write,
    batch: int,
    ahead: int,
    pool: ThreadPoolExecutor,
) -> Reports:
    """Three stations: reading, the network's turn, writing; each holds a few pictures, so that memory stays flat."""
    from torch import stack  # which detectors without a network do without

    detector: Any = annotator.detector
    groups: dict[Any, list] = defaultdict(list)  # jobs, requests and network inputs, by what can be one batch
    writing: deque[tuple[Job, Future]] = deque()

    def encode(job: Job) -> tuple[Request, Any]:
        request = read(job)
        return request, detector.prepare(request.view)

    def decode_and_write(job: Job, request: Request, output: Any) -> None:
        if isinstance(output, Exception):
            raise output
        write(job, annotator.finish(request, detector.finish(output, request.view, **request.parameters)))

    def outputs(group: list) -> list[Any]:
        """The network's outputs, or errors in their place; what fails together is tried again in halves."""
        nonlocal batch
        try:
            return detector.run(stack([x for _, _, x in group]), **group[0][1].parameters)
        except Exception as err:
            if len(group) == 1:
                return [err]
            reason = str(err)  # the error itself would keep what the network has allocated
        half = (len(group) + 1) // 2
        if "memory" in reason and half < batch:
            batch = half
            logger.warning("%d pictures at once do not fit into memory; going on with %d", len(group), batch)
        return outputs(group[:half]) + outputs(group[half:])

    def run_group(group: list) -> Reports:
        for start in range(0, len(group), batch):
            part = group[start : start + batch]
            for (job, request, _), output in zip(part, outputs(part), strict=True):
                writing.append((job, pool.submit(decode_and_write, job, request, output)))
        group.clear()
        yield from written(2 * batch)

    def written(limit: int) -> Reports:
        while len(writing) > limit:
            job, future = writing.popleft()
            yield job, _complaint(job, future.exception())

    for job, found in _ahead(jobs, lambda job: pool.submit(encode, job), ahead):
        if err := found.exception():
            yield job, _complaint(job, err)
            continue
        request, x = found.result()
        groups[x.shape, tuple(request.parameters.items())].append((job, request, x))
        largest = max(groups.values(), key=len)
        # Pictures of many shapes must not pile up.
        if len(largest) >= batch or sum(map(len, groups.values())) >= 4 * batch:
            yield from run_group(largest)
    for group in groups.values():
        yield from run_group(group)
    yield from written(0)


def _ahead(jobs: Iterable[Job], submit: Callable[[Job], Future], count: int) -> Iterator[tuple[Job, Future]]:
    """The jobs in order, each with its future when that is done; at most `count` are submitted at a time."""
    waiting: deque[tuple[Job, Future]] = deque()
    for job in jobs:
        waiting.append((job, submit(job)))
        if len(waiting) >= count:
            yield waiting.popleft()
    yield from waiting


def _complaint(job: Job, err: BaseException | None) -> str | None:
    """What went wrong with one picture, in a line."""
    if err is None:
        return None
    logger.debug("%s failed", job.picture, exc_info=err)
    line = first_line(err) if isinstance(err, (ValueError, OSError)) else f"{type(err).__name__}: {first_line(err)}"
    return line if str(job.picture) in line else f"{job.picture}: {line}"
