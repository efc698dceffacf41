"""Make pictures from one hint, a folder of hints, or a file of prompts.

    python -m cldm.generate edges.png out/ --weights models/control_sd15_canny.pth --prompt "a bird" --samples 4
    python -m cldm.generate photos/ out/ --annotator canny --weights models/v1-5-pruned.safetensors \\
        --control models/control_v11p_sd15_canny.pth --prompt "a bird"
    python -m cldm.generate training/fill50k/prompt.json out/ --weights runs/fill50k/model.safetensors

A file of prompts is a text with a prompt a line, for all of which --hint steers, or JSON lines such as those of a training set, with
`source` (a hint, relative to the file) and `prompt`; `negative_prompt` and `seed` may be given too. Pictures are called after the hint or
the line, and the seed; they carry their settings as text. A run that was interrupted goes on where it stopped when it is started again.
Exit status: 0, 1 if pictures failed (the rest is done), 2 for a mistake, 130 after Ctrl-C.
"""

import argparse
import hashlib
import json
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from annotator.network import choose_device
from annotator.options import RaisingParser, named_path, not_empty
from annotator.pictures import IMAGE_SUFFIXES, find_pictures, read_image
from annotator.registry import list_annotators
from annotator.weights import fingerprint
from cldm.arguments import check_numbers
from cldm.checkpoint import identify
from cldm.checkpoint.recognising import SCHEDULE_KEYS
from cldm.cldm import ControlLDM
from cldm.command import help_text, run_command
from cldm.config import resolve
from cldm.low_memory import memory_advice
from cldm.model import OPTIONAL, add_control, create_model, load_control, load_weights
from cldm.pipeline import SAMPLER_NAMES, ControlPipeline
from cldm.prompts import DEFAULT_PROMPT
from cldm.results import read_png_text
from cldm.terminal import show
from ldm.files.errors import about
from ldm.files.locating import locate
from ldm.util import ConfigError

PROGRAM = "python -m cldm.generate"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# Arguments of the pipeline's call that are options of the command, with what makes them of a text.
_NUMBERS = {"steps": int, "guidance_scale": float, "eta": float, "denoise": float, "clip_skip": int}
_EACH_CONTROL = {"strength": float, "start": float, "end": float}
_SWITCHES = ("guess_mode", "conditional_only", "resolution_weights", "long_prompts")
_MEMORY = ("sliced_attention", "vae_tiles", "vae_one_at_a_time", "offload")
_PROMPT_FILES = (".txt", ".json", ".jsonl")


@dataclass(frozen=True)
class Job:
    """One hint (or several, for several ControlNets) and prompt, and the pictures made of them."""

    name: str  # of the files, before the seed
    hints: tuple[Path | None, ...]
    prompt: str
    negative_prompt: str
    seeds: tuple[int, ...]
    image: Path | None = None
    mask: Path | None = None

    def file(self, folder: Path, seed: int) -> Path:
        return folder / f"{self.name}_{seed}.png"

    def notes(self, settings: dict[str, Any], seed: int) -> dict[str, Any]:
        """What a file tells of how it was made, by which a later run recognises it."""
        pictures = [None if path is None else _hash(path) for path in (*self.hints, self.image, self.mask)]
        return {
            **settings,
            "prompt": self.prompt,
            "negative_prompt": self.negative_prompt,
            "seed": seed,
            "pictures": pictures,
        }


