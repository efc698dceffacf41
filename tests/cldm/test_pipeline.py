"""The pipeline: whatever is asked of it through its one call, and what is refused."""

import random
import threading
from functools import lru_cache

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import annotator
from cldm.ddim_hacked import DDIMSampler
from cldm.guidance import strength_scales
from cldm.hack import enable_sliced_attention, hack_everything
from cldm.pipeline import ControlPipeline
from cldm.prompts import DEFAULT_PROMPT
from cldm.results import read_settings
from ldm.models.diffusion.guidance import SeparateGuidance
from ldm.modules.attention import get_attention, sliced_attention
from ldm.modules.encoders.modules import FrozenCLIPEmbedder, set_default_options
from ldm.util import instantiate_from_config
from tests.cldm.tiny import GUESS_SCALES, Inputs, tiny_config, tiny_model
from tests.parity import fill_

SMALL_TEXT = {
    "target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder",
    "params": {"width": 48, "layers": 2, "heads": 4},
}


@lru_cache(maxsize=1)
def weights():
    return fill_(instantiate_from_config(tiny_config("sd1", cond_stage_config=SMALL_TEXT))).state_dict()


def small_model(control=None, target=None, **changes):
    """A filled model; `control` replaces parameters of the ControlNet, whose other weights stay."""
    config = tiny_config("sd1", cond_stage_config=SMALL_TEXT, **changes)
    config["params"]["control_stage_config"]["params"].update(control or {})
    with torch.device("meta"):
        model = instantiate_from_config({**config, "target": target or config["target"]})
    own = model.state_dict()
    fitting = {key: value.clone() for key, value in weights().items() if key in own and own[key].shape == value.shape}
    new = {key: torch.randn(value.shape) * 0.05 for key, value in own.items() if key not in fitting}
    model.load_state_dict(fitting | new, strict=True, assign=True)
    return model.to("cpu").eval()  # which tells Lightning that it is not on the meta device any more


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture
def two(model):
    """The model with a second ControlNet, for this test alone."""
    number = model.add_control()
    network = model.control_networks()[number]
    network.load_state_dict({key: value * 0.9 for key, value in model.control_model.state_dict().items()})
    yield model
    del model.more_control_models[number - 1]


def hint(seed=0, size=64):
    return np.random.default_rng(seed).integers(0, 255, (size, size, 3), dtype=np.uint8)


def far(a, b):
    return np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).max()


# -- random numbers, batches, settings ---------------------------------------------------------------------


def test_what_is_made_for_a_picture_is_its_own_too(model):
    """A seeded detector, a mask, and the windows of a long prompt."""
    pipeline, options = ControlPipeline(model), {"steps": 2, "guidance_scale": 3, "seed": 5}
    shuffled = pipeline(hint(), "a", num_samples=2, annotator="shuffle", **options)
    assert far(shuffled[1], pipeline(hint(), **shuffled.settings_of(1))[0]) <= 1
    masks = np.zeros((2, 64, 64), np.uint8)
    masks[0, :32] = masks[1, 32:] = 255
    painted = pipeline(None, "a", image=hint(1), mask=list(masks), annotator="inpaint", **options)
    alone = pipeline(None, image=hint(1), mask=masks[1], **painted.settings_of(1))
    assert far(painted[1], alone[0]) <= 1
    read = pipeline(hint(), ["a", "a bird, " * 60], long_prompts=True, **options)
    assert read.settings["long_prompts"] == 3
    assert far(read[0], pipeline(hint(), **read.settings_of(0))[0]) <= 1
    captioned = pipeline(hint(), lambda picture: "a bird, " * 60, long_prompts=True, **options)
    assert captioned.settings["long_prompts"] == 3
    with pytest.raises(IndexError):
        captioned.settings_of(1)
    one = pipeline(hint(), ["a"], num_samples=2, **options)
    assert one.settings_of(1)["prompt"] == "a" and one.settings_of(1)["seed"] == 6


