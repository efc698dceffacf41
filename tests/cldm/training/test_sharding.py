"""FSDP on two processes without a GPU: the same weights as with DDP, and checkpoints that either goes on from."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pytorch_lightning.plugins.precision import FSDPPrecision

from cldm.data.fill import generate_fill
from cldm.training.sharding import ShardedStrategy
from ldm.files import read_checkpoint, read_state_dict

ROOT = Path(__file__).parents[3]
HERE = "tests.cldm.training.fsdp_on_cpu"


def train(data, out, strategy, steps):
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    settings = {"data": data, "out": out, "held_out": 8, "batch_size": 2, "steps": steps, "log_every": 2, "save_every": 2,
                "sample_steps": 2, "pictures": 2, "pictures_before": False, "accelerator": "cpu", "devices": 2,
                "strategy": strategy, "clip": 0.05, "precision": "bf16-mixed", "frozen_precision": "fp32"}  # fmt: skip
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}", "-m", HERE]
    command += [f"{key}={value}" for key, value in settings.items()]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=400, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_shards_train_as_whole_models_do_and_go_on_from_their_checkpoints(tmp_path):
    data = tmp_path / "fill"
    generate_fill(data, count=24, size=64, palette="clear", progress=False)
    train(data, tmp_path / "whole", "ddp", 4)
    train(data, tmp_path / "shards", "fsdp", 2)
    train(data, tmp_path / "shards", "fsdp", 4)
    whole, shards = (
        read_checkpoint(tmp_path / run / "checkpoints" / "step-00000004.ckpt") for run in ("whole", "shards")
    )
    assert shards.keys() == whole.keys() and shards["optimizer_names"] == whole["optimizer_names"]
    first, second = (checkpoint["optimizer_states"][0] for checkpoint in (whole, shards))
    assert first["param_groups"] == second["param_groups"]
    for number, state in first["state"].items():
        for name, value in state.items():
            torch.testing.assert_close(second["state"][number][name], value, atol=1e-6, rtol=1e-3)
    before, *results = (read_state_dict(tmp_path / path) for path in
                        ("whole/control_ini.safetensors", "whole/model.safetensors", "shards/model.safetensors"))  # fmt: skip
    assert any(not torch.equal(before[key].float(), value.float()) for key, value in results[0].items())
    torch.testing.assert_close(results[1], results[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_noise_schedule_is_not_rounded(precision):
    strategy = ShardedStrategy()
    strategy.precision_plugin = FSDPPrecision(precision)
    config = strategy.mixed_precision_config
    assert config.buffer_dtype is None and config.param_dtype is None
