"""How much memory a training step takes, computed without a GPU and without that memory.

    python -m cldm.training.memory                          the table of presets, for SD 1.5 at 512 pixels
    python -m cldm.training.memory preset=8gb batch_size=2  one computation with other settings

A full-size model is made of fake tensors, which have a shape, a type and a device but no content, and the step runs with them:
creation, forward, backward, the optimizer's step, and a second time with the optimizer's state there. A dispatch mode sees every
tensor that is made and counts the storages that live. What comes out is what tensors take. The driver, CUDA's libraries and the
gaps between allocations come on top: about 0.5 to 1 GiB on a GPU.
"""

import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from cldm.command import Parser, run_command
from cldm.config import override
from cldm.model import create_model
from cldm.settings import explain, setting
from cldm.storage_tracker import OTHER, StorageTracker
from cldm.terminal import quiet, show
from cldm.training.cache import release_encoders
from cldm.training.precision import PRECISIONS, cast_frozen, forward_context, set_recompute
from cldm.training.presets import PRESETS
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.util import ConfigError

GIB = 2**30
PARTS = ("frozen weights", "trained weights", "gradients", "optimizer", OTHER)


@dataclass
class Plan:
    """What the memory of a step depends on; names and meaning are those of the training settings."""

    config: str = setting("cldm_v15", "a packaged configuration or a YAML file")
    size: int = setting(512, "pixels a side, a multiple of 64")
    preset: str = setting("", f"settings to start from: {', '.join(PRESETS)}")
    batch_size: int = setting(1, "pairs a batch")
    precision: str = setting("bf16-mixed", "or 32-true, 16-mixed")
    frozen_precision: str = setting("bf16", "of weights that are not trained: fp32, bf16 or fp16")
    recompute: str = setting(
        "all", "blocks that compute activations again instead of keeping them: none, trained or all"
    )
    cache: bool = setting(True, "latents and text come from the cache; autoencoder and text encoder are not in memory")
    optimizer: str = setting("adamw", "or adamw8bit")
    sd_locked: bool = setting(True, "false also trains the UNet's decoder")
    only_mid_control: bool = setting(False, "use the control's middle output alone")


@dataclass(frozen=True)
class Report:
    """Bytes by part when a training step needs most, and those of the model as it is made, before anything is converted or freed."""

    peak: Mapping[str, int] = field(default_factory=dict)
    creation: int = 0

    @property
    def total(self) -> int:
        return sum(self.peak.values())


class AdamMemory(torch.optim.Optimizer):
    """The memory of AdamW's fused step: the same state, and no update. Its kernels work in place and cannot run on fake tensors.

    Args:
        eight_bit: the state of bitsandbytes' AdamW8bit rather than float32.
    """

    SMALLEST = 4096  # elements; smaller parameters keep float32 state
    BLOCK = 256  # elements that share a scale

    def __init__(self, parameters: Iterable[nn.Parameter], eight_bit: bool = False) -> None:
        super().__init__(parameters, {})
        self.eight_bit = eight_bit

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for parameter in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            state = self.state[parameter]
            if state:
                continue
            large = self.eight_bit and parameter.numel() >= self.SMALLEST
            for name in ("first moment", "second moment"):
                state[name] = torch.zeros_like(parameter, dtype=torch.uint8 if large else torch.float32)
                if large:
                    blocks = -(-parameter.numel() // self.BLOCK)
                    state[f"scale of {name}"] = torch.zeros(blocks, device=parameter.device)


def measure(plan: Plan) -> Report:
    """The memory of a training step as `plan` describes it.

    Raises:
        ConfigError: a setting out of its range.
    """
    if plan.size < 64 or plan.size % 64:
        raise ConfigError(f"size must be a multiple of 64, found {plan.size}")
    if plan.batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1, found {plan.batch_size}")
    if plan.optimizer not in ("adamw", "adamw8bit"):
        raise ConfigError(f"optimizer must be adamw or adamw8bit, found {plan.optimizer!r}")
    if plan.frozen_precision not in PRECISIONS:
        raise ConfigError(f"frozen_precision must be one of {', '.join(PRECISIONS)}, found {plan.frozen_precision!r}")
    # The CPU stands for the GPU: backward passes of fake CUDA tensors need CUDA. (The schedule comes from NumPy and is not fake.)
    model = create_model(
        plan.config, device="meta"
    )  # initial values of fake tensors would take a minute and mean nothing
    with FakeTensorMode(allow_non_fake_inputs=True), StorageTracker() as tracker:
        _give_fake_memory(model)
        creation = tracker.peak.total()
        model.sd_locked = plan.sd_locked
        model.only_mid_control = plan.only_mid_control
        cast_frozen(model, plan.frozen_precision)
        set_recompute(model, plan.recompute)
        if plan.cache:
            release_encoders(model)
        model.train()
        return Report(dict(_measure_steps(model, plan, tracker)), creation)


def _give_fake_memory(model: nn.Module) -> None:
    """Replace what lies on the meta device by tensors of the CPU, within FakeTensorMode."""
    for module in model.modules():
        if isinstance(module, pl.LightningModule):
            module._device = torch.device("cpu")  # what it says of itself; moving it would not work with fake tensors
        for name, value in module._parameters.items():
            if value is not None:
                module._parameters[name] = nn.Parameter(
                    torch.empty_like(value, device="cpu"), requires_grad=value.requires_grad
                )
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = torch.empty_like(buffer, device="cpu")


def _measure_steps(model: LatentDiffusion, plan: Plan, tracker: StorageTracker) -> Counter[str]:
    trained = [p for p in model.parameters() if p.requires_grad]
    tracker.assign("frozen weights", (p for p in model.parameters() if not p.requires_grad))
    tracker.assign("frozen weights", model.buffers())
    tracker.assign("trained weights", trained)
    for parameter in trained:
        parameter.register_post_accumulate_grad_hook(lambda p: tracker.assign("gradients", [p.grad]))
    optimizer = AdamMemory(trained, eight_bit=plan.optimizer == "adamw8bit")
    tracker.restart_peak()
    for _ in range(2):
        batch = _batch(model, plan)
        with forward_context(plan.precision, "cpu"):
            loss, _ = model.shared_step(batch)
        loss.backward()
        optimizer.step()
        tracker.assign("optimizer", (v for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor)))
        optimizer.zero_grad(set_to_none=True)
        del batch, loss
    return tracker.peak