def test_threads_that_share_a_model_wait_for_one_another(model):
    pipeline, made = ControlPipeline(model), {}

    def sample(clip_skip):
        for _ in range(3):
            made[clip_skip] = pipeline(hint(), "a", steps=1, seed=1, clip_skip=clip_skip)

    threads = [threading.Thread(target=sample, args=(clip_skip,)) for clip_skip in (None, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for clip_skip, pictures in made.items():
        assert far(pictures, pipeline(hint(), "a", steps=1, seed=1, clip_skip=clip_skip)) == 0
    assert len(made) == 2 and model.cond_stage_model.prompt_options is None


def test_modes_of_parts_and_the_default_dtype_do_not_matter(model):
    pipeline = ControlPipeline(model)
    want = pipeline(hint(), "a", steps=1, seed=1)
    model.train()
    model.model.eval()
    torch.set_default_dtype(torch.float64)
    try:
        assert far(pipeline(hint(), "a", steps=1, seed=1), want) == 0
    finally:
        torch.set_default_dtype(torch.float32)
        assert model.training and model.control_model.training and not model.model.training
        model.eval()


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"steps": 2.0}, "steps must be a whole number"),
        ({"num_samples": 2.0}, "num_samples must be a whole number"),
        ({"scales": 1.0}, "scales must be a list"),
        ({"scales": []}, "scales must be a list"),
        ({"clip_skip": "2"}, "clip_skip must be a whole number"),
        ({"long_prompts": "x"}, "windows must be a whole number"),
        ({"strength": None}, "must be numbers, found None"),
        ({"seed": {1: 2}}, "seed must be a whole number"),
        ({"seed": True}, "seed must be a whole number"),
        ({"x_T": np.zeros(3)}, "x_T must be a tensor"),
        ({"resolution_weights": [True]}, "True or False"),
        ({"guess_mode": "no"}, "True or False"),
        ({"negative_prompt": print}, "negative_prompt must be a text"),
        ({"prompt": None}, "prompt must be a text"),
        ({"prompt": "red \ud800"}, "no text, at position 4"),
        ({"hint": np.ones((64, 64), bool)}, "found bool"),
        ({"hint": np.ones((64, 64), np.uint16)}, "found uint16"),
        ({"image": hint(), "mask": -np.ones((64, 64))}, r"a mask must lie in \[0, 1\]"),
    ],
)
def test_values_of_a_wrong_kind_are_named(model, given, match):
    with pytest.raises(ValueError, match=match):
        ControlPipeline(model)(**{"hint": hint(), "prompt": "a", "steps": 1} | given)


def test_a_picture_depends_on_its_own_seed_and_nothing_else_is_changed(model):
    model.train()
    scales, pipeline = model.control_scales, ControlPipeline(model)
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    batch = pipeline([hint(0), hint(1)], ["a", "b"], steps=2, seed=5, eta=1.0)
    alone = [pipeline(hint(i), prompt, steps=2, seed=5 + i, eta=1.0)[0] for i, prompt in enumerate("ab")]
    other_order = pipeline([hint(1), hint(0)], ["b", "a"], steps=2, seed=[6, 5], eta=1.0)
    assert batch.shape == (2, 64, 64, 3) and batch.dtype == np.uint8
    assert far(batch, alone) <= 1 and far(batch, other_order[::-1]) <= 1 and far(batch[0], batch[1]) > 50
    assert far(batch, pipeline([hint(0), hint(1)], ["a", "b"], steps=2, seed=5, eta=1.0)) == 0
    drawn = pipeline(hint(), "a", steps=1), pipeline(hint(), "a", steps=1)
    assert far(*drawn) > 10 and drawn[0].settings["seed"] != drawn[1].settings["seed"]
    assert torch.equal(states[0], torch.get_rng_state()) and random.getstate() == states[2]
    assert np.array_equal(states[1], np.random.get_state()[1])
    assert model.training and model.control_scales is scales
    model.eval()


def test_a_saved_picture_is_made_again_from_its_settings(model, tmp_path):
    pipeline = ControlPipeline(model)
    made = pipeline(
        hint(),
        ["a (b:1.3)", "c"],
        steps=3,
        seed=8,
        strength=0.7,
        guess_mode=True,
        end=0.7,
        guidance_scale=2.0,
        sampler="plms",
    )
    files = made.save(tmp_path / "out.png")
    again = ControlPipeline(model)(hint(), **read_settings(files[1]))
    assert far(again[0], Image.open(files[1])) <= 1
    assert made.inputs.keys() == {"hint"} and made.inputs == again.inputs


def test_a_hint_and_a_prompt_are_encoded_once(model):
    hints, texts = [], []
    hooks = [
        model.control_model.input_hint_block.register_forward_pre_hook(lambda _m, inputs: hints.append(len(inputs[0]))),
        model.cond_stage_model.transformer.text_model.embeddings.register_forward_pre_hook(
            lambda _m, inputs: texts.append(len(inputs[0]))
        ),
    ]
    ControlPipeline(model)(hint(), "a", num_samples=3, steps=3, seed=0)
    for hook in hooks:
        hook.remove()
    assert hints == [1] and texts == [2]  # one hint for all; the prompt and the empty negative one


# -- hints and sizes ----------------------------------------------------------------------------------------


