"""Memory and time of adding control to a checkpoint of real size.

    python -m tests.benchmarks.bench_checkpoints [--config cldm_v15] [--folder FOLDER] [--repeats 2]

A base model with weights by the parity cases' fill rule is written to a temporary folder (for SD 1.5: 4.3 GB, and twice
the 5.7 GB of the output beside it). Then tool_add_control.py runs as a process of its own, in turn with what it is
measured against: copying its output and reading its input, and an interpreter that only imports torch. Everything is
removed at the end.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from cldm.checkpoint.control import initial_values
from cldm.checkpoint.expected import expected_entries, model_params
from cldm.checkpoint.names import CONTROL_PREFIX
from cldm.checkpoint.schedule import schedule_tensors
from ldm.files import LazyTensor, write_weights
from tests.parity import value

ROOT = Path(__file__).parents[2]
MEMORY_BUDGET = 2.0  # GiB beyond the interpreter with torch imported
TIME_BUDGET = 1.5  # times copying the output and reading the input; also beyond the interpreter with torch
_CHUNK = 16 << 20


def write_base(path: Path, config: str) -> None:
    """A base model as published ones are, without ControlNet and `logvar`, filled."""
    expected = {k: i for k, i in expected_entries(config).items() if not k.startswith(CONTROL_PREFIX) and k != "logvar"}
    initial = initial_values(expected) | schedule_tensors(model_params(config))

    def entry(key: str, info: LazyTensor) -> LazyTensor:
        return initial.get(key) or LazyTensor(
            info.shape,
            info.dtype,
            lambda: torch.from_numpy(np.asarray(value(key, info.shape), dtype=np.float32)).reshape(info.shape),
        )

    write_weights(path, {key: entry(key, info) for key, info in expected.items()})


def run(command: Sequence[str]) -> tuple[float, float]:
    """Seconds and peak resident GiB of a command, which must succeed."""
    start = time.perf_counter()
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with status {process.returncode}")
    return seconds, usage.ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def timed(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def read(path: Path) -> None:
    """Read a file from its beginning to its end."""
    buffer = bytearray(_CHUNK)
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def copy(source: Path, target: Path) -> None:
    """Copy a file, and wait until it is on the disk, as the tool does."""
    shutil.copyfile(source, target)
    with open(target, "rb+") as file:
        os.fsync(file.fileno())


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="cldm_v15", help="configuration of the model (default: %(default)s)")
    parser.add_argument("--folder", help="where to make the temporary folder; it needs 16 GB for SD 1.5")
    parser.add_argument("--repeats", type=int, default=2, help="of every measurement; the quickest counts")
    parser.add_argument("--suffix", default=".safetensors", help="format of input and output (default: %(default)s)")
    args = parser.parse_args(argv)
    start, torch_memory = min(run([sys.executable, "-c", "import torch"]) for _ in range(args.repeats))
    imports, _ = min(run([sys.executable, "-c", "import cldm.checkpoint"]) for _ in range(args.repeats))
    with tempfile.TemporaryDirectory(prefix="bench_checkpoints_", dir=args.folder) as name:
        source, output, copied = (Path(name) / f"{part}{args.suffix}" for part in ("base", "control", "copy"))
        write_base(source, args.config)
        command = [sys.executable, "tool_add_control.py", str(source), str(output), "--config", args.config]
        tool, copying, reading, memory = [], [], [], 0.0
        for _ in range(args.repeats):
            output.unlink(missing_ok=True)  # giving the old one's space back is no part of the work
            seconds, peak = run(command)
            memory = max(memory, peak)
            tool.append(seconds)
            copying.append(timed(lambda: copy(output, copied)))
            copied.unlink()
            reading.append(timed(lambda: read(source)))
        sizes = source.stat().st_size / 1e9, output.stat().st_size / 1e9
    ratio = (min(tool) - start) / (min(copying) + min(reading))
    beyond = memory - torch_memory
    print(f"{args.config}{args.suffix}: input {sizes[0]:.2f} GB, output {sizes[1]:.2f} GB")
    print(f"peak memory   {memory:.2f} GiB, {beyond:.2f} beyond torch imported (at most {MEMORY_BUDGET})")
    print(
        f"time          {min(tool):.1f} s, {min(tool) - start:.1f} beyond torch imported, of which {imports - start:.1f} "
        "are further imports"
    )
    print(f"in comparison {min(copying):.1f} s to copy the output, {min(reading):.1f} s to read the input")
    print(f"ratio         {ratio:.2f} (at most {TIME_BUDGET})")
    return 0 if beyond <= MEMORY_BUDGET and ratio <= TIME_BUDGET else 1


if __name__ == "__main__":
    sys.exit(main())