def _batch(model: Any, plan: Plan) -> dict[str, Any]:
    count, side = plan.batch_size, plan.size
    batch: dict[str, Any] = {model.control_key: torch.rand(count, side, side, model.control_model.hint_channels)}
    if plan.cache:
        width = next(m.attn2.to_k.in_features for m in model.control_model.modules() if hasattr(m, "attn2"))
        moments = torch.randn(count, 2 * model.channels, side // 8, side // 8)
        return {**batch, "moments": moments, "context": torch.randn(count, 77, width)}
    target = torch.rand(count, side, side, 3)
    return {**batch, model.first_stage_key: target, model.cond_stage_key: ["a text"] * count}


def plan_of(preset: str, **changes: Any) -> Plan:
    """The plan of a preset.

    Raises:
        ConfigError: there is no such preset.
    """
    if preset not in PRESETS:
        raise ConfigError(f"preset must be one of {', '.join(PRESETS)}, found {preset!r}")
    known = {key: value for key, value in PRESETS[preset].items() if key in Plan.__dataclass_fields__}
    return Plan(**{**known, "preset": preset, **changes})


def limit_of(preset: str) -> int:
    """The bytes that a preset may need as computed: 10% below its name (8gb: 7.2 * 10**9)."""
    return int(preset.removesuffix("gb")) * 10**9 * 9 // 10


def table(rows: Sequence[tuple[Plan, Report]]) -> str:
    """Plans and what they take, in GiB, as a Markdown table."""
    head = ["preset", "batch", "precision", "frozen", "recompute", "cache", "optimizer", *PARTS, "peak (GiB)"]
    lines = [head, ["---"] * len(head)]
    for plan, report in rows:
        lines.append([
            plan.preset or "-", str(plan.batch_size), plan.precision, plan.frozen_precision, plan.recompute,
            "yes" if plan.cache else "no", plan.optimizer, *(f"{report.peak.get(part, 0) / GIB:.2f}" for part in PARTS),
            f"{report.total / GIB:.2f}",
        ])  # fmt: skip
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join(
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |" for line in lines
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m cldm.training.memory", description=__doc__, epilog="settings:\n" + explain(Plan))
    parser.add_argument("settings", nargs="*", metavar="key=value", help="compute one plan instead of the presets")
    arguments = parser.parse_args(argv).settings

    def work() -> int:
        if not arguments:
            rows = []
            for preset in PRESETS:
                rows.append((plan_of(preset), measure(plan_of(preset))))
                show(table(rows).splitlines()[-1], sys.stderr)  # each takes a while
        else:
            plan = override(Plan(), arguments)
            if plan.preset:
                start = [f"{k}={v}" for k, v in vars(plan_of(plan.preset)).items()]
                plan = override(Plan(), [*start, *arguments])
            rows = [(plan, measure(plan))]
        for line in table(rows).splitlines():
            show(line)
        over = [plan.preset for plan, report in rows if plan.preset and report.total > limit_of(plan.preset)]
        if over:
            show(f"more than 90% of its name: {', '.join(over)}")
        return 1 if over else 0

    with quiet("ldm"):  # the networks here have no weights, and would say so
        return run_command(parser.prog, work, interrupted="interrupted")


if __name__ == "__main__":
    sys.exit(main())
