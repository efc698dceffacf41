"""How well ControlNets learn on a base: each task is trained on each base with the same settings, and scored on held-out pairs.

    python -m tests.benchmarks.bench_base models/cldm_tiny.safetensors OTHER.safetensors
    python -m tests.benchmarks.bench_base models/cldm_tiny.safetensors --tasks shapes segments --steps 300

Tasks: `fill` (circles), `shapes` (the outline of one of eight shapes, in all of the web's colours), and scenes of up to three shapes
with their segmentation maps (`segments`), outlines (`lines`) or `depth`. A training takes four to eight minutes on two cores; what is
done is kept in `--out`.
"""

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import tutorial_dataset
import tutorial_train
from cldm.terminal import show

PAIRS = 2000 + 64  # 64 held out
PALETTES = {"fill": "clear", "shapes": "web", "segments": "clear", "lines": "clear", "depth": "clear"}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bases", nargs="+", type=Path)
    parser.add_argument("--tasks", nargs="+", choices=list(PALETTES), default=["fill", "shapes", "segments"])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--pairs", type=int, default=PAIRS)
    parser.add_argument(
        "--configs", nargs="+", default=["cldm_tiny"], help="of each base; the last serves those that follow"
    )
    parser.add_argument("--settings", nargs="*", default=[], help="others of tutorial_train.py, as key=value")
    parser.add_argument("--out", type=Path, default=Path("runs/bases"))
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    lines = []
    for task in options.tasks:
        data = options.out / f"data_{task}_{options.pairs}"
        drawn = ["--task", task, "--out", str(data), "--count", str(options.pairs), "--size", "64"]
        if tutorial_dataset.main([*drawn, "--palette", PALETTES[task]]):
            return 1
        for number, base in enumerate(options.bases):
            run = options.out / f"{task}_{options.steps}_{base.stem}_{number}"
            config = options.configs[min(number, len(options.configs) - 1)]
            own = [f"base={base}", f"config={config}", f"data={data}", f"steps={options.steps}", f"out={run}"]
            if tutorial_train.main([*own, "cache=true", *options.settings]):
                return 1
            result = json.loads((run / "result.json").read_text())
            for when in ("before", "after"):
                scores = ", ".join(f"{name} {value:.3f}" for name, value in result[when].items())
                lines.append(f"{task:10} {base} {when:7} {scores}")
    for line in lines:
        show(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
