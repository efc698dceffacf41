"""The training data: MyDataset reads image pairs; as a script, this file makes a Fill set.

python tutorial_dataset.py --out training/fill50k --count 50000 --size 512
"""

import argparse
import sys
from pathlib import Path

from cldm.data.fill import PALETTES, generate_fill
from cldm.data.pairs import PairDataset


class MyDataset(PairDataset):
    """The pairs that `prompt.json` in the data folder lists, as `{"jpg", "txt", "hint"}`; see PairDataset.

    Change `__getitem__` for data of another layout: `jpg` is the target, float32 (H, W, 3) in [-1, 1], `txt` the prompt and `hint`
    the condition, float32 (H, W, 3) in [0, 1].
    """

    def __init__(self, root: str | Path = "./training/fill50k/", **kwargs) -> None:
        super().__init__(root, **kwargs)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Make a Fill set: circles to fill, with both colours in the prompt.")
    parser.add_argument("--out", default="./training/fill50k/", help="folder to write (default: %(default)s)")
    parser.add_argument("--count", type=int, default=50_000, help="number of pairs (default: %(default)s)")
    parser.add_argument("--size", type=int, default=512, help="pixels a side, a multiple of 64 (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the set (default: %(default)s)")
    parser.add_argument(
        "--palette", default="web", choices=list(PALETTES), help="colours to use (default: %(default)s)"
    )
    parser.add_argument("--workers", type=int, help="threads (default: one for each processor)")
    options = parser.parse_args(argv)
    try:
        listing = generate_fill(
            options.out, options.count, options.size, options.seed, options.palette, options.workers
        )
    except (ValueError, OSError) as error:
        print(f"tutorial_dataset.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130
    print(f"{options.count} pairs are in {listing.parent}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
