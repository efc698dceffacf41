"""What command lines that run a detector over pictures have in common: its options, its task, and the progress bar."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from tqdm import tqdm

from annotator.folder import HasPicture, Task, run
from annotator.registry import REGISTRY, VERSIONS, Parameter, describe


class Parser(argparse.ArgumentParser):
    """A parser whose errors are for the caller to print: ValueError instead of usage and exit."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def parameters_of(name: str) -> dict[str, Parameter]:
    """The parameters that a condition has in any version."""
    return {p.name: p for (known, _), info in REGISTRY.items() if known == name for p in info.parameters}


def add_detector_options(command: argparse.ArgumentParser, name: str, leave_out: Sequence[str] = ()) -> None:
    """Give `command` the options of the condition `name`: how it runs, and its parameters but for those left out."""
    command.add_argument("--version", choices=VERSIONS, help="ControlNet whose conventions hold")
    command.add_argument("--detect-resolution", type=int, help="shorter side of what the detector sees")
    command.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: the best there is)")
    command.add_argument("--weights", help="weight file, or folder that holds it")
    if describe(name).network:
        command.add_argument("--batch", type=int, help="pictures at once (default: 1 on the CPU, else 8)")
    else:
        command.add_argument("--workers", type=int, help="pictures at once (default: one for each processor)")
    for parameter in parameters_of(name).values():
        option = "--" + parameter.name.replace("_", "-")
        if parameter.name in leave_out:
            continue
        if parameter.kind is bool:
            command.add_argument(option, dest=parameter.name, action="store_const", const=True, help=parameter.help)
        else:
            limits = f"{parameter.minimum:g} to {parameter.maximum:g}"
            default = "" if parameter.default is None else f", default {parameter.default:g}"
            text = f"{parameter.help} ({limits}{default})"
            command.add_argument(option, dest=parameter.name, type=parameter.kind, metavar="N", help=text)


def read_task(args: argparse.Namespace, name: str, kind: type[Task] = Task, **facts: object) -> Task:
    """The task that the options of `add_detector_options` describe, as a `kind` with more `facts`.

    Raises:
        ValueError: for values out of range.
    """
    info = describe(name, args.version)
    for option in ("workers", "batch"):
        value = getattr(args, option, None)
        if value is not None and value < 1:
            raise ValueError(f"--{option} must be at least 1, got {value}")
    check_resolution("--detect-resolution", args.detect_resolution)
    if args.detect_resolution is not None and info.works_at != "detect":
        raise ValueError(f"{name} {info.version} works on the picture itself and takes no --detect-resolution")
    given = {p: value for p in parameters_of(name) if (value := getattr(args, p, None)) is not None}
    return kind(
        name=name,
        version=info.version,
        detect_resolution=args.detect_resolution,
        parameters=info.check_parameters(given),
        device=args.device,
        weights=args.weights,
        **facts,
    )


def check_resolution(option: str, value: int | None) -> None:
    """Refuse a resolution that no detector works at."""
    if value is not None and not 64 <= value <= 8192:
        raise ValueError(f"{option} must lie within 64 and 8192, got {value}")


def run_with_bar(
    program: str,
    args: argparse.Namespace,
    task: Task,
    jobs: Sequence[HasPicture],
    total: int,
    unit: str = "picture",
    processes: bool = True,
) -> set[Path]:
    """Do the jobs under a progress bar of `total`; the pictures that failed, each complained about once, on stderr."""
    failed: set[Path] = set()
    workers, batch = getattr(args, "workers", None), getattr(args, "batch", None)
    with tqdm(total=total, initial=total - len(jobs), desc=task.name, unit=unit, disable=None) as bar:
        for job, complaint in run(task, jobs, workers, batch, processes):
            if complaint and job.picture not in failed:
                failed.add(job.picture)
                tqdm.write(f"{program}: {complaint}", file=sys.stderr)
            bar.update()
    return failed