def test_every_form_of_hint(model):
    settings = {"prompt": "a", "steps": 1, "seed": 0, "guidance_scale": 1.0}
    pipeline, grey = ControlPipeline(model), hint()[:, :, 0]
    want = pipeline(np.dstack([grey] * 3), **settings)
    forms = [grey, Image.fromarray(grey), np.dstack([grey] * 3 + [np.full_like(grey, 255)]), grey / 255.0,
             torch.from_numpy(np.stack([grey] * 3)) / 255]  # fmt: skip
    for form in forms:
        assert far(pipeline(form, **settings), want) <= 1
    with_hole = np.dstack([hint(), np.full((64, 64), 255, np.uint8)])
    with_hole[10:40, 10:40, 3] = 0
    hole = annotator.load("inpaint").make_hint(with_hole, resolution=None)
    assert float(hole.hint.min()) == -1 and pipeline(hole, **settings).inputs["hint"] != want.inputs["hint"]


@pytest.mark.parametrize("channels", [1, 4, 6])
def test_hints_with_other_channel_counts(channels):
    own = small_model({"hint_channels": channels})
    picture = np.random.default_rng(0).random((64, 64, channels), dtype=np.float32)
    assert ControlPipeline(own)(picture, "a", steps=1, seed=0).shape == (1, 64, 64, 3)
    with pytest.raises(ValueError, match=f"must have {channels} channels, found 2"):
        ControlPipeline(own)(picture[:, :, :1].repeat(2, axis=2), "a", steps=1)


@pytest.mark.parametrize("size", [(64, 64), (72, 200), (8, 130), (640, 1000)])
def test_any_height_and_width(size):
    # At the largest size attention over all positions would take a minute; it is the same code at every size.
    changes = {"attention_resolutions": [4]} if size[0] > 500 else {}
    config = tiny_config("sd1", cond_stage_config=SMALL_TEXT)["params"]
    unet, control = (config[f"{name}_config"] for name in ("unet", "control_stage"))
    configs = {
        f"{n}_config": {**c, "params": {**c["params"], **changes}}
        for n, c in (("unet", unet), ("control_stage", control))
    }
    pipeline = ControlPipeline(small_model(**configs), vae_tiles=size[0] > 500)
    height, width = size
    whole = np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8)
    made = pipeline(whole, "a", steps=1, seed=0, guidance_scale=1.0)
    assert made.shape == (1, height, width, 3) and made.settings["size"] == [height, width]
    if size == (72, 200):  # as if padded by hand, and cut
        padded = np.pad(whole, ((0, 56), (0, 56), (0, 0)), mode="edge")
        assert far(pipeline(padded, "a", steps=1, seed=0, guidance_scale=1.0)[:, :72, :200], made) == 0


def test_hints_are_fitted_to_the_size_that_is_asked_for(model):
    made = ControlPipeline(model)(hint(size=100), "a", size=(64, 128), steps=1, seed=0)
    assert made.shape == (1, 64, 128, 3)
    own = small_model(image_size=[8, 16])
    assert ControlPipeline(own)(None, "a", steps=1, seed=0).shape == (1, 64, 128, 3)  # nothing says, so the model's own


# -- control --------------------------------------------------------------------------------------------------


def controls_of(model, monkeypatch, *args, **options):
    """The controls that the pipeline hands to the model."""
    seen = []
    make = model.make_guidance
    with monkeypatch.context() as patch:
        patch.setattr(model, "make_guidance", lambda *rest: seen.append(rest[3]) or make(*rest))
        ControlPipeline(model)(*args, "a", steps=1, seed=0, **options)
    return seen[0]


def test_what_a_control_is_told(model, monkeypatch):
    (plain,) = controls_of(model, monkeypatch, hint(), strength=0.7, start=0.2, end=0.9)
    assert (plain.scales, plain.start, plain.end, plain.conditional_only) == ([0.7] * 13, 0.2, 0.9, False)
    (guess,) = controls_of(model, monkeypatch, hint(), guess_mode=True)
    assert guess.conditional_only and guess.scales == pytest.approx(GUESS_SCALES)
    (flat,) = controls_of(model, monkeypatch, hint(), conditional_only=True, scales=[i / 12 for i in range(13)])
    assert flat.conditional_only and flat.scales == pytest.approx([i / 12 for i in range(13)])
    (paper,) = controls_of(model, monkeypatch, hint(), resolution_weights=True)
    assert paper.conditional_only and paper.resolution_weights
    assert controls_of(model, monkeypatch, None, size=(64, 64)) == []
    monkeypatch.setattr(model, "global_average_pooling", True)  # shuffle steers the conditional half alone
    (pooled,) = controls_of(model, monkeypatch, hint())
    assert (
        pooled.conditional_only
        and not controls_of(model, monkeypatch, hint(), conditional_only=False)[0].conditional_only
    )


