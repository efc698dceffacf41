"""`python -m annotator NAME IN OUT`: the condition of a picture, or of all pictures in a folder, as PNG files.

    python -m annotator canny photos/ maps/ --low-threshold 80
    python -m annotator hed photo.jpg edges.png --weights folder/
    python -m annotator --list

A folder's sub-folders and names are kept. A run that was interrupted goes on where it stopped when it is started again.
Exit status: 0, 1 if pictures failed (the rest is done), 2 for a mistake in the command, 130 after Ctrl-C.
"""

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from pathlib import Path
from typing import NoReturn

from tqdm import tqdm

from annotator.folder import SAVED, Job, Task, find_jobs, run, write_atomically
from annotator.registry import REGISTRY, VERSIONS, Parameter, describe, list_annotators

PROGRAM = "python -m annotator"
SETTINGS = ".annotator.json"  # in the folder of the maps: what they were made with


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def _parameters(name: str) -> dict[str, Parameter]:
    return {p.name: p for (known, _), info in REGISTRY.items() if known == name for p in info.parameters}


def build_parser() -> argparse.ArgumentParser:
    """The command line, with one sub-command a condition whose parameters are options."""
    parser = _Parser(prog=PROGRAM, description="Make the conditions of ControlNet from pictures.")
    parser.add_argument("--list", action="store_true", help="list all conditions and their parameters")
    commands = parser.add_subparsers(dest="name", metavar="NAME", help="a condition; NAME --help shows its parameters")
    for name in list_annotators():
        command = commands.add_parser(name, help=describe(name).title, description=describe(name).title)
        command.add_argument("source", metavar="IN", type=Path, help="a picture or a folder of pictures")
        command.add_argument("target", metavar="OUT", type=Path, help="a .png file or a folder")
        command.add_argument("--version", choices=VERSIONS, help="ControlNet whose conventions hold")
        command.add_argument("--resolution", type=int, help="shorter side of the result (default: as the picture)")
        command.add_argument("--detect-resolution", type=int, help="shorter side of what the detector sees")
        command.add_argument(
            "--save", choices=SAVED, default="hint", help="what a model takes, people look at, or the detector gives"
        )
        command.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: the best there is)")
        command.add_argument("--weights", help="weight file, or folder that holds it")
        if describe(name).network:
            command.add_argument("--batch", type=int, help="pictures at once (default: 1 on the CPU, else 8)")
        else:
            command.add_argument("--workers", type=int, help="processes (default: all processors)")
        command.add_argument("--force", action="store_true", help="make anew what is already there")
        for parameter in _parameters(name).values():
            option = "--" + parameter.name.replace("_", "-")
            if parameter.kind is bool:
                command.add_argument(option, dest=parameter.name, action="store_const", const=True, help=parameter.help)
            else:
                limits = f"{parameter.minimum:g} to {parameter.maximum:g}"
                default = "" if parameter.default is None else f", default {parameter.default:g}"
                text = f"{parameter.help} ({limits}{default})"
                command.add_argument(option, dest=parameter.name, type=parameter.kind, metavar="N", help=text)
    return parser


def _print_list() -> None:
    for (name, version), info in sorted(REGISTRY.items()):
        options = ", ".join(f"{p.name}={p.default}" for p in info.parameters)
        weights = "needs weights" if info.network else ""
        print(f"{name:22} {version}  {info.title:36} {weights:14} {options}".rstrip())


