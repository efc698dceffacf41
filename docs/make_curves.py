"""Makes the curves of docs/converging.md: short runs of `tutorial_train.py` on the tiny model that go wrong. (`curves_good.png` is
the main job's.)

    python -m docs.make_curves [NAME ...]

Each takes two to four minutes on one core, and goes on where it was if it is interrupted. Runs are in `runs/curves`.
"""

import logging
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import tutorial_train

DOCS = Path(__file__).parent
RUNS = Path("runs/curves")
COMMON = ["batch_size=16", "cache=true", "log_every=50", "pictures=8", "pictures_at_once=8", "sample_steps=10"]
CASES = {
    "small_rate": ["learning_rate=1.5e-5", "steps=300"],
    "large_rate": ["learning_rate=3e-2", "steps=150"],
    "few_steps": ["learning_rate=1.5e-3", "steps=100"],
}


def main(names: Sequence[str]) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for name in names or CASES:
        status = tutorial_train.main([*COMMON, *CASES[name], f"out={RUNS / name}"])
        if status:
            return status
        shutil.copyfile(RUNS / name / "curves.png", DOCS / f"curves_{name}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
