"""Files of real size (holes on disk) in every layout are recognised, and what they lack is named."""

import json
from pathlib import Path

import pytest
import torch

from cldm.checkpoint import identify
from cldm.checkpoint.expected import expected_entries
from tests.ldm.files.forging import hollow
from tests.parity import load_json

VERSIONS = {"v15": "sd1", "v21": "sd2"}
Shapes = dict[str, tuple[int, ...]]


def manifest(version: str, *prefixes: str) -> Shapes:
    """Keys and shapes of the real model, those with one of the prefixes."""
    entries = load_json(f"core/manifest_{version}.json").items()
    return {key: tuple(shape) for key, (shape, _) in entries if key.startswith(prefixes)}


def without_prefix(shapes: Shapes, prefix: str) -> Shapes:
    return {key.removeprefix(prefix): shape for key, shape in shapes.items() if key.startswith(prefix)}


def diffusers(name: str) -> Shapes:
    return {key: tuple(shape) for key, shape in load_json("core/manifest_diffusers.json")[name].items()}


@pytest.fixture(params=VERSIONS)
def version(request: pytest.FixtureRequest) -> str:
    return request.param


def test_full(tmp_path: Path, version: str) -> None:
    report = identify(hollow(tmp_path / "control_sd.safetensors", manifest(version, "")))
    assert (report.layout, report.family) == ("full", VERSIONS[version])
    assert report.config == f"cldm_{version}" and report.prediction == ("eps" if version == "v15" else None)
    assert report.parts["control"] == 340 and report.parts["unet"] == 686 and report.parts["vae"] == 248
    assert report.parts["schedule"] == 13 and report.dtypes == {"float32": sum(report.parts.values())}
    assert not report.missing and not report.extra and not report.mismatched and not report.ema
    assert report.bytes == 4 * report.parameters > 5e9


def test_base_as_published(tmp_path: Path) -> None:
    """v1-5-pruned: with averaged weights, without `logvar` and `position_ids`."""
    shapes = manifest("v15", "model.", "first_stage_model.", "cond_stage_model.")
    shapes = {key: shape for key, shape in shapes.items() if not key.endswith("position_ids")}
    averaged = {f"model_ema.{k[6:].replace('.', '')}": s for k, s in shapes.items() if k.startswith("model.")}
    report = identify(hollow(tmp_path / "v1-5-pruned.safetensors", shapes | averaged | {"betas": (1000,)}, "F16"))
    assert (report.layout, report.family, report.ema) == ("base", "sd1", True)
    assert report.parts["ema"] == 686 and report.dtypes == {"float16": len(shapes) + 687}
    assert not report.missing and not report.extra
    assert any("controlnet add-control" in line for line in report.suggestions)


@pytest.mark.parametrize(("prefix", "layout"), [("control_model.", "control"), ("", "control-plain")])
def test_control_alone(tmp_path: Path, version: str, prefix: str, layout: str) -> None:
    control = without_prefix(manifest(version, "control_model."), "control_model.")
    shapes = {prefix + key: shape for key, shape in control.items()}
    report = identify(hollow(tmp_path / "c.safetensors", shapes, "F16"))
    assert (report.layout, report.family) == (layout, VERSIONS[version])
    assert report.parts == {"control": 340} and not report.missing and not report.extra
    difference = identify(hollow(tmp_path / "d.safetensors", shapes | {"difference": ()}, "F16"))
    assert (difference.layout, difference.family) == ("difference", VERSIONS[version])
    assert not difference.missing and not difference.extra


def test_damage_is_named(tmp_path: Path) -> None:
    shapes = manifest("v15", "control_model.")
    del shapes["control_model.zero_convs.3.0.weight"]
    shapes["control_model.input_hint_block.0.weight"] = (16, 4, 3, 3)
    shapes["optimizer.state"] = (3,)
    report = identify(hollow(tmp_path / "c.safetensors", shapes))
    assert report.missing == ("control_model.zero_convs.3.0.weight",)
    assert report.mismatched == ("control_model.input_hint_block.0.weight",)
    assert report.extra == ("optimizer.state",)
    assert any("incomplete: 1 entries" in line for line in report.suggestions)


def test_base_without_vae_and_text(tmp_path: Path) -> None:
    report = identify(hollow(tmp_path / "u.safetensors", manifest("v21", "model.")))
    assert (report.layout, report.family) == ("base", "sd2") and len(report.missing) == 248 + 294 - 2
    assert sum("it has no" in line for line in report.suggestions) == 2


def test_diffusers_files(tmp_path: Path, version: str) -> None:
    for name, layout in (("controlnet", "diffusers-controlnet"), ("unet", "diffusers-unet")):
        report = identify(hollow(tmp_path / f"{name}.safetensors", diffusers(f"{name}_{version}"), "F16"))
        assert (report.layout, report.family) == (layout, VERSIONS[version])
        assert not report.missing and not report.extra and not report.mismatched


