"""Training steps, timed side by side. One comparison a call; both sides run in turn in one process, the ratio is taken pair by pair.

    python -m tests.benchmarks.bench_training step                 a step against diffusers' training loop, same weights, same loss
    python -m tests.benchmarks.bench_training loop                 the loop from the cache against diffusers' loop, which encodes
    python -m tests.benchmarks.bench_training base                 a step with control against fine-tuning the whole base without
    python -m tests.benchmarks.bench_training middle               the middle output alone against all outputs
    python -m tests.benchmarks.bench_training throughput --device cuda --size full --compile --channels-last --batches 8 32
                                                                   images a second, share of the chip's peak, and memory

`--size full` is SD 1.5 at 512 pixels: `step` then takes about 16 GB of memory for both sides, `base` 26. Where that is too much, `--apart`
runs each side in processes of its own, still in turn. `--memory` adds the peak memory of each side.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import count, cycle
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from cldm.cldm import ControlLDM
from cldm.data.fill import generate_fill
from cldm.data.pairs import PairDataset
from cldm.storage_tracker import StorageTracker
from cldm.training.cache import CachedPairs, make_cache, release_encoders
from cldm.training.memory import GIB, AdamMemory
from cldm.training.precision import (
    allow_tf32,
    cast_frozen,
    forward_context,
    set_recompute,
    use_channels_last,
)
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.util import instantiate_from_config
from tests.benchmarks.bench_diffusers import SIZES, Inputs, build_ours, build_theirs
from tests.benchmarks.memory import peak_memory

Step = Callable[[], Any]
# Width of the autoencoder's first level and layers of the text encoder, in proportion to the networks.
ENCODERS = {"tiny": (32, 2), "mid": (64, 12), "full": (128, 12)}
# Dense bf16 operations a second, as NVIDIA states them.
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}
HALF = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LIGHTNING = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}


@dataclass(frozen=True)
class Options:
    size: str
    device: str
    precision: str
    frozen: str
    recompute: str
    channels_last: bool = False

    def autocast(self) -> Any:
        return forward_context(LIGHTNING[self.precision], self.device)


def optimizer_step(optimizer: torch.optim.Optimizer, loss: Tensor) -> Tensor:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return loss.detach()


# -- a step with control -------------------------------------------------------------------------------------------


def fill_zero_convolutions(model: nn.Module) -> None:
    """So that all of a ControlNet works, and results can be compared."""
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1 and not p.is_meta and not p.any():
                p.normal_(std=0.02)


def control_model(options: Options, only_mid: bool = False) -> ControlLDM:
    torch.manual_seed(0)
    model = build_ours(options.size, recompute=False)
    fill_zero_convolutions(model)
    model.only_mid_control = only_mid
    model.learning_rate = 1e-5
    return model


def prepared(model: ControlLDM, options: Options) -> ControlLDM:
    """The model as a training run would have it."""
    model = model.to(options.device).train()
    cast_frozen(model, options.frozen)
    set_recompute(model, options.recompute)
    if options.channels_last:
        use_channels_last(model)
    return model


def control_step(model: ControlLDM, options: Options) -> Step:
    model = prepared(model, options)
    inputs, optimizer = Inputs(options.size, options.device), model.configure_optimizers()
    cond = {"c_crossattn": [inputs.text], "c_concat": [inputs.hint]}

    def step() -> Tensor:
        with options.autocast():
            loss, _ = model.p_losses(inputs.x, cond, inputs.t, inputs.noise)
        return optimizer_step(optimizer, loss)

    return step


def base_model(size: str) -> LatentDiffusion:
    """The whole UNet to be fine-tuned, without control."""
    config = {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": dict(
        linear_start=0.00085, linear_end=0.012, channels=4, image_size=64, use_ema=False, conditioning_key="crossattn",
        first_stage_key="jpg", cond_stage_key="txt", scale_factor=0.18215,
        unet_config={"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": unet_params(size)},
        first_stage_config={"target": "ldm.models.autoencoder.IdentityFirstStage"}, cond_stage_config={"target": "torch.nn.Identity"},
    )}  # fmt: skip
    return instantiate_from_config(config)


def base_step(options: Options) -> Step:
    """Fine-tuning of the whole UNet: the same code, losses and optimizer."""
    torch.manual_seed(0)
    model = base_model(options.size)
    fill_zero_convolutions(model)
    model.learning_rate = 1e-5
    model = model.to(options.device).train()
    set_recompute(model, options.recompute)
    inputs, optimizer = Inputs(options.size, options.device), model.configure_optimizers()

    def step() -> Tensor:
        with options.autocast():
            loss, _ = model.p_losses(inputs.x, inputs.text, inputs.t, inputs.noise)
        return optimizer_step(optimizer, loss)

    return step


def unet_params(size: str) -> dict[str, Any]:
    channels, _, _, heads, context = SIZES[size]
    return dict(
        image_size=32, in_channels=4, out_channels=4, model_channels=channels, attention_resolutions=[4, 2, 1],
        num_res_blocks=2, channel_mult=[1, 2, 4, 4], num_heads=heads, use_spatial_transformer=True, transformer_depth=1,
        context_dim=context, use_checkpoint=False, legacy=False,
    )  # fmt: skip


# -- diffusers' loop, as its train_controlnet.py does it --------------------------------------------------------------


class Theirs:
    """UNet and ControlNet of diffusers, trained as in its example: the UNet in the precision, the ControlNet under autocast."""

    def __init__(self, ours: ControlLDM, options: Options) -> None:
        from diffusers import DDPMScheduler

        self.options = options
        unet, control = build_theirs(ours, options.size, options.recompute != "none")
        self.unet = unet.to(options.device, HALF[options.precision])
        self.control = control.to(options.device)
        self.optimizer = torch.optim.AdamW(self.control.parameters(), lr=1e-5)
        self.schedule = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")

    def step(self, latents: Tensor, noise: Tensor, t: Tensor, text: Tensor, hint: Tensor) -> Tensor:
        dtype = HALF[self.options.precision]
        noisy = self.schedule.add_noise(latents.float(), noise.float(), t).to(dtype)
        text, hint = text.to(dtype), hint.to(dtype)
        with self.options.autocast():
            down, middle = self.control(noisy, t, encoder_hidden_states=text, controlnet_cond=hint, return_dict=False)
        predicted = self.unet(
            noisy,
            t,
            encoder_hidden_states=text,
            down_block_additional_residuals=[d.to(dtype) for d in down],
            mid_block_additional_residual=middle.to(dtype),
            return_dict=False,
        )[0]
        loss = F.mse_loss(predicted.float(), noise.float())
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


def step_sides(options: Options, sides: tuple[str, ...]) -> dict[str, Step]:
    """A step from given latents and text, both with the same weights and the same draws."""
    with torch.device("cpu" if "ours" in sides else "meta"):
        ours = control_model(options)
    found: dict[str, Step] = {}
    if "theirs" in sides:
        theirs, inputs = Theirs(ours, options), Inputs(options.size, options.device)
        found["theirs"] = lambda: theirs.step(inputs.x, inputs.noise, inputs.t, inputs.text, inputs.hint)
    if "ours" in sides:
        found["ours"] = control_step(ours, options)
    return found


# -- whole loops: data, encoders, step ----------------------------------------------------------------------------------


def add_encoders(model: ControlLDM, size: str) -> None:
    width, layers = ENCODERS[size]
    _, _, _, heads, context = SIZES[size]
    ddconfig = dict(double_z=True, z_channels=4, resolution=256, in_channels=3, out_ch=3, ch=width, ch_mult=[1, 2, 4, 4],
                    num_res_blocks=2, attn_resolutions=[], dropout=0.0)  # fmt: skip
    stage = {"target": "ldm.models.autoencoder.AutoencoderKL", "params": {"embed_dim": 4, "ddconfig": ddconfig}}
    text = {
        "target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder",
        "params": dict(width=context, layers=layers, heads=heads),
    }
    model.instantiate_first_stage(stage)
    model.instantiate_cond_stage(text)


def their_encoders(size: str) -> tuple[nn.Module, nn.Module]:
    """diffusers' autoencoder and transformers' text encoder of the same sizes."""
    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig, CLIPTextModel

    width, layers = ENCODERS[size]
    _, _, _, heads, context = SIZES[size]
    vae = AutoencoderKL(
        block_out_channels=(width, 2 * width, 4 * width, 4 * width),
        layers_per_block=2,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )
    text = CLIPTextModel(
        CLIPTextConfig(
            hidden_size=context,
            intermediate_size=4 * context,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            projection_dim=context,
        )
    )
    return vae.eval().requires_grad_(False), text.eval().requires_grad_(False)


def loop_sides(options: Options, sides: tuple[str, ...], folder: Path) -> dict[str, Step]:
    """Steps from pictures and prompts on disk."""
    _, side, batch, _, _ = SIZES[options.size]
    generate_fill(folder / "data", count=4 * batch, size=8 * side, progress=False)
    dataset = PairDataset(folder / "data")
    ours = control_model(options)
    found: dict[str, Step] = {}

    def batches(data: Any) -> Iterator[dict[str, Any]]:
        for _ in count():
            yield from DataLoader(data, batch, drop_last=True)

    if "ours" in sides:
        add_encoders(ours, options.size)
        ours = ours.to(options.device)
        cache = make_cache(ours, dataset, folder / "cache", LIGHTNING[options.precision], progress=False)
        release_encoders(ours)
        optimizer = prepared(ours, options).configure_optimizers()
        our_batches = batches(CachedPairs(dataset, cache))

        def our_step() -> Tensor:
            with options.autocast():
                loss, _ = ours.shared_step(next(our_batches))
            return optimizer_step(optimizer, loss)

        found["ours"] = our_step
    if "theirs" in sides:
        from ldm.modules.encoders.tokenizer import tokenize

        theirs = Theirs(ours if "ours" not in sides else control_model(options), options)
        vae, text = (encoder.to(options.device, HALF[options.precision]) for encoder in their_encoders(options.size))
        their_batches = batches(dataset)

        def their_step() -> Tensor:
            item = next(their_batches)
            pictures, hint = (item[k].to(options.device).permute(0, 3, 1, 2).contiguous() for k in ("jpg", "hint"))
            with torch.no_grad():
                latents = vae.encode(pictures.to(vae.dtype)).latent_dist.sample() * 0.18215
                states = text(tokenize(item["txt"], 77).to(options.device), return_dict=False)[0]
            noise = torch.randn_like(latents)
            t = torch.randint(0, 1000, (len(latents),), device=latents.device)
            return theirs.step(latents, noise, t, states, hint)

        found["theirs"] = their_step
    return found


# -- throughput on one device -------------------------------------------------------------------------------------------


def throughput(options: Options, batches: list[int], compiled: bool, steps: int) -> None:
    """Images a second of the training step from the cache, at several batch sizes."""
    _, side, _, _, context = SIZES[options.size]
    on_gpu = options.device.startswith("cuda")
    name = torch.cuda.get_device_name() if on_gpu else "CPU"
    chip = next((peak for key, peak in PEAKS.items() if key in name), None)
    allow_tf32()
    for batch in batches:
        model = prepared(control_model(options), options)
        optimizer = torch.optim.AdamW(model.trained_parameters(), lr=1e-5, fused=True)
        # As a loader with pinned memory hands them over.
        stored = [cached_batch(batch, side, context) for _ in range(2)]
        source = cycle([{k: v.pin_memory() if on_gpu else v for k, v in item.items()} for item in stored])

        def step(model=model, optimizer=optimizer, source=source) -> Tensor:
            item = {k: v.to(options.device, non_blocking=True) for k, v in next(source).items()}
            with options.autocast():
                loss, _ = model.shared_step(item)
            return optimizer_step(optimizer, loss)

        with FlopCounterMode(display=False) as counter:
            step()
        operations = counter.get_total_flops()
        if compiled:
            for network in (model.model.diffusion_model, model.control_model):
                network.compile()
        for _ in range(3):
            step()
        synchronize(options.device)
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        for _ in range(steps):
            step()
        synchronize(options.device)
        seconds = (time.perf_counter() - start) / steps
        peak = torch.cuda.max_memory_allocated() if on_gpu else peak_memory()
        share = (
            f", {operations / seconds / chip:.1%} of the chip's peak" if chip and options.precision != "fp32" else ""
        )
        print(
            f"{name}, batch {batch}: {batch / seconds:.2f} images/s, {seconds * 1e3:.0f} ms a step, "
            f"{operations / batch / 1e12:.3f} TFLOP an image, {operations / seconds / 1e12:.2f} TFLOP/s{share}; "
            f"peak memory {peak / GIB:.2f} GiB, computed {computed_cost(options, batch)[0] / GIB:.2f}",
            flush=True,
        )
        del model, optimizer, step
        if on_gpu:
            torch.cuda.empty_cache()


def cached_batch(batch: int, side: int, context: int) -> dict[str, Tensor]:
    """What a loader gives of the cache."""
    return {
        "moments": torch.randn(batch, 8, side, side),
        "context": torch.randn(batch, 77, context),
        "hint": torch.rand(batch, 8 * side, 8 * side, 3),
    }


def computed_cost(options: Options, batch: int, control: bool = True) -> tuple[int, int]:
    """Bytes of all tensors at the peak of a step, with control or of the whole base, and its operations; on fake tensors."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    _, side, _, _, context = SIZES[options.size]
    with FakeTensorMode(allow_non_fake_inputs=True), StorageTracker() as tracker:
        if control:
            model = build_ours(options.size, recompute=False).train()
            cast_frozen(model, options.frozen)
        else:
            model = base_model(options.size).train()
        set_recompute(model, options.recompute)
        optimizer = AdamMemory(model.trained_parameters())
        tracker.restart_peak()
        text, hint = torch.randn(batch, 77, context), torch.rand(batch, 3, 8 * side, 8 * side)
        cond = {"c_crossattn": [text], "c_concat": [hint]} if control else text

        def step() -> None:
            with forward_context(LIGHTNING[options.precision], "cpu"):
                loss, _ = model(torch.randn(batch, 4, side, side), cond)
            optimizer_step(optimizer, loss)

        step()  # the optimizer's state is made in it
        step()
        peak = tracker.peak.total()
        with FlopCounterMode(display=False) as counter:  # which changes what is kept
            step()
        return peak, counter.get_total_flops()


