"""Control gain against the loss computed one pair at a time, and the jump against series of every kind."""

import copy
import math
import random

import pytest
import torch

from cldm.training.gain import ControlGain, JumpDetector, steps_between
from cldm.training.metrics import MetricsFile, read_metrics
from tests.cldm.training.small_runs import held_out, small_model, train
from tests.parity import fill_


def first_step(series):
    """The place in a series at which the detector finds the jump, or None; it must say so once."""
    detector = JumpDetector()
    told = [step for at, value in enumerate(series) if (step := detector.update(at, value)) is not None]
    assert told == [detector.step] * len(told) and len(told) <= 1
    return detector.step


def test_gain_is_the_difference_of_losses_on_the_same_noise(tmp_path):
    model = small_model()
    fill_(model.control_model)  # a ControlNet that does something
    gain = ControlGain(held_out(4), every=1, at_once=3, seed=5)
    train(model, 1, [gain], logger=[MetricsFile(tmp_path)], limit_train_batches=0)
    assert not (tmp_path / "metrics.csv").exists()  # nothing is trained, so nothing is measured

    before = copy.deepcopy(model.state_dict())
    train(model, 1, [gain], logger=[MetricsFile(tmp_path)])
    first = read_metrics(tmp_path / "metrics.csv")[0]
    assert first["step"] == 0
    model.load_state_dict(before)
    batch, text, hints = held_out(4), *(held_out(4)[key] for key in ("context", "hint"))
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(5)
        latents = torch.cat(
            [model.get_input({k: v[s] for k, v in batch.items()}, "jpg")[0] for s in (slice(3), slice(3, 4))]
        )
    generator = torch.Generator().manual_seed(5)
    gains, over_other = [[] for _ in range(4)], []
    for draw in range(4):
        levels = [(draw + pair) % 4 for pair in range(4)]
        t = [int((level + float(u)) * 250) for level, u in zip(levels, torch.rand(4, generator=generator), strict=True)]
        noise = torch.randn(latents.shape, generator=generator)
        for i in range(4):
            losses = []
            for hint in (None, hints[i], hints[(i + 2) % 4]):
                cond = {
                    "c_crossattn": [text[i : i + 1]],
                    "c_concat": None if hint is None else [hint[None].permute(0, 3, 1, 2)],
                }
                with torch.no_grad():
                    losses.append(
                        float(model.p_losses(latents[i : i + 1], cond, torch.tensor(t[i : i + 1]), noise[i : i + 1])[0])
                    )
            assert t[i] * 4 // 1000 == levels[i]
            gains[levels[i]].append(losses[0] - losses[1])
            over_other.append(losses[2] - losses[1])
    for level in range(4):
        assert first[f"gain/noise_{level}"] == pytest.approx(sum(gains[level]) / 4, rel=1e-3, abs=1e-6)
    assert first["gain/mean"] == pytest.approx(sum(map(sum, gains)) / 16, rel=1e-3, abs=1e-6)
    assert first["gain/over_other_hint"] == pytest.approx(sum(over_other) / 16, rel=1e-2, abs=1e-6)
    assert abs(first["gain/mean"]) > 1e-3


