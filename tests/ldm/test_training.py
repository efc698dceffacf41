"""The pieces train with Lightning as plain latent diffusion, from the configurations that `ldm` alone builds."""

from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf
from torch.utils.data import DataLoader

from ldm.models.autoencoder import AutoencoderKL
from ldm.modules.ema import LitEma
from ldm.util import ConfigError, instantiate_from_config, log_txt_as_img
from tests.parity import load_json

CONFIGS = Path(__file__).parents[2] / "configs" / "stable-diffusion"
DDCONFIG = dict(double_z=True, z_channels=4, resolution=32, in_channels=3, out_ch=3, ch=32, ch_mult=[1, 1], num_res_blocks=1,
                attn_resolutions=[], num_groups=4)  # fmt: skip


def pictures(count: int) -> list[dict]:
    rng = np.random.default_rng(0)
    colours = rng.uniform(-1, 1, (count, 1, 1, 3)).astype(np.float32)
    return [{"image": np.broadcast_to(c, (32, 32, 3)).copy(), "txt": f"picture {i}"} for i, c in enumerate(colours)]


def trainer(tmp_path, steps):
    return pl.Trainer(max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
                      default_root_dir=tmp_path, enable_model_summary=False)  # fmt: skip


def test_autoencoder_learns_with_reconstruction_and_kl(tmp_path):
    pl.seed_everything(0)
    model = AutoencoderKL(DDCONFIG, {"target": "torch.nn.Identity"}, embed_dim=4, ema_decay=0.9)
    model.learning_rate = 2e-3
    batch = torch.utils.data.default_collate(pictures(8))
    model.eval()
    with torch.no_grad():
        before = float(model.loss(model.get_input(batch, "image"), *model(model.get_input(batch, "image")))[0])
    trainer(tmp_path, 30).fit(model, DataLoader(pictures(32), batch_size=8))
    with torch.no_grad():
        after, terms = model.loss(model.get_input(batch, "image"), *model(model.get_input(batch, "image")), split="val")
    assert float(after) < 0.8 * before and {"val/kl_loss", "val/rec_loss"} <= set(terms)
    own = model.encoder.conv_in.weight.clone()
    with model.ema_scope():
        assert not torch.equal(own, model.encoder.conv_in.weight)
    assert torch.equal(own, model.encoder.conv_in.weight)
    images = model.eval().log_images(batch)
    assert set(images) == {"inputs", "reconstructions", "samples", "reconstructions_ema", "samples_ema"}
    assert not torch.allclose(images["reconstructions"], images["reconstructions_ema"])


def test_latent_diffusion_learns(tmp_path):
    pl.seed_everything(0)
    config = {
        "target": "ldm.models.diffusion.ddpm.LatentDiffusion",
        "params": {
            "first_stage_config": {"target": "ldm.models.autoencoder.AutoencoderKL", "params": {"ddconfig": DDCONFIG, "embed_dim": 4}},
            "cond_stage_config": {
                "target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder",
                "params": {"width": 32, "layers": 1, "heads": 4, "freeze": False},
            },
            "unet_config": {
                "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
                "params": dict(in_channels=4, out_channels=4, model_channels=32, num_res_blocks=1, attention_resolutions=[1],
                               channel_mult=[1, 2], num_heads=2, use_spatial_transformer=True, context_dim=32, legacy=False),
            },
            "cond_stage_key": "txt", "cond_stage_trainable": True, "conditioning_key": "crossattn", "scale_by_std": True,
            "channels": 4, "image_size": 16, "ucg_training": {"txt": {"p": 0.2, "val": ""}},
        },
    }  # fmt: skip
    model = instantiate_from_config(config)
    model.learning_rate = 1e-3
    first_stage = {k: v.clone() for k, v in model.first_stage_model.state_dict().items()}
    token = model.cond_stage_model.transformer.text_model.embeddings.token_embedding.weight.clone()
    trainer(tmp_path, 12).fit(model, DataLoader(pictures(32), batch_size=8))
    assert all(torch.equal(v, first_stage[k]) for k, v in model.first_stage_model.state_dict().items())
    assert not torch.equal(token, model.cond_stage_model.transformer.text_model.embeddings.token_embedding.weight)
    assert float(model.scale_factor) != 1.0 and int(model.model_ema.num_updates) == 12
    batch = torch.utils.data.default_collate(pictures(2))
    images = model.log_images(batch, N=2, ddim_steps=3, unconditional_guidance_scale=2.0)
    assert set(images) == {
        "inputs", "reconstruction", "conditioning", "diffusion_row", "samples", "samples_cfg_scale_2.00"
    }  # fmt: skip
    assert images["samples"].shape == (2, 3, 32, 32)


@pytest.mark.parametrize(
    "name, manifest, parameterization",
    [("v1-inference", "v15", "eps"), ("v2-inference", "v21", "eps"), ("v2-inference-v", "v21", "v")],
)
def test_plain_configurations_have_the_published_keys(name, manifest, parameterization):
    with torch.device("meta"):
        model = instantiate_from_config(OmegaConf.load(CONFIGS / f"{name}.yaml").model)
    want = {
        k: s for k, (s, _) in load_json(f"core/manifest_{manifest}.json").items() if not k.startswith("control_model.")
    }
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == want
    assert model.parameterization == parameterization


def test_ema_keys_and_warm_up():
    layer = torch.nn.Linear(2, 2)
    ema = LitEma(layer, decay=0.5)
    assert set(ema.state_dict()) == {"decay", "num_updates", "weight", "bias"}
    start = layer.weight.detach().clone()
    with torch.no_grad():
        layer.weight.add_(1.0)
    ema(layer)
    torch.testing.assert_close(ema.weight, start + 1 - 2 / 11)  # the first decay is (1 + 1) / (10 + 1)


def test_prompts_as_pictures_wrap_and_take_any_letter():
    drawn = log_txt_as_img((96, 64), ["a long prompt that needs several lines", "猫 détaillé"], size=10)
    assert drawn.shape == (2, 3, 64, 96) and drawn.max() == 1 and drawn.min() < 0
    assert (drawn[0, 0] < 0.5).any(dim=1).sum() > (drawn[1, 0] < 0.5).any(dim=1).sum()


def test_configuration_mistakes():
    with pytest.raises(ConfigError, match="does not take widht"):
        instantiate_from_config({"target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder", "params": {"widht": 3}})
    with pytest.raises(ConfigError, match="target"):
        instantiate_from_config({"params": {}})
    with pytest.raises(ConfigError, match="needs the parameters ddconfig"):
        instantiate_from_config({"target": "ldm.models.autoencoder.AutoencoderKL"})
