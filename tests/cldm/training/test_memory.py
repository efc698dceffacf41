"""Memory of a training step, computed on fake tensors: known numbers on small networks, and the presets at full size."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from cldm.storage_tracker import StorageTracker
from cldm.training import memory
from cldm.training.memory import AdamMemory, Plan, limit_of, measure, plan_of
from cldm.training.presets import PRESETS
from ldm.util import ConfigError

TINY = {"config": "cldm_tiny", "size": 64, "precision": "32-true", "frozen_precision": "fp32"}


def test_storages_are_counted_while_they_live():
    with FakeTensorMode(allow_non_fake_inputs=True), StorageTracker() as tracker:
        a = torch.empty(1000)
        view = a[:10]
        b = a * 2
        assert tracker.live.total() == 8000
        del a
        assert tracker.live.total() == 8000  # the view holds it
        del view
        assert tracker.live.total() == 4000 and tracker.peak.total() == 8000
        tracker.assign("mine", [b])
        assert tracker.live["mine"] == 4000 and tracker.live["activations"] == 0
        b.add_(1)
        assert tracker.live.total() == 4000


def test_a_step_of_a_linear_layer_takes_what_it_must():
    with FakeTensorMode(allow_non_fake_inputs=True), StorageTracker() as tracker:
        layer = nn.Linear(1024, 1024, bias=False)
        tracker.assign("trained weights", layer.parameters())
        layer.weight.register_post_accumulate_grad_hook(lambda p: tracker.assign("gradients", [p.grad]))
        optimizer = AdamMemory(layer.parameters())
        for _ in range(2):
            layer(torch.randn(2, 1024)).sum().backward()
            tracker.restart_peak()
            optimizer.step()
            tracker.assign("optimizer", (v for s in optimizer.state.values() for v in s.values()))
    megabyte = 4 * 1024**2
    assert tracker.live["trained weights"] == tracker.live["gradients"] == megabyte
    assert tracker.live["optimizer"] == 2 * megabyte
    assert tracker.peak.total() >= 4 * megabyte


def test_the_state_of_eight_bits_is_that_of_bitsandbytes():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    parameters = [nn.Parameter(torch.ones(*shape)) for shape in ((100, 100), (33,), (64, 3, 3, 64), (4096,), (4097,))]

    def state_bytes(optimizer):
        tensors = (
            v for s in optimizer.state.values() for k, v in s.items() if isinstance(v, torch.Tensor) and "qmap" not in k
        )
        return sum(v.nbytes for v in tensors)

    theirs = bitsandbytes.optim.AdamW8bit(parameters)
    for index, parameter in enumerate(parameters):
        parameter.grad = torch.ones_like(parameter)
        theirs.init_state(theirs.param_groups[0], parameter, 0, index)
    ours = AdamMemory(parameters, eight_bit=True)
    ours.step()
    assert state_bytes(ours) == state_bytes(theirs)
    # And that of float32 is torch's, but for its counts of steps.
    plain, torchs = AdamMemory(parameters), torch.optim.AdamW(parameters)
    plain.step()
    torchs.step()
    assert state_bytes(plain) == state_bytes(torchs) - 4 * len(parameters)


def test_settings_change_the_parts_that_they_concern():
    plain = measure(Plan(**TINY, batch_size=8, recompute="none"))
    model_bytes = {part: plain.peak.get(part, 0) for part in memory.PARTS}
    assert model_bytes["trained weights"] > 0 and model_bytes["activations"] > 0

    def change(**settings):
        found = measure(Plan(**{**TINY, "batch_size": 8, "recompute": "none", **settings}))
        return {part: found.peak.get(part, 0) / max(model_bytes[part], 1) for part in memory.PARTS}

    assert change(frozen_precision="bf16")["frozen weights"] == pytest.approx(0.5, abs=0.01)
    assert change(optimizer="adamw8bit")["optimizer"] < 0.35
    assert change(cache=False)["frozen weights"] > 1.05
    activations = [change(recompute=choice)["activations"] for choice in ("trained", "all")]
    assert activations[1] < activations[0] < 0.95
    assert 1.8 < change(batch_size=16)["activations"] < 2.2
    assert change(sd_locked=False)["trained weights"] > 1.2


@pytest.mark.parametrize("cache", [True, False])
def test_configurations_that_are_not_shaped_like_stable_diffusion(tmp_path, cache):
    text = (Path(__file__).parents[3] / "models" / "cldm_tiny.yaml").read_text()
    for published, own in (
        ("[ 4, 2, 1 ]", "[ 4, 2 ]"),  # no attention in the first level
        ("channels: 4\n", "channels: 8\n"),  # of latents
        ("embed_dim: 4", "embed_dim: 8"),
        ('"hint"', '"edges"'),
        ('"jpg"', '"image"'),
        ('"txt"', '"caption"'),
    ):
        assert published in text
        text = text.replace(published, own)
    config = tmp_path / "own.yaml"
    config.write_text(text)
    assert measure(Plan(**{**TINY, "config": str(config), "cache": cache})).total > 0


def test_mistakes_are_named(capsys):
    for changes, message in [
        ({"size": 100}, "multiple of 64"),
        ({"batch_size": 0}, "at least 1"),
        ({"optimizer": "sgd"}, "adamw or adamw8bit"),
        ({"frozen_precision": "int4"}, "one of fp32, bf16, fp16"),
    ]:
        with pytest.raises(ConfigError, match=message):
            measure(Plan(**{**TINY, **changes}))
    assert memory.main(["preset=9gb"]) == 2
    assert "preset must be one of 8gb" in capsys.readouterr().err


def test_the_command_prints_a_table(capsys):
    assert memory.main([f"{k}={v}" for k, v in TINY.items()]) == 0
    head, line, row = capsys.readouterr().out.strip().splitlines()
    assert head.count("|") == line.count("|") == row.count("|") and "peak (GiB)" in head


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
def test_presets_fit_below_their_names(preset):
    assert measure(plan_of(preset)).total <= limit_of(preset)
