"""Scripts that we wrote in the way of the reference's users run on the tiny model, each as a file of its own."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from cldm.checkpoint import add_control
from cldm.data.fill import generate_fill

ROOT = Path(__file__).parents[2]


def run(script: str, *arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "tests" / "examples" / script), *map(str, arguments)]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "2", "HOME": str(Path.home())}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "control_ini.safetensors"
    add_control(ROOT / "models" / "cldm_tiny.safetensors", path, progress=False)
    return path


def test_training_script(tmp_path, weights):
    generate_fill(tmp_path / "data", count=16, size=64, palette="clear", progress=False)
    done = run("train_like_the_reference.py", tmp_path / "data", weights, tmp_path / "out")
    assert done.returncode == 0, done.stderr[-2000:]
    names = {p.name.split("_gs-")[0] for p in (tmp_path / "out").rglob("image_log/train/*.png")}
    assert names == {"reconstruction", "control", "conditioning", "samples_cfg_scale_9.00", "overview"}
    assert list((tmp_path / "out").rglob("*.ckpt"))


def test_sampling_snippet(tmp_path, weights):
    done = run("sample_like_the_reference.py", weights, tmp_path / "out.npy")
    assert done.returncode == 0, done.stderr[-2000:]
    pictures = np.load(tmp_path / "out.npy")
    assert pictures.shape == (2, 64, 64, 3) and pictures.dtype == np.uint8 and pictures.std() > 5


@pytest.mark.parametrize(
    "switches, trained",
    [
        ({"only_mid_control": True}, ("control_model.",)),
        ({"sd_locked": False}, ("control_model.", "model.diffusion_model.out")),
    ],
)
def test_two_processes_train_as_one_with_twice_the_batch(tmp_path, switches, trained):
    for processes in (2, 1):
        done = run("train_on_two_processes.py", tmp_path, json.dumps(switches), processes)
        assert done.returncode == 0, done.stderr[-2000:]
        if processes == 2:
            one, other = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert one == other and all(any(key.startswith(start) for key in one["changed"]) for start in trained)
    assert all(key.startswith(trained) for key in one["changed"])
    unused = [key for key in one["changed"] if key.startswith("control_model.zero_convs")]
    assert bool(unused) != switches.get("only_mid_control", False)
    two, single = (torch.load(tmp_path / f"moved-{n}.pt", weights_only=True) for n in (2, 1))
    assert two.keys() == single.keys()
    whole = torch.cat([value.flatten() for value in single.values()])
    apart = torch.cat([(value - single[key]).flatten() for key, value in two.items()])
    assert whole.norm() > 0 and apart.norm() < 1e-3 * whole.norm()
