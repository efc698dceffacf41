"""The mathematics of diffusion: schedules, conversions, and samplers against a predictor that is exact."""

import numpy as np
import pytest
import torch

from cldm.ddim_hacked import DDIMSampler as HackedSampler
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.ddpm import DDPM
from ldm.models.diffusion.dpm_solver import DPMSolverSampler
from ldm.models.diffusion.plms import PLMSSampler
from ldm.models.diffusion.schedule import make_beta_schedule, make_ddim_timesteps

UNET = {
    "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
    "params": dict(in_channels=4, out_channels=4, model_channels=32, num_res_blocks=1, attention_resolutions=[2],
                   channel_mult=[1, 1], num_heads=2),
}  # fmt: skip


def diffusion(parameterization: str = "eps", **params) -> DDPM:
    return DDPM(UNET, linear_start=0.00085, linear_end=0.012, use_ema=False, channels=4, image_size=8,
                parameterization=parameterization, **params)  # fmt: skip


class Exact:
    """A model whose data set is one latent: every prediction follows from x_t exactly."""

    def __init__(self, parameterization: str, x0: torch.Tensor) -> None:
        process = diffusion(parameterization)
        self.process, self.x0, self.parameterization = process, x0, parameterization
        self.num_timesteps, self.betas = process.num_timesteps, process.betas
        self.alphas_cumprod, self.alphas_cumprod_prev = process.alphas_cumprod, process.alphas_cumprod_prev

    def apply_model(self, x, t, cond):
        log_alphas = self.alphas_cumprod.double().log().numpy()
        alpha = float(np.exp(np.interp(float(t[0]), np.arange(self.num_timesteps), log_alphas)))
        eps = (x - alpha**0.5 * self.x0) / (1 - alpha) ** 0.5
        v = alpha**0.5 * eps - (1 - alpha) ** 0.5 * self.x0
        return {"eps": eps, "v": v, "x0": self.x0}[self.parameterization]


class Linear(Exact):
    """A noise predictor that does not depend on x, under which inversion and sampling are exact inverses."""

    def apply_model(self, x, t, cond):
        if self.parameterization == "eps":
            return self.x0 * (1 + t[0] / 1000)
        eps = self.x0 * (1 + t[0] / 1000)
        x_start = self.process.predict_start_from_noise(x, t, eps)
        return self.process.get_v(x_start, eps, t)


@pytest.mark.parametrize("parameterization", ["eps", "v", "x0"])
@pytest.mark.parametrize("sampler", [DDIMSampler, HackedSampler, PLMSSampler, DPMSolverSampler])
def test_samplers_recover_x0_from_an_exact_predictor(sampler, parameterization):
    x0 = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    out, kept = sampler(Exact(parameterization, x0)).sample(ddim_steps=10, batch_size=2, shape=(4, 8, 8), verbose=False)
    # The last step lands on the first alpha-bar, whose noise level is 0.03.
    assert float((out - x0).abs().max()) < 0.15
    torch.testing.assert_close(kept["pred_x0"][-1], x0, atol=1e-4, rtol=0)


class Curved(Exact):
    """A model whose output is no simple function of x and t."""

    def apply_model(self, x, t, cond):
        return torch.tanh(0.7 * x + self.x0) * (0.5 + t.view(-1, 1, 1, 1) / 1000)


@pytest.mark.parametrize("parameterization", ["eps", "v", "x0"])
@pytest.mark.parametrize("steps", [1, 9, 27])  # divisors of 999: elsewhere diffusers rounds the timesteps
def test_dpm_solver_equals_that_of_diffusers(steps, parameterization):
    from diffusers import DPMSolverMultistepScheduler

    x0, noise = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(4))
    model = Curved(parameterization, x0)
    got, _ = DPMSolverSampler(model).sample(steps, 2, (4, 8, 8), x_T=noise, verbose=False)
    prediction = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}[parameterization]
    theirs = DPMSolverMultistepScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction,
        timestep_spacing="linspace", final_sigmas_type="sigma_min",
    )  # fmt: skip
    theirs.set_timesteps(steps)
    x = noise
    for t in theirs.timesteps:
        x = theirs.step(model.apply_model(x, t.expand(2), None), t, x).prev_sample
    torch.testing.assert_close(got, x, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(
    "steps", [1, 2, 4, 20, 50]
)  # eps alone: diffusers extrapolates what the network predicts, here it is eps
def test_plms_equals_that_of_diffusers(steps):
    from diffusers import PNDMScheduler

    x0, noise = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(4))
    model = Curved("eps", x0)
    got, _ = PLMSSampler(model).sample(steps, 2, (4, 8, 8), x_T=noise, verbose=False)
    theirs = PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
    )
    theirs.set_timesteps(steps)
    x = noise
    for t in theirs.timesteps:
        x = theirs.step(model.apply_model(x, t.expand(2), None), t, x).prev_sample
    torch.testing.assert_close(got, x, atol=1e-4, rtol=1e-4)


