"""What command lines that run a detector over pictures have in common: its options, and the progress bar."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from tqdm import tqdm

from annotator.detector import VERSIONS
from annotator.folder import Read, Write, run
from annotator.registry import REGISTRY, Annotator, AnnotatorInfo, describe, load


class RaisingParser(argparse.ArgumentParser):
    """A parser whose errors are for the caller to print: ValueError instead of usage and exit."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def not_empty(text: str) -> str:
    """The type of an argument that names a file or folder; an empty one, as of a variable that is not set, is refused."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty; give a file or a folder")
    return text


def named_path(text: str) -> Path:
    """The same as a path: an empty one would be the folder one is in."""
    return Path(not_empty(text))


def versions_of(name: str) -> list[AnnotatorInfo]:
    """The condition `name` in every version that has it."""
    return [info for (known, _), info in REGISTRY.items() if known == name]


def add_detector_options(command: argparse.ArgumentParser, name: str, leave_out: Sequence[str] = ()) -> None:
    """Give `command` the options of the condition `name`: how it runs, and its parameters but for those left out."""
    infos = versions_of(name)
    command.set_defaults(detect_resolution=None, device=None, weights=None, batch=None)
    command.add_argument("--version", choices=VERSIONS, help="ControlNet whose conventions hold")
    if any(info.works_at == "detect" for info in infos):
        command.add_argument("--detect-resolution", type=int, help="shorter side of what the detector sees")
    if describe(name).network:
        command.add_argument("--device", help="cpu, cuda, cuda:1, mps, xpu (default: the best there is)")
        command.add_argument("--weights", type=not_empty, help="weight file, or folder that holds it")
        command.add_argument("--batch", type=int, help="pictures it sees at once (default: 1 on the CPU, else 8)")
    command.add_argument(
        "--workers", type=int, help="threads that read and write (default: one for each processor, at most 8)"
    )
    offered = {parameter.name: (parameter, info) for info in infos for parameter in info.parameters}
    for parameter, info in offered.values():
        default = info.defaults[parameter.name]
        option: dict[str, Any] = {"help": parameter.help}
        if parameter.kind is bool:
            option["action"] = argparse.BooleanOptionalAction if default else "store_true"
        elif parameter.choices:
            option["choices"] = parameter.choices
        else:
            known_default = "" if default is None else f", default {default:g}"
            limits = f"{parameter.minimum:g} to {parameter.maximum:g}{known_default}"
            option |= {"type": parameter.kind, "metavar": "N", "help": f"{parameter.help} ({limits})"}
        if parameter.name not in leave_out:
            command.add_argument("--" + parameter.name.replace("_", "-"), default=None, **option)
    command.set_defaults(offered=sorted(offered))


def load_annotator(args: argparse.Namespace, name: str) -> tuple[Annotator, dict[str, Any]]:
    """The condition with the weights that the options of `add_detector_options` ask for, and all of its parameters.

    ValueError for values out of range, before anything is loaded; and for weights that cannot be had.
    """
    info = describe(name, args.version)
    for option in ("workers", "batch"):
        value = getattr(args, option)
        if value is not None and value < 1:
            raise ValueError(f"--{option} must be at least 1, got {value}")
    check_resolution("--detect-resolution", args.detect_resolution)
    if args.detect_resolution is not None and info.works_at != "detect":
        raise ValueError(f"{name} {info.version} works on the picture itself and takes no --detect-resolution")
    given = {parameter: getattr(args, parameter, None) for parameter in args.offered}
    parameters = info.check_parameters({name: value for name, value in given.items() if value is not None})
    annotator = load(name, args.device, args.weights, info.version)
    annotator.detector.load(**parameters)
    return annotator, parameters


def made_with(annotator: Annotator, parameters: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """What decides how a map comes out, as a folder of maps notes it."""
    info = annotator.info
    return {
        "condition": info.name,
        "version": info.version,
        "detect_resolution": args.detect_resolution or info.detect_resolution,
        "weights": getattr(annotator.detector, "sources", {}),
        **parameters,
    }


def check_resolution(option: str, value: int | None) -> None:
    """Refuse a resolution that no detector works at."""
    if value is not None and not 64 <= value <= 8192:
        raise ValueError(f"{option} must lie within 64 and 8192, got {value}")


def run_with_bar(
    args: argparse.Namespace, annotator: Annotator, jobs: Sequence, read: Read, write: Write, total: int, unit: str
) -> set[Path]:
    """Do the jobs under a progress bar of `total`; the pictures that failed, each complained about once, on stderr."""
    failed: set[Path] = set()
    with tqdm(total=total, initial=total - len(jobs), desc=annotator.info.name, unit=unit, disable=None) as bar:
        for job, complaint in run(annotator, jobs, read, write, args.batch, args.workers):
            if complaint and job.picture not in failed:
                failed.add(job.picture)
                tqdm.write(f"{args.program}: {complaint}", file=sys.stderr)
            bar.update()
    return failed