def test_several_controls_have_their_own_hints_and_strengths(two, monkeypatch):
    pipeline, settings = ControlPipeline(two), {"prompt": "a", "steps": 2, "seed": 0, "guidance_scale": 2.0}
    both = pipeline([hint(0), hint(1, 128)], size=(64, 64), **settings, strength=[1.0, 0.5], end=[1.0, 0.6])
    controls = controls_of(
        two, monkeypatch, [hint(0), hint(1)], strength=[1.0, 0.5], guess_mode=[False, True], end=[1.0, 0.6]
    )
    assert [(c.network, c.scales[-1], c.end, c.conditional_only) for c in controls] == [
        (0, 1.0, 1.0, False),
        (1, 0.5, 0.6, True),
    ]
    first, second = (pipeline(one, **settings) for one in ([hint(0), None], [None, hint(1)]))
    assert min(far(both, first), far(both, second), far(first, second)) > 20
    again = pipeline([hint(0), hint(1, 128)], **both.settings)
    assert far(again, both) == 0
    with pytest.raises(ValueError, match="2 ControlNets: give a list of 2 hints"):
        pipeline(hint(), **settings)
    with pytest.raises(ValueError, match="hint has 3 entries for 2 ControlNets"):
        pipeline([hint()] * 3, **settings)
    with pytest.raises(ValueError, match="strength has 3 entries"):
        pipeline([hint()] * 2, **settings, strength=[1, 1, 1])


@pytest.mark.parametrize("guess_mode", [False, True])
def test_one_batched_call_gives_the_numbers_of_the_published_two(guess_mode):
    model, inputs = tiny_model("sd1"), Inputs("sd1")
    model.control_scales = strength_scales(0.7, guess_mode)
    uncond = {**inputs.uncond, "c_concat": None} if guess_mode else inputs.uncond
    calls = []
    handle = model.model.diffusion_model.register_forward_pre_hook(lambda *a: calls.append(1))
    with torch.no_grad():
        batched = model.make_guidance(inputs.cond, uncond, 3.0)(inputs.x, inputs.t)
        assert len(calls) == 1
        apart = SeparateGuidance(model, inputs.cond, uncond, 3.0)(inputs.x, inputs.t)
    handle.remove()
    torch.testing.assert_close(batched, apart, atol=1e-4, rtol=1e-4)


def test_scales_of_guess_mode():
    assert strength_scales(1.0, True) == pytest.approx(GUESS_SCALES) and strength_scales(0.5) == [0.5] * 13


@pytest.mark.parametrize("guess_mode", [False, True])
def test_a_users_own_apply_model_gets_the_hint(model, guess_mode):
    own = small_model(target="tests.cldm.tiny.OwnControlLDM")
    settings = {"prompt": "a", "steps": 2, "seed": 3, "guess_mode": guess_mode}
    want, got = (ControlPipeline(m)(hint(), **settings) for m in (model, own))
    without = ControlPipeline(own)(None, size=(64, 64), **settings)
    assert far(got, want) <= 1 and far(got, without) > 50


@pytest.mark.parametrize("guess_mode", [False, True])
def test_every_sampler_takes_a_hint_and_they_meet_with_many_steps(model, guess_mode):
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(6))
    settings = {"guidance_scale": 2.0, "guess_mode": guess_mode, "x_T": noise}
    ddim, plms, solver = (
        ControlPipeline(model, sampler)(hint(), "a", steps=40, **settings).astype(int)
        for sampler in ("ddim", "plms", "dpm_solver")
    )
    without = ControlPipeline(model, "dpm_solver")(None, "a", size=(64, 64), steps=40, **settings).astype(int)
    near = max(abs(ddim - plms).mean(), abs(ddim - solver).mean())
    assert 3 * near < abs(solver - without).mean()


@pytest.mark.parametrize("name", ["unipc", "euler_a"])
def test_samplers_of_diffusers_work_in_every_way(model, name):
    diffusers = pytest.importorskip("diffusers")
    pipeline, mask = ControlPipeline(model), np.zeros((64, 64), np.uint8)
    mask[:32] = 255
    settings = {"prompt": "a", "steps": 3, "sampler": name, "image": hint(1)}
    batch = pipeline(hint(), **settings, seed=4, num_samples=2, denoise=0.7)
    assert far(batch[1], pipeline(hint(), **settings, seed=5, denoise=0.7)[0]) <= 1
    painted = pipeline(hint(), **settings, seed=4, mask=mask)
    assert np.array_equal(painted[0][32:], hint(1)[32:]) and painted.settings["sampler"] == name
    if name == "unipc":
        by_class = pipeline(hint(), **settings | {"sampler": diffusers.UniPCMultistepScheduler}, seed=4, denoise=0.7)
        assert far(by_class[0], batch[0]) <= 1 and by_class.inputs["sampler"] == "UniPCMultistepScheduler"


# -- pictures to start from -----------------------------------------------------------------------------------


