"""The pipeline, the reference's switches in `cldm.hack`, and pictures while training."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch

from cldm.cldm import ControlLDM
from cldm.data.pairs import read_rgb
from cldm.guidance import strength_scales
from cldm.hack import enable_sliced_attention, hack_everything
from cldm.logger import ImageLogger
from cldm.pictures import grid, save_png
from cldm.pipeline import ControlPipeline, seeded
from ldm.models.diffusion.guidance import SeparateGuidance
from ldm.modules.attention import get_attention, sliced_attention
from ldm.modules.encoders.modules import FrozenCLIPEmbedder
from ldm.util import instantiate_from_config
from tests.cldm.tiny import GUESS_SCALES, Inputs, tiny_config, tiny_model
from tests.parity import fill_

SMALL_TEXT = {
    "target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder",
    "params": {"width": 48, "layers": 1, "heads": 4},
}


@pytest.fixture(scope="module")
def model():
    return fill_(instantiate_from_config(tiny_config("sd1", cond_stage_config=SMALL_TEXT))).eval()


def hint(seed=0, size=64):
    return np.random.default_rng(seed).integers(0, 255, (size, size, 3), dtype=np.uint8)


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


def test_the_same_seed_gives_the_same_pictures_and_the_model_is_left_as_it_was(model):
    model.train()
    scales = model.control_scales
    pipeline = ControlPipeline(model)
    calls = []
    handle = model.control_model.input_hint_block.register_forward_pre_hook(lambda *a: calls.append(1))
    first, again, other = (
        pipeline(hint(), "a", num_samples=2, steps=3, seed=s, strength=0.5, eta=0.5) for s in (1, 1, 2)
    )
    handle.remove()
    assert first.shape == (2, 64, 64, 3) and first.dtype == np.uint8
    assert np.array_equal(first, again) and not np.array_equal(first, other) and not np.array_equal(first[0], first[1])
    assert len(calls) == 3  # the hint is encoded once a run
    assert model.training and model.control_scales is scales
    model.eval()


def test_a_seed_leaves_the_generators_as_they_were(model):
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    first = ControlPipeline(model)(hint(), "a", steps=1, seed=1, eta=1.0)
    assert torch.equal(torch.rand(3), want)
    assert np.array_equal(first, ControlPipeline(model)(hint(), "a", steps=1, seed=1, eta=1.0))
    assert not np.array_equal(
        ControlPipeline(model)(hint(), "a", steps=1), ControlPipeline(model)(hint(), "a", steps=1)
    )


@pytest.mark.parametrize(
    ("device", "kept"),
    [
        ("cpu", {"devices": []}),
        ("cuda:1", {"devices": [torch.device("cuda:1")], "device_type": "cuda"}),
        ("xpu:0", {"devices": [torch.device("xpu:0")], "device_type": "xpu"}),
    ],
)
def test_the_random_state_of_any_accelerator_is_kept(monkeypatch, device, kept):
    asked = []
    monkeypatch.setattr("torch.random.fork_rng", lambda **states: asked.append(states) or nullcontext())
    with seeded(3, torch.device(device)):
        assert torch.initial_seed() == 3
    with seeded(None, torch.device(device)):
        pass
    assert asked == [kept]


class Own(ControlLDM):
    """A user's model, whose `apply_model` is written as in the reference."""

    def apply_model(self, x_noisy, t, cond, *args, **kwargs):
        text, unet = torch.cat(cond["c_crossattn"], 1), self.model.diffusion_model
        if cond["c_concat"] is None:
            return unet(x=x_noisy, timesteps=t, context=text, control=None, only_mid_control=self.only_mid_control)
        control = self.control_model(x=x_noisy, hint=torch.cat(cond["c_concat"], 1), timesteps=t, context=text)
        control = [c * scale for c, scale in zip(control, self.control_scales, strict=True)]
        return unet(x=x_noisy, timesteps=t, context=text, control=control, only_mid_control=self.only_mid_control)


@pytest.mark.parametrize("guess_mode", [False, True])
def test_a_users_own_apply_model_gets_the_hint(model, guess_mode):
    config = tiny_config("sd1", cond_stage_config=SMALL_TEXT)
    own = fill_(instantiate_from_config({**config, "target": f"{__name__}.Own"})).eval()
    settings = {"prompt": "a", "steps": 2, "seed": 3, "guess_mode": guess_mode}
    want, got = (ControlPipeline(m)(hint(), **settings).astype(int) for m in (model, own))
    without = ControlPipeline(own)(None, size=(64, 64), **settings).astype(int)
    assert abs(got - want).max() <= 1 and abs(got - without).max() > 50


