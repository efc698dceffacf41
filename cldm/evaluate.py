"""Score a checkpoint on a data folder.

    python -m cldm.evaluate runs/tutorial/model.safetensors training/fill_tiny --condition fill --guidance-scale 3
    python -m cldm.evaluate models/control_sd15_canny.pth training/photos-canny --condition canny --parameter low_threshold=80

Pictures are made for the hints of pairs at the end of the folder, which training holds out; the condition's own
detector is run on them, and what it finds is compared with the hints. Beside the score stand two others that tell how to read it:
that of the target pictures, which a perfect model would reach, and that of pictures made for other hints, which is chance.
"""

import argparse
import json
import logging
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import nn

from cldm.arguments import check_numbers, list_seeds
from cldm.checkpoint import identify
from cldm.checkpoint.names import CONTROL_PREFIX
from cldm.checkpoint.recognising import SCHEDULE_KEYS
from cldm.cldm import ControlLDM
from cldm.command import Parser, device_option, help_text, run_command
from cldm.data.pairs import PairDataset
from cldm.data.shards import find_shards
from cldm.evaluation import CONDITIONS, DRAWN, Fidelity, Sampling, Score, generate, save_comparison
from cldm.files import locked, write_whole
from cldm.low_memory import memory_advice
from cldm.model import OPTIONAL, create_model, load_control, load_weights
from cldm.terminal import show
from ldm.util import ConfigError

PROGRAM = "python -m cldm.evaluate"
RESULT, PICTURE = "evaluation.json", "evaluation.png"
SHOWN = 8
_CLIP: Final = "openai/clip-vit-large-patch14"


