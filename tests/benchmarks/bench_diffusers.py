"""Sampling with a ControlNet, timed side by side with diffusers doing the same work on the same random weights.

    python -m tests.benchmarks.bench_diffusers --size mid --threads 2                 a step, by the public call DDIMSampler(model).sample
    python -m tests.benchmarks.bench_diffusers --size mid --threads 2 --guess         in guess mode
    python -m tests.benchmarks.bench_diffusers --size mid --threads 2 --image         whole images, VAE included, against its pipeline
    python -m tests.benchmarks.bench_diffusers --size mid --precision bf16 --versus fp32      bf16 weights against our own fp32
    python -m tests.benchmarks.bench_diffusers --size full --device cuda --precision fp16 --compile --channels-last

Both sides run in turn in one process, and the ratio is taken pair by pair, so that a machine whose speed drifts does not matter; peak
memory is measured in a process of its own for each side. Guidance has the hint in both halves, in one batch, as diffusers' pipeline
does it (in guess mode in the conditional half alone). `--versus` names the other side: diffusers with the same precision and
settings, our own in fp32 (`fp32`), or our own not compiled and with channels first (`eager`). At full size both sides take 12 GB.
"""

import argparse
import copy
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from cldm.checkpoint.diffusers_config import component_config
from cldm.checkpoint.names import to_diffusers
from cldm.cldm import ControlLDM
from ldm.files import LazyTensor
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.util import instantiate_from_config
from tests.benchmarks.memory import peak_memory

SIZES = {  # model channels, latent height and width, batch, heads, context width
    "tiny": (32, 16, 2, 4, 64),
    "mid": (128, 32, 2, 8, 256),
    "full": (320, 64, 1, 8, 768),
}


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
    unet_entries = {k: LazyTensor.of(v) for k, v in ours.model.diffusion_model.state_dict().items()}
    control_entries = {k: LazyTensor.of(v) for k, v in ours.control_model.state_dict().items()}
    unet_entries, control_entries = (to_diffusers("unet", entries)[0] for entries in (unet_entries, control_entries))
    unet = UNet2DConditionModel.from_config(component_config("unet", unet_entries, params))
    control = ControlNetModel.from_config(component_config("controlnet", control_entries, params))
    if ours.device.type != "meta":
        for theirs, entries in ((unet, unet_entries), (control, control_entries)):
            theirs.load_state_dict({k: v.read() for k, v in entries.items()})
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


def our_side(model: ControlLDM, inputs: Inputs, options: argparse.Namespace) -> Callable[[], Tensor]:
    """A run of the public call, as notebooks and scripts have it."""
    hint = [inputs.hint]
    cond = {"c_crossattn": [inputs.text], "c_concat": hint}
    uncond = {"c_crossattn": [inputs.empty], "c_concat": None if options.guess else hint}
    if options.guess:
        model.control_scales = torch.logspace(-1, 0, 13).tolist()  # diffusers' scales, so that results can be compared
    model.eval()

    @torch.no_grad()
    def run() -> Tensor:
        latents, _ = DDIMSampler(model).sample(
            options.steps, len(inputs.x), inputs.x.shape[1:], cond, verbose=False, x_T=inputs.x,
            unconditional_guidance_scale=9.0, unconditional_conditioning=uncond,
        )  # fmt: skip
        return model.decode_first_stage(latents) if options.image else latents

    return run


