"""Draw docs/base.png: what the small base paints without control, what its autoencoder keeps, and what ControlNets learn on it.

    python -m tests.benchmarks.bench_base cldm_tiny.safetensors --tasks shapes lines segments depth
    python -m docs.make_base [--base FILE] [--runs runs/bases] [--out FILE]

Rows of tasks that were not trained are left out. The photographs are those that scikit-image ships.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from skimage import data

from cldm.checkpoint.names import CONTROL_PREFIX
from cldm.checkpoint.recognising import SCHEDULE_KEYS
from cldm.command import run_command
from cldm.data.scenes import describe_scene, draw_hint
from cldm.model import OPTIONAL, create_model, load_weights
from cldm.pictures import save_png, to_uint8
from cldm.pipeline import ControlPipeline
from cldm.terminal import show
from docs.make_samples import COLUMNS, ROOT, SIZE, Panel, sheet

SETTINGS = {"seed": 1, "guidance_scale": 4.0, "size": (SIZE, SIZE), "steps": 30}
PROMPTS = {
    "one shape": [
        "red heart",
        "gold star",
        "teal cross",
        "white diamond",
        "navy triangle",
        "lime hexagon",
        "black square",
    ],
    "relations": [
        "red square left of blue circle",
        "gold star above teal heart",
        "white cross in front of purple circle",
        "lime triangle right of navy star",
        "orange circle below black diamond",
        "blue heart and red star",
        "pink hexagon above green square",
    ],
    "grounds": [
        "red circle with orange background",
        "red circle with sky blue to navy gradient background",
        "gold star with green to yellow gradient background",
        "white heart with red and black striped background",
        "blue cross with white and pink striped background",
        "orange square with navy and teal checkered background",
        "black star with yellow and lime checkered background",
    ],
}
PHOTOS = ("astronaut", "chelsea", "coffee")
TASKS = {"shapes": "lines", "lines": "lines", "segments": "segments", "depth": "depth"}
HELD_OUT = 2000  # number of the first pair that training held out


def rows(base: str, runs: Path) -> Iterator[tuple[str, list[Panel]]]:
    """Title and panels of each row."""
    model = create_model("cldm_tiny")
    load_weights(model, base, (*OPTIONAL, CONTROL_PREFIX, *SCHEDULE_KEYS))
    pipeline = ControlPipeline(model, warn_untrained=False)
    for title, prompts in PROMPTS.items():
        texts = [text if "background" in text else f"{text} with gray background" for text in prompts]
        pictures = pipeline(None, texts, **SETTINGS)
        yield title, [(text, np.asarray(picture)) for text, picture in zip(prompts, pictures, strict=True)]
    for size in (SIZE, 2 * SIZE):
        panels: list[Panel] = []
        for name in PHOTOS:
            photo = getattr(data, name)()
            side = min(photo.shape[:2])
            photo = cv2.resize(photo[:side, :side], (size, size), interpolation=cv2.INTER_AREA)
            pixels = torch.from_numpy(photo).permute(2, 0, 1)[None] / 127.5 - 1  # (1, 3, H, W)
            with torch.no_grad():
                kept = to_uint8(
                    model.decode_first_stage(model.get_first_stage_encoding(model.encode_first_stage(pixels).mode()))
                )
            panels += [(name, photo), ("after the VAE", kept[0])]
        yield f"photos, {size} px", panels
    for task, hint in TASKS.items():
        for run in sorted(runs.glob(f"{task}_*_{Path(base).stem}_*/model.safetensors")):
            trained = ControlPipeline(create_model("cldm_tiny", weights=run))
            shown: list[Panel] = []
            for index in range(HELD_OUT, HELD_OUT + COLUMNS // 2):
                scene = describe_scene(index, 0, most=1, plain=True) if task == "shapes" else describe_scene(index, 0)
                source = draw_hint(scene, SIZE, hint)
                made = trained(source, scene.prompt, **SETTINGS)
                shown += [("hint", source), (scene.prompt, np.asarray(made[0]))]
            yield task, shown


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m docs.make_base", description=__doc__.splitlines()[0])
    parser.add_argument("--base", default="cldm_tiny.safetensors")
    parser.add_argument("--runs", type=Path, default=Path("runs/bases"))
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "base.png")
    args = parser.parse_args(argv)

    def work() -> None:
        save_png(args.out, sheet(list(rows(args.base, args.runs))))
        show(f"written to {args.out}")

    return run_command(parser.prog, work, interrupted="interrupted", mistakes=(ValueError, OSError))


if __name__ == "__main__":
    sys.exit(main())
