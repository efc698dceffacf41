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
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from annotator.detector import first_line
from annotator.folder import seed_of
from annotator.options import (
    RaisingParser,
    add_detector_options,
    check_resolution,
    load_annotator,
    made_with,
    named_path,
    run_with_bar,
)
from annotator.pictures import SETTINGS, changed_at, find_pictures, save_png, whole_file, write_whole
from annotator.registry import REGISTRY, Hint, Request, describe, list_annotators

PROGRAM = "python -m annotator"
SAVED = {"hint": "source", "shown": "shown", "map": "map"}  # by name on the command line: which part of a Hint


class Job(NamedTuple):
    """A picture, its name among the others, the file that its condition goes to, and where there is one its mask."""

    picture: Path
    name: str
    target: Path
    mask: Path | None = None


def build_parser(name: str | None, program: str = PROGRAM) -> argparse.ArgumentParser:
    """The command line, with one sub-command a condition; only `name` has its options, as reading them imports detectors."""
    parser = RaisingParser(
        prog=program,
        description=(__doc__ or "").replace(PROGRAM, program),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--list", action="store_true", help="list all conditions and their parameters")
    commands = parser.add_subparsers(dest="name", metavar="NAME", help="a condition; NAME --help shows its parameters")
    for known in list_annotators():
        command = commands.add_parser(known, help=describe(known).title, description=describe(known).title)
        if known != name:
            continue
        inpaint = name == "inpaint"
        command.add_argument("source", metavar="IN", type=named_path, help="a picture or a folder of pictures")
        command.add_argument("target", metavar="OUT", type=named_path, help="a .png file or a new folder")
        text = "shorter side of the result, both sides multiples of 64, as training needs it (default: as the picture)"
        command.add_argument("--resolution", type=int, help=text)
        text = "what a model takes, people look at, or the detector gives (default: %(default)s)"
        command.add_argument("--save", choices=SAVED, default="map" if inpaint else "hint", help=text)
        command.add_argument("--force", action="store_true", help="make anew what is already there")
        command.set_defaults(mask=None)
        if inpaint:
            text = "where to paint, in white: a picture, or a folder with PNG files of the same names (default: where IN is transparent)"
            command.add_argument("--mask", type=named_path, help=text)
        add_detector_options(command, known)
    return parser


def _print_list() -> None:
    try:
        for (name, version), info in sorted(REGISTRY.items()):
            options = ", ".join(f"{key}={value}" for key, value in info.defaults.items())
            print(f"{name:22} {version}  {info.title:36} {info.weights:44} {options}".rstrip())
        sys.stdout.flush()
    except BrokenPipeError:  # `head`, say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains at its end


def _plan(source: Path, target: Path, mask: Path | None) -> list[Job]:
    """All pictures and where each goes: the same name below `target`, as PNG."""
    many = source.is_dir()
    if not source.exists():
        raise ValueError(f"there is no {source}")
    if many and target.exists() and not target.is_dir():
        raise ValueError(f"{target} is a file, but {source} is a folder")
    if not many and (target.is_dir() or not target.suffix):
        target = target / f"{source.stem}.png"
    if not many and target.suffix.lower() != ".png":
        raise ValueError(f"OUT must be a .png file or a folder, not {target}")
    if os.path.realpath(target) == os.path.realpath(source):
        raise ValueError(f"IN and OUT are the same {'folder' if many else 'file'}: {source}")
    jobs: dict[Path, Job] = {}
    for path in find_pictures(source, target) if many else [source]:
        name = path.relative_to(source) if many else Path(source.name)
        goal = target / name.with_suffix(".png") if many else target
        if goal in jobs:
            raise ValueError(f"{jobs[goal].picture} and {path} would both become {goal}; rename one of them")
        own_mask = mask / name.with_suffix(".png") if mask and mask.is_dir() else mask
        jobs[goal] = Job(path, name.as_posix(), goal, own_mask)
    return list(jobs.values())


def _claim(folder: Path, settings: dict[str, object], force: bool) -> bool:
    """Note in a folder what its maps are made with, or check that the note there says so; whether the note is new.

    Of several processes that start at once, one writes the note, and the others find it.

    Raises:
        ValueError: the folder holds something else; or maps with other settings, and `force` does not say to write all the same.
    """
    note, text = folder / SETTINGS, json.dumps(settings).encode()
    others = sorted(path.name for path in folder.iterdir() if path.name[0] != ".") if folder.is_dir() else []
    if others and not note.exists():
        told = f"{folder} already holds {others[0]}, made by something else"
        raise ValueError(f"{told}; choose another name for the folder")
    try:
        with whole_file(note, replace=False) as file:
            file.write(text)
        return True
    except FileExistsError:
        found = _noted(note)
    if force or not (found or others):  # or it is broken, and of nothing
        write_whole(note, text)
    elif changed := _differences(settings, found):
        reason = f"is for maps made with other settings ({changed})"
        raise ValueError(f"{folder} {reason}; choose another folder, or --force to make such files anew")
    return False


def _noted(note: Path) -> dict[str, object]:
    """The settings in a note; none if it is broken."""
    try:
        return dict(json.loads(note.read_bytes()))
    except (ValueError, TypeError):
        return {}


def _differences(settings: dict[str, object], found: dict[str, object]) -> str:
    """The names of the settings that a note has otherwise."""
    wanted = json.loads(json.dumps(settings))
    changed = ", ".join(key for key in wanted if found.get(key) != wanted[key])
    return changed or ("" if found == wanted else SETTINGS)


def _unfinished(jobs: list[Job], since: int) -> list[Job]:
    """Jobs whose file is missing, or older than the picture, the mask or this time, in nanoseconds."""

    def is_done(job: Job) -> bool:
        changes = [since, *(changed_at(path) for path in (job.picture, job.mask) if path and path.exists())]
        return job.target.exists() and job.target.stat().st_mtime_ns >= max(changes)

    return [job for job in jobs if not is_done(job)]


def _run(args: argparse.Namespace) -> int:
    check_resolution("--resolution", args.resolution)
    if args.name == "inpaint" and args.save == "hint":
        raise ValueError(
            "no picture file can hold the -1 of an inpainting hint; --save map keeps its hole as transparency"
        )
    jobs, many = _plan(args.source, args.target, args.mask), args.source.is_dir()
    if not many and jobs[0].target.exists() and not args.force:
        raise ValueError(f"{jobs[0].target} exists already; --force makes it anew")
    if args.mask and not args.mask.exists():
        raise ValueError(f"there is no mask {args.mask}")
    annotator, parameters = load_annotator(args, args.name)
    settings = made_with(annotator, parameters, args) | {"resolution": args.resolution, "saved": args.save}
    if args.mask:
        settings["mask"] = str(args.mask.resolve())
    note = (args.target if many else jobs[0].target.parent) / SETTINGS
    claimed = many and _claim(args.target, settings, args.force)
    if not many and note.exists() and (changed := _differences(settings, _noted(note))):
        raise ValueError(f"{note.parent} is for maps made with other settings ({changed}); choose another folder")
    todo = _unfinished(jobs, note.stat().st_mtime_ns) if many else jobs

    def read(job: Job) -> Request:
        own = dict(parameters)
        if many and "seed" in own:
            own["seed"] = seed_of(own["seed"], job.name)
        return annotator.request(job.picture, args.resolution, args.detect_resolution, mask=job.mask, **own)

    def write(job: Job, hint: Hint) -> None:
        save_png(job.target, getattr(hint, SAVED[args.save]))

    try:
        failed = len(run_with_bar(args, annotator, todo, read, write, len(jobs), "picture"))
    finally:
        made = many and any(path.name[0] != "." for path in args.target.iterdir())
        if claimed and not made:
            note.unlink(missing_ok=True)  # so the next run may have other settings
        elif made and not note.exists():  # the run that wrote it made nothing, and took it away
            write_whole(note, json.dumps(settings).encode())
    line = f"{len(todo) - failed} written to {args.target}"
    if len(todo) < len(jobs):
        line += f", {len(jobs) - len(todo)} were there already"
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"  # which may lack characters of the folder's name
    print((line + (f", {failed} failed" if failed else "")).encode(encoding, "replace").decode(encoding))
    return 1 if failed else 0


def main(argv: Sequence[str] | None = None, program: str = PROGRAM) -> int:
    """Run the command; see the module's text for the exit status."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        parser = build_parser(next((word for word in argv if not word.startswith("-")), None), program)
        args = parser.parse_args(argv, argparse.Namespace(program=program))
        if args.list:
            _print_list()
            return 0
        if args.name is None:
            parser.error("which condition? --list shows them all")
        return _run(args)
    except KeyboardInterrupt:
        print(f"{program}: interrupted; start it again to go on", file=sys.stderr)
        return 130
    except (ValueError, OSError, RuntimeError, ImportError) as err:
        print(f"{program}: {first_line(err)}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