# -- measuring ----------------------------------------------------------------------------------------------------------

COMPARISONS = {  # names of the sides
    "step": ("ours", "theirs"),
    "loop": ("ours", "theirs"),
    "base": ("control", "base"),
    "middle": ("middle", "all"),
}


def prepare(what: str, options: Options, sides: tuple[str, ...], folder: Path) -> dict[str, Step]:
    if what == "step":
        return step_sides(options, sides)
    if what == "loop":
        return loop_sides(options, sides, folder)
    makers: dict[str, Callable[[], Step]] = {
        "control": lambda: control_step(control_model(options), options),
        "base": lambda: base_step(options),
        "middle": lambda: control_step(control_model(options, only_mid=True), options),
        "all": lambda: control_step(control_model(options), options),
    }
    return {side: makers[side]() for side in sides}


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def timed(step: Step, device: str) -> float:
    synchronize(device)
    start = time.perf_counter()
    step()
    synchronize(device)
    return time.perf_counter() - start


@dataclass(frozen=True)
class Alone:
    """One side in a process of its own: the loss of a first step, the seconds of a second one, and the GiB that it took."""

    loss: float
    seconds: float
    peak: float

    @classmethod
    def measure(cls, what: str, side: str, options: Options, folder: Path) -> "Alone":
        step = prepare(what, options, (side,), folder)[side]
        loss, seconds = float(step()), timed(step, options.device)
        on_gpu = options.device.startswith("cuda")
        return cls(loss, seconds, (torch.cuda.max_memory_allocated() if on_gpu else peak_memory()) / GIB)

    @classmethod
    def run(cls, side: str, arguments: list[str]) -> "Alone":
        command = [sys.executable, "-m", "tests.benchmarks.bench_training", *arguments, "--only", side]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        return cls(**json.loads(done.stdout.splitlines()[-1]))