def test_dpm_solver_is_of_second_order_also_between_timesteps():
    class Gaussian(Exact):
        """Data of standard deviation 2, for which the probability-flow equation has a known solution."""

        def alpha(self, t):
            log_alphas = self.alphas_cumprod.double().log().numpy()
            return float(np.exp(np.interp(float(t), np.arange(self.num_timesteps), log_alphas)))

        def apply_model(self, x, t, cond):
            alpha = self.alpha(t[0])
            return x * (1 - alpha) ** 0.5 / (4 * alpha + 1 - alpha)

    model = Gaussian("eps", torch.zeros(1))
    model.alphas_cumprod = model.alphas_cumprod.double()
    noise = torch.full((1, 4, 8, 8), 1.0, dtype=torch.float64)
    first, last = (4 * a + 1 - a for a in (model.alpha(0), model.alpha(999)))
    want = (first / last) ** 0.5
    errors = [
        abs(float(DPMSolverSampler(model).sample(steps, 1, (4, 8, 8), x_T=noise, verbose=False)[0].mean()) - want)
        for steps in (80, 160, 320)
    ]
    assert errors[0] < 0.005 and errors[0] / errors[1] > 3 and errors[1] / errors[2] > 3
    plain = DDIMSampler(model).sample(160, 1, (4, 8, 8), x_T=noise, verbose=False)[0].mean()
    assert errors[1] < abs(float(plain) - want) / 5


@pytest.mark.parametrize("sampler", [DDIMSampler, PLMSSampler, DPMSolverSampler])
def test_what_a_mask_keeps_and_where_image_to_image_starts(sampler):
    model = Exact("eps", torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5)))
    kept, mask = torch.randn(2, 4, 8, 8), torch.zeros(2, 1, 8, 8)
    mask[..., :4] = 1
    seen = []
    model_output = model.apply_model
    model.apply_model = lambda x, t, c: seen.append((x, float(t[0]))) or model_output(x, t, c)
    sampler(model).sample(8, 2, (4, 8, 8), mask=mask, x0=kept, verbose=False)
    x, t = seen[-1]
    noise = (1 - float(np.interp(t, np.arange(1000), model.alphas_cumprod.numpy()))) ** 0.5
    assert float((x - kept)[..., :4].std()) < 1.3 * noise < 0.5 < float((x - kept)[..., 4:].std())
    image_to_image = sampler(model)
    image_to_image.make_schedule(10, verbose=False)
    noised = image_to_image.stochastic_encode(model.x0, torch.tensor([4, 4]))
    seen.clear()
    out = image_to_image.decode(noised, None, 5, verbose=False)
    assert seen[0][1] == pytest.approx(float(image_to_image.ddim_timesteps[4])) and seen[0][0] is noised
    assert float((out - model.x0).abs().max()) < 0.15


@pytest.mark.parametrize("sampler", [DDIMSampler, PLMSSampler, DPMSolverSampler])
def test_corrected_scores_and_quantised_latents(sampler):
    class Corrector:
        def modify_score(self, model, eps, x, t, c, factor):
            return eps * factor

    class FirstStage:
        def quantize(self, x0):
            return x0.round(), None, None

    model = Exact("eps", torch.full((1, 4, 8, 8), 0.7))
    model.first_stage_model = FirstStage()
    plain = {"S": 4, "batch_size": 1, "shape": (4, 8, 8), "x_T": torch.ones(1, 4, 8, 8), "verbose": False}
    corrected, _ = sampler(model).sample(**plain, score_corrector=Corrector(), corrector_kwargs={"factor": 1.5})
    model.apply_model = lambda x, t, c, exact=model.apply_model: 1.5 * exact(x, t, c)
    torch.testing.assert_close(corrected, sampler(model).sample(**plain)[0])
    _, kept = sampler(Exact("x0", model.x0)).sample(**plain)
    assert float(kept["pred_x0"][-1].mean()) == pytest.approx(0.7, abs=1e-5)
    model = Exact("x0", model.x0)
    model.first_stage_model = FirstStage()
    _, kept = sampler(model).sample(**plain, quantize_x0=True)
    assert torch.equal(kept["pred_x0"][-1], kept["pred_x0"][-1].round())
    with pytest.raises(ValueError, match="predicts x0"):
        sampler(model).sample(**plain, score_corrector=Corrector())
    with pytest.raises(NotImplementedError, match="dynamic"):
        sampler(model).sample(**plain, dynamic_threshold=0.9)