@pytest.mark.parametrize("old_names", [False, True])
@pytest.mark.parametrize("text_module", ["text_model.", ""])  # without it since transformers 5
def test_diffusers_pipeline(tmp_path: Path, version: str, old_names: bool, text_module: str) -> None:
    for component in ("unet", "vae", "text_encoder", "scheduler"):
        (tmp_path / component).mkdir()
    vae = diffusers("vae")
    if old_names:
        for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0")):
            vae = {key.replace(f".{new}.", f".{old}."): shape for key, shape in vae.items()}
    hollow(tmp_path / "unet" / "diffusion_pytorch_model.safetensors", diffusers(f"unet_{version}"))
    hollow(tmp_path / "vae" / "diffusion_pytorch_model.safetensors", vae)
    layers, width = (12, 768) if version == "v15" else (23, 1024)
    text = {key.replace("text_model.", text_module): shape for key, shape in _clip(layers, width).items()}
    hollow(tmp_path / "text_encoder" / "model.safetensors", text)
    (tmp_path / "model_index.json").write_text("{}")
    prediction = {"v15": "epsilon", "v21": "v_prediction"}[version]
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps({"prediction_type": prediction}))
    report = identify(tmp_path)
    assert (report.layout, report.family) == ("diffusers-pipeline", VERSIONS[version])
    assert report.prediction == {"v15": "eps", "v21": "v"}[version]
    assert report.parts["unet"] == 686 and report.parts["vae"] == 248
    assert not report.missing and not report.extra and not report.mismatched


def _clip(layers: int, width: int) -> Shapes:
    """A text encoder as transformers names it."""
    shapes = {
        "text_model.embeddings.token_embedding.weight": (49408, width),
        "text_model.embeddings.position_embedding.weight": (77, width),
    }
    linear = {f"self_attn.{name}": (width, width) for name in ("q_proj", "k_proj", "v_proj", "out_proj")}
    linear |= {"mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width)}
    linear |= {"layer_norm1": (width,), "layer_norm2": (width,)}
    for i in range(layers):
        for name, shape in linear.items():
            shapes[f"text_model.encoder.layers.{i}.{name}.weight"] = shape
            shapes[f"text_model.encoder.layers.{i}.{name}.bias"] = shape[:1]
    return shapes | {f"text_model.final_layer_norm.{kind}": (width,) for kind in ("weight", "bias")}


def test_tiny_in_a_lightning_checkpoint(tmp_path: Path) -> None:
    weights = {key: torch.zeros(info.shape, dtype=info.dtype) for key, info in expected_entries("cldm_tiny").items()}
    torch.save({"state_dict": weights, "pytorch-lightning_version": "2.5", "global_step": 7}, tmp_path / "last.ckpt")
    report = identify(tmp_path / "last.ckpt")
    assert (report.layout, report.family, report.config) == ("full", "tiny", "cldm_tiny")
    assert report.lightning and report.wrapping == ("state_dict",)
    assert not report.missing and not report.extra and not report.mismatched


@pytest.mark.parametrize(
    ("metadata", "prediction"),
    [
        ({"modelspec.prediction_type": "v"}, "v"),
        ({"modelspec.prediction_type": "epsilon"}, "eps"),
        ({"ss_v_parameterization": "True"}, "v"),
        ({"modelspec.title": "mine"}, None),
    ],
)
def test_prediction_from_metadata(tmp_path: Path, metadata: dict[str, str], prediction: str | None) -> None:
    path = hollow(tmp_path / "m.safetensors", manifest("v21", "model."), metadata=metadata)
    assert identify(path).prediction == prediction


def test_prediction_from_a_flag(tmp_path: Path) -> None:
    report = identify(hollow(tmp_path / "m.safetensors", manifest("v15", "model.") | {"v_pred": (0,), "ztsnr": (0,)}))
    assert report.prediction == "v" and not report.extra


@pytest.mark.parametrize(
    ("shapes", "hint"),
    [
        ({"lora_unet_down_blocks_0.lora_up.weight": (4, 4)}, "a LoRA"),
        ({"conditioner.embedders.0.transformer.x": (4,)}, "Stable Diffusion XL"),
        ({"input_blocks.0.0.weight": (320, 4, 3, 3), "output_blocks.0.0.x": (3,)}, "a bare UNet"),
        ({"something": (3,)}, "none of its keys"),
    ],
)
def test_unknown_files_are_explained(tmp_path: Path, shapes: Shapes, hint: str) -> None:
    report = identify(hollow(tmp_path / "x.safetensors", shapes))
    assert report.layout == "unknown" and any(hint in line for line in report.suggestions)
    assert not report.missing and not report.extra


def test_a_small_model_of_other_widths_is_not_taken_for_the_packaged_one(tmp_path: Path) -> None:
    shapes = {"control_model.input_blocks.0.0.weight": (24, 4, 3, 3), "control_model.x.attn2.to_k.weight": (24, 48)}
    report = identify(hollow(tmp_path / "x.safetensors", shapes))
    assert (report.layout, report.family, report.config) == ("control", "unknown", None)
    assert not report.missing and any("no packaged configuration fits" in line for line in report.suggestions)


def test_inpainting_and_xl_bases(tmp_path: Path) -> None:
    shapes = manifest("v15", "model.") | {"model.diffusion_model.input_blocks.0.0.weight": (320, 9, 3, 3)}
    report = identify(hollow(tmp_path / "inpaint.safetensors", shapes))
    assert report.family == "sd1" and any("9 channels" in line for line in report.suggestions)
    xl = {key: (s[0], 2048) if key.endswith("attn2.to_k.weight") else s for key, s in manifest("v15", "model.").items()}
    report = identify(hollow(tmp_path / "xl.safetensors", xl | {"conditioner.embedders.0.x": (1,)}))
    assert (report.layout, report.family, report.config) == ("base", "unknown", None)
    assert any("Stable Diffusion XL" in line for line in report.suggestions)
