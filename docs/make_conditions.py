"""Make docs/conditions.png: one photograph and every condition that needs no weights, side by side.

    python -m docs.make_conditions [PHOTO] [OUT]

Without PHOTO: the astronaut that scikit-image ships (NASA, public domain), as stored with the tests.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np

import annotator
from annotator.pictures import HWC3, read_image, save_png
from annotator.shuffle import ColorShuffleDetector, DownSampleDetector

ROOT = Path(__file__).resolve().parent.parent
SIZE = 256
CAPTION = 24
COLUMNS = 4


def conditions(photo: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Captions and pictures of about `SIZE` pixels."""

    def hint(name: str, image: np.ndarray = photo, **parameters: object) -> annotator.Hint:
        return annotator.load(name).make_hint(image, SIZE, **parameters)

    canny = hint("canny")
    picture = canny.picture
    height, width = picture.shape[:2]
    yield "photograph, tile, ip2p", hint("tile").source
    yield "canny", canny.source
    yield "canny, 40 and 90", hint("canny", low_threshold=40, high_threshold=90).source
    yield "scribble", hint("scribble").source
    strokes = 255 - hint("threshold", threshold=90).source
    yield "scribble_interactive", hint("scribble_interactive", strokes).source
    hole = np.full((height, width), 255, dtype=np.uint8)
    hole[height // 8 : height // 2, width // 3 : 2 * width // 3] = 0
    yield "inpaint", hint("inpaint", np.dstack([picture, hole])).shown
    yield "shuffle", hint("shuffle", f=64, seed=0).source
    yield "shuffled colours", ColorShuffleDetector()(picture, seed=2)
    yield "noise, down and up", DownSampleDetector()(picture, seed=0)
    yield "invert", hint("invert").source
    yield "threshold", hint("threshold").source
    yield "blur", hint("blur", sigma=4.0).source
    yield "grey", hint("grey").source
    yield "colour", hint("colour", cell=32).source
    yield "colour, cells of 8", hint("colour", cell=8).source
    yield "tile_gaussian", hint("tile_gaussian", scale_factor=4.0, blur_strength=4.0).source


def sheet(panels: Sequence[tuple[str, np.ndarray]]) -> np.ndarray:
    """The pictures in rows of four, each under its caption: (H, W, 3), uint8."""
    cells = []
    for caption, picture in panels:
        bar = np.full((CAPTION, picture.shape[1], 3), 255, dtype=np.uint8)
        cv2.putText(bar, caption, (6, 17), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (0, 0, 0), 1, cv2.LINE_AA)
        cell = np.vstack([bar, picture])
        cells.append(cv2.copyMakeBorder(cell, 0, 4, 2, 2, cv2.BORDER_CONSTANT, value=(255, 255, 255)))
    rows = [np.hstack(cells[i : i + COLUMNS]) for i in range(0, len(cells), COLUMNS)]
    return np.vstack(rows)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("photo", nargs="?", type=Path)
    parser.add_argument("out", nargs="?", type=Path, default=ROOT / "docs" / "conditions.png")
    args = parser.parse_args(argv)
    try:
        if args.photo is None:
            photo = np.load(ROOT / "tests" / "data" / "annotator" / "canny.npz")["astronaut/input"]
        else:
            photo = HWC3(read_image(args.photo))
        save_png(args.out, sheet(list(conditions(photo))))
    except (ValueError, OSError) as err:
        print(f"make_conditions.py: {err}", file=sys.stderr)
        return 2
    print(f"written to {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
