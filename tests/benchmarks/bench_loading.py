"""Creating a model with control and filling it from a file, at once or as published, against only reading that file.

    python -m tests.benchmarks.bench_loading [--config cldm_v15] [--folder FOLDER] [--pairs 3]

A file of real size (SD 1.5 with control: 5.7 GB) is written to a temporary folder and removed at the end. Each run is a process of its
own, whose imports are not counted; peak memory is what it takes beyond them.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from cldm.checkpoint.expected import expected_entries
from ldm.files import LazyTensor, write_weights

ROOT = Path(__file__).parents[2]

_RUN = """
import json, sys, time
import torch
from cldm.model import create_model, load_state_dict
from ldm import initial_values
from tests.benchmarks.memory import peak_memory

what, config, path = sys.argv[1:]
if what != "read":
    create_model(config, device="meta")  # what is imported on the way is not counted
before, start = peak_memory(), time.perf_counter()
if what == "read":
    with open(path, "rb") as file:
        kept = file.read()
elif what == "load":
    kept = create_model(config, weights=path)
elif what.startswith("create"):
    if what == "create and draw":
        initial_values.SMALLEST = sys.maxsize
    kept = create_model(config)
else:
    kept = create_model(config).cpu()
    kept.load_state_dict(load_state_dict(path, location="cpu"))
print(json.dumps([time.perf_counter() - start, peak_memory() - before]))
"""


def measure(what: str, config: str, path: Path) -> tuple[float, float]:
    """Seconds and bytes that one run takes."""
    done = subprocess.run(
        [sys.executable, "-c", _RUN, what, config, str(path)], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True
    )
    seconds, memory = json.loads(done.stdout)
    return seconds, memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="cldm_v15")
    parser.add_argument("--folder", help="where there is room for the file")
    parser.add_argument("--pairs", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        path = Path(folder) / "model.safetensors"
        lazy = {
            key: LazyTensor(t.shape, t.dtype, lambda t=t: torch.full(t.shape, 0.01).to(t.dtype))
            for key, t in expected_entries(args.config).items()
        }
        write_weights(path, lazy)
        size = path.stat().st_size
        ways = ("load", "read", "published", "create", "create and draw")
        runs = [[measure(way, args.config, path) for way in ways] for _ in range(args.pairs)]
    ratios = sorted(load[0] / read[0] for load, read, *_ in runs)
    loading, reading, published, creating, drawing = (statistics.median(run[i][0] for run in runs) for i in range(5))
    memory, twice = (statistics.median(run[i][1] for run in runs) / size for i in (0, 2))
    print(
        f"{args.config}, {size / 1e9:.2f} GB: created and filled in {loading:.2f} s, read in {reading:.2f} s, "
        f"ratio {statistics.median(ratios):.2f} (from {ratios[0]:.2f} to {ratios[-1]:.2f}); "
        f"peak memory {memory:.2f} times the file"
    )
    print(f"create_model and load_state_dict, as published: {published:.2f} s, peak memory {twice:.2f} times the file")
    print(f"of which create_model: {creating:.2f} s; with all initial values drawn at once: {drawing:.2f} s")


if __name__ == "__main__":
    main()