def test_image_to_image_keeps_more_with_less_denoising(model):
    pipeline, image = ControlPipeline(model), Image.fromarray(hint(7).repeat(2, axis=0)[:64])
    settings = {"image": image, "steps": 20, "seed": 0, "guidance_scale": 1.0}
    near, half, far_off = (pipeline(None, "a", denoise=denoise, **settings) for denoise in (0.06, 0.5, 1.0))
    kept = model.decode_first_stage(
        model.scale_factor
        * model.encode_first_stage(torch.from_numpy(np.array(image) / 127.5 - 1).float().permute(2, 0, 1)[None]).mean
    )
    kept = ((kept + 1) * 127.5).clamp(0, 255).permute(0, 2, 3, 1).detach().numpy()
    errors = [np.abs(made.astype(float) - kept).mean() for made in (near, half, far_off)]
    assert errors[0] < errors[1] < errors[2]
    assert pipeline(hint(), "a", **settings).inputs.keys() == {"hint", "image"}
    several = pipeline(None, ["a", "b"], **{**settings, "image": [image, hint(3)]}, denoise=0.5)
    assert far(several[0], half[0]) <= 1


@pytest.mark.parametrize("size", [64, 60])
@pytest.mark.parametrize("denoise", [None, 0.5])
def test_inpainting_gives_untouched_pixels_back_exactly(model, size, denoise):
    image, mask = hint(1, size), np.zeros((size, size), np.uint8)
    mask[20:40, 10:35] = 255
    mask[40, 10:35] = 128
    made = ControlPipeline(model)(hint(2, size), "a", image=image, mask=mask, steps=3, seed=0, denoise=denoise)[0]
    assert np.array_equal(made[mask == 0], image[mask == 0])
    assert far(made[20:40, 10:35], image[20:40, 10:35]) > 30
    by_condition = ControlPipeline(model)(
        None, "a", annotator="inpaint", image=image, mask=mask, steps=3, seed=0, denoise=denoise
    )
    by_hand = annotator.load("inpaint").make_hint(image, resolution=None, mask=mask, blur=0.0)
    assert (
        far(
            by_condition, ControlPipeline(model)(by_hand, "a", image=image, mask=mask, steps=3, seed=0, denoise=denoise)
        )
        == 0
    )


def test_annotators_by_name_loaded_or_as_a_function(model):
    pipeline, photo = ControlPipeline(model), hint(4, 80)
    settings = {"steps": 1, "seed": 0, "size": (64, 128)}
    canny = annotator.load("canny")
    by_name, loaded, function = (
        pipeline(photo, "a", annotator=maker, **settings)
        for maker in ("canny", canny, lambda picture: canny.make_hint(picture, resolution=None).hint)
    )
    assert far(by_name, loaded) == far(by_name, function) == 0 and by_name.settings["annotator"] == "canny"
    assert function.inputs["annotator"] == "<lambda>"
    assert by_name.inputs["hint"] != pipeline(photo, "a", **settings).inputs["hint"]
    shuffled = [pipeline(photo, "a", annotator="shuffle", **settings) for _ in range(2)]  # follows the seed
    assert far(*shuffled) == 0
    settings["steps"] = 2  # of which an image leaves one
    tile, itself = (pipeline(h, "a", annotator=a, image=photo, **settings) for h, a in ((None, "tile"), (photo, None)))
    assert far(tile, itself) <= 10  # the hint was rounded to 8 bits in between
    with pytest.raises(ValueError, match="no annotator 'kanny'|kanny"):
        pipeline(photo, "a", annotator="kanny")
    with pytest.raises(ValueError, match="needs a picture"):
        pipeline(None, "a", annotator="canny")


def test_an_annotator_by_name_follows_the_version_in_use(model, monkeypatch):
    """Also where one pipeline has called another version before."""
    loaded = []
    monkeypatch.setattr(
        "cldm.pipeline.load", lambda *args, version=None: loaded.append(version) or annotator.load("canny")
    )
    pipeline = ControlPipeline(model)
    try:
        for version in ("1.0", "1.1", "1.0"):
            annotator.use_version(version)
            pipeline(hint(4, 80), "a", annotator="canny", steps=1, seed=0, size=(64, 64))
    finally:
        annotator.use_version(None)
    assert loaded == ["1.0", "1.1"]


# -- prompts --------------------------------------------------------------------------------------------------


def test_automatic_prompts_are_captions_of_a_picture_without_a_prompt(model):
    pipeline, seen = ControlPipeline(model), []

    def captioner(picture):
        seen.append(picture)
        return f"picture {len(seen)}"

    settings = {"steps": 2, "seed": 1, "num_samples": 2}
    made = pipeline(hint(), captioner, **settings)
    assert made.settings["prompt"] == ["picture 1", "picture 2"] and far(seen, pipeline(hint(), "", **settings)) <= 1
    assert far(made, pipeline(hint(), ["picture 1", "picture 2"], steps=2, seed=1)) <= 1
    assert far(made, pipeline(hint(), DEFAULT_PROMPT, **settings)) > 10
    with pytest.raises(ValueError, match="a captioner must return a text, found int"):
        pipeline(hint(), lambda picture: 3, **settings)


