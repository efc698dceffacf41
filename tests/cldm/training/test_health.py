"""Steps whose loss or gradient is not finite."""

import logging

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from cldm.training.health import SkipBadSteps, TrainingError, all_finite, suspects


class Line(pl.LightningModule):
    """A weight for each of two features."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1, bias=False)
        torch.nn.init.ones_(self.layer.weight)

    def training_step(self, batch, batch_idx):
        return (self.layer(batch["x"]) ** 2).mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.1)


def items(bad):
    values = torch.randn(12, 2, generator=torch.Generator().manual_seed(0))
    values[list(bad)] = float("nan")
    return [{"x": x, "name": f"pair {i}"} for i, x in enumerate(values)]


def fit(data, health, **options):
    model = Line()
    trainer = pl.Trainer(accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
                         enable_model_summary=False, callbacks=[health], **options)  # fmt: skip
    trainer.fit(model, DataLoader(data, batch_size=2))
    return model


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_bad_step_changes_neither_weights_nor_the_memory_of_the_optimizer(caplog, accumulate):
    health = SkipBadSteps()
    with caplog.at_level(logging.WARNING):
        model = fit(items([5]), health, accumulate_grad_batches=accumulate)
    assert health.skipped == 1 and health.is_good()
    assert "samples: pair 5" in caplog.text and "pair 4" not in caplog.text
    # The same as if the step had not been: its batches are 4 and 5, or 4 to 7.
    kept = [item for i, item in enumerate(items([])) if i not in range(4, 4 + 2 * accumulate)]
    assert torch.equal(model.layer.weight, fit(kept, SkipBadSteps(), accumulate_grad_batches=accumulate).layer.weight)


def test_several_in_a_row_end_the_training():
    health = SkipBadSteps(limit=3, last_good=lambda: "runs/a/checkpoints/step-00000002.ckpt")
    with pytest.raises(TrainingError, match="3 steps in a row, up to step 5; the last good checkpoint is runs/a"):
        fit(items([4, 6, 8, 10]), health)
    assert not health.is_good()
    with pytest.raises(TrainingError, match="no checkpoint has been saved before"):
        fit(items(range(12)), SkipBadSteps(limit=2))


def test_an_infinite_gradient_of_a_finite_loss_counts():
    class Root(Line):
        def training_step(self, batch, batch_idx):
            return (self.layer.weight - self.layer.weight.detach()).abs().sqrt().sum()  # 0, with an infinite slope

    health = SkipBadSteps(limit=99)
    model = Root()
    trainer = pl.Trainer(accelerator="cpu", max_steps=2, logger=False, enable_checkpointing=False, enable_progress_bar=False,
                         enable_model_summary=False, callbacks=[health])  # fmt: skip
    trainer.fit(model, DataLoader(items([]), batch_size=2))
    assert health.skipped == 2 and torch.equal(model.layer.weight, torch.ones(1, 2))


def test_what_counts_as_finite_and_who_is_suspected():
    assert all_finite([]) and all_finite([None, torch.ones(2)])
    assert not all_finite([torch.ones(2), torch.tensor([1.0, float("inf")])])
    assert suspects({"x": torch.ones(2, 1)}) == [] and suspects(None) == []
    assert suspects({"x": torch.ones(2, 1), "name": ["a", "b"]}) == ["a", "b"]
