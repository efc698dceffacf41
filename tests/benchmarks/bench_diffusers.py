"""A training step and a sampling step, timed side by side with diffusers doing the same work on the same random weights.

    python -m tests.benchmarks.bench_diffusers --size mid --device cpu --threads 2

Both sides run in turn in one process, and the ratio is taken pair by pair, so that a machine whose speed drifts does not
matter; peak memory is measured in a process of its own for each side. Training: AdamW on the ControlNet, the UNet locked,
recomputation off on both sides (or on, with --recompute). Sampling: guidance with the hint in both halves, as diffusers'
pipeline does it, one batch. At full size training needs about 24 GB of memory, sampling 12.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cldm.checkpoint.diffusers_config import controlnet_config, unet_config
from cldm.checkpoint.lazy import lazy_entries
from cldm.checkpoint.names import NETWORKS
from cldm.cldm import ControlLDM
from ldm.util import instantiate_from_config
from tests.benchmarks.memory import peak_memory

SIZES = {  # model channels, latent height and width, batch, heads, context width
    "tiny": (32, 16, 2, 4, 64),
    "mid": (128, 32, 2, 8, 256),
    "full": (320, 64, 1, 8, 768),
}

STEPS = ("sampling", "training")


def build_ours(size: str, recompute: bool) -> ControlLDM:
    channels, _, _, heads, context = SIZES[size]
    unet = dict(image_size=32, in_channels=4, model_channels=channels, attention_resolutions=[4, 2, 1], num_res_blocks=2,
                channel_mult=[1, 2, 4, 4], num_heads=heads, use_spatial_transformer=True, transformer_depth=1,
                context_dim=context, use_checkpoint=recompute, legacy=False)  # fmt: skip
    return instantiate_from_config({
        "target": "cldm.cldm.ControlLDM",
        "params": dict(
            linear_start=0.00085, linear_end=0.012, channels=4, image_size=64, use_ema=False, only_mid_control=False,
            conditioning_key="crossattn", control_key="hint", first_stage_key="jpg", cond_stage_key="txt", scale_factor=0.18215,
            control_stage_config={"target": "cldm.cldm.ControlNet", "params": {**unet, "hint_channels": 3}},
            unet_config={"target": "cldm.cldm.ControlledUnetModel", "params": {**unet, "out_channels": 4}},
            first_stage_config={"target": "ldm.models.autoencoder.IdentityFirstStage"},
            cond_stage_config={"target": "torch.nn.Identity"},
        ),
    })  # fmt: skip


def build_theirs(ours: ControlLDM, size: str, recompute: bool) -> tuple[nn.Module, nn.Module]:
    """diffusers' UNet and ControlNet with the same weights; random ones if our model lies on the meta device."""
    from diffusers import ControlNetModel, UNet2DConditionModel

    channels, _, _, heads, context = SIZES[size]
    options = {"num_heads": heads, "context_dim": context, "use_spatial_transformer": True, "transformer_depth": 1}
    params = {"unet_config": {"params": options}, "control_stage_config": {"params": options}, "image_size": 64}
    unet_entries = lazy_entries(ours.model.diffusion_model.state_dict())
    control_entries = lazy_entries(ours.control_model.state_dict())
    unet = UNet2DConditionModel.from_config(unet_config(unet_entries, params, "eps"))
    control = ControlNetModel.from_config(controlnet_config(control_entries, params, False))
    if ours.device.type != "meta":
        for theirs, name, entries in ((unet, "unet", unet_entries), (control, "controlnet", control_entries)):
            theirs.load_state_dict({k: v.read() for k, v in NETWORKS[name].to_diffusers(entries)[0].items()})
    if recompute:
        unet.enable_gradient_checkpointing()
        control.enable_gradient_checkpointing()
    return unet.requires_grad_(False), control.train()


