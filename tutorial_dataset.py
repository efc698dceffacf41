"""The training data: MyDataset reads image pairs; as a script, this file makes them, drawn or from photographs.

    python tutorial_dataset.py --out training/fill50k --count 50000 --size 512
    python tutorial_dataset.py --task segments --out training/scenes --count 5000
    python tutorial_dataset.py canny training/photos training/photos-canny --size 512
    python tutorial_dataset.py --check training/photos-canny

The first command draws a Fill set: circles to fill, with both colours in the prompt. The second draws scenes of shapes with another
kind of hint. The third makes the condition of every picture in a folder: `tutorial_dataset.py CONDITION --help` shows the options
of each. All three go on where they were when they are started again. The last one reads every pair of a data folder, or every sample
of shards, as training would.
Exit status: 0, 1 if pictures failed or pairs cannot be used (the rest is done), 2 for a mistake in the command, 130 after Ctrl-C.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from textwrap import fill

from annotator.options import (
    RaisingParser,
    add_detector_options,
    load_annotator,
    made_with,
    named_path,
    run_with_bar,
)
from annotator.pictures import find_pictures
from annotator.registry import Hint, Request, describe, list_annotators
from cldm.command import MISTAKES, help_text, run_command
from cldm.data.checking import check_dataset
from cldm.data.fill import PALETTES, generate_fill
from cldm.data.folders import claimed_folder, note_count
from cldm.data.pairs import DataError, PairDataset
from cldm.data.photos import (
    Framing,
    PhotoPair,
    cut_part,
    list_pairs,
    parse_size,
    plan_pairs,
    read_prompts,
    settings_of,
    write_pair,
)
from cldm.data.scenes import generate_scenes
from cldm.data.shards import check_shards, find_shards
from cldm.terminal import fail, show

PROGRAM = "tutorial_dataset.py"
FILL_FOLDER = "./training/fill50k/"
MOST_CROPS = 10_000  # of one picture
# What can be drawn.
TASKS = {
    "fill": "circles to fill",
    "shapes": "the outline of one shape",
    "lines": "outlines in a scene of up to three shapes",
    "segments": "a colour for each kind of shape in a scene",
    "depth": "nearer shapes are brighter",
}
# A hole's -1 cannot be stored in a picture file; masks belong into the training loop.
CONDITIONS = [name for name in list_annotators() if name != "inpaint"]


class MyDataset(PairDataset):
    """The pairs that `prompt.json` in the data folder lists, as `{"jpg", "txt", "hint"}`; see PairDataset.

    Change `__getitem__` for data of another layout: `jpg` is the target, float32 (H, W, 3) in [-1, 1], `txt` the prompt and `hint`
    the condition, float32 (H, W, 3) in [0, 1].
    """

    def __init__(self, root: str | Path = FILL_FOLDER, leave_out: bool = False) -> None:
        super().__init__(root, leave_out)


def fill_parser(program: str = PROGRAM) -> argparse.ArgumentParser:
    """The command line for pairs that are drawn, and the help for all of them."""
    parser = RaisingParser(
        prog=program,
        description=help_text(__doc__, PROGRAM, program),
        epilog=f"{program} CONDITION PHOTOS OUT makes a set from pictures. CONDITION is one of\n"
        f"{fill(', '.join(CONDITIONS), 100)}.\n{program} --check DATA looks for pairs that cannot be used.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--task", default="fill", choices=list(TASKS), help="; ".join(f"{name}: {task}" for name, task in TASKS.items())
    )
    parser.add_argument("--out", help=f"folder to write (default: {FILL_FOLDER}, or ./training/TASK/)")
    parser.add_argument("--count", type=int, default=50_000, help="number of pairs (default: %(default)s)")
    parser.add_argument("--size", type=int, default=512, help="pixels a side, a multiple of 64 (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the set (default: %(default)s)")
    parser.add_argument(
        "--palette", default="web", choices=list(PALETTES), help="colours to use (default: %(default)s)"
    )
    parser.add_argument("--workers", type=int, help="threads (default: one for each processor)")
    parser.set_defaults(run=draw_pairs)
    return parser


def photos_parser(condition: str, program: str = PROGRAM) -> argparse.ArgumentParser:
    """The command line for a set from photographs, with one sub-command a condition; only the named one has its options."""
    parser = RaisingParser(prog=program, description="Make a training set from a folder of pictures.")
    commands = parser.add_subparsers(dest="condition", metavar="CONDITION", required=True)
    for name in CONDITIONS:
        command = commands.add_parser(
            name, description=f"Pairs of pictures and their condition: {describe(name).title}."
        )
        if name != condition:
            continue
        command.add_argument("photos", metavar="PHOTOS", type=named_path, help="folder of pictures, with sub-folders")
        command.add_argument("out", metavar="OUT", type=named_path, help="data folder to write")
        prompts = command.add_mutually_exclusive_group()
        prompts.add_argument(
            "--captions",
            type=named_path,
            metavar="FILE",
            help='lines like {"file": "a.jpg", "prompt": "..."} (default: a.txt beside a.jpg)',
        )
        prompts.add_argument("--prompt", help="one prompt for all pictures")
        command.add_argument(
            "--size", default="512", help="of the pairs: pixels a side, or WIDTHxHEIGHT (default: %(default)s)"
        )
        command.add_argument(
            "--buckets", action="store_true", help="sizes of this area, for each picture the one nearest to its shape"
        )
        command.add_argument(
            "--crops", type=int, metavar="N", help="N random parts of each picture (default: one, in the middle)"
        )
        command.add_argument("--seed", type=int, default=0, help="of whatever is random (default: %(default)s)")
        add_detector_options(command, name, leave_out=["seed"])
    parser.set_defaults(run=make_pairs)
    return parser


def check_parser(program: str = PROGRAM) -> argparse.ArgumentParser:
    """The command line for looking at a data set."""
    parser = RaisingParser(
        prog=program, description="Read every pair as training would, and name those that cannot be used."
    )
    parser.add_argument("--check", required=True, metavar="DATA", help="data folder, or WebDataset shards")
    parser.add_argument("--workers", type=int, help="threads (default: one for each processor)")
    parser.set_defaults(run=check_data)
    return parser


def check_data(options: argparse.Namespace) -> int:
    """Name what is wrong with a data set."""
    if options.workers is not None and options.workers < 1:
        raise DataError(f"--workers must be at least 1, found {options.workers}")
    shards = find_shards(options.check)
    if shards:
        count, problems = check_shards(shards, options.workers)
    else:
        dataset = MyDataset(options.check, leave_out=True)
        count, problems = len(dataset), check_dataset(dataset, options.workers)
    for problem in problems:
        fail(problem, options.program)
    # Beside broken pairs there are problems of the whole: lines of a listing, pairs not made yet.
    usable = count - sum(problem.index >= 0 for problem in problems)
    show(
        f"{usable:,} of {count:,} pairs in {options.check} can be used" if problems else f"all {count:,} pairs are fine"
    )
    return 1 if problems else 0


def draw_pairs(options: argparse.Namespace) -> int:
    """Draw a Fill set, or scenes."""
    out = options.out or (FILL_FOLDER if options.task == "fill" else f"./training/{options.task}/")
    common = (out, options.count, options.size, options.seed, options.palette)
    if options.task == "fill":
        listing = generate_fill(*common, workers=options.workers)
    elif options.task == "shapes":
        listing = generate_scenes(*common, hint="lines", most=1, plain=True, workers=options.workers)
    else:
        listing = generate_scenes(*common, hint=options.task, workers=options.workers)
    show(f"{options.count} pairs are in {listing.parent}")
    return 0


def make_pairs(options: argparse.Namespace) -> int:
    """Make a set from photographs."""
    if options.crops is not None and not 1 <= options.crops <= MOST_CROPS:
        raise DataError(f"--crops must lie within 1 and {MOST_CROPS:,}, found {options.crops}")
    framing = Framing(*parse_size(options.size), options.buckets, options.crops is not None, options.seed)
    if not options.photos.is_dir():
        raise DataError(f"there is no folder {options.photos}")
    if options.out.resolve() == options.photos.resolve():
        raise DataError(f"PHOTOS and OUT are the same folder: {options.out}")
    photos = find_pictures(options.photos, options.out)
    prompts, complaints = read_prompts(options.photos, photos, options.captions, options.prompt)
    pairs = plan_pairs(options.photos, prompts, photos, options.crops)
    annotator, parameters = load_annotator(options, options.condition)
    settings = made_with(annotator, {k: v for k, v in parameters.items() if k != "seed"}, options)
    for complaint in complaints:
        fail(complaint, options.program)
    failed: set[Path] = set()

    def read(pair: PhotoPair) -> Request:
        part, target = cut_part(pair, framing)
        own = parameters | ({"seed": framing.seed_of(pair.name)} if "seed" in parameters else {})
        detect_resolution = getattr(options, "detect_resolution", None)
        return annotator.request(part, detect_resolution=detect_resolution, picture=target, **own)

    def write(pair: PhotoPair, hint: Hint) -> None:
        write_pair(options.out, pair, hint.source, hint.picture)

    with claimed_folder(options.out, "photos.json", settings_of(framing, settings)):
        note_count(options.out, "photos.json", len(pairs))
        todo = [pair for pair in pairs if not pair.is_current(options.out)]
        try:
            failed = run_with_bar(options, annotator, todo, read, write, len(pairs), "pair")
        finally:
            made = list_pairs(options.out, (pair for pair in pairs if pair.picture not in failed))
        note_count(options.out, "photos.json", made)  # not reached where the making was interrupted
    used = len(prompts) - len(failed)
    show(
        f"{made} pairs of {used}{f' of the {len(photos)}' if used < len(photos) else ''} pictures are in {options.out}"
    )
    return 1 if failed or complaints else 0


def main(argv: Sequence[str] | None = None, program: str = PROGRAM) -> int:
    arguments = sys.argv[1:] if argv is None else argv

    def work() -> int:
        if any(a == "--check" or a.startswith("--check=") for a in arguments):
            parser = check_parser(program)
        elif arguments and not arguments[0].startswith("-"):
            parser = photos_parser(arguments[0], program)
        else:
            parser = fill_parser(program)
        options = parser.parse_args(arguments, argparse.Namespace(program=program))
        return options.run(options)

    return run_command(
        program,
        work,
        interrupted="interrupted; the same command goes on",
        # The annotators know nothing of this library's errors: options that they refuse are ValueError, a detector that
        # cannot be had here the others. What goes wrong with a single picture is reported elsewhere.
        mistakes=(*MISTAKES, ValueError, RuntimeError, ImportError),
    )


if __name__ == "__main__":
    sys.exit(main())
