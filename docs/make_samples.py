"""Draw docs/samples.png: what the pipeline does, on the tiny model that the main job has trained.

    python3 start.py train
    python -m docs.make_samples runs/tutorial/model.safetensors [OUT]

Each row shows one feature of docs/sampling.md; about two minutes on two cores.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from textwrap import wrap

import cv2
import numpy as np

from cldm.command import run_command
from cldm.data.fill import draw_fill, paint_circle
from cldm.model import add_control, create_model
from cldm.pictures import save_png
from cldm.pipeline import SAMPLERS, ControlPipeline
from cldm.terminal import show

ROOT = Path(__file__).resolve().parent.parent
SIZE, SCALE = 64, 2  # pixels of a picture, and how many times it is enlarged
CAPTION = 20  # pixels of a line above a picture
LETTERS = 17  # of such a line
COLUMNS = 7
PROMPT = "orange circle with teal background"
GUIDANCE = 3.0
OTHER_SAMPLERS = ("unipc", "euler", "euler_a", "dpmpp_2m_karras")  # of diffusers

Panel = tuple[str, np.ndarray]


def outline(x: float, y: float, radius: float) -> np.ndarray:
    """A hint with one circle, in parts of the picture's side."""
    return paint_circle(SIZE, (x * SIZE, y * SIZE), radius * SIZE, (255, 255, 255), (0, 0, 0), outline=1.5)


def rows(model_file: str) -> Iterator[tuple[str, list[Panel]]]:
    """Title and panels of each row."""
    model = create_model("cldm_tiny", weights=model_file)
    pipeline = ControlPipeline(model)
    hint, other = outline(0.35, 0.35, 0.24), outline(0.68, 0.7, 0.2)

    def make(hint: object, prompt: str = PROMPT, **options: object) -> np.ndarray:
        return np.asarray(
            pipeline(hint, prompt, **{"seed": 3, "guidance_scale": GUIDANCE, "size": (SIZE, SIZE), **options})[0]
        )

    hint_panel = ("hint", hint)
    prompts = [
        "red circle with white background",
        "white circle with navy background",
        "gold circle with purple background",
    ]
    yield (
        "prompts",
        [
            hint_panel,
            *((text.split(" circle")[0], make(hint, text)) for text in [PROMPT, *prompts]),
            ("none", make(hint, "")),
        ],
    )
    yield "strength", [hint_panel, *((f"{s:g}", make(hint, strength=s)) for s in (0.0, 0.3, 0.6, 1.0, 1.5))]
    yield "start and end", [hint_panel, *((f"{a:g} to {b:g}", make(hint, start=a, end=b)) for a, b in
                                          ((0, 0.1), (0, 0.3), (0, 0.6), (0.3, 1), (0, 1)))]  # fmt: skip
    names = [name for name in (*SAMPLERS, *OTHER_SAMPLERS) if name in SAMPLERS or _is_available(pipeline, name)]
    yield "samplers", [(name, make(hint, sampler=name)) for name in dict.fromkeys(names)][:COLUMNS]
    yield "no prompt", [hint_panel, ("guidance", make(hint, "")), ("guess mode", make(hint, "", guess_mode=True)),
                        ("cond. only", make(hint, "", conditional_only=True)),
                        ("paper's weights", make(hint, PROMPT, resolution_weights=True))]  # fmt: skip
    start = draw_fill(index=5, size=SIZE, seed=9).target
    denoised = [(f"denoise {d:g}", make(None, image=start, denoise=d)) for d in (0.2, 0.4, 0.6, 0.8)]
    yield "image to image", [("image", start), *denoised, ("with a hint", make(hint, image=start, denoise=0.8))]
    mask = np.zeros((SIZE, SIZE), np.uint8)
    mask[:, SIZE // 2 :] = 255
    whole = make(hint)
    anew = {"prompt": "red circle with white background", "image": whole, "mask": mask}
    yield "inpainting", [("image", whole), ("mask", np.dstack([mask] * 3)), ("with a hint", make(other, **anew)),
                         ("without", make(None, **anew))]  # fmt: skip
    photo = draw_fill(index=11, size=SIZE, seed=9).target
    yield (
        "annotators",
        [("picture", photo), *((name, make(photo, annotator=name)) for name in ("canny", "shuffle", "tile"))],
    )
    add_control(model, model_file)
    yield "several controls", [("first hint", hint), ("second hint", other), ("first", make([hint, None])), ("second", make([None, other])),
                               ("both", make([hint, other])), ("1 and 0.4", make([hint, other], strength=[1.0, 0.4]))]  # fmt: skip


def _is_available(pipeline: ControlPipeline, name: str) -> bool:
    """Whether a sampler of diffusers can be had here."""
    try:
        ControlPipeline(pipeline.model, name)
    except (ValueError, ImportError):
        return False
    return True


def sheet(made: Sequence[tuple[str, list[Panel]]]) -> np.ndarray:
    """All rows under each other, each panel under its caption: (H, W, 3), uint8. Panels are of SIZE or twice SIZE."""
    side = SIZE * SCALE
    left = 130
    page = []
    for title, panels in made:
        captions = [wrap(caption, LETTERS) for caption, _ in panels[:COLUMNS]]
        top = CAPTION * max(map(len, captions))
        row = np.full((top + side + 6, left + COLUMNS * (side + 6), 3), 255, np.uint8)
        cv2.putText(row, title, (4, top + side // 2), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (0, 0, 0), 1, cv2.LINE_AA)
        for i, (lines, (_, picture)) in enumerate(zip(captions, panels, strict=False)):
            x = left + i * (side + 6)
            for number, line in enumerate(lines):
                y = 14 + number * CAPTION
                cv2.putText(row, line, (x, y), cv2.FONT_HERSHEY_SIMPLEX, 0.42, (0, 0, 0), 1, cv2.LINE_AA)
            scale = side // len(picture)
            row[top : top + side, x : x + side] = picture.repeat(scale, axis=0).repeat(scale, axis=1)
        page.append(row)
    return np.vstack(page)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m docs.make_samples", description=__doc__.splitlines()[0])
    parser.add_argument("model", help="the trained tiny model, runs/tutorial/model.safetensors")
    parser.add_argument("out", nargs="?", type=Path, default=ROOT / "docs" / "samples.png")
    args = parser.parse_args(argv)

    def work() -> None:
        save_png(args.out, sheet(list(rows(args.model))))
        show(f"written to {args.out}")

    return run_command(parser.prog, work, interrupted="interrupted", mistakes=(ValueError, OSError))


if __name__ == "__main__":
    sys.exit(main())