def build_parser(program: str = PROGRAM) -> argparse.ArgumentParser:
    parser = RaisingParser(
        prog=program,
        description=help_text(__doc__, PROGRAM, program),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "source", metavar="HINT", type=named_path, help="a picture, a folder of pictures, or a file of prompts"
    )
    parser.add_argument("target", metavar="OUT", type=named_path, help="folder of the results")
    model = parser.add_argument_group("model")
    model.add_argument(
        "--weights",
        required=True,
        type=not_empty,
        help="file or folder of any layout with the base model, and perhaps a ControlNet",
    )
    model.add_argument(
        "--control",
        action="append",
        type=not_empty,
        default=[],
        metavar="FILE",
        help="a ControlNet of any layout; may be repeated",
    )
    model.add_argument("--config", type=not_empty, help="configuration (default: the one that the weights belong to)")
    model.add_argument("--device", help="cpu, cuda, mps, xpu (default: an accelerator if there is one)")
    model.add_argument("--dtype", choices=DTYPES, default="float32", help="precision of the weights")
    text = parser.add_argument_group("prompts")
    text.add_argument("--prompt", help=f'default: none; "{DEFAULT_PROMPT}" is the paper\'s default')
    text.add_argument("--negative-prompt", default="")
    text.add_argument(
        "--clip-skip", type=int, metavar="N", help="take the n-th hidden state of the text encoder from the end"
    )
    text.add_argument("--long-prompts", action="store_true", help="read prompts of more than 77 tokens whole")
    text.add_argument("--plain-prompts", action="store_true", help="brackets in prompts are characters, not weights")
    control = parser.add_argument_group("control; what is marked * may be repeated, once for each ControlNet")
    control.add_argument(
        "--hint",
        action="append",
        type=named_path,
        default=[],
        help="* for a text of prompts, and for further ControlNets",
    )
    control.add_argument("--annotator", action="append", default=[], choices=list_annotators(), metavar="NAME",
                         help="* hints are photographs, of which this condition is made")  # fmt: skip
    control.add_argument("--strength", action="append", type=float, help="* factor of the control (1)")
    control.add_argument(
        "--start", action="append", type=float, help="* fraction of the run at which the control begins (0)"
    )
    control.add_argument("--end", action="append", type=float, help="* fraction at which it ends (1)")
    control.add_argument("--guess-mode", action="store_true", help="for sampling without a prompt")
    control.add_argument("--conditional-only", action="store_true", help="the hint steers the conditional half only")
    control.add_argument("--resolution-weights", action="store_true", help="the paper's weights by resolution")
    image = parser.add_argument_group("from a picture")
    image.add_argument("--image", type=named_path, help="picture to start from")
    image.add_argument("--denoise", type=float, help="how much of it is made anew, above 0 to 1 (0.75; 1 with a mask)")
    image.add_argument("--mask", type=named_path, help="white where --image is to be painted anew")
    run = parser.add_argument_group("sampling")
    run.add_argument("--samples", type=int, default=1, help="pictures for each hint or prompt")
    run.add_argument("--sampler", default="ddim", help=f"{', '.join(SAMPLER_NAMES)} (ddim)")
    run.add_argument("--steps", type=int, default=20)
    run.add_argument("--guidance-scale", type=float, default=9.0)
    run.add_argument("--eta", type=float, default=0.0, help="of DDIM, 0 to 1")
    run.add_argument("--seed", type=int, default=0, help="of the first picture of each hint; the next one's is 1 more")
    run.add_argument("--size", type=_size, metavar="HxW", help="height and width in pixels (default: the hint's)")
    run.add_argument("--force", action="store_true", help="make anew what is already there")
    memory = parser.add_argument_group("less memory")
    for name in _MEMORY:
        memory.add_argument(f"--{name.replace('_', '-')}", action="store_true")
    return parser


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.lower().partition("x")
    try:
        return int(height), int(width)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be HEIGHTxWIDTH such as 512x768, found {text!r}") from None


# -- what is to be done ----------------------------------------------------------------------------------


def read_jobs(args: argparse.Namespace) -> list[Job]:
    """The jobs that the command line asks for.

    Raises:
        ConfigError: there are none, or the file of prompts is broken.
    """
    source: Path = args.source
    if not source.exists():
        raise ConfigError(f"there is no {source}")
    if args.samples < 1:
        raise ConfigError(f"--samples must be at least 1, found {args.samples}")
    if args.mask is not None and args.image is None:
        raise ConfigError("--mask needs --image, the picture in which it is to be painted")
    if source.is_file() and source.suffix.lower() in _PROMPT_FILES:
        if args.prompt is not None:
            raise ConfigError(f"{source} holds the prompts; leave out --prompt")
        return list(_prompt_jobs(args))
    if os.path.realpath(source) == os.path.realpath(args.target):
        raise ConfigError(f"HINT and OUT are the same: {source}")
    if source.is_dir():
        pictures = find_pictures(source, args.target, maps=not args.annotator)
        names = [path.relative_to(source).with_suffix("").as_posix() for path in pictures]
    elif source.suffix.lower() in IMAGE_SUFFIXES:
        pictures, names = [source], [source.stem]
    else:
        raise ConfigError(
            f"{source} is no picture ({' '.join(IMAGE_SUFFIXES)}) and no file of prompts ({' '.join(_PROMPT_FILES)})"
        )
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise ConfigError(f"several pictures in {source} are called {min(twice)!r}; rename all but one")
    return [_job(args, name, (path, *args.hint), args.prompt or "") for name, path in zip(names, pictures, strict=True)]


