"""LatentDiffusion beyond the loss: ancestral sampling, batches and conditionings of every kind, starting weights, building."""

import numpy as np
import pytest
import torch
from torch import nn

from ldm.lr_scheduler import LambdaLinearScheduler
from ldm.models.autoencoder import IdentityFirstStage
from ldm.models.diffusion.ddpm import DDPM, LatentDiffusion
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.util import ConfigError, instantiate_from_config

IDENTITY = {"target": "ldm.models.autoencoder.IdentityFirstStage"}
CLASSES = {
    "target": "ldm.modules.encoders.modules.ClassEmbedder",
    "params": {"embed_dim": 6, "n_classes": 5, "key": "label"},
}


def unet(**params):
    params = dict(in_channels=4, out_channels=4, model_channels=32, num_res_blocks=1, attention_resolutions=[],
                  channel_mult=[1], num_heads=2) | params  # fmt: skip
    return {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": params}


def latent_diffusion(cond_stage_config="__is_unconditional__", unet_params=None, **params) -> LatentDiffusion:
    params = dict(timesteps=20, log_every_t=5, use_ema=False, channels=4, image_size=8) | params
    return LatentDiffusion(IDENTITY, cond_stage_config, unet_config=unet(**unet_params or {}), **params)


def test_ancestral_sampling_of_latents_is_not_clipped():
    model = latent_diffusion(parameterization="x0")
    x0 = 4 * torch.randn(2, 4, 8, 8)
    model.apply_model = lambda x, t, cond=None: x0
    img, kept = model.sample(None, 2, return_intermediates=True, verbose=False)
    torch.testing.assert_close(img, x0, atol=1e-5, rtol=0)
    assert len(kept) == 6  # the noise, the first step's result, and those of timesteps 15, 10, 5 and 0
    wanted, mask = torch.randn(2, 4, 8, 8), torch.zeros(2, 1, 8, 8)
    mask[..., :4] = 1
    first = torch.full((2,), 0)
    torch.manual_seed(0)
    img = model.sample(None, 2, x0=wanted, mask=mask, verbose=False)
    torch.testing.assert_close(img[..., 4:], x0[..., 4:], atol=1e-5, rtol=0)
    assert float((img - wanted)[..., :4].abs().max()) < 6 * float((1 - model.alphas_cumprod[0]).sqrt())
    step, predicted = model.p_sample(img, None, first, return_x0=True)
    torch.testing.assert_close(step, x0)
    assert predicted is x0 and len(model.p_mean_variance(img, None, first, False, return_x0=True)) == 4
    assert len(model.p_sample_loop(None, (1, 4, 8, 8), True, None, False, None, 10)[1]) == 4


def test_ancestral_sampling_that_overflows_is_repeated_with_the_same_noise(caplog):
    model = latent_diffusion()
    nn.init.normal_(model.model.diffusion_model.out[-1].weight, std=0.02)  # zero at first
    broken = model.model.diffusion_model.input_blocks[1][0].in_layers[2]
    with torch.no_grad():
        broken.weight.mul_(1e6).clamp_(-6e4, 6e4)
    torch.manual_seed(0)
    want, noise_after = model.half().float().sample(None, 2, verbose=False), torch.randn(3)
    torch.manual_seed(0)
    got = model.half().sample(None, 2, verbose=False)
    assert "from model.diffusion_model.input_blocks.1.0.in_layers.2 (Conv2d) on; it is repeated" in caplog.text
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)
    assert torch.equal(torch.randn(3), noise_after)


def test_ancestral_sampling_cuts_a_longer_conditioning_to_the_batch():
    model = latent_diffusion({"target": "torch.nn.Identity"}, {"in_channels": 6}, conditioning_key="concat")
    assert model.sample({"c_concat": [torch.zeros(3, 2, 8, 8)]}, 2, verbose=False).shape == (2, 4, 8, 8)
    with pytest.raises(ValueError, match="timesteps must be 1 to 20"):
        model.sample({"c_concat": [torch.zeros(2, 2, 8, 8)]}, 2, timesteps=21)


def test_pictures_as_conditioning_and_everything_that_a_batch_can_give():
    model = latent_diffusion(
        {"target": "torch.nn.Identity"}, {"in_channels": 6}, conditioning_key="concat", cond_stage_key="low"
    )
    batch = {"image": torch.randn(3, 8, 8, 4), "low": torch.randn(3, 8, 8, 2)}
    z, c, x, again, original = model.get_input(
        batch, "image", return_first_stage_outputs=True, return_original_cond=True, bs=2
    )
    torch.testing.assert_close(c, batch["low"][:2].permute(0, 3, 1, 2))
    torch.testing.assert_close(x, batch["image"][:2].permute(0, 3, 1, 2))
    assert (
        torch.equal(again, x) and torch.equal(original, c) and len(model.get_input(batch, "image", return_x=True)) == 3
    )
    assert torch.isfinite(model.shared_step(batch)[0])
    with pytest.raises(KeyError, match="no 'low'"):
        model.get_input({"image": batch["image"]}, "image")


