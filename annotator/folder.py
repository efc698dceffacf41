"""Many pictures: read by threads, grouped by shape for the network, and written by threads, a few of each at a time."""

import errno
import logging
import os
import zlib
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from annotator.detector import first_line, printable
from annotator.registry import Annotator, Hint, Request

logger = logging.getLogger(__name__)

BATCH = 8  # pictures that a network on an accelerator sees at once


Job = Any  # whatever is made of one picture; its attribute `picture` is the picture's file, which reports name
Read = Callable[[Job], Request]
Write = Callable[[Job, Hint], None]
Reports = Iterator[tuple[Job, str | None]]  # a job that is done with None, or with one line that says what went wrong


def default_workers() -> int:
    """One for each processor that this process may run on, but at most 8: each has whole photographs in memory."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(usable, 8)


def seed_of(seed: int | None, name: str) -> int:
    """The seed of one picture among many, 0 to 2**32 - 1, from the seed of all and the picture's name."""
    return zlib.crc32(f"{seed or 0}/{name}".encode(errors="surrogateescape"))  # a name may be of any bytes


def run(
    annotator: Annotator, jobs: Sequence[Job], read: Read, write: Write, batch: int | None, workers: int | None
) -> Reports:
    """Do the jobs, and report each when it is done.

    While the network sees one chunk of pictures, threads read the next one and write the one before; so memory stays flat.

    Args:
        annotator: its networks should be loaded (`annotator.detector.load`), or each picture reports what is missing.
        read, write: what the detector is to be called with for a job, and what keeps its hint; called by several threads.
        batch: pictures that a network sees at once; if not given, 8 on an accelerator and 1 on the CPU, where batches gain
            nothing. A batch that does not fit into memory is halved.
        workers: threads; `default_workers` if not given.
    """
    detector: Any = annotator.detector
    has_network = hasattr(detector, "prepare")
    at_once = batch or (BATCH if has_network and detector.device.type != "cpu" else 1)
    workers = workers or default_workers()
    pool = ThreadPoolExecutor(workers)

    def begin(job: Job) -> tuple[Request, Any]:
        """The network's input; without a network, the map."""
        request = read(job)
        if has_network:
            return request, detector.prepare(request.view)
        return request, detector.detect(request.view, **request.parameters)

    def network(group: list) -> list[Any]:
        """The network's outputs, or errors in their place; what fails together is tried again in halves."""
        nonlocal at_once
        from torch import stack  # which detectors without a network do without

        try:
            return detector.run(stack([x for _, _, x in group]), **group[0][1].parameters)
        except Exception as err:
            if len(group) == 1:
                return [err]
            reason = str(err)  # the error itself would keep what the network has allocated
        half = (len(group) + 1) // 2
        if "memory" in reason and half < at_once:
            at_once = half
            logger.warning("%d pictures at once do not fit into memory; going on with %d", len(group), at_once)
        return network(group[:half]) + network(group[half:])

    def end(job: Job, request: Request, output: Any) -> None:
        if isinstance(output, Exception):
            raise output
        if has_network:
            output = detector.finish(output, request.view, **request.parameters)
        write(job, annotator.finish(request, output))

    size = max(4 * at_once, workers)
    chunks = [jobs[start : start + size] for start in range(0, len(jobs), size)]
    ending: deque[tuple[Job, Future]] = deque()
    beginning: list[tuple[Job, Future]] = []
    try:
        for following in [*chunks, []]:
            begun, beginning = beginning, [(job, pool.submit(begin, job)) for job in following]
            groups: dict[Any, list] = defaultdict(list)  # jobs, requests and inputs, by what can be one batch
            for job, future in begun:
                if err := future.exception():
                    yield job, _complaint(job, err)
                else:
                    request, x = future.result()
                    same = (x.shape, *request.parameters.items()) if has_network else None
                    groups[same].append((job, request, x))
            for group in groups.values():
                while group:
                    part, group = group[:at_once], group[at_once:]
                    outputs = network(part) if has_network else [x for _, _, x in part]
                    for (job, request, _), output in zip(part, outputs, strict=True):
                        ending.append((job, pool.submit(end, job, request, output)))
                    while ending and (ending[0][1].done() or len(ending) > size):
                        job, future = ending.popleft()
                        yield job, _complaint(job, future.exception())
        for job, future in ending:
            yield job, _complaint(job, future.exception())
    finally:
        pool.shutdown(cancel_futures=True)


def _complaint(job: Job, err: BaseException | None) -> str | None:
    """What went wrong with one picture, in a line."""
    if err is None:
        return None
    # An interruption, or a full disk, ends all that would follow.
    if not isinstance(err, Exception) or isinstance(err, OSError) and err.errno in (errno.ENOSPC, errno.EDQUOT):
        raise err
    logger.debug("%s failed", job.picture, exc_info=err)
    name = " ".join(str(job.picture).split())  # it may hold a line break
    line = f"{type(err).__name__}: {first_line(err)}"
    if isinstance(err, (ValueError, OSError)) and str(err):
        line = " ".join(str(err).split())
    return printable(line if name in line else f"{name}: {line}")