def test_hints_prompts_and_sizes_in_every_form(model):
    pipeline = ControlPipeline(model)
    several = np.stack([hint(0), hint(1)])
    out = pipeline(several, ["a", "b"], negative_prompt="c", steps=2, seed=0, guess_mode=True)
    tensor = (torch.from_numpy(several).float() / 255).permute(0, 3, 1, 2)
    assert np.array_equal(
        out, pipeline(tensor, ["a", "b"], negative_prompt=["c", "c"], steps=2, seed=0, guess_mode=True)
    )
    assert pipeline(None, "a", size=(64, 128), steps=1, guidance_scale=1.0).shape == (1, 64, 128, 3)


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
    with pytest.raises(ValueError, match="unknown sampler 'euler'; known are ddim, plms, dpm_solver"):
        ControlPipeline(model, "euler")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"hint": np.zeros((60, 64, 3), np.uint8)}, "multiples of 64"),
        ({"hint": np.zeros((64, 64), np.uint8)}, "HWC3"),
        ({"hint": np.zeros((64, 64, 3), np.float32)}, "uint8"),
        ({"hint": torch.full((1, 3, 64, 64), 2.0)}, r"\[0, 1\]"),
        ({"prompt": ["a", "b", "c"], "num_samples": 2}, "3 prompts"),
        ({"steps": 0}, "steps"),
    ],
)
def test_mistakes_are_named(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        ControlPipeline(model)(**{"hint": hint(), "prompt": "a", "steps": 1, **arguments})


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


def test_long_prompts_and_clip_skip(model):
    forward, text = FrozenCLIPEmbedder.forward, ["cat " * 100]
    deep = FrozenCLIPEmbedder(width=48, layers=2, heads=4)
    other = instantiate_from_config(tiny_config("sd1", cond_stage_config=SMALL_TEXT))
    try:
        hack_everything(clip_skip=2)
        torch.testing.assert_close(deep(text), deep.encode_long(text, clip_skip=2))
        assert deep(text).shape == (1, 231, 48) and not torch.allclose(deep(text), deep.encode_long(text, clip_skip=1))
    finally:
        FrozenCLIPEmbedder.forward = forward
    hack_everything(model=other)
    assert other.get_learned_conditioning(text).shape == (1, 231, 48)
    assert model.get_learned_conditioning(["cat"]).shape == (1, 77, 48)
    with pytest.raises(ValueError, match="long prompts are for SD 1.x"):
        hack_everything(model=tiny_model("sd1"))


def test_image_logger_saves_each_kind_and_an_overview(model, tmp_path):
    images = {kind: torch.rand(2, 3, 64, 64) * 2 - 1 for kind in ("control", "samples")}
    ImageLogger(max_images=2).log_local(tmp_path, "train", images, global_step=7, current_epoch=1, batch_idx=3)
    assert {p.name for p in (tmp_path / "image_log" / "train").iterdir()} == {
        f"{kind}_gs-000007_e-000001_b-000003.png" for kind in ("control", "samples", "overview")
    }

    class Module:
        training, global_rank, global_step, current_epoch, logger = False, 0, 0, 0, None
        trainer = type("Trainer", (), {"default_root_dir": str(tmp_path / "rows")})

        def log_images(self, batch, **options):
            return images | {"diffusion_row": torch.zeros(3, 64, 256)}

        eval = train = lambda self, mode=True: self

    ImageLogger(batch_frequency=1, max_images=2, log_first_step=True).log_img(Module(), {}, 0)
    pictures = {p.name.split("_gs")[0]: p for p in (tmp_path / "rows").rglob("*.png")}
    assert set(pictures) == {"control", "samples", "diffusion_row", "overview"}
    assert read_rgb(pictures["diffusion_row"]).shape == (64 + 2 * 4, 256 + 2 * 4, 3)
    assert read_rgb(pictures["overview"]).shape == (2 * 68 + 4, 2 * 68 + 4, 3)
    due = ImageLogger(batch_frequency=5)
    assert [i for i in range(11) if due.check_frequency(i)] == [0, 5, 10]


def test_log_images_of_a_control_model(model):
    batch = {"jpg": torch.rand(2, 64, 64, 3) * 2 - 1, "hint": torch.rand(2, 64, 64, 3), "txt": ["a", "b"]}
    images = model.log_images(batch, N=2, sample=True, ddim_steps=2)
    assert set(images) == {"reconstruction", "control", "conditioning", "samples", "samples_cfg_scale_9.00"}
    assert all(picture.shape == (2, 3, 64, 64) for picture in images.values())
    torch.testing.assert_close(images["control"], batch["hint"].permute(0, 3, 1, 2) * 2 - 1)
    rows = {"plot_denoise_rows": True, "plot_diffusion_rows": True}
    images = model.log_images(batch, N=2, n_row=1, sample=True, ddim_steps=2, unconditional_guidance_label="b", **rows)
    assert images["diffusion_row"].shape == (3, 64, 6 * 64) and images["denoise_row"].shape[1] == 2 * 64
    assert set(model.log_images(batch, ddim_steps=2, return_keys=["control"])) == {"control"}


def test_log_images_where_the_text_encoder_is_trained():
    config = tiny_config("sd1", cond_stage_config=SMALL_TEXT, cond_stage_trainable=True)
    model = fill_(instantiate_from_config(config)).eval()
    batch = {"jpg": torch.rand(1, 64, 64, 3) * 2 - 1, "hint": torch.rand(1, 64, 64, 3), "txt": ["a"]}
    assert model.log_images(batch, ddim_steps=2)["samples_cfg_scale_9.00"].shape == (1, 3, 64, 64)


def test_an_encoder_is_moved_by_its_device(model):
    model.cond_stage_model.device = "cpu"
    assert model.cond_stage_model.device == torch.device("cpu")


def test_pictures_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    picture = grid([[hint(), hint(1)], [hint(2)]], gap=4, scale=2)
    assert picture.shape == (4 + 2 * 132, 4 + 2 * 132, 3)
    save_png(tmp_path / "a" / "x.png", picture)
    monkeypatch.setattr("os.replace", lambda *a: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_png(tmp_path / "a" / "y.png", picture)
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["x.png"]
