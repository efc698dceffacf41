"""Every value of the two small parity cases: networks, autoencoder, losses, gradients, an optimizer step, all samplers."""

import json

import numpy as np
import pytest
import torch

from cldm.ddim_hacked import DDIMSampler
from ldm.models.diffusion import ddim as base
from ldm.models.diffusion.plms import PLMSSampler
from tests.cldm.tiny import CASES, GUESS_SCALES, NAMES, Inputs, tiny_model
from tests.parity import fill_, relative_error

BAR = 1e-4
AFTER_ADAM = 2e-3


@pytest.fixture(scope="module", params=NAMES)
def case(request):
    return request.param, tiny_model(request.param), Inputs(request.param)


def check(case, name, got, bar=BAR):
    assert relative_error(got, CASES[f"{case[0]}/{name}"]) < bar, name


def seeded_sampler(model, cls=DDIMSampler):
    torch.manual_seed(11)
    return cls(model)


def test_keys_and_schedule(case):
    name, model, _ = case
    want = json.loads(str(CASES[f"{name}/keys"]))
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == {k: list(v) for k, v in dict(want).items()}
    for quantity in ("betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_recipm1_alphas_cumprod", "posterior_variance",
                     "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2", "lvlb_weights"):  # fmt: skip
        check(case, quantity, getattr(model, quantity), 1e-5)


def test_control_outputs(case):
    _, model, inputs = case
    with torch.no_grad():
        outputs = model.control_model(
            x=inputs.x, hint=inputs.hint, timesteps=inputs.t, context=inputs.cond["c_crossattn"][0]
        )
    assert len(outputs) == 13
    for i, out in enumerate(outputs):
        check(case, f"control{i:02d}", out)


@torch.no_grad()
def test_apply_model(case):
    _, model, inputs = case
    check(case, "eps_control", model.apply_model(inputs.x, inputs.t, inputs.cond))
    check(case, "eps_plain", model.apply_model(inputs.x, inputs.t, {**inputs.cond, "c_concat": None}))
    model.only_mid_control = True
    check(case, "eps_mid", model.apply_model(inputs.x, inputs.t, inputs.cond))
    model.only_mid_control = False
    model.control_scales = GUESS_SCALES
    check(case, "eps_scaled", model.apply_model(inputs.x, inputs.t, inputs.cond))
    model.control_scales = [1.0] * 13


@torch.no_grad()
def test_autoencoder_and_forward_process(case):
    _, model, inputs = case
    posterior = model.encode_first_stage(inputs.image)
    check(case, "vae_mean", posterior.mean)
    check(case, "vae_logvar", posterior.logvar)
    check(case, "vae_decode", model.decode_first_stage(inputs.x))
    check(case, "q_sample", model.q_sample(inputs.x, inputs.t, inputs.n))


@pytest.mark.parametrize("locked", [True, False], ids=["locked", "unlocked"])
def test_loss_gradients_and_a_step(case, locked):
    name, model, inputs = case
    suffix = "locked" if locked else "unlocked"
    model.sd_locked = locked
    model.learning_rate = 1e-3
    model.train()
    optimizer = model.configure_optimizers()
    loss = model.p_losses(inputs.x, inputs.cond, inputs.t, noise=inputs.n)[0]
    check(case, f"loss_{suffix}", loss)
    loss.backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    names = json.loads(str(CASES[f"{name}/trained_{suffix}"]))
    assert sorted(trained) == names
    assert all(p.grad is None for n, p in model.named_parameters() if n not in trained)
    # Where a gradient is zero by symmetry, only rounding is left of it; hence the absolute bar beside the relative one.
    got, want = np.array([float(trained[n].grad.norm()) for n in names]), CASES[f"{name}/gradnorm_{suffix}"]
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-6 * want.max())
    optimizer.step()
    model.eval()
    with torch.no_grad():
        check(case, f"eps_after_step_{suffix}", model.apply_model(inputs.x, inputs.t, inputs.cond), AFTER_ADAM)
    optimizer.zero_grad()
    model.sd_locked = True
    fill_(model)