class Inputs:
    def __init__(self, size: str, device: str) -> None:
        _, side, batch, _, context = SIZES[size]
        generator = torch.Generator().manual_seed(0)

        def noise(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(device)

        self.x, self.noise = noise(batch, 4, side, side), noise(batch, 4, side, side)
        self.hint = noise(batch, 3, 8 * side, 8 * side).sigmoid()
        self.text, self.empty = noise(batch, 77, context), noise(batch, 77, context)
        self.t = torch.full((batch,), 500, device=device)


def our_steps(model: ControlLDM, inputs: Inputs) -> dict[str, Callable[[], Tensor]]:
    model.learning_rate = 1e-5
    optimizer = model.configure_optimizers()
    cond = {"c_crossattn": [inputs.text], "c_concat": [inputs.hint]}

    def train() -> Tensor:
        model.train()
        loss = F.mse_loss(model.apply_model(inputs.x, inputs.t, cond), inputs.noise)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.detach()

    guidance = model.make_guidance(cond, {**cond, "c_crossattn": [inputs.empty]}, 9.0)  # once a run, as samplers do

    @torch.no_grad()
    def sample() -> Tensor:
        model.eval()
        return guidance(inputs.x, inputs.t)

    return {"training step": train, "sampling step": sample}


def their_steps(unet: nn.Module, control: nn.Module, inputs: Inputs) -> dict[str, Callable[[], Tensor]]:
    optimizer = torch.optim.AdamW(control.parameters(), lr=1e-5)

    def predict(x: Tensor, t: Tensor, text: Tensor, hint: Tensor) -> Tensor:
        down, mid = control(x, t, encoder_hidden_states=text, controlnet_cond=hint, return_dict=False)
        return unet(
            x,
            t,
            encoder_hidden_states=text,
            down_block_additional_residuals=down,
            mid_block_additional_residual=mid,
            return_dict=False,
        )[0]

    def train() -> Tensor:
        control.train()
        loss = F.mse_loss(predict(inputs.x, inputs.t, inputs.text, inputs.hint), inputs.noise)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.detach()

    @torch.no_grad()
    def sample() -> Tensor:
        control.eval()
        both = [
            torch.cat([a, b])
            for a, b in (
                (inputs.x, inputs.x),
                (inputs.t, inputs.t),
                (inputs.empty, inputs.text),
                (inputs.hint, inputs.hint),
            )
        ]
        out_uncond, out_cond = predict(*both).chunk(2)
        return out_uncond + 9.0 * (out_cond - out_uncond)

    return {"training step": train, "sampling step": sample}


def prepare(
    size: str, device: str, recompute: bool, sides: tuple[str, ...]
) -> dict[str, dict[str, Callable[[], Tensor]]]:
    torch.manual_seed(0)
    with torch.device("cpu" if "ours" in sides else "meta"):  # nothing but the measured side takes memory
        ours = build_ours(size, recompute)
    with torch.no_grad():  # zero convolutions that are not zero, so that all of the ControlNet works
        for p in ours.parameters():
            if p.dim() > 1 and not p.is_meta and not p.any():
                p.normal_(std=0.02)
    inputs = Inputs(size, device)
    steps = {}
    if "theirs" in sides:
        unet, control = build_theirs(ours, size, recompute)
        steps["theirs"] = their_steps(unet.to(device), control.to(device), inputs)
    if "ours" in sides:
        steps["ours"] = our_steps(ours.to(device), inputs)
    return steps


def timed(step: Callable[[], Tensor], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_of(size: str, device: str, recompute: bool, side: str, what: str, threads: int) -> float:
    """GiB that one side's step needs, in a process of its own; on CUDA the device's memory."""
    command = [sys.executable, "-m", "tests.benchmarks.bench_diffusers", "--size", size, "--device", device]
    command += ["--threads", str(threads), "--memory", side, what] + ["--recompute"] * recompute
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="mid")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--step", choices=STEPS, action="append", help="only this one (default: both)")
    parser.add_argument(
        "--recompute", action="store_true", help="recompute activations in the backward pass, on both sides"
    )
    parser.add_argument("--memory", nargs=2, metavar=("SIDE", "STEP"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.memory:
        side, what = args.memory
        step = prepare(args.size, args.device, args.recompute, (side,))[side][what]
        for _ in range(2):
            step()
        peak = torch.cuda.max_memory_allocated() if args.device == "cuda" else peak_memory()
        print(json.dumps(peak / 2**30))
        return

    steps = prepare(args.size, args.device, args.recompute, ("ours", "theirs"))
    name = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {args.threads} threads"
    print(
        f"size {args.size} on {name}, fp32, recomputation {'on' if args.recompute else 'off'}, {args.pairs} pairs after a warm-up"
    )
    for what in (f"{step} step" for step in args.step or STEPS):
        ours, theirs = steps["ours"][what], steps["theirs"][what]
        difference = float((ours() - theirs()).abs().max())
        pairs = [(timed(ours, args.device), timed(theirs, args.device)) for _ in range(args.pairs)]
        a, b = (statistics.median(times) for times in zip(*pairs, strict=True))
        ratios = sorted(x / y for x, y in pairs)
        memory = [
            peak_of(args.size, args.device, args.recompute, side, what, args.threads) for side in ("ours", "theirs")
        ]
        print(
            f"{what}: {a:.3f} s here, {b:.3f} s diffusers, ratio {statistics.median(ratios):.3f} "
            f"(from {ratios[0]:.3f} to {ratios[-1]:.3f}); peak memory {memory[0]:.2f} and {memory[1]:.2f} GiB; "
            f"results differ by {difference:.1e}",
            flush=True,
        )


if __name__ == "__main__":
    main()