def test_class_labels_as_conditioning():
    attention = {"use_spatial_transformer": True, "context_dim": 6, "attention_resolutions": [1], "legacy": False}
    model = latent_diffusion(CLASSES, attention, conditioning_key="crossattn", cond_stage_key="class_label").eval()
    batch = {"image": torch.randn(3, 8, 8, 4), "label": torch.tensor([0, 3, 2])}
    c = model.get_input(batch, "image", bs=2)[1]
    torch.testing.assert_close(c[:, 0], model.cond_stage_model.embedding.weight[[0, 3]])
    nothing = model.get_unconditional_conditioning(2)
    torch.testing.assert_close(nothing[:, 0], model.cond_stage_model.embedding.weight[[4, 4]])
    given = model.get_unconditional_conditioning(2, {"label": torch.tensor([1])})
    torch.testing.assert_close(given[:, 0], model.cond_stage_model.embedding.weight[[1, 1]])
    model.ucg_training = {"label": {"p": 1.0, "val": 4}}
    assert model._drop_conditioning(batch)["label"].tolist() == [4, 4, 4] and batch["label"].tolist() == [0, 3, 2]
    images = model.log_images(batch, N=2, ddim_steps=2, unconditional_guidance_scale=2.0, plot_denoise_rows=True)
    assert images["samples_cfg_scale_2.00"].shape == (2, 4, 8, 8)
    assert images["diffusion_row"].shape == (4, 2 * 8, 5 * 8) and images["denoise_row"].shape[1] == 2 * 8
    assert set(model.log_images(batch, ddim_steps=2, return_keys=["nothing there"])) > {"inputs", "samples"}


def test_what_checkpoint_callbacks_watch_is_there_without_an_average():
    logged = {}
    for use_ema in (False, True):
        model = latent_diffusion(use_ema=use_ema).eval()
        model.log_dict = lambda terms, **options: logged.update(terms)
        model.validation_step({"image": torch.randn(2, 8, 8, 4)}, 0)
        assert {"val/loss_simple", "val/loss_simple_ema"} <= set(logged)
        logged.clear()


def test_logvar_weighs_the_loss_of_latents_alone():
    x, t, eps = torch.randn(2, 4, 8, 8), torch.tensor([3, 9]), torch.randn(2, 4, 8, 8)
    latent = latent_diffusion(logvar_init=0.7)
    plain = DDPM(unet(), timesteps=20, use_ema=False, channels=4, image_size=8, logvar_init=0.7)
    error = (latent.apply_model(latent.q_sample(x, t, eps), t, None) - eps).pow(2).mean()
    torch.testing.assert_close(latent.p_losses(x, None, t, eps)[0], error / np.exp(0.7) + 0.7)
    error = (plain.apply_model(plain.q_sample(x, t, eps), t) - eps).pow(2).mean()
    torch.testing.assert_close(plain.p_losses(x, t, eps)[0], error)


def test_starting_weights(tmp_path):
    source = latent_diffusion(use_ema=True, scale_factor=0.5)
    source.model_ema.num_updates.fill_(77)
    for p in source.parameters():
        nn.init.normal_(p)
    whole, alone, rubbish = (str(tmp_path / f"{name}.ckpt") for name in ("whole", "alone", "rubbish"))
    torch.save({"state_dict": source.state_dict()}, whole)
    torch.save(source.model.state_dict(), alone)
    torch.save([1, 2], rubbish)

    def weight(model):
        return model.model.diffusion_model.out[2].weight

    kept = latent_diffusion(use_ema=True, ckpt_path=whole)
    assert torch.equal(weight(kept), weight(source)) and int(kept.model_ema.num_updates) == 77
    reset = latent_diffusion(use_ema=True, ckpt_path=whole, reset_num_ema_updates=True)
    assert torch.equal(weight(reset), weight(source)) and int(reset.model_ema.num_updates) == 0
    for path in (whole, alone):
        model = latent_diffusion(use_ema=True, ckpt_path=path, load_only_unet=True)
        assert torch.equal(weight(model), weight(source)) and int(model.model_ema.num_updates) == 0
    left_out = latent_diffusion(ckpt_path=whole, ignore_keys=["model.diffusion_model.out"])
    assert not torch.equal(weight(left_out), weight(source))
    for path, message in ((rubbish, "holds a list"), (str(tmp_path / "none.ckpt"), "does not exist")):
        with pytest.raises(ConfigError, match=message):
            latent_diffusion(ckpt_path=path)


