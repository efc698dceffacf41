"""Make the pictures of all conditions: docs/conditions.png, and a small one of each in docs/conditions.

    python -m docs.make_conditions [PHOTO] [OUT]

Conditions that need no weights are made of PHOTO: by default the astronaut that scikit-image ships (NASA, public domain), as stored
with the tests. Those that need weights, which are not kept here, draw what a perfect network would find in a drawn room.
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
from docs.drawn_scene import Scene, answers, draw_scene

ROOT = Path(__file__).resolve().parent.parent
SIZE = 256
SCENE_SIZE = 512
SMALL = 128
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


def scene_conditions(scene: Scene) -> Iterator[tuple[str, np.ndarray]]:
    """Every condition that needs weights, by name, with its hint for the scene."""
    for name, (network, output) in answers(scene).items():
        info = annotator.describe(name)
        detector = info.detector_class.__new__(info.detector_class)  # its constructor would look for weights
        vars(detector).update(version=info.version, network=network)
        condition = annotator.Annotator(info, detector)
        request = condition.request(scene.picture, scene.size, scene.size)
        if name == "segmentation":
            request.parameters["task"] = "panoptic"
        yield name, condition.finish(request, detector.finish(output, request.view, **request.parameters)).source


def small(picture: np.ndarray, size: int = SMALL) -> np.ndarray:
    """A picture for the table; thin lines on black are made thicker first, as they would fade."""
    if np.median(picture) < 10:
        width = max(len(picture) // size - 1, 1)
        picture = cv2.dilate(picture, np.ones((width, width), dtype=np.uint8))
    return cv2.resize(picture, (size, size), interpolation=cv2.INTER_AREA)


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
    parser.add_argument("out", nargs="?", type=Path, default=ROOT / "docs", help="folder for the pictures")
    args = parser.parse_args(argv)
    try:
        if args.photo is None:
            photo = np.load(ROOT / "tests" / "data" / "annotator" / "canny.npz")["astronaut/input"]
        else:
            photo = HWC3(read_image(args.photo))
        panels, scene = list(conditions(photo)), draw_scene(SCENE_SIZE)
        save_png(args.out / "conditions.png", sheet(panels))
        save_png(args.out / "conditions" / "drawn_scene.png", small(scene.picture, SIZE))
        named = [(name, picture) for caption, picture in panels for name in caption.split(", ")]
        for name, picture in [*reversed(named), *scene_conditions(scene)]:  # of several, the first one is kept
            if name in annotator.list_annotators():
                save_png(args.out / "conditions" / f"{name}.png", small(picture))
    except (ValueError, OSError) as err:
        print(f"make_conditions.py: {err}", file=sys.stderr)
        return 2
    print(f"written to {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