def compare(
    what: str, options: Options, pairs: int, folder: Path, arguments: list[str], apart: bool, memory: bool
) -> str:
    """One line with both times, their ratio, and the memory if it is asked for."""
    first, second = COMPARISONS[what]
    if apart:
        runs = [(Alone.run(first, arguments), Alone.run(second, arguments)) for _ in range(pairs)]
        losses = [run.loss for run in runs[0]]
        times = [(x.seconds, y.seconds) for x, y in runs]
    else:
        steps = prepare(what, options, (first, second), folder)
        losses = [float(steps[side]()) for side in (first, second)]  # a warm-up, too
        times = [(timed(steps[first], options.device), timed(steps[second], options.device)) for _ in range(pairs)]
        runs = [(Alone.run(first, arguments), Alone.run(second, arguments))] if memory else []
    a, b = (statistics.median(side) for side in zip(*times, strict=True))
    ratios = sorted(x / y for x, y in times)
    more = f"; losses differ by {abs(losses[0] - losses[1]):.1e}" if what == "step" else ""
    if runs:
        x, y = (max(run.peak for run in side) for side in zip(*runs, strict=True))
        more += f"; peak memory {x:.2f} and {y:.2f} GiB, ratio {x / y:.3f}"
    if what == "base":
        batch = SIZES[options.size][2]
        (x, operations), (y, of_base) = (computed_cost(options, batch, control) for control in (True, False))
        more += f"; operations, ratio {operations / of_base:.2f}"
        more += f"; tensors alone, computed, {x / GIB:.2f} and {y / GIB:.2f} GiB, ratio {x / y:.3f}"
    return (
        f"{what}: {a:.3f} s {first}, {b:.3f} s {second}, ratio {statistics.median(ratios):.3f} "
        f"(from {ratios[0]:.3f} to {ratios[-1]:.3f}, {pairs} pairs){more}"
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=[*COMPARISONS, "throughput"])
    parser.add_argument("--size", choices=SIZES, default="mid")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--precision", choices=HALF, help="of computing (default: fp32; throughput: bf16)")
    parser.add_argument("--frozen", choices=HALF, help="precision of frozen weights (default: as --precision)")
    parser.add_argument("--recompute", choices=["none", "trained", "all"], default="none", help="on both sides")
    parser.add_argument("--channels-last", action="store_true", help="on our side")
    parser.add_argument("--memory", action="store_true", help="also the peak memory of each side")
    parser.add_argument("--apart", action="store_true", help="each side in processes of its own, with its peak memory")
    parser.add_argument("--batches", type=int, nargs="+", default=[1], help="of throughput")
    parser.add_argument("--compile", action="store_true", help="of throughput: torch.compile both networks")
    parser.add_argument("--steps", type=int, default=20, help="of throughput: steps that are timed")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    given = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(given)
    torch.set_num_threads(args.threads)
    precision = args.precision or ("bf16" if args.what == "throughput" else "fp32")
    options = Options(args.size, args.device, precision, args.frozen or precision, args.recompute, args.channels_last)
    if args.what == "throughput":
        throughput(options, args.batches, args.compile, args.steps)
        return
    with tempfile.TemporaryDirectory() as folder:
        if args.only:
            print(json.dumps(asdict(Alone.measure(args.what, args.only, options, Path(folder)))))
            return
        name = torch.cuda.get_device_name() if args.device.startswith("cuda") else f"CPU, {args.threads} threads"
        print(
            f"size {args.size} on {name}, {precision}, frozen weights {options.frozen}, recomputation {args.recompute}"
        )
        own = [a for a in given if a not in ("--memory", "--apart")]
        print(compare(args.what, options, args.pairs, Path(folder), own, args.apart, args.memory), flush=True)


if __name__ == "__main__":
    main()
