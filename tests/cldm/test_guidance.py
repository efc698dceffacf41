"""Guidance with control: several ControlNets, when and where they act, what is encoded once, and users' own networks."""

import numpy as np
import pytest
import torch
from torch import nn

from cldm.cldm import ControlNet
from cldm.ddim_hacked import DDIMSampler as PublicSampler
from cldm.guidance import Control, ControlCall, strength_scales, takes_guided_hint
from cldm.model import add_control, load_control
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.dpm_solver import DPMSolverSampler
from ldm.models.diffusion.guidance import SeparateGuidance
from ldm.models.diffusion.noise import picture_generators
from ldm.models.diffusion.plms import PLMSSampler
from ldm.util import ConfigError, instantiate_from_config
from tests.cldm.tiny import tiny_config, tiny_model
from tests.parity import fill_

SHAPE = (4, 8, 8)


def small(name: str, **changes):
    """A tiny ControlLDM with random, not zero, weights everywhere."""
    return tiny_model(name, **changes)


def with_second(model, **changes) -> int:
    number = model.add_control(**changes)
    fill_(model.control_networks()[number], prefix="second.")
    return number


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Case:
    """Inputs for two pictures of 64 pixels."""

    def __init__(self) -> None:
        self.x, self.t = noise(2, *SHAPE, seed=1), torch.tensor([481, 481])
        self.hint, self.other = torch.sigmoid(noise(2, 3, 64, 64, seed=2)), torch.sigmoid(noise(2, 3, 64, 64, seed=3))
        self.text, self.empty = noise(2, 77, 48, seed=4), noise(2, 77, 48, seed=5)
        self.cond = {"c_crossattn": [self.text], "c_concat": [self.hint]}
        self.uncond = {"c_crossattn": [self.empty], "c_concat": [self.hint]}


def by_hand(model, case, outputs, scale=3.0, conditional_only=False):
    """Guidance in two plain calls of the UNet, with these control outputs for the conditional and the other half."""
    unet = model.model.diffusion_model
    cond = unet(case.x, case.t, case.text, control=outputs(case.text))
    uncond = unet(case.x, case.t, case.empty, control=None if conditional_only else outputs(case.empty))
    return uncond + scale * (cond - uncond)


@torch.no_grad()
@pytest.mark.parametrize("conditional_only", [False, True])
def test_outputs_of_several_networks_are_added(conditional_only):
    model, case = small("sd1"), Case()
    keys = set(model.state_dict())
    pooled = with_second(model, global_average_pooling=True)
    wide = with_second(model, hint_channels=5)
    assert keys < set(model.state_dict()) and model.control_networks()[0] is model.control_model
    assert not any(p.requires_grad for p in model.more_control_models.parameters())
    assert all(p.requires_grad for p in model.control_model.parameters())
    hints = [case.hint, case.other[:1], torch.rand(2, 5, 64, 64)]
    controls = [
        Control(hints[0], scales=0.5, conditional_only=conditional_only),
        Control(hints[1], network=pooled, scales=[1.5] * 13, conditional_only=conditional_only),
        Control(hints[2], network=wide, conditional_only=conditional_only),
    ]
    model.control_scales = [0.25] * 13  # what a control without scales of its own takes

    def outputs(text):
        first, second, third = (
            network(case.x, hint.expand(2, -1, -1, -1), case.t, text)
            for network, hint in zip(model.control_networks(), hints, strict=True)
        )
        second = [(1.5 * c).mean(dim=(2, 3), keepdim=True) for c in second]
        return [0.5 * a + b + 0.25 * c for a, b, c in zip(first, second, third, strict=True)]

    want = by_hand(model, case, outputs, conditional_only=conditional_only)
    got = model.make_guidance(case.cond, case.uncond, 3.0, controls)(case.x, case.t)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="no ControlNet 3: this model has 3"):
        model.make_guidance(case.cond, case.uncond, 3.0, [Control(case.hint, network=3)])