@pytest.mark.parametrize(("pairs", "said"), [(4, "75% lower than with another's"), (1, "50% lower than without")])
def test_the_announcement_is_a_share_of_what_it_compares_with(tmp_path, monkeypatch, caplog, pairs, said):
    gain, own = ControlGain(held_out(pairs), every=1), []

    def losses(model, latents, text, hints):
        own.extend([hints] if hints is not None and not own else [])
        return torch.full((16 // pairs, pairs), 1.0 if hints is None else 0.5 if torch.equal(hints, own[0]) else 2.0)

    monkeypatch.setattr(gain, "_losses", losses)
    monkeypatch.setattr(gain.detector, "update", lambda step, value: 7)
    with caplog.at_level("INFO"):
        train(small_model(), 1, [gain], logger=[MetricsFile(tmp_path)])
    assert f"control took hold at step 7: with a picture's own hint the loss is now {said}" in caplog.text


def test_measuring_changes_nothing_and_a_fresh_control_has_no_gain(tmp_path):
    plain, measured = small_model(), small_model()
    train(plain, 3, [])
    modes = [module.training for module in measured.modules()]
    train(measured, 3, [ControlGain(held_out(), every=1)], logger=[MetricsFile(tmp_path)])
    assert all(
        torch.equal(a, b) for a, b in zip(plain.state_dict().values(), measured.state_dict().values(), strict=True)
    )
    assert [module.training for module in measured.modules()] == modes
    rows = read_metrics(tmp_path / "metrics.csv")
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert all(value == 0 for name, value in rows[0].items() if name.startswith("gain/"))
    assert rows[3]["gain/mean"] != 0


@pytest.mark.parametrize("options", [{"precision": "bf16-mixed"}, {"accumulate_grad_batches": 3}])
def test_precision_and_accumulation(tmp_path, options):
    train(small_model(), 4, [ControlGain(held_out(1), every=2)], logger=[MetricsFile(tmp_path)], **options)
    rows = read_metrics(tmp_path / "metrics.csv")
    assert [row["step"] for row in rows] == [0, 2, 4]
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert "gain/over_other_hint" not in rows[0]  # one pair has no other hint


def test_the_loss_without_hint_follows_an_unlocked_unet(tmp_path):
    model = small_model()
    model.sd_locked = False
    gain = ControlGain(held_out(), every=1)
    train(model, 1, [gain])
    without = gain._without.clone()
    train(model, 2, [gain])
    assert not torch.equal(without, gain._without)


def test_cost_decides_how_often():
    assert steps_between(32, 32, 0.02) == 17 and steps_between(32, 1, 0.02) == 534
    assert steps_between(32, 4096, 0.02) == 1 and steps_between(10**6, 1, 0.01) == 1000
    gain = ControlGain(held_out(2), cost=1.0)
    assert gain.state_dict()["every"] is None
    train(small_model(), 1, [gain], batch_size=2)
    assert gain.state_dict()["every"] == math.ceil(32 / 6)
    resumed = ControlGain(held_out(2))
    resumed.load_state_dict(gain.state_dict())
    assert resumed.every == 6


@pytest.mark.parametrize("wrong", [{"every": 0}, {"at_once": 0}, {"cost": 0.0}, {"batch": {}}])
def test_mistakes(wrong):
    with pytest.raises(ValueError):
        ControlGain(**({"batch": held_out(1)} | wrong))


# -- the jump ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-4, 0.01, 0.1, 1.0])
def test_noise_is_no_jump(scale):
    rng = random.Random(0)
    series = [[0.0] + [rng.gauss(0, scale) for _ in range(150)] for _ in range(200)]
    heavy = [
        [0.0] + [scale * rng.gauss(0, 1) / math.sqrt(rng.gammavariate(1.5, 1)) for _ in range(150)] for _ in range(100)
    ]
    assert all(first_step(values) is None for values in series + heavy)


def test_jumps_are_found_where_they_are():
    rng = random.Random(1)
    for height, noise in ((0.03, 1e-4), (0.1, 0.003), (0.4, 0.02)):
        for at in (3, 4, 10, 60):
            series = [0.0] + [rng.gauss(height if i >= at else 0.0, noise) for i in range(1, at + 8)]
            assert first_step(series) == at
    assert first_step([0.0] * 20 + [0.5, 0.0, 0.5, 0.0] * 10) is None  # outliers
    assert first_step([0.0] * 20 + [0.015] * 20) is None  # too small to be seen in a picture
    assert first_step([0.0] * 20 + [-0.5] * 20) is None  # a hint that harms
    assert first_step([0.0, 0.0, 0.0, math.nan, 0.3, 0.3, 0.3]) == 4


def test_slow_rises_and_a_control_that_is_there_already():
    assert first_step([i * 0.005 for i in range(100)]) == 41
    assert first_step([0.5 + 0.01 * math.sin(i) for i in range(40)]) == 0
    assert first_step([0.001 * i for i in range(100)]) is None


def test_the_jump_survives_a_resume():
    series = [0.0] * 6 + [0.3] * 6
    for cut in range(len(series)):
        detector = JumpDetector()
        told = [detector.update(10 * i, value) for i, value in enumerate(series[:cut])]
        resumed = JumpDetector()
        resumed.load_state_dict(detector.state_dict())
        told += [resumed.update(10 * (cut + i), value) for i, value in enumerate(series[cut:])]
        assert [step for step in told if step is not None] == [60] and resumed.step == 60