def their_side(
    unet: nn.Module, control: nn.Module, vae: nn.Module | None, inputs: Inputs, options: argparse.Namespace
) -> Callable[[], Tensor]:
    """The same with the loop of diffusers' pipeline, or with the pipeline itself."""
    from diffusers import DDIMScheduler, StableDiffusionControlNetPipeline

    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
                              set_alpha_to_one=False, steps_offset=1)  # fmt: skip
    dtype = next(unet.parameters()).dtype
    x, text, empty, hint = (a.to(dtype) for a in (inputs.x, inputs.text, inputs.empty, inputs.hint))
    if options.image:
        pipeline = StableDiffusionControlNetPipeline(
            vae, None, None, unet, control.eval(), scheduler, None, None, requires_safety_checker=False
        )
        pipeline.set_progress_bar_config(disable=True)
        return lambda: pipeline(
            image=hint, prompt_embeds=text, negative_prompt_embeds=empty, latents=x, num_inference_steps=options.steps,
            guidance_scale=9.0, guess_mode=options.guess, output_type="pt",
        ).images * 2 - 1  # fmt: skip
    both_texts, both_hints = torch.cat([empty, text]), torch.cat([hint, hint])
    control.eval()

    @torch.no_grad()
    def run() -> Tensor:
        scheduler.set_timesteps(options.steps, device=x.device)
        latents = x
        for t in scheduler.timesteps:
            both = scheduler.scale_model_input(torch.cat([latents, latents]), t)
            given = (latents, text, hint) if options.guess else (both, both_texts, both_hints)
            down, mid = control(
                given[0],
                t,
                encoder_hidden_states=given[1],
                controlnet_cond=given[2],
                guess_mode=options.guess,
                return_dict=False,
            )
            if options.guess:
                down, mid = [torch.cat([torch.zeros_like(d), d]) for d in down], torch.cat([torch.zeros_like(mid), mid])
            output = unet(
                both, t, encoder_hidden_states=both_texts, down_block_additional_residuals=down,
                mid_block_additional_residual=mid, return_dict=False,
            )[0]  # fmt: skip
            uncond, cond = output.chunk(2)
            latents = scheduler.step(uncond + 9.0 * (cond - uncond), t, latents, return_dict=False)[0]
        return latents

    return run


# Width of the autoencoder's first level, in proportion to the networks.
VAE_WIDTHS = {"tiny": 32, "mid": 64, "full": 128}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def with_vae(model: ControlLDM, size: str) -> ControlLDM:
    """The model with an autoencoder of Stable Diffusion's structure."""
    ddconfig = dict(double_z=True, z_channels=4, resolution=256, in_channels=3, out_ch=3, ch=VAE_WIDTHS[size], ch_mult=[1, 2, 4, 4],
                    num_res_blocks=2, attn_resolutions=[], dropout=0.0)  # fmt: skip
    model.first_stage_model = AutoencoderKL(ddconfig, embed_dim=4).eval().requires_grad_(False)
    return model


def their_vae(model: ControlLDM) -> nn.Module:
    from diffusers import AutoencoderKL as TheirAutoencoder

    ours = {k: LazyTensor.of(v) for k, v in model.first_stage_model.state_dict().items()}
    entries, _ = to_diffusers("vae", ours)
    params = {"scale_factor": model.scale_factor, "image_size": 64, "first_stage_config": {"params": {}}}
    theirs = TheirAutoencoder.from_config(component_config("vae", entries, params))
    if model.device.type != "meta":
        theirs.load_state_dict({k: v.read() for k, v in entries.items()})
    return theirs.eval()


