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
from pathlib import Path

from annotator.folder import SAVED, Job, Task, find_jobs, write_atomically
from annotator.options import Parser, add_detector_options, check_resolution, read_task, run_with_bar
from annotator.registry import REGISTRY, describe, list_annotators

PROGRAM = "python -m annotator"
SETTINGS = ".annotator.json"  # in the folder of the maps: what they were made with


def build_parser() -> argparse.ArgumentParser:
    """The command line, with one sub-command a condition whose parameters are options."""
    parser = Parser(prog=PROGRAM, description="Make the conditions of ControlNet from pictures.")
    parser.add_argument("--list", action="store_true", help="list all conditions and their parameters")
    commands = parser.add_subparsers(dest="name", metavar="NAME", help="a condition; NAME --help shows its parameters")
    for name in list_annotators():
        command = commands.add_parser(name, help=describe(name).title, description=describe(name).title)
        command.add_argument("source", metavar="IN", type=Path, help="a picture or a folder of pictures")
        command.add_argument("target", metavar="OUT", type=Path, help="a .png file or a folder")
        command.add_argument("--resolution", type=int, help="shorter side of the result (default: as the picture)")
        command.add_argument(
            "--save", choices=SAVED, default="hint", help="what a model takes, people look at, or the detector gives"
        )
        command.add_argument("--force", action="store_true", help="make anew what is already there")
        add_detector_options(command, name)
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
    """Jobs whose file is missing, or older than the picture or the settings that the folder's maps are made with."""
    note = target / SETTINGS
    wanted = json.dumps(task.origin | {"resolution": task.resolution, "saved": task.saved}, sort_keys=True)
    present = [job for job in jobs if job.target.exists()]
    same = note.is_file() and note.read_bytes() == wanted.encode()
    if present and not same and not force:
        if not note.exists():
            raise ValueError(
                f"{target} already holds {present[0].target.name}, made by something else; "
                f"choose another folder, or --force to make such files anew"
            )
        raise ValueError(f"{target} holds maps made with other settings ({note}); choose another folder, or --force")
    if not same or force:
        write_atomically(note, wanted.encode())
    since = note.stat().st_mtime_ns

    def is_done(job: Job) -> bool:
        return job.target.exists() and job.target.stat().st_mtime_ns >= max(since, job.picture.stat().st_mtime_ns)

    return [job for job in jobs if not is_done(job)]


def _run(args: argparse.Namespace) -> int:
    check_resolution("--resolution", args.resolution)
    task = read_task(args, args.name, resolution=args.resolution, saved=args.save)
    jobs, todo = _plan(args.source, args.target, task, args.force)
    done = len(jobs) - len(todo)
    failed = len(run_with_bar(PROGRAM, args, task, todo, len(jobs)))
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