def _plan(source: Path, target: Path, task: Task, force: bool) -> tuple[list[Job], list[Job]]:
    """All jobs and those still to be done."""
    if source.is_dir():
        if target.exists() and not target.is_dir():
            raise ValueError(f"{target} is a file, but {source} is a folder")
        if target.resolve() == source.resolve():
            raise ValueError(f"IN and OUT are the same folder: {source}")
        jobs = find_jobs(source, target)
        return jobs, _unfinished(jobs, target, task, force)
    if not source.exists():
        raise ValueError(f"there is no {source}")
    if target.is_dir() or not target.suffix:
        target = target / f"{source.stem}.png"
    if target.suffix.lower() != ".png":
        raise ValueError(f"OUT must be a .png file or a folder, not {target}")
    if target.exists() and not force:
        raise ValueError(f"{target} exists already; --force makes it anew")
    if target.resolve() == source.resolve():
        raise ValueError(f"IN and OUT are the same file: {source}")
    return [Job(source, target)], [Job(source, target)]


def _unfinished(jobs: list[Job], target: Path, task: Task, force: bool) -> list[Job]:
    """Jobs whose file is missing or older than the settings that the folder's maps are made with."""
    note = target / SETTINGS
    settings = {key: value for key, value in asdict(task).items() if key not in ("device", "weights")}
    wanted = json.dumps(settings | {"version": task.info.version}, sort_keys=True)
    present = [job for job in jobs if job.target.exists()]
    if not note.exists() or force:
        if present and not force:
            raise ValueError(
                f"{target} already holds {present[0].target.name}, made by something else; "
                f"choose another folder, or --force to make such files anew"
            )
        write_atomically(note, wanted.encode())
    elif note.read_text() != wanted:
        raise ValueError(f"{target} holds maps made with other settings ({note}); choose another folder, or --force")
    since = note.stat().st_mtime_ns
    return [job for job in jobs if not (job.target.exists() and job.target.stat().st_mtime_ns >= since)]


def _run(args: argparse.Namespace) -> int:
    info = describe(args.name, args.version)
    given = {name: getattr(args, name) for name in _parameters(args.name)}
    given = {name: value for name, value in given.items() if value is not None}
    side_by_side = {option: vars(args)[option] for option in ("workers", "batch") if option in args}
    for option, value in side_by_side.items():
        if value is not None and value < 1:
            raise ValueError(f"--{option} must be at least 1, got {value}")
    for option in ("resolution", "detect_resolution"):
        value = getattr(args, option)
        if value is not None and not 64 <= value <= 8192:
            raise ValueError(f"--{option.replace('_', '-')} must lie within 64 and 8192, got {value}")
    if args.detect_resolution is not None and info.works_at != "detect":
        raise ValueError(f"{info.name} {info.version} works on the picture itself and takes no --detect-resolution")
    task = Task(
        name=args.name,
        version=info.version,
        resolution=args.resolution,
        detect_resolution=args.detect_resolution,
        parameters=info.check_parameters(given),
        saved=args.save,
        device=args.device,
        weights=args.weights,
    )
    jobs, todo = _plan(args.source, args.target, task, args.force)
    failed = 0
    done = len(jobs) - len(todo)
    with tqdm(total=len(jobs), initial=done, desc=args.name, unit="picture", disable=None) as bar:
        for _, complaint in run(task, todo, **side_by_side):
            if complaint:
                failed += 1
                tqdm.write(f"{PROGRAM}: {complaint}", file=sys.stderr)
            bar.update()
    parts = [f"{len(todo) - failed} written to {args.target}"]
    parts += [f"{done} were there already"] * bool(done) + [f"{failed} failed"] * bool(failed)
    print(", ".join(parts))
    return 1 if failed else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; see the module's text for the exit status."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    parser = build_parser()
    try:
        args = parser.parse_args(argv)
        if args.list:
            _print_list()
            return 0
        if args.name is None:
            parser.error("which condition? --list shows them all")
        return _run(args)
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted; start it again to go on", file=sys.stderr)
        return 130
    except BrokenProcessPool:
        print(f"{PROGRAM}: a process died, perhaps of memory; start again with fewer --workers", file=sys.stderr)
        return 1
    except (ValueError, OSError, RuntimeError, ImportError) as err:
        reason = (str(err).strip().splitlines() or [type(err).__name__])[0]
        print(f"{PROGRAM}: {reason}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