class Halving(DDIMSampler):
    """A user's sampler, with a step of its own under the published name."""

    def p_sample_ddim(self, x, c, t, index, **options):
        x, pred_x0 = super().p_sample_ddim(x, c, t, index=index, **options)
        return x / 2, pred_x0


def test_a_users_own_step_is_taken():
    run = {"S": 4, "batch_size": 1, "shape": (4, 8, 8), "x_T": torch.ones(1, 4, 8, 8), "verbose": False}
    model = Linear("eps", torch.zeros(1, 4, 8, 8))  # every step scales x alone
    got, want = (cls(model).sample(**run)[0] for cls in (Halving, DDIMSampler))
    torch.testing.assert_close(got, want / 16)


@pytest.mark.parametrize("parameterization", ["eps", "v"])
def test_inversion_then_sampling_returns_the_start(parameterization):
    model = Linear(parameterization, torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2)))
    sampler = DDIMSampler(model)
    sampler.make_schedule(20, verbose=False)
    start = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    noised, kept = sampler.encode(start, None, 15, return_intermediates=3, verbose=False)
    assert not torch.allclose(noised, start, atol=0.1) and kept["intermediates"]
    torch.testing.assert_close(sampler.decode(noised, None, 15, verbose=False), start, atol=1e-4, rtol=1e-4)


def test_the_public_sampler_inverts_v_models_as_published_and_truly_when_asked():
    model = Linear("v", torch.randn(1, 4, 8, 8))
    start = torch.randn(1, 4, 8, 8)
    sampler = HackedSampler(model)
    sampler.make_schedule(20, verbose=False)
    published = sampler.encode(start, None, 10, verbose=False)[0]
    true = sampler.encode(start, None, 10, verbose=False, output_is_eps=False)[0]
    assert not torch.allclose(published, true, atol=1e-3)
    torch.testing.assert_close(sampler.decode(true, None, 10, verbose=False), start, atol=1e-4, rtol=1e-4)


