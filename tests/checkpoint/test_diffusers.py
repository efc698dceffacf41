"""Conversions judged by diffusers itself: the same weights and inputs give the same outputs."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from cldm.checkpoint import convert, identify
from ldm.files import read_state_dict, write_weights
from tests.cldm.tiny import Inputs, tiny_config, tiny_model
from tests.parity import fill_, load_json, noise_tensor, relative_error

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

WIDTH, LAYERS, HEADS = 48, 3, 3  # of the text encoders
SAME = 1e-5  # relative error of float32 outputs


class SmallText(torch.nn.Module):
    """A filled text encoder with the entries of SD 1.x (`model` of transformers) or SD 2.x (of open_clip)."""

    def __init__(self, version: str, heads: int, layer: str) -> None:
        super().__init__()
        if version == "sd1":
            sizes = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_hidden_layers": LAYERS}
            model = transformers.CLIPTextModel(transformers.CLIPTextConfig(**sizes, num_attention_heads=heads))
            self.transformer = torch.nn.Module()
            self.transformer.text_model = getattr(model, "text_model", model)
        else:
            text = {"vocab_size": 49408, "width": WIDTH, "heads": heads, "layers": LAYERS}
            vision = {"layers": 1, "width": 16, "patch_size": 16, "image_size": 16, "head_width": 16}
            self.model = open_clip.CLIP(embed_dim=WIDTH, vision_cfg=vision, text_cfg=text)
            del self.model.visual
            self.register_buffer("mask", self.model.attn_mask, persistent=False)
            del self.model.attn_mask
        fill_(self, prefix="cond_stage_model.").eval()

    def penultimate(self, ids: Tensor) -> Tensor:
        """SD 2.x's conditioning, by open_clip's own layers."""
        hidden = self.model.token_embedding(ids) + self.model.positional_embedding  # (B, 77, D)
        for block in self.model.transformer.resblocks[:-1]:
            hidden = block(hidden, attn_mask=self.mask)
        return self.model.ln_final(hidden)


@dataclass
class Case:
    """A small model of either version: file, configuration, and the pipeline folder made of them."""

    name: str
    model: Any
    inputs: Inputs
    path: Path
    config: Path
    pipeline: Path
    text: SmallText


@pytest.fixture(scope="module", params=("sd1", "sd2"))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    name, folder = request.param, tmp_path_factory.mktemp(request.param)
    model = tiny_model(name)
    text = SmallText(name, HEADS, "penultimate")
    entries = {f"cond_stage_model.{key}": tensor for key, tensor in text.state_dict().items()}
    path = write_weights(folder / "full.safetensors", {**model.state_dict(), **entries}, progress=False)
    config = OmegaConf.create({"model": tiny_config(name)})
    config.model.params.cond_stage_config = {
        "target": f"{__name__}.SmallText",
        "params": {"version": name, "heads": HEADS, "layer": "penultimate"},
    }
    OmegaConf.save(config, folder / "config.yaml")
    made = Case(name, model, Inputs(name), path, folder / "config.yaml", folder / "pipeline", text)
    convert(
        path, made.pipeline, "diffusers-pipeline", config=made.config, prediction={"sd2": "v"}.get(name), progress=False
    )
    return made


@torch.no_grad()
def test_control_and_unet_give_the_same_outputs(case: Case, tmp_path: Path) -> None:
    control = tmp_path / "controlnet"
    convert(case.path, control, "diffusers", config=case.config, progress=False)
    controlnet = diffusers.ControlNetModel.from_pretrained(control)
    unet = diffusers.UNet2DConditionModel.from_pretrained(case.pipeline / "unet")
    x, t, context = case.inputs.x, case.inputs.t, case.inputs.cond["c_crossattn"][0]
    down, middle = controlnet(x, t, context, case.inputs.hint, return_dict=False)
    want = case.model.control_model(x=x, hint=case.inputs.hint, timesteps=t, context=context)
    for got, expected in zip([*down, middle], want, strict=True):
        assert relative_error(got, expected) < SAME
    got = unet(x, t, context, down_block_additional_residuals=down, mid_block_additional_residual=middle).sample
    assert relative_error(got, case.model.apply_model(x, t, case.inputs.cond)) < SAME
    plain = case.model.apply_model(x, t, {**case.inputs.cond, "c_concat": None})
    assert relative_error(unet(x, t, context).sample, plain) < SAME


@torch.no_grad()
def test_vae_gives_the_same_outputs(case: Case) -> None:
    vae = diffusers.AutoencoderKL.from_pretrained(case.pipeline / "vae")
    assert vae.config.scaling_factor == case.model.scale_factor
    ours = case.model.encode_first_stage(case.inputs.image)
    theirs = vae.encode(case.inputs.image).latent_dist
    assert relative_error(theirs.mean, ours.mean) < SAME
    assert relative_error(theirs.logvar, ours.logvar) < SAME
    decoded = vae.decode(case.inputs.x / vae.config.scaling_factor).sample
    assert relative_error(decoded, case.model.decode_first_stage(case.inputs.x)) < SAME


@torch.no_grad()
def test_text_encoder_and_tokenizer(case: Case) -> None:
    tokenizer = transformers.CLIPTokenizer.from_pretrained(case.pipeline / "tokenizer")
    encoder = transformers.CLIPTextModel.from_pretrained(case.pipeline / "text_encoder").eval()
    tokens = load_json("core/tokens_v15.json")
    ids = tokenizer(
        tokens["prompts"], padding="max_length", max_length=77, truncation=True, return_tensors="pt"
    ).input_ids
    want = torch.tensor(tokens["ids"])
    if case.name == "sd1":
        assert torch.equal(ids, want)
        expected = case.text.transformer.text_model(ids).last_hidden_state
        assert encoder.config.hidden_act == "quick_gelu"
    else:
        beyond_end = (want == 49407).cumsum(1) > 1
        # As in the published pipelines: the padding token is "!", which transformers then also sees in texts.
        plain = [i for i, prompt in enumerate(tokens["prompts"]) if "!" not in prompt]
        assert len(plain) > 8 and torch.equal(ids[plain], want.masked_fill(beyond_end, 0)[plain])
        expected = case.text.penultimate(ids)
    assert relative_error(encoder(ids).last_hidden_state, expected) < SAME


def test_whole_pipelines_load_and_come_back_bit_by_bit(case: Case, tmp_path: Path) -> None:
    pipeline = diffusers.StableDiffusionControlNetPipeline.from_pretrained(case.pipeline)
    assert pipeline.scheduler.config.prediction_type == {"sd1": "epsilon", "sd2": "v_prediction"}[case.name]
    assert torch.allclose(pipeline.scheduler.alphas_cumprod, case.model.alphas_cumprod, rtol=1e-5)
    pipeline.save_pretrained(tmp_path / "saved")
    report = identify(case.pipeline)
    assert report.layout == "diffusers-pipeline" and report.prediction == {"sd1": "eps", "sd2": "v"}[case.name]
    want = read_state_dict(case.path)
    for source in (case.pipeline, tmp_path / "saved"):
        back = tmp_path / f"{source.name}.ckpt"
        convert(source, back, "full", config=case.config, progress=False)
        got = read_state_dict(back)
        # diffusers itself keeps neither the unused last layer nor the projection of SD 2.x's text encoder
        unused = (f"resblocks.{LAYERS - 1}.", "text_projection", "logit_scale") if source.name == "saved" else ()
        for key, tensor in want.items():
            if not any(part in key for part in unused):
                assert torch.equal(got[key], tensor), key
        assert not got.keys() - want.keys()


def test_text_encoders_of_transformers_5(case: Case, tmp_path: Path) -> None:
    """It writes their keys without `text_model.` when it has made the encoder itself."""
    pipeline = tmp_path / "pipeline"
    shutil.copytree(case.pipeline, pipeline)
    path = pipeline / "text_encoder" / "model.safetensors"
    text = {key.removeprefix("text_model."): tensor for key, tensor in read_state_dict(path).items()}
    write_weights(path, text, overwrite=True, progress=False)
    for source in (case.pipeline, pipeline):
        convert(source, tmp_path / f"{source.parent.name}.pt", "full", config=case.config, progress=False)
    want, got = (read_state_dict(tmp_path / f"{f.parent.name}.pt") for f in (case.pipeline, pipeline))
    assert want.keys() == got.keys() and all(torch.equal(got[key], tensor) for key, tensor in want.items())
    assert any("a bare text encoder" in line for line in identify(pipeline / "text_encoder").suggestions)


def test_control_round_trips_through_every_layout(case: Case, tmp_path: Path) -> None:
    want = read_state_dict(case.path)
    for to, name in (
        ("diffusers", "folder"),
        ("diffusers", "one.safetensors"),
        ("control", "c.pth"),
        ("control-plain", "p.pt"),
    ):
        path, back = tmp_path / name, tmp_path / f"back_{to}_{name}.safetensors"
        convert(case.path, path, to, config=case.config, progress=False)
        convert(path, back, "full", base=case.path, config=case.config, progress=False)
        got = read_state_dict(back)
        assert got.keys() == want.keys() and all(torch.equal(got[key], tensor) for key, tensor in want.items())


def test_global_average_pooling_is_carried_along(case: Case, tmp_path: Path) -> None:
    folder, plain, again = tmp_path / "a", tmp_path / "b.safetensors", tmp_path / "c"
    convert(case.path, folder, "diffusers", config=case.config, global_average_pooling=True, progress=False)
    lines = convert(folder, plain, "control-plain", progress=False)
    assert any("global_average_pooling: true" in line for line in lines)
    convert(plain, again, "diffusers", config=case.config, progress=False)
    for made in (folder, again):
        assert diffusers.ControlNetModel.from_pretrained(made).config.global_pool_conditions is True


@torch.no_grad()
def test_single_files_that_diffusers_reads(case: Case, tmp_path: Path) -> None:
    """With the configuration given locally, as a machine without network needs it."""
    control, context = tmp_path / "control.safetensors", case.inputs.cond["c_crossattn"][0]
    convert(case.path, control, "control", progress=False)
    x, t, hint = case.inputs.x, case.inputs.t, case.inputs.hint
    controlnet = diffusers.ControlNetModel.from_single_file(
        str(control), config=str(case.pipeline), subfolder="controlnet"
    )
    want = case.model.control_model(x=x, hint=hint, timesteps=t, context=context)
    assert relative_error(controlnet(x, t, context, hint, return_dict=False)[1], want[-1]) < SAME
    full = tmp_path / "base.safetensors"
    convert(case.path, full, "base", config=case.config, progress=False)
    unet = diffusers.UNet2DConditionModel.from_single_file(str(full), config=str(case.pipeline), subfolder="unet")
    plain = case.model.apply_model(x, t, {**case.inputs.cond, "c_concat": None})
    assert relative_error(unet(x, t, context).sample, plain) < SAME
    vae = diffusers.AutoencoderKL.from_single_file(str(full), config=str(case.pipeline), subfolder="vae")
    assert (
        relative_error(
            vae.encode(case.inputs.image).latent_dist.mean, case.model.encode_first_stage(case.inputs.image).mean
        )
        < SAME
    )


def test_configurations_are_those_that_diffusers_writes(case: Case) -> None:
    """Nothing that matters is left to a default that may change."""
    for name, cls in (("unet", diffusers.UNet2DConditionModel), ("controlnet", diffusers.ControlNetModel)):
        ours = json.loads((case.pipeline / name / "config.json").read_text())
        loaded = cls.from_pretrained(case.pipeline / name)
        assert {k: v for k, v in ours.items() if k != "_class_name"}.items() <= dict(loaded.config).items() or all(
            loaded.config[k] == v or list(loaded.config[k]) == v for k, v in ours.items() if not k.startswith("_")
        )


@pytest.mark.full
@torch.no_grad()
@pytest.mark.parametrize("version", ("v15", "v21"))
def test_full_size_controlnet(version: str, tmp_path: Path) -> None:
    """The real shapes, filled; at a small latent, since they are what costs."""
    from cldm.config import load_config
    from ldm.util import instantiate_from_config

    with torch.device("meta"):
        ours = instantiate_from_config(load_config(f"cldm_{version}").model.params.control_stage_config)
    ours = fill_(ours.to_empty(device="cpu"), prefix="control_model.").eval()
    path = write_weights(tmp_path / "control.safetensors", ours.state_dict(), progress=False)
    convert(path, tmp_path / "folder", "diffusers", progress=False)
    path.unlink()
    theirs = diffusers.ControlNetModel.from_pretrained(tmp_path / "folder")
    width = {"v15": 768, "v21": 1024}[version]
    x, context = noise_tensor("x", (1, 4, 16, 8)), noise_tensor("context", (1, 77, width))
    hint, t = torch.sigmoid(noise_tensor("hint", (1, 3, 128, 64))), torch.tensor([500])
    want = ours(x=x, hint=hint, timesteps=t, context=context)
    down, middle = theirs(x, t, context, hint, return_dict=False)
    for got, expected in zip([*down, middle], want, strict=True):
        assert relative_error(got, expected) < SAME