def test_prompts_that_are_encoded_already(model):
    pipeline, settings = ControlPipeline(model), {"steps": 2, "seed": 1}
    text = model.get_learned_conditioning(["a", "b"])
    made = pipeline(hint(), text, negative_prompt=model.get_learned_conditioning(["c"]), **settings)
    assert far(made, pipeline(hint(), ["a", "b"], negative_prompt="c", **settings)) <= 1
    assert "prompt" not in made.settings
    with pytest.raises(ValueError, match="must be of one shape"):
        pipeline(hint(), "a", negative_prompt=text[:, :40], **settings)


def test_options_of_prompts(model, caplog):
    pipeline, long = ControlPipeline(model), "cat " * 80 + "red"
    settings = {"steps": 1, "seed": 0}
    cut = pipeline(hint(), long, **settings)
    assert (
        "a prompt of 81 tokens is cut to 75" in caplog.text and far(cut, pipeline(hint(), "cat " * 75, **settings)) == 0
    )
    assert far(cut, pipeline(hint(), long, long_prompts=True, **settings)) > 1
    assert far(*(pipeline(hint(), "cat", clip_skip=n, **settings) for n in (1, 2))) > 1
    assert far(pipeline(hint(), "(cat:1.0)", **settings), pipeline(hint(), "cat", **settings)) == 0
    assert far(pipeline(hint(), "(cat:1.9)", **settings), pipeline(hint(), "cat", **settings)) > 1
    assert model.cond_stage_model.prompt_options is None


def test_long_prompts_of_the_published_hack(model):
    text = ["cat " * 100]
    deep = fill_(FrozenCLIPEmbedder(width=48, layers=2, heads=4))
    other = small_model()
    try:
        hack_everything(clip_skip=2)
        with_skip = deep(text)
        with deep.using(windows=3, clip_skip=2):
            assert torch.equal(with_skip, deep(text)) and deep(text).shape == (1, 231, 48)
        hack_everything()
        assert not torch.allclose(with_skip, deep(text))
        assert ControlPipeline(other)(hint(), "cat", steps=1).shape == (1, 64, 64, 3)
    finally:
        set_default_options(None)
    hack_everything(model=other)
    assert other.get_learned_conditioning(text).shape == (1, 231, 48)
    assert model.get_learned_conditioning(["cat"]).shape == (1, 77, 48)
    with pytest.raises(ValueError, match="this model has a Identity"):
        hack_everything(model=tiny_model("sd1"))


# -- while it runs --------------------------------------------------------------------------------------------


def test_callbacks_get_steps_and_small_pictures(model):
    steps, previews = [], []
    pipeline = ControlPipeline(model)
    made = pipeline(
        hint(), "a", num_samples=2, steps=4, seed=0, callback=steps.append, preview=lambda *seen: previews.append(seen)
    )
    assert steps == [0, 1, 2, 3] and [step for step, _ in previews] == steps
    last = previews[-1][1]
    assert last.shape == (2, 8, 8, 3) and last.dtype == np.uint8
    small = np.asarray(made).reshape(2, 8, 8, 8, 8, 3).mean(axis=(2, 4))
    assert np.isfinite(small).all() and far(previews[0][1], last) > 0


def test_a_callback_stops_a_run_and_the_model_is_left_as_it_was(model):
    def stop(step):
        raise InterruptedError

    model.train()
    pipeline = ControlPipeline(model, sliced_attention=True, vae_tiles=True, vae_one_at_a_time=True)
    with pytest.raises(InterruptedError):
        pipeline(hint(), "a", steps=2, callback=stop, clip_skip=2)
    assert model.training and get_attention() is not sliced_attention and model.cond_stage_model.prompt_options is None
    assert model.first_stage_model.band_positions is None and not model.first_stage_model.one_at_a_time
    model.eval()


# -- precision and memory -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_from_text_to_picture(dtype):
    whole, half = small_model(), small_model().to(dtype)
    settings = {"prompt": "a", "steps": 3, "seed": 0, "guidance_scale": 1.0, "image": hint(3), "denoise": 0.8}
    want, got = (ControlPipeline(m)(hint(), **settings).astype(int) for m in (whole, half))
    without = ControlPipeline(whole)(None, **settings).astype(int)
    assert abs(got - want).mean() < 0.3 * abs(without - want).mean()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = ControlPipeline(whole)(hint(), **settings).astype(int)
    assert abs(got - want).mean() < 0.3 * abs(without - want).mean()


