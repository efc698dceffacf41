"""Gather photographs with captions to try the tools on: those that scikit-image and scikit-learn bring along.

    pip install scikit-image scikit-learn
    python -m docs.make_photos [OUT]

Nothing is fetched, and neither package is imported. scikit-image says in `skimage.data` where its pictures come from (public
domain, but for the cat, CC0, by Stefan van der Walt, and the coffee, CC0, by Rachel Michetti, among others); the two of
scikit-learn are CC BY 2.0, by danielbuechele (china) and vultilion (flower).
"""

import argparse
import importlib.util
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"skimage": "data", "sklearn": "datasets/images"}
# File: captions, by package.
PHOTOS = {
    "skimage": {
        "astronaut.png": "a smiling astronaut in an orange space suit before a flag",
        "brick.png": "a pavement of bricks in black and white",
        "camera.png": "a man with a camera on a tripod in black and white",
        "chelsea.png": "the face of a ginger cat",
        "coffee.png": "a cup of coffee on a wooden table",
        "coins.png": "old coins in rows in black and white",
        "grass.png": "blades of grass in black and white",
        "gravel.png": "gravel in black and white",
        "hubble_deep_field.jpg": "galaxies and stars on a black sky",
        "moon.png": "the surface of the moon in black and white",
        "motorcycle_left.png": "a red motorcycle in a garage",
        "retina.jpg": "the retina of an eye with its vessels",
        "rocket.jpg": "a rocket on its launch pad under a dark blue sky",
    },
    "sklearn": {
        "china.jpg": "a chinese tower with curved roofs above trees",
        "flower.jpg": "an orange flower on a dark green background",
    },
}


def gather(out: Path) -> int:
    """Copy all photographs that are installed to `out`, each with its caption beside it; returns their number.

    Raises:
        ValueError: if a package, or its pictures, are missing.
    """
    for package, photos in PHOTOS.items():
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise ValueError(f"{package} is not installed; pip install scikit-image scikit-learn")
        folder = Path(spec.origin).parent / FOLDERS[package]
        for name, caption in photos.items():
            if not (folder / name).is_file():
                raise ValueError(f"this version of {package} brings no {name} along (looked in {folder})")
            out.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / name, out / name)
            (out / name).with_suffix(".txt").write_text(caption + "\n", encoding="utf-8")
    return sum(len(photos) for photos in PHOTOS.values())


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", nargs="?", type=Path, default=ROOT / "training" / "photos")
    args = parser.parse_args(argv)
    try:
        print(f"{gather(args.out)} photographs are in {args.out}")
    except (ValueError, OSError) as error:
        print(f"make_photos.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