def test_starting_weights_that_do_not_fit_are_refused(tmp_path):
    of_diffusers = {"unet/down_blocks.0.resnets.0.conv1.bias": torch.zeros(1), "logvar": torch.zeros(20)}
    for entries, message in (({"lora_unet_x": torch.zeros(1)}, "none of the entries"), (of_diffusers, "convert")):
        torch.save(entries, tmp_path / "other.ckpt")
        with pytest.raises(ConfigError, match=message):
            latent_diffusion(cond_stage_config=CLASSES, ckpt_path=str(tmp_path / "other.ckpt"))


def test_an_average_that_starting_weights_lack_begins_at_them(tmp_path, caplog):
    source = latent_diffusion()
    nn.init.normal_(source.model.diffusion_model.out[2].weight)
    torch.save(source.state_dict(), tmp_path / "base.ckpt")
    for only_unet in (False, True):
        model = latent_diffusion(use_ema=True, ckpt_path=str(tmp_path / "base.ckpt"), load_only_unet=only_unet)
        assert torch.equal(model.model_ema.diffusion_modelout2weight, source.model.diffusion_model.out[2].weight)
        partial = [r for r in caplog.records if r.levelname == "WARNING" and "missing (first model_ema." in r.message]
        assert len(partial) == 1


@pytest.mark.parametrize(
    "params, message",
    [
        ({"linear_end": 3.0}, "each above 0"),
        ({"timesteps": 0}, "at least one beta"),
        ({"scale_factor": 0.0}, "scale_factor must be positive"),
        ({"unet_params": {"num_res_blocks": -1}}, "num_res_blocks"),
        ({"unet_params": {"attention_resolutions": [1], "num_head_channels": 5, "num_heads": -1}}, "num_head_channels"),
        ({"beta_schedule": "steep"}, "steep"),
    ],
)
def test_values_out_of_range(params, message):
    unet_params = params.pop("unet_params", {})
    config = {
        "target": "ldm.models.diffusion.ddpm.LatentDiffusion",
        "params": {"first_stage_config": IDENTITY, "cond_stage_config": "__is_unconditional__",
                   "unet_config": unet(**unet_params), **params},
    }  # fmt: skip
    with pytest.raises(ConfigError, match=message):
        instantiate_from_config(config)


class Wrapped(nn.Module):
    """A user's network, which hands its arguments to something that is none of its bases."""

    def __init__(self, **kwargs):
        super().__init__()
        self.inner = UNetModel(**kwargs)


class Settled(LatentDiffusion):
    """A user's model, which fills in a parameter of its base class itself."""

    def __init__(self, **kwargs):
        super().__init__(first_stage_config=IDENTITY, **kwargs)


def test_classes_of_users_with_open_arguments():
    here = __name__
    wrapped = instantiate_from_config({"target": f"{here}.Wrapped", "params": unet()["params"]})
    assert wrapped.inner.model_channels == 32
    config = {
        "target": f"{here}.Settled",
        "params": {"cond_stage_config": "__is_unconditional__", "unet_config": unet()},
    }
    assert isinstance(instantiate_from_config(config).first_stage_model, IdentityFirstStage)
    config["params"]["no_such_option"] = 1
    with pytest.raises(ConfigError, match="no_such_option"):
        instantiate_from_config(config)
    del config["params"]["unet_config"], config["params"]["no_such_option"]
    with pytest.raises(ConfigError, match="unet_config"):
        instantiate_from_config(config)
    for target in ("torch.nn.Identity", "ldm.models.autoencoder.IdentityFirstStage"):
        instantiate_from_config({"target": target, "params": {"embed_dim": 4}})


def test_networks_in_half_precision_take_a_context_in_single():
    model = UNetModel(
        **unet(use_spatial_transformer=True, context_dim=6, attention_resolutions=[1], use_fp16=True)["params"]
    )
    assert model.dtype == torch.float16 and model.num_res_blocks == (1,) and model.num_heads_upsample == 2
    out = model(torch.randn(1, 4, 8, 8), torch.tensor([3]), torch.randn(1, 5, 6))
    assert out.dtype == torch.float32 and torch.isfinite(out).all()


def test_each_cycle_of_the_linear_schedule_comes_once():
    schedule = LambdaLinearScheduler([10, 10], [0.1, 0.1], [1.0, 1.0], [0.0, 0.0], [100, 100])
    assert [schedule(n) for n in (0, 5, 10, 55, 100)] == pytest.approx([0.0, 0.5, 0.91, 0.505, 0.1])
    assert [schedule(n) for n in (105, 110, 155, 200, 500)] == pytest.approx([0.5, 0.91, 0.505, 0.1, 0.1])
