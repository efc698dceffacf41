"""Schedulers of diffusers as samplers: whole runs against loops written for diffusers, with the same network and noise."""

import inspect
import logging

import pytest
import torch

from ldm.models.diffusion.noise import picture_generators
from ldm.models.diffusion.process import DiffusionProcess
from ldm.models.diffusion.samplers import SAMPLER_NAMES, make_sampler
from ldm.models.diffusion.schedulers import PREDICTION_TYPES, SCHEDULERS, scheduler_settings
from ldm.util import ConfigError

diffusers = pytest.importorskip("diffusers")
SHAPE = (4, 8, 8)


class Curved(DiffusionProcess):
    """A model whose output is no simple function of x and t."""

    def __init__(self, parameterization: str) -> None:
        super().__init__(linear_start=0.00085, linear_end=0.012, parameterization=parameterization)
        self.pattern = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(4))
        self.seen = []

    def apply_model(self, x, t, cond):
        self.seen.append(float(t[0]))
        return torch.tanh(0.7 * x + self.pattern) * (0.5 + t.view(-1, 1, 1, 1) / 1000)


def made(cls, **settings):
    """A scheduler with those of the settings that it has."""
    return cls(**{key: value for key, value in settings.items() if key in inspect.signature(cls.__init__).parameters})


def their_loop(scheduler, model, noise, steps, generator=None):
    """The loop of diffusers' pipelines."""
    scheduler.set_timesteps(steps)
    x = noise * scheduler.init_noise_sigma
    options = {"generator": generator} if "generator" in scheduler.step.__code__.co_varnames else {}
    for t in scheduler.timesteps:
        output = model.apply_model(scheduler.scale_model_input(x, t), t.expand(len(x)), None)
        x = scheduler.step(output, t, x, **options).prev_sample
    return x


@pytest.mark.parametrize("parameterization", PREDICTION_TYPES)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_run_equals_that_of_diffusers(name, parameterization):
    class_name, options = SCHEDULERS[name]
    model = Curved(parameterization)
    scheduler = made(
        getattr(diffusers, class_name),
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
        prediction_type=PREDICTION_TYPES[parameterization], **{"steps_offset": 1, "clip_sample": False} | options,
    )  # fmt: skip
    noise = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(5))
    try:
        want = their_loop(scheduler, model, noise, 6, picture_generators([1, 2], 2))
    except NotImplementedError:  # some of them have no models that predict x_0; the sampler gives them eps
        pytest.skip(f"{class_name} cannot take models that predict {parameterization}")
    theirs, model.seen = model.seen, []
    sampler = make_sampler(name, model)
    got, kept = sampler.sample(6, 2, SHAPE, x_T=noise, generators=picture_generators([1, 2], 2), verbose=False)
    assert model.seen == pytest.approx(theirs)
    torch.testing.assert_close(got, want, atol=2e-4, rtol=2e-4)
    again, _ = make_sampler(scheduler, model).sample(
        6, 2, SHAPE, x_T=noise, generators=picture_generators([1, 2], 2), verbose=False
    )
    torch.testing.assert_close(again, got, atol=2e-4, rtol=2e-4)


class Exact(DiffusionProcess):
    """A model whose data set is one latent."""

    def __init__(self, parameterization: str) -> None:
        super().__init__(linear_start=0.00085, linear_end=0.012, parameterization=parameterization)
        self.x0 = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(1))

    def apply_model(self, x, t, cond):
        # Schedulers interpolate between timesteps each in its own way: x itself tells the noise level best.
        return self.exact(x, float(self.level))

    def exact(self, x, alpha):
        eps = (x - alpha**0.5 * self.x0) / (1 - alpha) ** 0.5
        return {"eps": eps, "v": alpha**0.5 * eps - (1 - alpha) ** 0.5 * self.x0, "x0": self.x0.expand_as(x)}[
            self.parameterization
        ]


@pytest.mark.parametrize("parameterization", PREDICTION_TYPES)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_recovers_x0_for_every_kind_of_model(name, parameterization):
    model = Exact(parameterization)
    sampler = make_sampler(name, model)
    denoised = []
    original = sampler.step

    def step(x, at, denoiser):
        model.level = at.signal**2
        return original(x, at, denoiser)

    sampler.step = step
    out, _ = sampler.sample(
        8, 1, SHAPE, generators=picture_generators(3, 1), img_callback=lambda x0, i: denoised.append(x0), verbose=False
    )
    torch.testing.assert_close(denoised[-1], model.x0, atol=1e-3, rtol=0)
    assert float((out - model.x0).abs().max()) < 0.2


@pytest.mark.parametrize("name", ["euler", "unipc", "heun", "dpmpp_2m_karras"])
def test_masks_and_image_to_image(name):
    model = Exact("eps")
    sampler = make_sampler(name, model)
    original, seen = sampler.step, []

    def step(x, at, denoiser):
        model.level = at.signal**2
        seen.append((sampler.scheduler.scale_model_input(x, sampler._timestep(at.index)), at))
        return original(x, at, denoiser)

    sampler.step = step
    wanted, mask = torch.full((1, *SHAPE), 2.0), torch.zeros(1, 1, 8, 8)
    mask[..., :4] = 1
    sampler.sample(8, 2, SHAPE, mask=mask, x0=wanted, generators=picture_generators(3, 2), verbose=False)
    x, at = seen[-1]
    assert float((x - at.signal * wanted)[..., :4].std()) < 2 * at.noise_level < float((x - wanted)[..., 4:].std())
    seen.clear()
    out, _ = sampler.sample(
        10, 2, SHAPE, init_latents=model.x0, strength=0.5, generators=picture_generators(3, 2), verbose=False
    )
    x, at = seen[0]
    assert len(seen) in (5, 9)  # the last step of second order evaluates once
    assert float((x - at.signal * model.x0).std()) == pytest.approx(at.noise_level, rel=0.15)
    assert float((out - model.x0).abs().max()) < 0.2


def test_what_is_given_is_left_as_it_was_and_mistakes_are_named(caplog):
    model = Curved("eps")
    scheduler = diffusers.EulerDiscreteScheduler(**{k: v for k, v in scheduler_settings(model).items() if k in (
        "num_train_timesteps", "trained_betas", "prediction_type")})  # fmt: skip
    before = scheduler.timesteps.clone()
    with caplog.at_level(logging.WARNING):
        make_sampler(scheduler, model).sample(4, 1, SHAPE, verbose=False)
    assert torch.equal(scheduler.timesteps, before) and not caplog.records
    with caplog.at_level(logging.WARNING):
        make_sampler(diffusers.EulerDiscreteScheduler(), model)
    assert "noise schedule" in caplog.text
    make_sampler(diffusers.EulerDiscreteScheduler, model)
    with pytest.raises(ValueError, match="unknown sampler 'eular'; known are ddim, .*unipc"):
        make_sampler("eular", model)
    with pytest.raises(ConfigError, match="no scheduler"):
        make_sampler(diffusers.FlowMatchEulerDiscreteScheduler(), model)
    sampler = make_sampler("euler", model)
    for wrong, message in (
        ({"eta": 0.5}, "eta must be 0"),
        ({"quantize_x0": True}, "quantize_x0"),
        ({"S": 0}, "1 to 1000"),
    ):
        with pytest.raises(ValueError, match=message):
            sampler.sample(**{"S": 3, "batch_size": 1, "shape": SHAPE, "verbose": False, **wrong})
    assert len(set(SAMPLER_NAMES)) == len(SAMPLER_NAMES) >= 13