def _prompt_jobs(args: argparse.Namespace) -> Iterator[Job]:
    """One job for each line of a file of prompts."""
    try:
        text = args.source.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{args.source} is not a text in UTF-8: {error}") from error
    lines = text.removesuffix("\n").split("\n")  # at nothing else that may stand in a prompt, such as U+2028
    digits = len(str(len(lines)))
    count = 0
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        count += 1
        name = f"{number:0{digits}}"
        if args.source.suffix.lower() == ".txt":
            yield _job(args, name, tuple(args.hint) or (None,), line.strip())
            continue
        try:
            entry = json.loads(line)
            prompt, hint = entry["prompt"], entry.get("source")
            negative, seed = entry.get("negative_prompt", args.negative_prompt), entry.get("seed", args.seed)
            if not isinstance(prompt, str) or not isinstance(negative, str) or not isinstance(seed, int):
                raise TypeError("prompts must be texts and a seed a whole number")
            path = args.source.parent / hint if hint is not None else None
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f'{args.source}, line {number} should be like {{"source": "hint.png", "prompt": "a bird"}}: {error}'
            ) from error
        hints = (path, *args.hint) if path is not None else tuple(args.hint) or (None,)
        yield _job(args, name, hints, prompt, negative, seed)
    if not count:
        raise ConfigError(f"{args.source} holds no prompt")


def _job(
    args: argparse.Namespace,
    name: str,
    hints: Sequence[Path | None],
    prompt: str,
    negative: str | None = None,
    seed: int | None = None,
) -> Job:
    seed = args.seed if seed is None else seed
    seeds = tuple(range(seed, seed + args.samples))
    negative = args.negative_prompt if negative is None else negative
    return Job(name, tuple(hints), prompt, negative, seeds, args.image, args.mask)


def unfinished(jobs: Sequence[Job], target: Path, settings: dict[str, Any], force: bool) -> list[tuple[Job, list[int]]]:
    """The jobs with the seeds whose pictures are still to be made.

    Raises:
        ConfigError: a picture is there that was made in another way; nothing is overwritten without `force`.
    """
    todo = []
    for job in jobs:
        missing = []
        for seed in job.seeds:
            file = job.file(target, seed)
            if force or not file.exists():
                missing.append(seed)
                continue
            try:
                found = read_png_text(file).get("command")
            except ValueError:
                found = None
            if found != job.notes(settings, seed):
                how = "in another way"
                if isinstance(found, dict) and "files" not in found:
                    how = "by an older version, which noted the names of weights and not their content"
                raise ConfigError(f"{file} is there already and was made {how}; choose another folder, or --force")
        if missing:
            todo.append((job, missing))
    return todo


def _hash(path: Path) -> str:
    """The first digits of the SHA-256 of a file, by which it is recognised."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


# -- the model -------------------------------------------------------------------------------------------


def load_model(
    weights: str, controls: Sequence[str], config: str | None, device: torch.device, dtype: torch.dtype, steered: bool
) -> ControlLDM:
    """A model from files of any layout: the base, with its own ControlNet or those in `controls`.

    Raises:
        ConfigError, CheckpointError: the files cannot be read or do not fit, or hints are to steer and there is no ControlNet.
    """
    report = identify(weights)
    name = config or report.config
    if name is None:
        raise ConfigError(f"{weights} is of no known family of models; name its configuration with --config")
    has_control = report.parts.get("control", 0) > 0
    if steered and not has_control and not controls:
        raise ConfigError(f"{weights} holds no ControlNet, and hints are to steer: name one with --control")
    if has_control and not controls:
        return create_model(name, weights=weights).to(device=device, dtype=dtype).eval()
    model: ControlLDM = create_model(name)
    load_weights(model, weights, optional=(*OPTIONAL, *SCHEDULE_KEYS, "control_model."))
    for number, file in enumerate(controls):
        (add_control if number else load_control)(model, file)
    return model.to(device=device, dtype=dtype).eval()


def call_options(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of the pipeline's call that are the same for all jobs."""
    options: dict[str, Any] = {
        name: getattr(args, name) for name in (*_NUMBERS, "sampler", "size") if getattr(args, name) is not None
    }
    options |= {name: True for name in _SWITCHES if getattr(args, name)}
    options |= {
        name: _one_or_each(getattr(args, name)) for name in (*_EACH_CONTROL, "annotator") if getattr(args, name)
    }
    return options | {"prompt_weights": not args.plain_prompts}


def files_used(args: argparse.Namespace) -> list[str]:
    """Weights and configuration, each by name and content, as training writes every model under the same name.

    The content is hashed, in a second or two a gigabyte: by time and size a copy of the same weights would count as others.
    """
    used = [(file, locate(file)) for file in (args.weights, *args.control)]
    used += [(args.config, resolve(args.config, ".yaml"))] if args.config else []
    noted = []
    for given, path in used:
        with about(path):
            noted.append(f"{Path(given).name} {fingerprint(path)}")
    return noted


