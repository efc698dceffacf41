"""Runs of tutorial_train.py in processes of their own, which tests stop and kill.

    python -m tests.cldm.training.runs [--kills 100]

kills a run that often at random moments, and compares what it ends with to a run that was left alone.
"""

import argparse
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

from cldm.data.fill import generate_fill
from cldm.training.checkpoints import WholeFiles, checkpoints_in

# A server that has imported everything, from which each run is forked: importing takes longer than a short run.
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["tutorial_train"])


def make_data(folder: Path, count: int = 24) -> Path:
    generate_fill(folder, count=count, size=64, palette="clear", progress=False)
    return folder


def arguments(data: Path, out: Path, **changes: object) -> list[str]:
    """Of tutorial_train.py, for a run of a few seconds."""
    settings = {"data": data, "out": out, "held_out": 8, "batch_size": 2, "steps": 8, "log_every": 3, "save_every": 3,
                "sample_steps": 2, "pictures": 2, "pictures_before": False, "accelerator": "cpu", **changes}  # fmt: skip
    return [f"{k}={v}" for k, v in settings.items()]


def _main(argv: list[str], log: Path) -> None:
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.setsid()  # a group of its own, for signals that reach all processes of a run
    torch.set_num_threads(1)
    # Workers of data loaders come from the run, as they do when it is a command; from a server they would outlive a kill.
    multiprocessing.set_start_method("fork", force=True)
    import tutorial_train

    sys.exit(tutorial_train.main(argv))


def start(argv: list[str], log: Path) -> multiprocessing.process.BaseProcess:
    """A run that is on its way; what it says is added to the file `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    process = _SERVER.Process(target=_main, args=(argv, log))
    process.start()
    return process


def run(argv: list[str], log: Path) -> int:
    """Exit status of a whole run."""
    process = start(argv, log)
    process.join()
    return process.exitcode


def stop_at(argv: list[str], log: Path, number: int, when, group: bool = False) -> int:
    """Exit status of a run that gets a signal as soon as `when()` is true; its own, if it ends before.

    With `group` all of its processes get it, as from a terminal or a cluster, and twice, as `torchrun` and `timeout` send it.
    """
    process = start(argv, log)
    while process.is_alive() and not when():
        time.sleep(0.01)
    if process.is_alive():
        for _ in range(1 + group):
            (os.killpg if group else os.kill)(process.pid, number)
            time.sleep(0.05 * group)  # two that are pending at once are one
    process.join()
    return process.exitcode


def newest(out: Path) -> dict:
    """The newest checkpoint of a run, which must load."""
    return WholeFiles().load_checkpoint(list(checkpoints_in(out / "checkpoints").values())[-1])


def differences(a: object, b: object, where: str = "") -> list[str]:
    """Where two checkpoints, or parts of them, differ in any bit."""
    if isinstance(a, dict) and isinstance(b, dict):
        found = [f"{where}/{key} stands in one alone" for key in a.keys() ^ b.keys()]
        return found + [d for key in a.keys() & b.keys() for d in differences(a[key], b[key], f"{where}/{key}")]
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        return [d for i, pair in enumerate(zip(a, b, strict=True)) for d in differences(*pair, f"{where}/{i}")]
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [where]
    return [] if a == b else [f"{where}: {a!r} and {b!r}"]


TRAINED = ("state_dict", "optimizer_states", "lr_schedulers", "global_step")


def compare(a: Path, b: Path) -> list[str]:
    """Where the newest checkpoints of two runs differ."""
    first, second = newest(a), newest(b)
    return differences({k: first[k] for k in TRAINED}, {k: second[k] for k in TRAINED})


def kill_until_done(argv: list[str], out: Path, log: Path, kills: int, seconds: float, seed: int = 0) -> int:
    """Kill a run with SIGKILL at `kills` random moments of at most `seconds`, then let it end; returns how often it was alive."""
    rng = random.Random(seed)
    met = 0
    for _ in range(kills):
        process = start(argv, log)
        process.join(rng.uniform(0, seconds))
        if process.is_alive():
            met += 1
            os.kill(process.pid, signal.SIGKILL)
        process.join()
        if checkpoints_in(out / "checkpoints"):
            newest(out)
    assert run(argv, log) == 0, log.read_text()[-2000:]
    return met


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument(
        "--seconds", type=float, default=8.0, help="longest time that a run is given before it is killed"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        data = make_data(root / "data")
        alone, killed = root / "alone", root / "killed"
        changes = {"steps": options.steps, "save_every": 1, "ema": 0.9, "empty_prompts": 0.5, "pictures": 0}
        assert run(arguments(data, alone, **changes), root / "alone.log") == 0
        met = kill_until_done(
            arguments(data, killed, **changes), killed, root / "killed.log", options.kills, options.seconds
        )
        different = compare(alone, killed)
        print(
            f"killed {met} times at work, {options.kills} times in all; {len(different)} differences after {options.steps} steps"
        )
        return bool(different)


if __name__ == "__main__":
    sys.exit(main())
