"""Data-parallel training on CPU processes; run by tests/scripts/test_examples.py with switches and an output folder.

Each process writes what changed, and a sum over the ControlNet, to a file of its own; the first also saves how far each trained
weight has moved. What a step draws depends on its pairs alone here, so that two processes can be compared with one that has twice
the batch.
"""

import json
import sys
from pathlib import Path

import pytorch_lightning as pl
import torch

from cldm.training.batches import RunBatches
from cldm.training.engine import make_loader, run_options
from ldm.util import instantiate_from_config
from tests.cldm.tiny import tiny_config
from tests.parity import fill_

out, switches, processes = Path(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(1)
model = fill_(instantiate_from_config(tiny_config("sd1")))
for name, value in switches.items():
    setattr(model, name, value)


def draw(x_start: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return (x_start.mean(dim=(1, 2, 3)).abs() * 1e5).long() % 1000, torch.sin(1e3 * x_start)


model.draw_steps_and_noise = draw
# Plain gradient descent shows differences of gradients as they are; AdamW makes a step of full size of the smallest ones.
model.optimizer_config, model.learning_rate = {"target": "torch.optim.SGD"}, 1.0
before = {key: entry.clone() for key, entry in model.state_dict().items()}
generator = torch.Generator().manual_seed(0)
data = [
    {
        "moments": torch.cat([torch.randn(4, 8, 8, generator=generator), torch.full((4, 8, 8), -60.0)]),
        "context": torch.randn(77, 48, generator=generator),
        "hint": torch.rand(64, 64, 3, generator=generator),
    }
    for _ in range(8)
]
trainer = pl.Trainer(
    **run_options(steps=2, accumulate=1, precision="32-true", strategy="auto", processes=processes, clip=0),
    accelerator="cpu", devices=processes, logger=False,
)  # fmt: skip
batches = RunBatches([(64, 64)] * 8, 4 // processes, 2, 0, trainer.global_rank, trainer.world_size)
trainer.fit(model, make_loader(data, batches, workers=0, pin_memory=False))
changed = sorted(key for key, entry in model.state_dict().items() if not torch.equal(entry, before[key]))
total = sum(float(p.double().sum()) for p in model.control_model.parameters())
(out / f"{trainer.global_rank}.json").write_text(json.dumps({"changed": changed, "total": total}))
if trainer.is_global_zero:
    moved = {name: p.detach() - before[name] for name, p in model.named_parameters() if p.requires_grad}
    torch.save(moved, out / f"moved-{processes}.pt")
