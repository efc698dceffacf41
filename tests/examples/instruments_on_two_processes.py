"""All instruments on two CPU processes; run by tests/cldm/training/test_two_processes.py with an output folder.

Each process writes the sum of its ControlNet's weights to a file of its own.
"""

import sys
from pathlib import Path

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from cldm.logger import ImageLogger
from cldm.training.curves import Curves
from cldm.training.dynamics import Dynamics
from cldm.training.gain import ControlGain
from cldm.training.metrics import run_loggers
from tests.cldm.training.small_runs import held_out, pairs, small_model

out = Path(sys.argv[1])
torch.set_num_threads(1)
model = small_model()
model.log_images = lambda batch, N, split: {"noise": torch.randn(N, 3, 16, 16)}
trainer = pl.Trainer(
    accelerator="cpu", devices=2, strategy="ddp", max_steps=3, logger=run_loggers(out), log_every_n_steps=0,
    callbacks=[Dynamics(1), ControlGain(held_out(2), every=1), ImageLogger(1), Curves(out, every=2)],
    enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
)  # fmt: skip
trainer.fit(model, DataLoader(pairs(8), batch_size=1))
total = sum(float(p.double().sum()) for p in model.control_model.parameters())
(out / f"{trainer.global_rank}.txt").write_text(repr(total))
