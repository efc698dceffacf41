"""Pictures for a score leave no trace in what is random."""

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cldm.evaluation import Sampling, generate


@pytest.mark.parametrize(
    ("device", "kept"),
    [
        ("cpu", {"devices": []}),
        ("cuda:1", {"devices": [torch.device("cuda:1")], "device_type": "cuda"}),
        ("xpu:0", {"devices": [torch.device("xpu:0")], "device_type": "xpu"}),
    ],
)
def test_the_random_state_of_any_accelerator_is_kept(monkeypatch, device, kept):
    asked = []
    monkeypatch.setattr("torch.random.fork_rng", lambda **states: asked.append(states) or nullcontext())
    monkeypatch.setattr("cldm.evaluation.ControlPipeline", lambda model: lambda hints, prompts, **options: hints)
    hints = np.zeros((3, 64, 64, 3), np.uint8)
    model = SimpleNamespace(device=torch.device(device))
    assert len(generate(model, hints, ["a"] * 3, Sampling(batch_size=2))) == 3
    assert asked == [kept]