def evaluate(a: argparse.Namespace) -> dict[str, Any]:
    """Do what the command line says; returns the result that is written."""
    out = Path(a.out) if a.out else Path("evaluations") / f"{Path(a.checkpoint).stem}-{a.condition}"
    if (out / RESULT).exists() and not a.force:
        raise ConfigError(f"{out / RESULT} exists; choose another --out, or write over it with --force")
    for name in ("pairs", "batch_size"):
        if getattr(a, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, found {getattr(a, name)}")
    try:
        check_numbers(guidance_scale=a.guidance_scale)
        hints, targets, prompts, numbers, pairs = held_out(a.folder, a.pairs)
        list_seeds([a.seed, a.seed + len(hints) - 1], 2)  # of the first and the last picture
    except ValueError as error:
        raise ConfigError(str(error)) from error
    device = device_option(a.device)
    score = make_score(a, hints, targets, pairs)
    model = load_model(a.checkpoint, a.base, a.config).to(device).eval()
    sampling = Sampling(a.steps, a.guidance_scale, a.seed, a.batch_size)
    if not 1 <= a.steps <= model.num_timesteps:
        raise ConfigError(f"--steps must be 1 to {model.num_timesteps}, found {a.steps}")
    # Before the work: another command may be at it, or nothing can be written there.
    with locked(out / RESULT, wait=False):
        pictures = generate(model, hints, prompts, sampling, progress=True)
        scores = score(pictures)
        result = {
            "checkpoint": str(a.checkpoint),
            "folder": str(a.folder),
            "condition": a.condition,
            "pairs": [int(numbers[0]), int(numbers[-1])],
            "scores": scores,
            "of_targets": score(targets),
            "of_other_hints": score(np.roll(pictures, len(pictures) // 2, axis=0)) if len(pictures) > 1 else None,
            "quality": quality(pictures, targets, prompts),
            "sampling": {"steps": a.steps, "guidance_scale": a.guidance_scale, "seed": a.seed},
        }
        versions = [pictures]
        if isinstance(score, Fidelity):
            versions.append(score.found(pictures[:SHOWN]))
        save_comparison(
            out / PICTURE, hints[:SHOWN], targets[:SHOWN], prompts[:SHOWN], [version[:SHOWN] for version in versions]
        )
        text = json.dumps(_without_nan(result), indent=1)
        write_whole(out / RESULT, (text + "\n").encode())
    others = result["of_other_hints"]
    for name, value in scores.items():
        chance = f", other hints {others[name]:.4f}" if others else ""  # of one pair there are none
        show(f"{name} {value:.4f} on {len(hints)} pairs (target pictures {result['of_targets'][name]:.4f}{chance})")
    for name, value in result["quality"].items():
        show(f"{name} {value:.4f}" if isinstance(value, float) else f"{name}: {value}")
    show(f"{out / RESULT}, {out / PICTURE}")
    return result


def _without_nan(value: Any) -> Any:
    """JSON has no NaN: None in its place."""
    if isinstance(value, dict):
        return {key: _without_nan(entry) for key, entry in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def held_out(folder: str, count: int) -> tuple[np.ndarray, np.ndarray, list[str], list[int], list[Any]]:
    """Hints and targets uint8 (N, H, W, 3), prompts, numbers and pairs of the last `count` pairs of a data folder.

    Of several sizes, those of the first of them.
    """
    if find_shards(folder):
        raise ConfigError(f"{folder} holds shards, which are streamed; scores need a folder of pairs")
    dataset = PairDataset(folder)
    sizes = dataset.sizes()
    first = max(len(dataset) - count, 0)
    numbers = [i for i in range(first, len(dataset)) if sizes[i] == sizes[first]]
    items = [dataset[i] for i in numbers]
    hints = np.stack([np.rint(item["hint"] * 255).astype(np.uint8) for item in items])
    targets = np.stack([np.rint(item["jpg"] * 127.5 + 127.5).astype(np.uint8) for item in items])
    return hints, targets, [item["txt"] for item in items], numbers, [dataset.pairs[i] for i in numbers]


def make_score(a: argparse.Namespace, hints: np.ndarray, targets: np.ndarray, pairs: list[Any]) -> Score:
    """The score that the command line names; a mistake in it is found before anything is loaded."""
    if a.condition in DRAWN:
        score = DRAWN[a.condition](pairs)
        if score is None:
            raise ConfigError(
                f"the pairs in {a.folder} are not what --condition {a.condition} scores; choose another condition"
            )
        return score
    parameters = dict(_parameter(text) for text in a.parameter)
    try:
        return Fidelity(
            a.condition, hints, targets, a.device, a.annotator_weights, a.annotator_version or None, **parameters
        )
    except ValueError as error:  # missing weights, an unknown parameter: the user's to mend
        raise ConfigError(str(error)) from error


def _parameter(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"--parameter takes name=value, found {text!r}")
    try:
        return name.strip().replace("-", "_"), json.loads(value.strip().lower())
    except json.JSONDecodeError as error:
        raise ConfigError(f"--parameter {name} must be a number, true or false, found {value!r}") from error


def load_model(checkpoint: str, base: str, config: str) -> ControlLDM:
    """The model of a checkpoint: whole, or a ControlNet alone that is put on a base."""
    report = identify(checkpoint)
    config = config or report.config or ""
    if not config:
        raise ConfigError(f"{checkpoint} is of no known family; name its configuration with --config")
    if report.layout == "full" and not base:
        return create_model(config, weights=checkpoint)
    if not base:
        raise ConfigError(f"{checkpoint} is no whole model ({report.layout}); name its base model with --base")
    model = create_model(config)
    load_weights(model, base, (*OPTIONAL, CONTROL_PREFIX, *SCHEDULE_KEYS))
    load_control(model, checkpoint)
    return model


# -- quality: optional, as it needs weights of its own -----------------------------------------------------------


def quality(pictures: np.ndarray, targets: np.ndarray, prompts: Sequence[str]) -> dict[str, float | str]:
    """FID against the targets, and CLIP score with the prompts, by torchmetrics; for what is not at hand, a line that says what to do."""
    return {
        "FID": _or_reason(lambda: fid(pictures, targets)),
        "CLIP score": _or_reason(lambda: clip_score(pictures, prompts)),
    }


class Unavailable(Exception):
    """A package or its weights are not at hand."""


def _or_reason(measure: Callable[[], float]) -> float | str:
    try:
        return measure()
    except Unavailable as error:
        return f"left out: {error}"


def fid(pictures: np.ndarray, targets: np.ndarray, extractor: nn.Module | None = None) -> float:
    """Fréchet distance of Inception features (Heusel et al. 2017); of few pictures it is too large, and only compares like with like.

    Raises:
        Unavailable: `torch-fidelity` is not installed, or its weights are not there; nothing is downloaded.
    """
    if extractor is None:
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
        except ImportError as error:
            raise Unavailable("FID needs `pip install torch-fidelity`") from error
        file = Path(torch.hub.get_dir()) / "checkpoints" / Path(URL_INCEPTION_V3).name
        if not file.is_file():
            raise Unavailable(f"FID needs the file {file}, from {URL_INCEPTION_V3}")
    from torchmetrics.image.fid import FrechetInceptionDistance

    if len(pictures) < 2:
        raise Unavailable("FID needs at least 2 pictures")
    metric = FrechetInceptionDistance(feature=2048 if extractor is None else extractor)
    for chosen, real in ((targets, True), (pictures, False)):
        for start in range(0, len(chosen), 16):
            metric.update(torch.from_numpy(chosen[start : start + 16]).permute(0, 3, 1, 2), real=real)
    return float(metric.compute())


def clip_score(pictures: np.ndarray, prompts: Sequence[str]) -> float:
    """Mean cosine of CLIP's picture and prompt, times 100 (Hessel et al. 2021).

    Raises:
        Unavailable: `transformers` is not installed, or CLIP's weights are not in its cache; nothing is downloaded.
    """
    try:
        from huggingface_hub import try_to_load_from_cache
        from torchmetrics.functional.multimodal import clip_score as score
        from transformers import CLIPModel  # noqa: F401 (torchmetrics imports it when it is called)
    except ImportError as error:
        raise Unavailable("CLIP score needs `pip install transformers`") from error
    if not any(
        isinstance(try_to_load_from_cache(_CLIP, name), str) for name in ("model.safetensors", "pytorch_model.bin")
    ):
        raise Unavailable(f"CLIP score needs the weights of {_CLIP}: `hf download {_CLIP}`")
    tensor = torch.from_numpy(pictures).permute(0, 3, 1, 2)
    return float(score(list(tensor), list(prompts), model_name_or_path=_CLIP))


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the defaults, and keeps the lines of the description."""


def build_parser(program: str = PROGRAM) -> argparse.ArgumentParser:
    parser = Parser(prog=program, description=help_text(__doc__, PROGRAM, program), formatter_class=_Formatter)
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="a model with control, or a ControlNet alone (then --base)")
    add("folder", metavar="FOLDER", help="data folder with prompt.json")
    add("--condition", required=True, choices=CONDITIONS, metavar="CONDITION", help=", ".join(CONDITIONS))
    add("--pairs", type=int, default=64, help="how many pairs, from the end of the folder")
    add("--base", default="", help="base model of a ControlNet that is alone in its file")
    add("--config", default="", help="configuration, where the file is of no known family")
    add("--steps", type=int, default=20, help="of DDIM")
    add("--guidance-scale", type=float, default=9.0, help="1 for none; the tiny model wants 3")
    add("--seed", type=int, default=0, help="of the first picture; the next has the next number")
    add("--batch-size", type=int, default=4, help="pictures made at once; does not change them")
    add("--device", default=None, help="cpu, cuda, mps; the best there is if not given")
    add(
        "--parameter",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="of the detector, as when the hints were made, e.g. low_threshold=80",
    )
    add("--annotator-weights", default=None, metavar="PATH", help="the detector's weights, a file or a folder")
    add(
        "--annotator-version",
        default="",
        metavar="VERSION",
        help="1.0 or 1.1, as when the hints were made; the first that has the condition if not given",
    )
    add(
        "--out",
        default="",
        help="folder of evaluation.json and evaluation.png; evaluations/CHECKPOINT-CONDITION if not given",
    )
    add("--force", action="store_true", help="write over the evaluation in that folder")
    return parser


def main(argv: Sequence[str] | None = None, program: str = PROGRAM) -> int:
    """0, or 2 for a mistake on the command line or in the files that it names."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    arguments = build_parser(program).parse_args(argv)

    def work() -> None:
        with memory_advice("a smaller --batch-size"):
            evaluate(arguments)

    return run_command(program, work, interrupted="interrupted; nothing was written")


if __name__ == "__main__":
    sys.exit(main())
