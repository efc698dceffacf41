"""How well ControlNets learn on a base: each task is trained on each base with the same settings, and scored on held-out pairs.

    python -m tests.benchmarks.bench_base models/cldm_tiny.safetensors OTHER.safetensors
    python -m tests.benchmarks.bench_base models/cldm_tiny.safetensors --tasks shapes segments --steps 300

Tasks: `fill` (circles), `shapes` (the outline of one of eight shapes, in all of the web's colours), `segments` (scenes of up to three
shapes with their segmentation maps) and `depth`. A training takes four to eight minutes on two cores; what is done is kept in `--out`.
"""

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import tutorial_dataset
import tutorial_train

PAIRS = 2000 + 64  # 64 held out
PALETTES = {"fill": "clear", "shapes": "web", "segments": "clear", "depth": "clear"}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bases", nargs="+", type=Path)
    parser.add_argument("--tasks", nargs="+", choices=list(PALETTES), default=["fill", "shapes", "segments"])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--pairs", type=int, default=PAIRS)
    parser.add_argument(
        "--config", help="of the bases, in their order, separated by commas (cldm_tiny)", default="cldm_tiny"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/bases"))
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    configs = options.config.split(",")
    lines = []
    for task in options.tasks:
        data = options.out / f"data_{task}_{options.pairs}"
        drawn = ["--task", task, "--out", str(data), "--count", str(options.pairs), "--size", "64"]
        if tutorial_dataset.main([*drawn, "--palette", PALETTES[task]]):
            return 1
        for number, base in enumerate(options.bases):
            run = options.out / f"{task}_{options.steps}_{base.stem}_{number}"
            config = configs[min(number, len(configs) - 1)]
            settings = [
                f"base={base}",
                f"config={config}",
                f"data={data}",
                f"steps={options.steps}",
                f"out={run}",
                "cache=true",
            ]
            if tutorial_train.main(settings):
                return 1
            result = json.loads((run / "result.json").read_text())
            for when in ("before", "after"):
                scores = ", ".join(f"{name} {value:.3f}" for name, value in result[when].items())
                lines.append(f"{task:10} {base} {when:7} {scores}")
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
