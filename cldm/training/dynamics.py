"""How the training goes: loss by noise level, norms of the zero convolutions and the hint encoder, speed and memory."""

import sys
import time
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from cldm.training.instrument import LEVELS, Instrument, log_metrics, seconds_in_instruments, whole_weights
from cldm.training.metrics import continue_loggers


class Dynamics(Instrument):
    """Logs what the training tells about itself, over the steps since the last row.

    - `train/loss`, and `train/loss_noise_0` to `_3`: the unweighted loss of timesteps in each quarter of the schedule;
    - `norm/zero_conv_00` and so on, the middle block's last; `norm/hint`, of the whole hint encoder, and
      `norm/hint_zero_conv`, of its last convolution. Zero convolutions start at 0: these tell that something is learned;
    - `speed/images_per_second` of all devices and `speed/steps_per_second`, without the time that pictures, scores and gain
      take; that is `speed/instruments`, as a share of all;
    - `memory/peak_gib`: of the first device since the start, or of the process on a CPU.

    Losses are those of rank 0. In a run that goes on, rows beyond its checkpoint are taken off `metrics.csv`.

    Args:
        every: optimizer steps between rows.
    """

    def __init__(self, every: int = 10) -> None:
        super().__init__(every)
        self._sums: Tensor | None = None  # (2, LEVELS + 1): sums and counts, of each level and of the whole loss
        self._images = 0
        self._since: tuple[float, float, int] = (0.0, 0.0, 0)  # time, seconds in instruments, step

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        continue_loggers(trainer)
        self._start_interval(trainer)

    def _start_interval(self, trainer: pl.Trainer) -> None:
        self._sums, self._images = None, 0
        self._since = time.perf_counter(), seconds_in_instruments(trainer), trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._add(pl_module, outputs, trainer.accumulate_grad_batches)
        self._images += len(next(iter(batch.values())))
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    @torch.no_grad()
    def _add(self, model: pl.LightningModule, outputs: Any, accumulate: int) -> None:
        """Add a batch's losses on the device, without waiting for it; Lightning has divided the loss by `accumulate`."""
        if self._sums is None:
            self._sums = torch.zeros(2, LEVELS + 1, device=model.device)
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs
        if loss is not None:
            level = torch.tensor([LEVELS], device=model.device)
            _count(self._sums, level, loss.detach().float().reshape(1) * accumulate)
        sample_losses: Any = getattr(model, "sample_losses", None)
        if sample_losses is not None:
            timesteps, losses = sample_losses
            _count(self._sums, timesteps * LEVELS // getattr(model, "num_timesteps", LEVELS), losses.float())

    def measure(self, trainer: pl.Trainer, model: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        with whole_weights(trainer):
            norms = control_norms(getattr(model, "control_model", None))
        assert self._sums is not None  # a measurement follows a batch
        sums, counts = self._sums.tolist()  # waits for the device
        names = [*(f"train/loss_noise_{level}" for level in range(LEVELS)), "train/loss"]
        losses = {name: total / count for name, total, count in zip(names, sums, counts, strict=True) if count}
        started, aside, first = self._since
        elapsed = time.perf_counter() - started
        aside = seconds_in_instruments(trainer) - aside
        busy = max(elapsed - aside, 1e-9)
        speed = {
            "speed/images_per_second": self._images * trainer.world_size / busy,
            "speed/steps_per_second": (trainer.global_step - first) / busy,
            "speed/instruments": aside / max(elapsed, 1e-9),
        }
        log_metrics(trainer, losses | norms | speed | peak_memory(model.device))
        self._start_interval(trainer)


def _count(sums: Tensor, places: Tensor, values: Tensor) -> None:
    """Add finite values (n,), and how many there are, to sums (2, levels) at places (n,)."""
    finite = values.isfinite()
    sums[0].index_add_(0, places, values.where(finite, torch.zeros_like(values)))
    sums[1].index_add_(0, places, finite.float())


@torch.no_grad()
def control_norms(control: Any) -> dict[str, float]:
    """L2 norms of each zero convolution, of the hint encoder and of its last convolution, as far as the network has them."""
    if not hasattr(control, "zero_convs") or not hasattr(control, "middle_block_out"):
        return {}
    parts = {f"norm/zero_conv_{i:02}": conv for i, conv in enumerate([*control.zero_convs, control.middle_block_out])}
    if hasattr(control, "input_hint_block"):
        parts |= {"norm/hint": control.input_hint_block, "norm/hint_zero_conv": control.input_hint_block[-1]}
    norms = [
        torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(p.float()) for p in part.parameters()]))
        for part in parts.values()
    ]
    return dict(zip(parts, torch.stack(norms).tolist(), strict=True))


def peak_memory(device: torch.device) -> dict[str, float]:
    """`memory/peak_gib`: most memory in use so far, of a CUDA device, or of this process where it runs on the CPU."""
    if device.type == "cuda":
        return {"memory/peak_gib": torch.cuda.max_memory_allocated(device) / 2**30}
    try:
        import resource
    except ImportError:  # Windows
        return {}
    unit = 1 if sys.platform == "darwin" else 1024
    return {"memory/peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30}