def test_nan_is_never_a_black_picture(caplog):
    own = small_model()
    with torch.no_grad():
        own.first_stage_model.decoder.up[1].block[0].conv2.weight.mul_(1e6).clamp_(-6e4, 6e4)
    want = ControlPipeline(own.half().float())(hint(), "a", steps=1, seed=0)
    got = ControlPipeline(own.half())(hint(), "a", steps=1, seed=0)
    assert "decoder.up.1.block.0.conv2" in caplog.text and got.std() > 0 and abs(got.astype(int) - want).mean() < 30
    with torch.no_grad():
        own.model.diffusion_model.out[-1].bias.fill_(torch.nan)
    for model in (own, own.float()):
        with pytest.raises(FloatingPointError, match=r"in float32, from model\.diffusion_model\.out\.2 \(Conv2d\) on"):
            ControlPipeline(model)(hint(), "a", steps=1)


OVERFLOWS = {
    "control_model.input_blocks.1.0.in_layers.2": "ddim",
    "model.diffusion_model.input_blocks.4.0.in_layers.2": "euler_a",
    "control_model.input_hint_block.14": "plms",
}


@pytest.mark.parametrize("name", OVERFLOWS)
def test_sampling_that_overflows_is_named_and_repeated(name, caplog):
    own = small_model().half()
    with torch.no_grad():
        own.get_submodule(name).weight.mul_(1e6).clamp_(-6e4, 6e4)
    before = {key: value.clone() for key, value in own.state_dict().items()}
    settings = {"sampler": OVERFLOWS[name], "steps": 2, "seed": 0, "guidance_scale": 2.0}
    steps = []
    got = ControlPipeline(own)(hint(), "a", **settings, callback=steps.append)
    assert f"sampling in float16 is not finite from {name} (Conv2d) on; it is repeated in float32" in caplog.text
    assert steps == list(range(len(steps) // 2)) * 2
    assert all(
        value.dtype == before[key].dtype and torch.equal(value, before[key]) for key, value in own.state_dict().items()
    )
    want = ControlPipeline(own.float())(hint(), "a", **settings).astype(int)
    assert got.std() > 0 and abs(got - want).mean() < 3
    assert caplog.text.count("not finite") == 1


def test_the_published_sampler_repeats_the_same_noise(caplog):
    own, inputs = tiny_model("sd1").half(), Inputs("sd1")
    with torch.no_grad():
        own.control_model.input_blocks[1][0].in_layers[2].weight.mul_(1e6).clamp_(-6e4, 6e4)

    def run():
        sampler = DDIMSampler(own)
        torch.manual_seed(5)
        latents, _ = sampler.sample(
            2, inputs.batch, inputs.shape, inputs.cond, verbose=False, eta=1.0,
            unconditional_guidance_scale=2.0, unconditional_conditioning=inputs.uncond,
        )  # fmt: skip
        decoded = sampler.decode(inputs.x_T, inputs.cond, 1, verbose=False)
        return latents, decoded, torch.rand(3)

    with caplog.at_level("WARNING"):
        got = run()
    assert caplog.text.count("control_model.input_blocks.1.0.in_layers.2 (Conv2d)") == 2
    own.float()
    for a, b in zip(got, run(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-3 * float(b.abs().max()), rtol=0)
    with torch.autocast("cpu", dtype=torch.float16):
        autocast = run()
    torch.testing.assert_close(autocast[0], got[0], atol=1e-3 * float(got[0].abs().max()), rtol=0)
    inputs.cond["c_crossattn"][0][0, 3] = torch.nan
    with pytest.raises(FloatingPointError, match=r"from the input of control_model\.input_blocks.*to_k \(Linear\) on"):
        run()


def test_a_model_without_weights_is_reported(caplog):
    config = tiny_config("sd1", cond_stage_config=SMALL_TEXT)
    pipeline = ControlPipeline(instantiate_from_config(config))
    for _ in range(2):
        pipeline(hint(), "a", steps=1)
    assert caplog.text.count("never loaded or trained") == 1 and caplog.text.count("hints change nothing") == 1


def test_little_memory_changes_no_picture(model):
    plain = ControlPipeline(model)(hint(), "a", num_samples=2, steps=2, seed=0, image=hint(2))
    frugal = ControlPipeline(
        model, sliced_attention=True, vae_tiles=True, vae_one_at_a_time=True, offload=True, device="cpu"
    )(hint(), "a", num_samples=2, steps=2, seed=0, image=hint(2))
    assert far(plain, frugal) <= 1


def test_parts_are_on_the_device_only_while_they_are_used(model, monkeypatch):
    moves = []
    home = nn.Module.to
    names = {
        model.cond_stage_model: "text",
        model.model: "unet",
        model.control_model: "control",
        model.first_stage_model: "vae",
    }

    def note(self, *args, **kwargs):
        if self in names:
            moves.append((names[self], str(args[0])))
        return home(self, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "to", note)
    monkeypatch.setattr(type(model.model), "to", note)
    monkeypatch.setattr(type(model.first_stage_model), "to", note)
    pipeline = ControlPipeline(model, offload=True, device="cpu")
    moves.clear()
    pipeline(hint(), "a", steps=1)
    assert [part for part, _ in moves] == ["text", "text", "unet", "control", "unet", "control", "vae", "vae"]


def test_another_device_needs_offloading(model):
    with pytest.raises(ValueError, match="the model is on cpu and the pipeline on meta"):
        ControlPipeline(model, device="meta")


def test_sliced_attention_is_a_switch_read_when_called():
    model, inputs = tiny_model("sd1"), Inputs("sd1")
    with torch.no_grad():
        full = model.apply_model(inputs.x, inputs.t, inputs.cond)
        enable_sliced_attention()
        try:
            assert get_attention() is sliced_attention
            torch.testing.assert_close(model.apply_model(inputs.x, inputs.t, inputs.cond), full, atol=1e-5, rtol=1e-5)
        finally:
            enable_sliced_attention(False)


# -- mistakes -------------------------------------------------------------------------------------------------

MASK = np.full((64, 64), 255, np.uint8)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"hint": "nowhere.png"}, "nowhere.png"),
        ({"hint": []}, "empty"),
        ({"hint": np.zeros((64, 64, 2), np.uint8)}, "3 channels, found 2"),
        ({"hint": torch.full((1, 3, 64, 64), 2.0)}, r"\[0, 1\]"),
        ({"hint": np.zeros((64, 64, 3), np.int32)}, "uint8"),
        ({"prompt": ["a", "b", "c"], "num_samples": 2}, "3 prompts"),
        ({"prompt": []}, "prompt"),
        ({"prompt": "a " * 20_000}, "40000 characters"),
        ({"prompt": "(a:99)"}, "weight must lie within"),
        ({"prompt": "cat " * 1600, "long_prompts": True}, "at most 20 windows"),
        ({"steps": 0}, "steps must be a whole number from 1 to 1000, found 0"),
        ({"steps": 2.5}, "steps"),
        ({"steps": "20"}, "steps"),
        ({"guidance_scale": float("nan")}, "guidance_scale"),
        ({"strength": -0.1}, "strength must be a number from 0 to 10, found -0.1"),
        ({"scales": [1.0] * 3}, "scales has 3 entries for the 13 outputs"),
        ({"eta": 1.01}, "eta must be a number from 0 to 1, found 1.01"),
        ({"eta": 0.5, "sampler": "plms"}, "eta"),
        ({"start": 0.8, "end": 0.2}, "start must be below end, found start=0.8 and end=0.2"),
        ({"end": 1.2}, "end must be a number from 0 to 1"),
        ({"size": (64, 4)}, "sides must be from 8 to 8192 pixels, found 64 x 4"),
        ({"size": 64.5}, "size"),
        ({"num_samples": 0}, "num_samples"),
        ({"sampler": "eular"}, "unknown sampler 'eular'; known are .*ddim.*plms"),
        ({"seed": -1}, "seed must be a whole number from 0"),
        ({"seed": [1, 2], "num_samples": 3}, "2 seeds"),
        ({"seed": "x"}, "seed must be a whole number, or a list"),
        ({"seed": []}, "seed must be a whole number, or a list"),
        ({"clip_skip": 3}, "clip_skip must be from 1 to 2"),
        ({"denoise": 0.5}, "denoise needs image="),
        ({"denoise": 0.0, "image": hint()}, "denoise must be above 0"),
        ({"mask": MASK}, "a mask needs image="),
        ({"mask": MASK[:32], "image": hint()}, "a mask of 32 x 64 does not fit an image of 64 x 64"),
        ({"mask": MASK * 0, "image": hint()}, "all black"),
        ({"x_T": torch.zeros(1, 4, 4, 4)}, "x_T"),
    ],
)
def test_mistakes_are_named(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        ControlPipeline(model)(**{"hint": hint(), "prompt": "a", "steps": 1, **arguments})


def test_misspelt_options_are_errors(model):
    with pytest.raises(TypeError, match="guidance"):
        ControlPipeline(model)(hint(), "a", guidance_scal=3.0)
    with pytest.raises(ValueError, match="unknown sampler"):
        ControlPipeline(model, "eular")


def test_an_encoder_is_moved_by_its_device(model):
    model.cond_stage_model.device = "cpu"
    assert model.cond_stage_model.device == torch.device("cpu")
