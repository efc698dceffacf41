"""Pictures while training: how often, how many at once, and that they leave the training as it is."""

from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from cldm.checkpoint import add_control
from cldm.config import resolve
from cldm.data.fill import PALETTES, draw_fill
from cldm.evaluation import Sampling, fill_score, generate
from cldm.logger import ImageLogger
from cldm.model import create_model
from cldm.training.metrics import MetricsFile, read_metrics
from cldm.training.pictures import HeldOutPictures
from tests.cldm.training.small_runs import small_model, train


class Recorder:
    """Takes the place of a model's `log_images`: notes what it gets, and draws random numbers."""

    def __init__(self, model):
        self.model, self.sizes, self.modes = model, [], []

    def __call__(self, batch, N, split):
        self.sizes.append([len(entries) for entries in batch.values()])
        self.modes.append((self.model.training, torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
        return {
            "noise": torch.randn(len(batch["hint"]), 3, 16, 16),
            "row": torch.zeros(3, 16, 64),
            "note": "no picture",
        }


def steps_of(folder: Path) -> list[int]:
    return sorted(int(path.name.split("gs-")[1][:6]) for path in folder.rglob("noise_gs-*.png"))


@pytest.mark.parametrize(
    "options, training, wanted",
    [
        ({}, {"items": 3}, [1, 4, 7]),  # epochs of three batches
        ({"log_first_step": False}, {"items": 3}, [4, 7]),
        ({"log_on_batch_idx": False}, {"items": 3}, [3, 6]),
        ({"log_on_batch_idx": False}, {"items": 28, "accumulate_grad_batches": 4}, [3, 6]),
        ({"disabled": True}, {}, []),
        ({"max_images": 0}, {}, []),
    ],
)
def test_pictures_count_optimizer_steps(tmp_path, options, training, wanted):
    model = small_model()
    model.log_images = Recorder(model)
    model.training_step = lambda batch, batch_idx: model.control_model.zero_convs[0][0].weight.sum()  # quick
    train(model, 7, [ImageLogger(3, **options)], default_root_dir=tmp_path, **training)
    assert steps_of(tmp_path) == wanted and len(model.log_images.sizes) == len(wanted)


def test_a_few_at_once_in_the_precision_of_the_training_which_goes_on_as_if_nothing_had_been(tmp_path):
    plain, logged = small_model(), small_model()
    train(plain, 2, [], batch_size=3, precision="bf16-mixed")
    recorder = logged.log_images = Recorder(logged)
    modes = [module.training for module in logged.modules()]
    entered = []

    @contextmanager
    def encoders(model: nn.Module):
        entered.append(model)
        yield

    pictures = ImageLogger(1, max_images=3, at_once=2, encoders=encoders)
    train(logged, 2, [pictures], batch_size=3, precision="bf16-mixed", default_root_dir=tmp_path)
    assert recorder.sizes == [[2] * 4, [1] * 4] * 2 and recorder.modes == [(False, False, True)] * 4
    assert entered == [logged, logged] and [module.training for module in logged.modules()] == modes
    assert all(
        torch.equal(a, b) for a, b in zip(plain.state_dict().values(), logged.state_dict().values(), strict=True)
    )
    assert len(list(tmp_path.rglob("overview_*.png"))) == 2


@pytest.mark.parametrize("wrong", [{"batch_frequency": 0}, {"at_once": 0}])
def test_mistakes(wrong):
    with pytest.raises(ValueError, match="must be at least 1"):
        ImageLogger(**wrong)
    with pytest.raises(ValueError, match="as many hints"):
        HeldOutPictures(np.zeros((2, 64, 64, 3), np.uint8), np.zeros((2, 64, 64, 3), np.uint8), ["a"], 1)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "control.safetensors"
    add_control(resolve("cldm_tiny.safetensors"), path, "cldm_tiny", progress=False)
    return create_model("cldm_tiny", weights=path)


def test_held_out_hints_are_sampled_saved_and_scored(tiny, tmp_path, caplog):
    samples = [draw_fill(i, 64, 3, PALETTES["clear"]) for i in range(3)]
    hints, targets = np.stack([s.source for s in samples]), np.stack([s.target for s in samples])
    prompts = [s.prompt for s in samples]
    state = torch.random.get_rng_state()
    together, apart = (generate(tiny, hints, prompts, Sampling(2, batch_size=size)) for size in (3, 2))
    assert np.abs(together.astype(int) - apart).max() <= 1 and torch.equal(torch.random.get_rng_state(), state)
    assert np.abs(generate(tiny, hints, prompts, Sampling(2, seed=1)).astype(int) - together).mean() > 1

    text = tiny.cond_stage_model
    trained_on = [{"jpg": t.astype(np.float32) / 127.5 - 1, "hint": h.astype(np.float32) / 255, "txt": p}
                  for t, h, p in zip(targets, hints, prompts, strict=True)]  # fmt: skip
    callback = HeldOutPictures(
        hints, targets, prompts, 1, Sampling(2, batch_size=2), fill_score(samples), tmp_path / "pictures", at_start=True
    )
    with caplog.at_level("INFO", logger="cldm.training.pictures"):
        train(tiny, 1, [callback], logger=[MetricsFile(tmp_path)], items=trained_on)
    assert tiny.cond_stage_model is text
    rows = read_metrics(tmp_path / "metrics.csv")
    assert [row["step"] for row in rows if "fill/iou" in row] == [0, 1]
    expected = fill_score(samples)(together)
    assert rows[0]["fill/iou"] == pytest.approx(expected["fill/iou"], abs=0.05)
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == ["step_000000.png", "step_000001.png"]
    assert "step 1: fill/iou" in caplog.text