def prepare(options: argparse.Namespace, sides: tuple[str, ...]) -> dict[str, Callable[[], Tensor]]:
    """A run of each side: `ours`, and `theirs` or `plain`, our own as `--versus` says."""
    torch.manual_seed(0)
    with torch.device(
        "cpu" if {"ours", "plain"} & set(sides) else "meta"
    ):  # nothing but the measured side takes memory
        ours = build_ours(options.size, False)
        ours = with_vae(ours, options.size) if options.image else ours
    with torch.no_grad():  # zero convolutions that are not zero, so that all of the ControlNet works
        for p in ours.parameters():
            if p.dim() > 1 and not p.is_meta and not p.any():
                p.normal_(std=0.02)
    inputs, dtype = Inputs(options.size, options.device), DTYPES[options.precision]
    layout = torch.channels_last if options.channels_last else torch.contiguous_format
    runs = {}
    if "theirs" in sides:
        unet, control = build_theirs(ours, options.size, False)
        vae = their_vae(ours) if options.image else None
        unet, control = (m.to(options.device, dtype).to(memory_format=layout) for m in (unet, control))
        vae = vae if vae is None else vae.to(options.device, dtype)
        if options.compile:
            unet.compile()
            control.compile()
        runs["theirs"] = their_side(unet, control, vae, inputs, options)
    if "plain" in sides:
        plain = copy.deepcopy(ours).to(options.device, torch.float32 if options.versus == "fp32" else dtype)
        runs["plain"] = our_side(plain, inputs, options)
    if "ours" in sides:
        ours = ours.to(options.device, dtype).to(memory_format=layout)
        if options.compile:
            ours.compile_networks()
        runs["ours"] = our_side(ours, inputs, options)
    return runs


def timed(run: Callable[[], Tensor], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_of(side: str, argv: Sequence[str]) -> float:
    """GiB that one side needs, in a process of its own with the same arguments; on CUDA the device's memory."""
    command = [sys.executable, "-m", "tests.benchmarks.bench_diffusers", *argv, "--memory", side]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="mid")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--steps", type=int, default=4, help="steps of a run (1000 must be a multiple)")
    parser.add_argument("--image", action="store_true", help="whole images, VAE included")
    parser.add_argument("--guess", action="store_true", help="guess mode")
    parser.add_argument("--precision", choices=DTYPES, default="fp32", help="of the weights")
    parser.add_argument("--compile", action="store_true", help="compile both networks")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--versus", choices=("diffusers", "fp32", "eager"), default="diffusers")
    parser.add_argument("--memory", metavar="SIDE", help=argparse.SUPPRESS)
    argv = sys.argv[1:] if argv is None else argv
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    if options.memory:
        run = prepare(options, (options.memory,))[options.memory]
        for _ in range(2):
            run()
        peak = torch.cuda.max_memory_allocated() if options.device == "cuda" else peak_memory()
        print(json.dumps(peak / 2**30))
        return

    other = "theirs" if options.versus == "diffusers" else "plain"
    runs = prepare(options, ("ours", other))
    name = torch.cuda.get_device_name() if options.device == "cuda" else f"CPU, {options.threads} threads"
    settings = [
        word
        for word, on in (
            ("guess mode", options.guess),
            ("compiled", options.compile),
            ("channels last", options.channels_last),
        )
        if on
    ]
    print(
        f"size {options.size} on {name}, {', '.join([options.precision, *settings])}, {options.pairs} pairs after a warm-up"
    )
    difference = relative_difference(runs["ours"](), runs[other]())
    pairs = [(timed(runs["ours"], options.device), timed(runs[other], options.device)) for _ in range(options.pairs)]
    count = 1 if options.image else options.steps
    a, b = (statistics.median(times) / count for times in zip(*pairs, strict=True))
    ratios = sorted(x / y for x, y in pairs)
    memory = [peak_of(side, argv) for side in ("ours", other)]
    what = f"a batch of images in {options.steps} steps" if options.image else "a sampling step"
    print(
        f"{what}: {a:.3f} s here, {b:.3f} s {options.versus}, ratio {statistics.median(ratios):.3f} "
        f"(from {ratios[0]:.3f} to {ratios[-1]:.3f}); peak memory {memory[0]:.2f} and {memory[1]:.2f} GiB; "
        f"results differ by {difference:.1e} of their size",
        flush=True,
    )


def relative_difference(a: Tensor, b: Tensor) -> float:
    a, b = a.float(), b.float()
    if a.dim() == 4 and a.shape[1] == 3:  # pictures, which the pipeline clips
        a, b = a.clamp(-1, 1), b.clamp(-1, 1)
    return float((a - b).norm() / b.norm())


if __name__ == "__main__":
    main()
