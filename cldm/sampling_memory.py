"""How much memory sampling takes, and what each switch of `LowMemory` saves, computed without a GPU and without that memory.

    python -m cldm.sampling_memory                     the table for SD 1.5 at 512 and 1024 pixels
    python -m cldm.sampling_memory cldm_tiny --sizes 64

A full-size model is made of fake tensors, which have a shape, a type and a device but no content; text is encoded, one guided step taken
and the result decoded. A dispatch mode counts the storages that live on the fake GPU. What comes out is what tensors take: the driver,
libraries' workspaces and gaps between allocations come on top, about 0.5 to 1 GiB.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from cldm.cldm import ControlLDM
from cldm.command import Parser, run_command
from cldm.guidance import Control
from cldm.low_memory import LowMemory
from cldm.model import create_model
from cldm.storage_tracker import StorageTracker
from cldm.terminal import show
from ldm.modules import attention

GIB = 2**30
STAGES = ("text", "step", "decode")
DEVICE = "cuda"


@dataclass(frozen=True)
class Case:
    """One way to sample.

    Attributes:
        pictures: in a batch; guidance doubles them in a step.
        fused: attention by kernels that hold no scores, as torch has for CUDA; otherwise all scores are in memory.
    """

    title: str
    dtype: torch.dtype = torch.float16
    pictures: int = 1
    fused: bool = True
    memory: LowMemory = LowMemory()


CASES = (
    Case("float32", torch.float32),
    Case("float16"),
    Case("float16, VAE in tiles", memory=LowMemory(vae_tiles=True)),
    Case("float16, parts moved when used", memory=LowMemory(offload=True)),
    Case("float16, tiles and parts moved", memory=LowMemory(vae_tiles=True, offload=True)),
    Case("float16, 4 pictures", pictures=4),
    Case("float16, 4 pictures, VAE one at a time", pictures=4, memory=LowMemory(vae_one_at_a_time=True)),
    Case("float16, no fused attention", fused=False),
    Case("float16, no fused attention, slices", fused=False, memory=LowMemory(sliced_attention=True)),
)


def _fused_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """The memory of a fused kernel: the output and nothing else."""
    return torch.empty(*q.shape[:-1], v.shape[-1], dtype=q.dtype, device=q.device)


def _explicit_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """The memory of attention without one: all scores, before and after the softmax."""
    return ((q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5).softmax(-1) @ v


@torch.no_grad()
def measure(config: str, size: int, case: Case) -> dict[str, int]:
    """The most bytes on the GPU in each of `STAGES`, for pictures of `size` x `size` pixels."""
    with FakeTensorMode(), StorageTracker(DEVICE) as tracker:
        model = create_model(config).eval()
        _place(model, "cpu" if case.memory.offload else DEVICE, case.dtype)
        peaks = {}
        kernel = _fused_attention if case.fused else _explicit_attention
        # Slices call the function of that name too.
        with patch.object(attention, "full_attention", kernel), patch.object(attention, "_attention", kernel):
            with case.memory.applied(model.first_stage_model):
                for stage, parts, work in _stages(model, size, case):
                    tracker.restart_peak()
                    for part in parts if case.memory.offload else ():
                        _place(part, DEVICE, case.dtype)
                    work()
                    peaks[stage] = tracker.peak.total()
                    for part in parts if case.memory.offload else ():
                        _place(part, "cpu", case.dtype)
    return peaks


def _place(module: nn.Module, device: str, dtype: torch.dtype) -> None:
    """What `module.to(device, dtype)` does, which fake tensors cannot: new ones take the places of all weights and buffers."""
    for part in module.modules():
        for places in (part._parameters, part._buffers):
            for name, old in places.items():
                if old is not None:
                    kind = dtype if old.is_floating_point() else old.dtype
                    new = torch.empty(old.shape, dtype=kind, device=device)
                    if places is part._parameters:
                        part._parameters[name] = nn.Parameter(new, requires_grad=False)
                    else:
                        part._buffers[name] = new


def _stages(model: ControlLDM, size: int, case: Case) -> list[tuple[str, list[nn.Module], Callable[[], object]]]:
    """Name, networks and work of each stage, as the pipeline does it."""
    count, latent = case.pictures, size // 8
    first_stage = model.first_stage_model
    text = model.cond_stage_model
    width = text(["a"]).shape[2]
    context = torch.empty(count, 77, width, dtype=case.dtype, device=DEVICE)
    control = Control(torch.empty(1, model.control_model.hint_channels, size, size, device=DEVICE))
    x = torch.empty(count, model.channels, latent, latent, device=DEVICE)
    t = torch.empty(count, dtype=torch.long, device=DEVICE)

    def step() -> Tensor:
        halves = {"c_crossattn": [context]}, {"c_crossattn": [context]}
        return model.make_guidance(*halves, 9.0, [control])(x, t)

    def decode() -> Tensor:
        # Inside its guard against NaN, which looks at values.
        parts = x.to(case.dtype).split(1 if first_stage.one_at_a_time else count)
        return torch.cat([first_stage._decode(part) for part in parts])

    return [
        ("text", [text], lambda: text(["a", "b"])),
        ("step", [model.model, *model.control_networks()], step),
        ("decode", [first_stage], decode),
    ]


def table(config: str, sizes: Sequence[int], cases: Sequence[Case]) -> list[str]:
    """Peaks in GiB as a Markdown table, a row a case; `most` is the largest of the stages."""
    head = ["", *(f"{stage}, {size}" for size in sizes for stage in (*STAGES, "most"))]
    rows = [head, ["---"] * len(head)]
    for case in cases:
        cells = [case.title]
        for size in sizes:
            peaks = measure(config, size, case)
            cells += [f"{peaks[stage] / GIB:.2f}" for stage in STAGES] + [f"{max(peaks.values()) / GIB:.2f}"]
        rows.append(cells)
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    return ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in rows]


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m cldm.sampling_memory", description=__doc__.splitlines()[0])
    parser.add_argument("config", nargs="?", default="cldm_v15", help="configuration (cldm_v15)")
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 1024], help="pixels a side, multiples of 64")
    args = parser.parse_args(argv)

    def work() -> None:
        wrong = [size for size in args.sizes if size < 64 or size % 64]
        if wrong:
            raise ValueError(f"sizes must be multiples of 64, found {wrong[0]}")
        for line in table(args.config, args.sizes, CASES):
            show(line)

    return run_command(parser.prog, work, interrupted="interrupted", mistakes=(ValueError, OSError))


if __name__ == "__main__":
    sys.exit(main())
