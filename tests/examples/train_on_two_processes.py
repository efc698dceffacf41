"""Plain data-parallel training on two CPU processes; run by tests/scripts/test_examples.py with switches and an output folder.

Each process writes what changed, and a sum over the ControlNet, to a file of its own.
"""

import json
import sys
from pathlib import Path

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from ldm.util import instantiate_from_config
from tests.cldm.tiny import tiny_config
from tests.parity import fill_

out, switches = Path(sys.argv[1]), json.loads(sys.argv[2])
torch.set_num_threads(1)
model = fill_(instantiate_from_config(tiny_config("sd1")))
for name, value in switches.items():
    setattr(model, name, value)
before = {key: entry.clone() for key, entry in model.state_dict().items()}
generator = torch.Generator().manual_seed(0)
data = [
    {
        "jpg": torch.rand(64, 64, 3, generator=generator) * 2 - 1,
        "hint": torch.rand(64, 64, 3, generator=generator),
        "txt": torch.randn(77, 48, generator=generator),
    }
    for _ in range(8)
]
trainer = pl.Trainer(accelerator="cpu", devices=2, strategy="ddp", max_steps=2, logger=False, enable_checkpointing=False,
                     enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
trainer.fit(model, DataLoader(data, batch_size=2))
changed = sorted(key for key, entry in model.state_dict().items() if not torch.equal(entry, before[key]))
total = sum(float(p.double().sum()) for p in model.control_model.parameters())
(out / f"{trainer.global_rank}.json").write_text(json.dumps({"changed": changed, "total": total}))