def test_guidance_also_in_inversion_of_dict_conditionings():
    class Conditioned(Exact):
        def apply_model(self, x, t, cond):
            return cond["c_crossattn"][0][:, :1, :1, None].expand_as(x)

    model = Conditioned("eps", torch.zeros(1))
    sampler = DDIMSampler(model)
    sampler.make_schedule(5, verbose=False)
    cond, uncond = ({"c_crossattn": [torch.full((2, 1, 1), v)], "c_concat": None} for v in (1.0, 0.25))
    guided = sampler.guidance_for(cond, uncond, 3.0)(torch.zeros(2, 4, 8, 8), torch.tensor([1, 1]))
    torch.testing.assert_close(guided, torch.full_like(guided, 0.25 + 3 * 0.75))
    start = torch.randn(2, 4, 8, 8)
    found, _ = sampler.encode(
        start, cond, 3, unconditional_guidance_scale=3.0, unconditional_conditioning=uncond, verbose=False
    )
    # DDIM with a constant eps is one step from the first alpha-bar to the last.
    first, last = sampler.ddim_alphas_prev[0], sampler.ddim_alphas[2]
    want = (last / first).sqrt() * (start - (1 - first).sqrt() * 2.5) + (1 - last).sqrt() * 2.5
    torch.testing.assert_close(found, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("count, kept", [(3, [0, 2, 4, 5]), (1, [0, 4, 5])])
def test_what_inversion_keeps_on_its_way(count, kept):
    sampler = DDIMSampler(Exact("eps", torch.zeros(1, 4, 8, 8)))
    sampler.make_schedule(10, verbose=False)
    noised, out = sampler.encode(torch.zeros(1, 4, 8, 8), None, 6, return_intermediates=count, verbose=False)
    assert out["intermediate_steps"] == kept and out["intermediates"][-1] is noised


def test_v_eps_and_x0_convert_into_each_other():
    process = diffusion("v")
    x0, eps = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8)
    t = torch.tensor([0, 400, 999])
    x_t, v = process.q_sample(x0, t, eps), process.get_v(x0, eps, t)
    torch.testing.assert_close(process.predict_start_from_z_and_v(x_t, t, v), x0, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(process.predict_eps_from_z_and_v(x_t, t, v), eps, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(process.predict_start_from_noise(x_t, t, eps), x0, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(process.predict_noise_from_start(x_t, t, x0)[1:], eps[1:], atol=1e-3, rtol=1e-3)


def test_schedules_follow_their_definitions():
    linear = make_beta_schedule("linear", 1000, 0.00085, 0.012)
    np.testing.assert_allclose(np.sqrt(linear), np.linspace(0.00085**0.5, 0.012**0.5, 1000))
    cosine = np.cumprod(1 - make_beta_schedule("cosine", 1000))
    s = 0.008
    f = np.cos((np.arange(1, 1001) / 1000 + s) / (1 + s) * np.pi / 2) ** 2 / np.cos(s / (1 + s) * np.pi / 2) ** 2
    np.testing.assert_allclose(cosine[:990], f[:990], rtol=1e-6)
    with pytest.raises(ValueError, match="square"):
        make_beta_schedule("square", 10)


def test_every_number_of_steps_works_and_stays_in_range():
    for steps in range(1, 1001):
        chosen = make_ddim_timesteps("uniform", steps, 1000)
        assert chosen[0] >= 1 and chosen[-1] <= 999 and (np.diff(chosen) > 0).all()
        if 1000 // steps * (999 // (1000 // steps)) + 1 <= 999:  # where the public rule works, it is kept
            np.testing.assert_array_equal(chosen, np.arange(0, 1000, 1000 // steps) + 1)
    assert len(make_ddim_timesteps("uniform", 7, 1000)) == 8 and len(make_ddim_timesteps("uniform", 30, 1000)) == 31
    for wrong in (0, 1001):
        with pytest.raises(ValueError, match="1 to 1000"):
            make_ddim_timesteps("uniform", wrong, 1000)


def test_sampler_mistakes_are_named():
    sampler = DDIMSampler(Exact("eps", torch.zeros(1)))
    with pytest.raises(TypeError, match="once"):
        sampler.sample(5, 1, (4, 8, 8), ddim_steps=5)
    with pytest.raises(ValueError, match="x_T has shape"):
        sampler.sample(5, 1, (4, 8, 8), x_T=torch.zeros(1, 4, 8, 9), verbose=False)
    with pytest.raises(ValueError, match="3 entries for a batch of 1"):
        sampler.sample(5, 1, (4, 8, 8), torch.zeros(3, 7, 2), verbose=False)
    for wrong in ({"eta": -1.0}, {"log_every_t": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            sampler.sample(5, 1, (4, 8, 8), verbose=False, **wrong)
    with pytest.raises(ValueError, match="ucg_schedule"):
        sampler.sample(5, 1, (4, 8, 8), ucg_schedule=[1.0], verbose=False)
    with pytest.raises(ValueError, match="eta must be 0"):
        PLMSSampler(Exact("eps", torch.zeros(1))).sample(5, 1, (4, 8, 8), eta=0.5, verbose=False)
    solver = DPMSolverSampler(Exact("eps", torch.zeros(1)))
    for wrong, message in (({"eta": 0.5}, "eta must be 0"), ({"S": 0}, "1 to 999"), ({"S": 1000}, "1 to 999")):
        with pytest.raises(ValueError, match=message):
            solver.sample(**{"S": 5, "batch_size": 1, "shape": (4, 8, 8), "verbose": False, **wrong})
    solver.make_schedule(5)
    with pytest.raises(ValueError, match="use_original_steps"):
        solver.decode(torch.zeros(1, 4, 8, 8), None, 3, use_original_steps=True, verbose=False)


def test_losses_by_parameterization_and_variational_weight():
    x0, eps, t = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.tensor([3, 700])
    for parameterization in ("eps", "x0", "v"):
        process = diffusion(parameterization, original_elbo_weight=0.5).eval()
        output = process.apply_model(process.q_sample(x0, t, eps), t)
        error = (output - process.loss_target(x0, eps, t)).pow(2).mean(dim=(1, 2, 3))
        loss, terms = process.p_losses(x0, t, eps)
        torch.testing.assert_close(loss, error.mean() + 0.5 * (process.lvlb_weights[t] * error).mean())
        assert set(terms) == {"val/loss_simple", "val/loss_vlb", "val/loss"}


def test_ancestral_sampling_with_an_exact_predictor_ends_near_x0():
    process = diffusion("x0", timesteps=50)
    x0 = torch.rand(2, 4, 8, 8) - 0.5
    process.apply_model = lambda x, t, cond=None: x0
    out = process.p_sample_loop((2, 4, 8, 8), verbose=False)
    torch.testing.assert_close(out, x0, atol=1e-5, rtol=0)
