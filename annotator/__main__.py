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
from pathlib import Path
from typing import NamedTuple

from annotator.folder import seed_of
from annotator.options import Parser, add_detector_options, check_resolution, load_annotator, made_with, run_with_bar
from annotator.pictures import find_pictures, read_image, save_png, write_whole
from annotator.registry import REGISTRY, Hint, Request, describe, list_annotators

PROGRAM = "python -m annotator"
SETTINGS = ".annotator.json"  # in the folder of the maps: what they were made with
SAVED = ("hint", "shown", "map")


class Job(NamedTuple):
    """A picture, its name among the others, and the file that its condition goes to."""

    picture: Path
    name: str
    target: Path


def build_parser(name: str | None) -> argparse.ArgumentParser:
    """The command line, with one sub-command a condition; only `name` has its options, as reading them imports detectors."""
    parser = Parser(prog=PROGRAM, description="Make the conditions of ControlNet from pictures.")
    parser.add_argument("--list", action="store_true", help="list all conditions and their parameters")
    commands = parser.add_subparsers(dest="name", metavar="NAME", help="a condition; NAME --help shows its parameters")
    for known in list_annotators():
        command = commands.add_parser(known, help=describe(known).title, description=describe(known).title)
        if known != name:
            continue
        command.add_argument("source", metavar="IN", type=Path, help="a picture or a folder of pictures")
        command.add_argument("target", metavar="OUT", type=Path, help="a .png file or a folder")
        command.add_argument("--resolution", type=int, help="shorter side of the result, both sides multiples of 64, as training "
                             "needs them (default: as the picture)")  # fmt: skip
        default = "map" if name == "inpaint" else "hint"
        text = f"what a model takes, people look at, or the detector gives (default: {default})"
        command.add_argument("--save", choices=SAVED, default=default, help=text)
        command.add_argument("--force", action="store_true", help="make anew what is already there")
        if name == "inpaint":
            text = "where to paint, in white: a picture, or a folder with pictures of the same names (default: where IN is transparent)"
            command.add_argument("--mask", type=Path, help=text)
        add_detector_options(command, known)
    return parser


def _print_list() -> None:
    for (name, version), info in sorted(REGISTRY.items()):
        options = ", ".join(f"{key}={value}" for key, value in info.defaults.items())
        print(f"{name:22} {version}  {info.title:36} {info.weights:44} {options}".rstrip())


def _plan(source: Path, target: Path) -> list[Job]:
    """All pictures and where each goes: the same name below `target`, as PNG."""
    if source.is_dir():
        if target.exists() and not target.is_dir():
            raise ValueError(f"{target} is a file, but {source} is a folder")
        if target.resolve() == source.resolve():
            raise ValueError(f"IN and OUT are the same folder: {source}")
        jobs: dict[Path, Job] = {}
        for path in find_pictures(source, target):
            name = path.relative_to(source)
            goal = target / name.with_suffix(".png")
            if goal in jobs:
                raise ValueError(f"{jobs[goal].picture} and {path} would both become {goal}; rename one of them")
            jobs[goal] = Job(path, name.as_posix(), goal)
        return list(jobs.values())
    if not source.exists():
        raise ValueError(f"there is no {source}")
    if target.is_dir() or not target.suffix:
        target = target / f"{source.stem}.png"
    if target.suffix.lower() != ".png":
        raise ValueError(f"OUT must be a .png file or a folder, not {target}")
    if target.resolve() == source.resolve():
        raise ValueError(f"IN and OUT are the same file: {source}")
    return [Job(source, source.name, target)]


def _unfinished(jobs: list[Job], target: Path, settings: dict[str, object], force: bool) -> list[Job]:
    """Jobs whose file is missing, or older than the picture or the settings that the folder's maps are made with."""
    note = target / SETTINGS
    present = [job for job in jobs if job.target.exists()]
    try:
        found = json.loads(note.read_bytes())
    except FileNotFoundError:
        found = None
    except (ValueError, UnicodeDecodeError):
        found = {}
    settings = json.loads(json.dumps(settings))
    if present and found != settings and not force:
        if found is None:
            raise ValueError(
                f"{target} already holds {present[0].target.name}, made by something else; "
                f"choose another folder, or --force to make such files anew"
            )
        known = found if isinstance(found, dict) else {}
        changed = ", ".join(key for key in settings if known.get(key) != settings[key]) or note.name
        raise ValueError(f"{target} holds maps made with other settings ({changed}); choose another folder, or --force")
    if found != settings or force:
        write_whole(note, json.dumps(settings).encode())
    since = note.stat().st_mtime_ns

    def is_done(job: Job) -> bool:
        return job.target.exists() and job.target.stat().st_mtime_ns >= max(since, job.picture.stat().st_mtime_ns)

    return [job for job in jobs if not is_done(job)]


def _find_masks(jobs: list[Job], place: Path | None) -> dict[Path, Path]:
    """The mask of each picture, of the same name below `place`, whatever its suffix; or `place` itself."""
    if place is None:
        return {}
    if place.is_file():
        return {job.picture: place for job in jobs}
    if not place.is_dir():
        raise ValueError(f"there is no mask {place}")
    masks = {path.relative_to(place).with_suffix(""): path for path in find_pictures(place)}
    found = {job.picture: masks.get(Path(job.name).with_suffix("")) for job in jobs}
    missing = [job for job in jobs if found[job.picture] is None]
    if missing:
        raise ValueError(f"{place} holds no mask for {missing[0].name}, and for {len(missing) - 1} more")
    return found


def _run(args: argparse.Namespace) -> int:
    check_resolution("--resolution", args.resolution)
    if args.name == "inpaint" and args.save == "hint":
        raise ValueError(
            "the hole of an inpainting hint is -1, which no picture file can hold; --save map keeps it as transparency"
        )
    jobs = _plan(args.source, args.target)
    many = args.source.is_dir()
    if not many and jobs[0].target.exists() and not args.force:
        raise ValueError(f"{jobs[0].target} exists already; --force makes it anew")
    masks = _find_masks(jobs, getattr(args, "mask", None))
    annotator, parameters = load_annotator(args, args.name)
    settings = made_with(annotator, parameters, args) | {"resolution": args.resolution, "saved": args.save}
    if masks:
        settings["mask"] = str(args.mask.resolve())
    todo = _unfinished(jobs, args.target, settings, args.force) if many else jobs

    def read(job: Job) -> Request:
        own = dict(parameters)
        if many and "seed" in own:
            own["seed"] = seed_of(own["seed"], job.name)
        return annotator.request(
            read_image(job.picture),
            args.resolution,
            getattr(args, "detect_resolution", None),
            mask=masks.get(job.picture),
            **own,
        )

    def write(job: Job, hint: Hint) -> None:
        save_png(
            job.target, {"hint": lambda: hint.source, "shown": lambda: hint.shown, "map": lambda: hint.map}[args.save]()
        )

    failed = len(run_with_bar(PROGRAM, args, annotator, todo, read, write, len(jobs)))
    line = f"{len(todo) - failed} written to {args.target}"
    if len(todo) < len(jobs):
        line += f", {len(jobs) - len(todo)} were there already"
    print(line + (f", {failed} failed" if failed else ""))
    return 1 if failed else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; see the module's text for the exit status."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = build_parser(next((word for word in argv if not word.startswith("-")), None))
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
    except (ValueError, OSError, RuntimeError, ImportError) as err:
        reason = (str(err).strip().splitlines() or [type(err).__name__])[0]
        print(f"{PROGRAM}: {reason}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