def _one_or_each(values: list[Any]) -> Any:
    return values[0] if len(values) == 1 else values


def run(args: argparse.Namespace) -> int:
    """Make the pictures; the exit status."""
    jobs = read_jobs(args)
    if args.target.exists() and not args.target.is_dir():
        raise ConfigError(f"{args.target} is a file, but OUT must be a folder")
    for path in {path for job in jobs for path in (*job.hints, job.image, job.mask) if path is not None}:
        if not path.is_file():
            raise ConfigError(f"there is no picture {path}")
    device = choose_device(args.device)
    options = call_options(args)
    check_numbers(**{name: getattr(args, name) for name in ("steps", "guidance_scale", "eta", "denoise")})
    settings = json.loads(json.dumps({**options, "files": files_used(args), "dtype": args.dtype}))
    todo = unfinished(jobs, args.target, settings, args.force)
    total = sum(len(job.seeds) for job in jobs)
    missing = sum(len(seeds) for _, seeds in todo)
    written = 0
    if todo:
        home = torch.device("cpu") if args.offload else device
        steered = any(path is not None for job in jobs for path in job.hints)
        model = load_model(args.weights, args.control, args.config, home, DTYPES[args.dtype], steered)
        pipeline = ControlPipeline(model, device=device, **{name: getattr(args, name) for name in _MEMORY})
        count = len(model.control_networks())
        if found := next((len(job.hints) for job, _ in todo if any(job.hints) and len(job.hints) != count), None):
            raise ConfigError(
                f"{count} ControlNets and {found} hints: HINT is of the first, --hint names each further one"
            )
        with tqdm(total=total, initial=total - missing, unit="picture", disable=None) as bar:
            for job, seeds in todo:
                try:
                    for _ in _make(pipeline, job, seeds, options, settings, args.target):
                        written += 1
                        bar.update()
                except (ValueError, FloatingPointError) as error:
                    if not written and isinstance(error, ValueError):
                        _check_options(pipeline, job, options, args.seed)
                    tqdm.write(f"{args.program}: {job.name}: {' '.join(str(error).split())}", file=sys.stderr)
    parts = [f"{written} written to {args.target}"]
    parts += [f"{total - missing} were there already"] if total > missing else []
    parts += [f"{missing - written} failed"] if written < missing else []
    show(", ".join(parts))
    return 1 if written < missing else 0


def _make(
    pipeline: ControlPipeline,
    job: Job,
    seeds: Sequence[int],
    options: dict[str, Any],
    settings: dict[str, Any],
    target: Path,
) -> Iterator[None]:
    """Make and write the pictures of a job, one at a time.

    Raises:
        ValueError: about its files, its texts or seeds, or the options.
        FloatingPointError: the model gives NaN.
    """
    hints = [None if path is None else read_image(path) for path in job.hints]
    hint, given = hints[0] if len(hints) == 1 else hints, _read_start(job)
    for seed in seeds:
        made = pipeline(hint, job.prompt, negative_prompt=job.negative_prompt, seed=seed, **given, **options)
        made.save(job.file(target, seed), notes={"command": job.notes(settings, seed)})
        yield


def _read_start(job: Job) -> dict[str, Any]:
    """The picture to start from and its mask, where there are any, which all jobs share."""
    return {name: read_image(path) for name, path in (("image", job.image), ("mask", job.mask)) if path is not None}


class _OneStep(Exception):
    """A step was taken."""


def _check_options(pipeline: ControlPipeline, job: Job, options: dict[str, Any], seed: int) -> None:
    """Find out, in one step with a hint that is certainly of use, whether a job failed because of what all jobs share.

    Raises:
        ValueError: it did; the message says why.
    """

    def stop(step: int) -> None:
        raise _OneStep

    hints = [None if path is None else np.zeros((64, 64, 3), np.uint8) for path in job.hints]
    with suppress(_OneStep):
        pipeline(hints[0] if len(hints) == 1 else hints, "", seed=seed, callback=stop, **_read_start(job), **options)


def main(argv: Sequence[str] | None = None, program: str = PROGRAM) -> int:
    """Run the command; see the module's text for the exit status."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)

    def work() -> int:
        with memory_advice("a smaller --size, --vae-tiles, --sliced-attention or --offload"):
            return run(build_parser(program).parse_args(argv, argparse.Namespace(program=program)))

    interrupted = "interrupted; start it again to go on"
    return run_command(program, work, interrupted=interrupted, mistakes=(ValueError, OSError))


if __name__ == "__main__":
    sys.exit(main())
