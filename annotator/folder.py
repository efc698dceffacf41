"""Conditions of many pictures: reading, writing, and running an annotator over a folder, several pictures at a time."""

import contextlib
import logging
import multiprocessing
import multiprocessing.connection
import os
import signal
import tempfile
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import cv2
import numpy as np
from PIL import Image, ImageOps

from annotator.registry import Annotator, AnnotatorInfo, Hint, describe, load

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
BATCH = 8  # pictures that a network on an accelerator sees at once
SAVED = ("hint", "shown", "map")


def read_image(path: str | os.PathLike) -> np.ndarray:
    """A picture file as uint8: (H, W) if grey, (H, W, 4) if it has transparency, else (H, W, 3) in RGB.

    Turned upright as its EXIF data say; 16-bit grey is reduced to 8 bits.

    Raises:
        ValueError: naming the file, if it is missing, broken, cut off, or of floats.
    """
    try:
        with Image.open(path) as opened:
            picture = ImageOps.exif_transpose(opened)
            if picture.mode.startswith("I"):
                return (np.asarray(picture).clip(0, 2**16 - 1) // 257).astype(np.uint8)
            if picture.mode == "F":
                raise ValueError("it holds floating-point numbers, whose range is unknown")
            if picture.mode in ("1", "L"):
                return np.array(picture.convert("L"))
            return np.array(picture.convert("RGBA" if picture.has_transparency_data else "RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as err:
        reason = (getattr(err, "strerror", None) or str(err)).splitlines()[0]
        raise ValueError(f"cannot read {path} as an image: {reason}") from err


def write_png(path: str | os.PathLike, image: np.ndarray) -> None:
    """Write a uint8 picture (grey, RGB or RGBA) as PNG, whole or not at all; folders are made."""
    path = Path(path)
    if image.ndim == 3:
        image = cv2.cvtColor(image, cv2.COLOR_RGBA2BGRA if image.shape[2] == 4 else cv2.COLOR_RGB2BGR)
    written, data = cv2.imencode(".png", image)
    if not written:
        raise ValueError(f"{path}: a picture of shape {image.shape} cannot be written as PNG")
    write_atomically(path, data.tobytes())


def write_atomically(path: Path, data: bytes) -> None:
    """Write beside the target, then rename, so that nobody ever sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


class HasPicture(Protocol):
    """Whatever is done to one picture: all that `run` needs to know is the file, for its reports."""

    @property
    def picture(self) -> Path: ...


class Job(NamedTuple):
    """A picture and the file that its condition goes to."""

    picture: Path
    target: Path


@dataclass(frozen=True)
class Task:
    """What is done to every picture; see `Annotator.make_hint` for the sizes. A subclass may do something else.

    Attributes:
        saved: "hint" (what a training set holds as source), "shown" (what people look at), or the detector's "map".
    """

    name: str
    version: str | None = None
    resolution: int | None = None
    detect_resolution: int | None = None
    parameters: dict[str, object] = field(default_factory=dict)
    saved: str = "hint"
    device: str | None = None
    weights: str | None = None

    @property
    def info(self) -> AnnotatorInfo:
        return describe(self.name, self.version)

    @property
    def origin(self) -> dict[str, object]:
        """What decides how a map comes out, as a folder of maps notes it; of a weight file that was named, name and size."""
        facts = ("name", "detect_resolution", "parameters")
        origin = {fact: getattr(self, fact) for fact in facts} | {"version": self.info.version}
        if self.weights is not None and os.path.isfile(self.weights):
            origin["weights"] = f"{os.path.basename(self.weights)}, {os.path.getsize(self.weights)} bytes"
        return origin

    def load(self) -> Annotator:
        return load(self.name, self.device, self.weights, self.version)

    def work(self, annotator: Annotator, job: Any) -> None:
        """Do one job; what it raises is reported, and the other jobs go on."""
        hint: Hint = annotator.make_hint(
            read_image(job.picture), self.resolution, self.detect_resolution, **self.parameters
        )
        saved = {"hint": lambda: hint.source, "shown": lambda: hint.shown, "map": lambda: hint.map}[self.saved]()
        write_png(job.target, saved)


def find_pictures(source: Path, target: Path) -> list[Path]:
    """The pictures in a folder and its sub-folders, sorted, but for hidden ones and what lies in `target`.

    Raises:
        ValueError: if there are none.
    """
    own = target.resolve() if target.resolve().is_relative_to(source.resolve()) else None
    found = sorted(
        path
        for path in source.rglob("*")
        if path.suffix.lower() in IMAGE_SUFFIXES
        and not path.name.startswith(".")
        and path.is_file()
        and not (own and path.resolve().is_relative_to(own))
    )
    if not found:
        raise ValueError(f"no pictures in {source} (looked for {' '.join(IMAGE_SUFFIXES)})")
    return found


def find_jobs(source: Path, target: Path) -> list[Job]:
    """The pictures in a folder and its sub-folders, with where each goes: the same name below `target`, as PNG.

    Raises:
        ValueError: if there are none, or two would go to the same file.
    """
    taken: dict[Path, Path] = {}
    for path in find_pictures(source, target):
        goal = target / path.relative_to(source).with_suffix(".png")
        if goal in taken:
            raise ValueError(f"{taken[goal]} and {path} would both become {goal}; rename one of them")
        taken[goal] = path
    return [Job(path, goal) for goal, path in taken.items()]


def usable_cpus() -> int:
    """Processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run(
    task: Task,
    jobs: Sequence[HasPicture],
    workers: int | None = None,
    batch: int | None = None,
    processes: bool = True,
) -> Iterator[tuple[Any, str | None]]:
    """Do the jobs; yield each in the end with None, or with one line that says what went wrong.

    Args:
        workers: processes for a detector without a network; as many as there are processors if not given.
        processes: if False, such workers are threads, which start at once where the program imports much.
        batch: pictures at once for a detector with a network, which runs in this process; if not given, 8 on an
            accelerator and 1 on the CPU, where batches gain nothing.

    Raises:
        annotator.weights.WeightsError: before the first job, if the weights cannot be had.
    """
    if not jobs:
        return
    workers = min(workers or usable_cpus(), len(jobs))
    if task.info.network or workers <= 1 or not processes:
        yield from _run_here(task, jobs, workers, batch)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(task,))
    try:
        chunk = max(1, min(16, len(jobs) // (4 * workers)))
        yield from zip(jobs, pool.map(_work, jobs, chunksize=chunk), strict=True)
    finally:
        pool.shutdown(cancel_futures=True)


def _run_here(
    task: Task, jobs: Sequence[HasPicture], workers: int, batch: int | None
) -> Iterator[tuple[Any, str | None]]:
    annotator = task.load()
    enrolled: contextlib.AbstractContextManager = contextlib.nullcontext()
    if task.info.network:
        from annotator.batching import Batcher

        workers = batch or (1 if annotator.detector.device.type == "cpu" else BATCH)
        annotator.detector.load_for(**task.parameters)
        enrolled = Batcher()
        enrolled.attach(annotator.detector)

    def work(job: HasPicture) -> str | None:
        with enrolled:
            return _attempt(task, annotator, job)

    pool = ThreadPoolExecutor(workers)
    try:
        yield from zip(jobs, pool.map(work, jobs), strict=True)
    finally:
        pool.shutdown(cancel_futures=True)


def _attempt(task: Task, annotator: Annotator, job: HasPicture) -> str | None:
    try:
        task.work(annotator, job)
    except Exception as err:  # one picture must not stop the rest, whatever its trouble is
        logger.debug("%s failed", job.picture, exc_info=True)
        reason = (str(err).strip().splitlines() or [""])[0]
        line = reason if isinstance(err, (ValueError, OSError)) else f"{type(err).__name__}: {reason}"
        return line if str(job.picture) in line else f"{job.picture}: {line}"
    return None


_in_worker: tuple[Task, Annotator]


def _start_worker(task: Task) -> None:
    global _in_worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent alone answers Ctrl-C
    threading.Thread(target=_end_with_parent, daemon=True).start()
    cv2.setNumThreads(1)
    _in_worker = task, task.load()


def _end_with_parent() -> None:
    """End this process when its parent is gone, killed perhaps, without having told it."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


def _work(job: HasPicture) -> str | None:
    return _attempt(*_in_worker, job)