def test_ddim(case):
    _, model, inputs = case
    shape, n = inputs.shape, inputs.batch
    guided = {"x_T": inputs.x_T, "verbose": False, "unconditional_conditioning": inputs.uncond}
    check(
        case,
        "ddim",
        seeded_sampler(model).sample(7, n, shape, inputs.cond, unconditional_guidance_scale=3.0, **guided)[0],
    )
    check(case, "ddim_nocfg", seeded_sampler(model).sample(5, n, shape, inputs.cond, x_T=inputs.x_T, verbose=False)[0])
    check(case, "ddim_eta", seeded_sampler(model).sample(
        5, n, shape, inputs.cond, eta=0.6, unconditional_guidance_scale=2.0, **guided)[0])  # fmt: skip
    check(case, "ddim_inpaint", seeded_sampler(model).sample(
        5, n, shape, inputs.cond, x0=inputs.x0, mask=inputs.mask, unconditional_guidance_scale=2.0, **guided)[0])  # fmt: skip
    model.control_scales = GUESS_SCALES
    guided["unconditional_conditioning"] = {**inputs.uncond, "c_concat": None}
    check(
        case,
        "ddim_guess",
        seeded_sampler(model).sample(5, n, shape, inputs.cond, unconditional_guidance_scale=2.0, **guided)[0],
    )
    model.control_scales = [1.0] * 13


def test_base_sampler_batches_the_halves_with_the_same_numbers(case):
    _, model, inputs = case
    calls = []
    original = model.apply_model
    model.apply_model = lambda x, t, c: calls.append(len(x)) or original(x, t, c)
    try:
        got = seeded_sampler(model, base.DDIMSampler).sample(
            ddim_steps=7, batch_size=inputs.batch, shape=inputs.shape, conditioning=inputs.cond, x_T=inputs.x_T, verbose=False,
            unconditional_guidance_scale=3.0, unconditional_conditioning=inputs.uncond,
        )[0]  # fmt: skip
    finally:
        del model.apply_model
    check(case, "ddim", got)
    assert calls == [2 * inputs.batch] * 8


def test_ddim_inversion_and_image_to_image(case):
    _, model, inputs = case
    sampler = seeded_sampler(model)
    sampler.make_schedule(10, verbose=False)
    check(case, "ddim_encode", sampler.encode(inputs.x, inputs.cond, 6, verbose=False)[0])
    noised = sampler.stochastic_encode(inputs.x, torch.tensor([4] * inputs.batch), noise=inputs.n)
    check(case, "ddim_stochastic_encode", noised)
    decoded = sampler.decode(
        noised,
        inputs.cond,
        4,
        unconditional_guidance_scale=2.0,
        unconditional_conditioning=inputs.uncond,
        verbose=False,
    )
    check(case, "ddim_decode", decoded)


def test_schedules_of_many_lengths(case):
    name, model, _ = case
    for key in CASES.files:
        if key.startswith(f"{name}/timesteps_"):
            steps = int(key.rsplit("_", 1)[1])
            sampler = DDIMSampler(model)
            sampler.make_schedule(steps, ddim_eta=0.3, verbose=False)
            np.testing.assert_array_equal(sampler.ddim_timesteps, CASES[key])
            np.testing.assert_allclose(
                sampler.ddim_sigmas.numpy(), CASES[f"{name}/sigmas_{steps}"], rtol=1e-5, atol=1e-7
            )


def test_plms():
    model, inputs = tiny_model("sd1"), Inputs("sd1")
    torch.manual_seed(11)
    got, _ = PLMSSampler(model).sample(8, inputs.batch, inputs.shape, inputs.cond, x_T=inputs.x_T, verbose=False)
    assert relative_error(got, CASES["sd1/plms"]) < BAR