@torch.no_grad()
def test_one_hint_for_one_half_and_another_for_both():
    model, case = small("sd1"), Case()
    second = with_second(model)
    controls = [Control(case.hint, conditional_only=True), Control(case.other, network=second)]
    both = model.control_networks()[second](case.x, case.other, case.t, case.empty)
    uncond = model.model.diffusion_model(case.x, case.t, case.empty, control=both)
    own = model.control_model(case.x, case.hint, case.t, case.text)
    both = model.control_networks()[second](case.x, case.other, case.t, case.text)
    cond = model.model.diffusion_model(
        case.x, case.t, case.text, control=[a + b for a, b in zip(own, both, strict=True)]
    )
    got = model.make_guidance(case.cond, case.uncond, 3.0, controls)(case.x, case.t)
    torch.testing.assert_close(got, uncond + 3 * (cond - uncond), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_weights_by_resolution():
    model, case = small("sd1"), Case()
    factors = [1, 1, 1, 2, 2, 2, 4, 4, 4, 8, 8, 8, 8]  # 64 / h for a latent of 64
    call = ControlCall(model.control_model, {"hint": case.hint}, 0.5, resolution_weights=True)
    plain = model.control_model(case.x, case.hint, case.t, case.text)
    for got, want, factor in zip(call.outputs(case.x, case.t, case.text), plain, factors, strict=True):
        torch.testing.assert_close(got, 0.5 * factor * want)


def test_controls_act_in_their_part_of_the_run():
    control = Control(torch.zeros(1, 3, 8, 8), start=0.2, end=0.6)
    assert [control.acts(i, 5) for i in range(5)] == [False, True, True, False, False]
    assert all(Control(torch.zeros(1, 3, 8, 8)).acts(i, 7) for i in range(7))
    model, case = small("sd1"), Case()
    ran = []
    model.control_model.middle_block.register_forward_pre_hook(lambda *a: ran.append(len(a[1][0])))
    model.control_model.input_hint_block.register_forward_pre_hook(lambda *a: ran.append("hint"))
    for only, rows in ((False, 4), (True, 2)):
        ran.clear()
        guidance = model.make_guidance(
            case.cond, case.uncond, 3.0, [Control(case.hint, start=0.2, end=0.6, conditional_only=only)]
        )
        DDIMSampler(model).sample(5, 2, SHAPE, guidance=guidance, verbose=False)
        assert ran == ["hint", rows, rows]


@pytest.mark.parametrize("sampler", [DDIMSampler, PublicSampler, PLMSSampler, DPMSolverSampler])
@pytest.mark.parametrize("guess_mode", [False, True])
def test_the_public_call_encodes_a_hint_once_and_joins_the_halves(sampler, guess_mode):
    model, case = small("sd1"), Case()
    calls = {"hint": 0, "unet": [], "control": []}
    model.control_model.input_hint_block.register_forward_pre_hook(lambda *a: calls.update(hint=calls["hint"] + 1))
    model.control_model.middle_block.register_forward_pre_hook(lambda m, a: calls["control"].append(len(a[0])))
    model.model.diffusion_model.middle_block.register_forward_pre_hook(lambda m, a: calls["unet"].append(len(a[0])))
    uncond = {**case.uncond, "c_concat": None} if guess_mode else case.uncond
    settings = {
        "unconditional_guidance_scale": 3.0,
        "unconditional_conditioning": uncond,
        "x_T": case.x,
        "verbose": False,
    }
    got, _ = sampler(model).sample(2, 2, SHAPE, case.cond, **settings)
    evaluations = 3 if sampler is PLMSSampler else 2
    assert calls == {"hint": 1, "unet": [4] * evaluations, "control": [2 if guess_mode else 4] * evaluations}
    guidance = SeparateGuidance(model, case.cond, uncond, 3.0)
    want, _ = sampler(model).sample(2, 2, SHAPE, guidance=guidance, x_T=case.x, verbose=False)
    torch.testing.assert_close(got, want, atol=2e-4, rtol=2e-4)


def test_pictures_for_a_logger_encode_the_hint_once_a_run():
    model, count = small("sd1"), []
    model.control_model.input_hint_block.register_forward_pre_hook(lambda *a: count.append(1))
    batch = {"jpg": torch.rand(1, 64, 64, 3), "hint": torch.rand(1, 64, 64, 3), "txt": torch.randn(1, 77, 48)}
    model.get_unconditional_conditioning = lambda n, label=None: torch.zeros(n, 77, 48)
    z, c = model.get_input(batch, "jpg")
    model.sample_log(
        c, 1, True, 3, unconditional_guidance_scale=9.0, unconditional_conditioning=model.unconditional_like(c, 1)
    )
    assert len(count) == 1


@torch.no_grad()
def test_texts_of_different_lengths_are_evaluated_one_after_the_other():
    model, case = small("sd1"), Case()
    case.empty = noise(2, 154, 48, seed=6)
    uncond = {"c_crossattn": [case.empty]}
    for only in (False, True):
        got = model.make_guidance(case.cond, uncond, 3.0, [Control(case.hint, conditional_only=only)])(case.x, case.t)
        want = by_hand(
            model, case, lambda text: model.control_model(case.x, case.hint, case.t, text), conditional_only=only
        )
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


class Published(ControlNet):
    """A user's ControlNet with the forward of the reference, which changes the hint."""

    def forward(self, x, hint, timesteps, context, **kwargs):
        return super().forward(x, 1 - hint, timesteps, context)


@torch.no_grad()
@pytest.mark.parametrize("guess_mode", [False, True])
def test_networks_and_models_of_users(guess_mode):
    model, case, config = small("sd1"), Case(), tiny_config("sd1")
    uncond = {**case.uncond, "c_concat": None} if guess_mode else case.uncond
    scales = strength_scales(0.7, guess_mode)
    model.control_scales = scales
    want = model.make_guidance(case.cond, uncond, 3.0)(case.x, case.t)
    control = [Control(case.hint, scales=scales, conditional_only=guess_mode, end=0.5)]
    without = model.make_guidance(case.cond, uncond, 3.0, [])(case.x, case.t)

    own = fill_(instantiate_from_config({**config, "target": "tests.cldm.tiny.OwnControlLDM"})).eval()
    guidance = own.make_guidance(case.cond, uncond, 3.0, control)
    torch.testing.assert_close(guidance(case.x, case.t, 0, 2), want, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(guidance(case.x, case.t, 1, 2), without, atol=1e-4, rtol=1e-4)
    assert own.control_scales == [1.0] * 13
    with pytest.raises(ValueError, match="OwnControlLDM has an apply_model of its own"):
        own.make_guidance(case.cond, uncond, 3.0, [Control(case.hint, network=1)])

    config["params"]["control_stage_config"]["target"] = f"{__name__}.Published"
    published = fill_(instantiate_from_config(config)).eval()
    assert not takes_guided_hint(published.control_model) and takes_guided_hint(model.control_model)
    inverted = {**case.cond, "c_concat": [1 - case.hint]}
    inverted_uncond = {**uncond, "c_concat": uncond["c_concat"] and inverted["c_concat"]}
    published.control_scales = scales
    got = published.make_guidance(inverted, inverted_uncond, 3.0)(case.x, case.t)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_compiled_network_is_recognised():
    model, case = small("sd1"), Case()
    want = model.make_guidance(case.cond, case.uncond, 3.0)(case.x, case.t)
    model.control_model = torch.compile(model.control_model)
    count = []
    model.control_model.input_hint_block.register_forward_pre_hook(lambda *a: count.append(1))
    guidance = model.make_guidance(case.cond, case.uncond, 3.0)
    compiled = small("sd1")
    keys = set(compiled.state_dict())
    compiled.compile_networks()
    assert set(compiled.state_dict()) == keys
    with torch.compiler.set_stance("force_eager"):  # compiling takes minutes
        torch.testing.assert_close(guidance(case.x, case.t), want)
        guidance(case.x, case.t)
        torch.testing.assert_close(compiled.make_guidance(case.cond, case.uncond, 3.0)(case.x, case.t), want)
    assert takes_guided_hint(model.control_model) and len(count) == 1


@pytest.mark.parametrize("sampler", [DDIMSampler, PLMSSampler, DPMSolverSampler])
def test_a_picture_depends_on_its_own_seed_alone(sampler):
    model, case = small("sd1"), Case()
    eta = {"eta": 0.7, "noise_dropout": 0.2} if sampler is DDIMSampler else {}
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :3] = 1

    def run(rows, seeds):
        cond, uncond = ({k: [v[0][rows]] for k, v in c.items()} for c in (case.cond, case.uncond))
        return sampler(model).sample(
            4, len(seeds), SHAPE, cond, unconditional_guidance_scale=3.0, unconditional_conditioning=uncond, verbose=False,
            mask=mask, x0=case.x[:1], generators=picture_generators(seeds, len(seeds)), **eta,
        )[0]  # fmt: skip

    torch.manual_seed(1)
    want = torch.rand(3)
    torch.manual_seed(1)
    together = run([0, 1], [7, 9])
    assert torch.equal(torch.rand(3), want)  # the global generator was left alone
    for row, seed in ((0, 7), (1, 9)):
        torch.testing.assert_close(together[[row]], run([row], [seed]), atol=1e-4, rtol=1e-4)


def test_seeds_are_numbers_that_count_up_or_a_list():
    first, second = (torch.cat([torch.rand(1, generator=g) for g in picture_generators(s, 3)]) for s in (5, [5, 6, 7]))
    assert torch.equal(first, second)
    for seeds, message in (([1, 2], "2 seeds for 3"), (-1, "found -1"), ([0, 1.5, 2], "found 1.5")):
        with pytest.raises(ValueError, match=message):
            picture_generators(seeds, 3)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_the_schedule_and_samples_close_to_single(dtype):
    model, case = small("sd2"), Case()
    settings = {
        "unconditional_guidance_scale": 2.0,
        "unconditional_conditioning": case.uncond,
        "x_T": case.x,
        "verbose": False,
    }
    want, _ = DDIMSampler(model).sample(3, 2, SHAPE, case.cond, **settings)
    schedule = {n: b.clone() for n, b in model.named_buffers(recurse=False)}
    model.to(dtype)
    assert all(torch.equal(getattr(model, n), b) for n, b in schedule.items())
    assert model.control_model.input_blocks[0][0].weight.dtype == dtype
    got, _ = DDIMSampler(model).sample(3, 2, SHAPE, case.cond, **settings)
    assert got.dtype == torch.float32 and float((got - want).norm() / want.norm()) < 0.1
    model.float()
    assert all(torch.equal(getattr(model, n), b) for n, b in schedule.items())
    with torch.device("meta"):
        empty = instantiate_from_config(tiny_config("sd2"))
    assert torch.equal(empty.to_empty(device="cpu").alphas_cumprod, schedule["alphas_cumprod"])


@torch.no_grad()
def test_autocast_samples_close_to_single():
    model, case = small("sd1"), Case()
    settings = {
        "unconditional_guidance_scale": 2.0,
        "unconditional_conditioning": case.uncond,
        "x_T": case.x,
        "verbose": False,
    }
    want, _ = DDIMSampler(model).sample(3, 2, SHAPE, case.cond, **settings)
    with torch.autocast("cpu", torch.bfloat16):
        got, _ = DDIMSampler(model).sample(3, 2, SHAPE, case.cond, **settings)
    assert got.dtype == torch.float32 and float((got - want).norm() / want.norm()) < 0.1
    model.control_model.bfloat16()  # networks of two types
    got = model.apply_model(case.x, case.t, case.cond)
    assert torch.isfinite(got).all()


def test_a_second_control_net_from_a_file(tmp_path):
    model, other = small("sd1"), small("sd1")
    fill_(other.control_model, prefix="second.")
    torch.save({f"control_model.{k}": v for k, v in other.control_model.state_dict().items()}, tmp_path / "other.pth")
    before = {k: v.clone() for k, v in model.control_model.state_dict().items()}
    number = add_control(model, tmp_path / "other.pth")
    added = model.control_networks()[number].state_dict()
    assert all(torch.equal(v, added[k]) for k, v in other.control_model.state_dict().items())
    assert all(torch.equal(v, before[k]) for k, v in model.control_model.state_dict().items())
    torch.save({"control_model.input_blocks.0.0.weight": torch.zeros(1)}, tmp_path / "bad.pth")
    with pytest.raises(ValueError):
        add_control(model, tmp_path / "bad.pth")
    assert len(model.control_networks()) == 2
    load_control(model, tmp_path / "other.pth")  # still the first
    with pytest.raises(ConfigError, match="different networks"):
        model.add_control(small("sd2").control_model)


class CompVisDenoiser(nn.Module):
    """What k-diffusion's wrapper of the same name does: sigmas from alpha-bar, and times between two timesteps."""

    def __init__(self, model):
        super().__init__()
        self.inner_model = model
        self.sigmas = ((1 - model.alphas_cumprod) / model.alphas_cumprod) ** 0.5

    def forward(self, x, sigma, **kwargs):
        t = torch.from_numpy(np.interp(sigma.log(), self.sigmas.log(), range(1000))).float()
        scale = (sigma**2 + 1).rsqrt()[:, None, None, None]
        return x - sigma[:, None, None, None] * self.inner_model.apply_model(x * scale, t, **kwargs)


@torch.no_grad()
def test_denoisers_written_for_compvis_models_take_this_one():
    model, case = small("sd1"), Case()
    sigma = torch.tensor([1.37, 0.2])
    got = CompVisDenoiser(model)(case.x, sigma, cond=case.cond)
    assert torch.isfinite(got).all() and not torch.equal(got, case.x)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"unconditional_guidance_scal": 9}, "unconditional_guidance_scal"),
        ({"unconditional_conditioning": {"c_crossattn": [torch.zeros(3, 77, 48)], "c_concat": None}}, "3 entries for a batch of 2"),
        ({"unconditional_conditioning": {"c_concat": None}}, "c_crossattn"),
        ({"unconditional_guidance_scale": float("nan")}, "finite"),
        ({"eta": 1.001}, "eta must be 0 to 1"),
        ({"mask": torch.zeros(2, 1, 8, 9), "x0": torch.zeros(2, 4, 8, 8)}, "a mask for latents"),
        ({"mask": torch.zeros(2, 1, 8, 8)}, "needs x0"),
        ({"init_latents": torch.zeros(1, 4, 8, 8), "strength": 0.01}, "leaves none of 3 steps"),
        ({"init_latents": torch.zeros(1, 4, 8, 8), "strength": 1.5}, "strength must be"),
        ({"generators": [torch.Generator()]}, "1 generators for a batch of 2"),
        ({"temperature": -1.0}, "temperature"),
    ],
)  # fmt: skip
def test_mistakes_are_named(change, message):
    model, case = small("sd1"), Case()
    options = {
        "unconditional_guidance_scale": 3.0,
        "unconditional_conditioning": case.uncond,
        "verbose": False,
    } | change
    with pytest.raises((ValueError, TypeError), match=message):
        DDIMSampler(model).sample(3, 2, SHAPE, case.cond, **options)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"start": 0.5, "end": 0.5}, "start < end"),
        ({"end": 1.1}, "found 0.0 and 1.1"),
        ({"scales": [1.0, float("inf")]}, "finite"),
        ({"hint": torch.zeros(3, 64, 64)}, r"\(B, C, H, W\)"),
    ],
)
def test_mistakes_in_a_control_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        Control(**{"hint": torch.zeros(1, 3, 64, 64), **options})


@torch.no_grad()
def test_hints_that_do_not_fit_are_named():
    model, case = small("sd1"), Case()
    with pytest.raises(ValueError, match="takes hints of 3 channels, found 4"):
        model.make_guidance(case.cond, None, 1.0, [Control(torch.zeros(1, 4, 64, 64))])(case.x, case.t)
    with pytest.raises(ValueError, match="3 hints for 2 pictures"):
        model.make_guidance(case.cond, None, 1.0, [Control(torch.zeros(3, 3, 64, 64))])
