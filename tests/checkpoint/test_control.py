"""Adding, moving and taking out a ControlNet."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from cldm.checkpoint import ModelWeights, add_control, convert, identify, open_model, transfer_control
from cldm.checkpoint.control import initial_values, join_control
from cldm.checkpoint.expected import model_params
from cldm.checkpoint.schedule import completed, model_betas
from cldm.config import load_config
from cldm.model import create_model
from ldm.files import CheckpointError, LazyTensor, open_weights, read_state_dict, write_weights, writing
from ldm.util import ConfigError
from tests.checkpoint.files import CONFIG, CONTROL, TEXT, UNET, VAE, only, same, saved, tiny_full, without
from tests.parity import load_json

QUIET = {"progress": False}


@pytest.fixture(scope="module")
def full() -> dict[str, Tensor]:
    return tiny_full()


@pytest.fixture(scope="module")
def other() -> dict[str, Tensor]:
    """Another model of the same family."""
    return tiny_full(seed=1)


@pytest.fixture()
def base(full: dict[str, Tensor], tmp_path: Path) -> Path:
    return saved(tmp_path / "base.safetensors", without(full, CONTROL, "logvar"))


@pytest.mark.parametrize(("config", "count"), [("cldm_v15", 43), ("cldm_v21", 43)])
def test_the_new_entries_of_stable_diffusion(config: str, count: int) -> None:
    """43 new entries: logvar, 24 of zero convolutions, 2 of the middle's, 16 of the hint encoder."""

    def unread() -> Tensor:
        raise AssertionError("planning must not read tensors")

    manifest = load_json(f"core/manifest_{config.removeprefix('cldm_')}.json")
    expected = {key: LazyTensor(tuple(s), getattr(torch, dtype), unread) for key, (s, dtype) in manifest.items()}
    published = without(expected, CONTROL, "logvar")
    added = join_control(ModelWeights(Path("sd.ckpt"), None, published), None, config)
    assert len(added.new) == count and not added.dropped and not added.kept
    sizes = {"logvar": 1, "zero_convs.": 24, "middle_block_out.": 2, "input_hint_block.": 16}
    for part, size in sizes.items():
        assert sum(part in key for key in added.new) == size
    assert added.tensors.keys() == expected.keys()
    assert len(published) + len(added.copied) + len(added.new) == len(expected)


def test_a_fresh_control_is_a_copy_with_zeros(base: Path, full: dict[str, Tensor], tmp_path: Path) -> None:
    output = tmp_path / "control.ckpt"
    added = add_control(base, output, **QUIET)
    got = read_state_dict(output)
    assert got.keys() == full.keys()
    assert same(without(got, CONTROL, "logvar"), without(full, CONTROL, "logvar"))
    for key in added.copied:
        assert torch.equal(got[key], full[key.replace(CONTROL, UNET)])
    for key in added.new:
        fresh = "input_hint_block" in key and "input_hint_block.14" not in key
        assert (got[key] != 0).any() == fresh, key
    first = got[CONTROL + "input_hint_block.0.weight"]  # uniform within 1 / sqrt(fan-in), as torch does
    assert 0.9 / 27**0.5 < first.abs().max() <= 1 / 27**0.5
    add_control(base, tmp_path / "again.safetensors", **QUIET)
    assert same(read_state_dict(tmp_path / "again.safetensors"), got)


def test_initial_values_are_those_of_the_model() -> None:
    from cldm.model import create_model

    model = create_model("cldm_tiny").state_dict()
    wanted = {key: LazyTensor.of(value) for key, value in model.items()}
    initial = initial_values(wanted)
    schedule, _ = completed(only(wanted, CONTROL), ModelWeights(Path("x"), None, {}), "cldm_tiny")
    initial |= without(schedule, CONTROL)
    assert {"betas", "logvar", CONTROL + "input_hint_block.14.bias"} <= initial.keys()
    for key, entry in initial.items():
        assert entry.shape == wanted[key].shape and entry.dtype == wanted[key].dtype
        if "input_hint_block" not in key or ".14." in key:
            assert torch.equal(entry.read(), model[key]), key


def test_the_default_device_does_not_matter(base: Path, full: dict[str, Tensor], tmp_path: Path) -> None:
    add_control(base, tmp_path / "wanted.safetensors", progress=False)
    with torch.device("meta"):
        add_control(base, tmp_path / "full.safetensors", progress=False)
        convert(tmp_path / "full.safetensors", tmp_path / "pipeline", "diffusers-pipeline", progress=False)
        convert(tmp_path / "pipeline", tmp_path / "back.safetensors", "full", progress=False)
        convert(tmp_path / "full.safetensors", tmp_path / "d.pth", "difference", base=base, progress=False)
    assert same(
        read_state_dict(tmp_path / "full.safetensors"), wanted := read_state_dict(tmp_path / "wanted.safetensors")
    )
    assert same(read_state_dict(tmp_path / "back.safetensors"), wanted)


def test_a_control_in_the_input_is_kept(full: dict[str, Tensor], tmp_path: Path) -> None:
    source, output = saved(tmp_path / "in.pt", without(full, "logvar")), tmp_path / "out.safetensors"
    added = add_control(source, output, **QUIET)
    assert added.new == ["logvar"] and len(added.kept) == len(only(full, CONTROL))
    assert same(read_state_dict(output), full)


@pytest.mark.parametrize("layout", ["full", "control", "control-plain", "diffusers", "difference"])
def test_control_from_any_layout(
    base: Path, full: dict[str, Tensor], other: dict[str, Tensor], tmp_path: Path, layout: str
) -> None:
    trained = saved(tmp_path / "trained.pth", {**full, **only(other, CONTROL)})
    source = tmp_path / ("folder" if layout == "diffusers" else "source.safetensors")
    convert(trained, source, layout, base=base, **QUIET)
    add_control(base, tmp_path / "out.safetensors", control_from=source, **QUIET)
    got = read_state_dict(tmp_path / "out.safetensors")
    want = {**full, **only(other, CONTROL)}
    assert same(without(got, CONTROL, "logvar"), without(want, CONTROL, "logvar"))
    for key in only(want, CONTROL):
        assert torch.allclose(got[key], want[key], atol=1e-6 if layout == "difference" else 0, rtol=0), key


def test_a_configuration_with_an_average_needs_none_in_the_file(base: Path, tmp_path: Path) -> None:
    config = load_config("cldm_tiny")
    config.model.params.use_ema = True
    OmegaConf.save(config, tmp_path / "own.yaml")
    added = add_control(base, tmp_path / "out.safetensors", config=tmp_path / "own.yaml", **QUIET)
    assert (
        not any(key.startswith("model_ema.") for key in added.tensors)
        and "control_model.time_embed.0.bias" in added.tensors
    )
    assert create_model(tmp_path / "own.yaml", weights=tmp_path / "out.safetensors").use_ema


def test_averages_are_dropped_and_files_unwrapped(base: Path, full: dict[str, Tensor], tmp_path: Path) -> None:
    averages = {
        f"model_ema.diffusion_model{k.removeprefix(UNET).replace('.', '')}": v + 1 for k, v in only(full, UNET).items()
    }
    lightning = {
        "state_dict": {**without(full, CONTROL, "logvar"), **averages, "model_ema.decay": torch.tensor(0.999)},
        "pytorch-lightning_version": "1.4.2",
        "callbacks": {"a": 1},
    }
    torch.save(lightning, tmp_path / "sd.ckpt")
    added = add_control(tmp_path / "sd.ckpt", tmp_path / "out.pth", dtype="float16", **QUIET)
    assert any("model_ema" in note for note in added.notes)
    got = torch.load(tmp_path / "out.pth", weights_only=True)
    assert got.keys() == full.keys()
    for key, tensor in only(full, UNET).items():
        assert torch.equal(got[key], tensor.half())
    assert got["betas"].dtype == torch.float32
    convert(tmp_path / "sd.ckpt", tmp_path / "ema.safetensors", "base", ema=True, **QUIET)
    got = read_state_dict(tmp_path / "ema.safetensors")
    assert got.keys() == without(full, CONTROL, "logvar").keys()
    assert all(torch.equal(got[key], tensor + 1) for key, tensor in only(full, UNET).items())
    with pytest.raises(CheckpointError, match="holds no EMA weights"):
        convert(base, tmp_path / "x.pt", "full", ema=True, **QUIET)


def test_what_cannot_be_joined_is_refused(base: Path, full: dict[str, Tensor], tmp_path: Path) -> None:
    output = tmp_path / "out.safetensors"

    def refused(message: str, state_dict: dict[str, Tensor], **options: object) -> None:
        source = saved(tmp_path / "source.safetensors", state_dict)
        with pytest.raises(CheckpointError, match=message):
            add_control(source, output, **options, **QUIET)
        source.unlink()
        assert not output.exists()

    plain = without(full, CONTROL)
    refused("holds no base model.*--control-from", only(full, CONTROL))
    refused(r"entries are missing, first 'first_stage_model\.", without(plain, VAE))
    refused("does not fit cldm_v15", plain, config="cldm_v15")
    key = UNET + "out.2.weight"
    refused(r"out.2.weight' has shape \[5, ", {**plain, key: torch.zeros(5, *plain[key].shape[1:])})
    partial = saved(tmp_path / "partial.pt", without(only(full, CONTROL), CONTROL + "zero_convs.3"))
    refused("partial.pt: its ControlNet is incomplete: 'control_model.zero_convs.3", plain, control_from=partial)
    refused("base.safetensors: holds no ControlNet", plain, control_from=base)


def test_transfer(base: Path, full: dict[str, Tensor], other: dict[str, Tensor], tmp_path: Path) -> None:
    trained = {**full, **only(tiny_full(seed=2), CONTROL)}
    trained[UNET + "out.2.bias"] = trained[UNET + "out.2.bias"] + 1  # trained with sd_locked=False
    controlled, output = saved(tmp_path / "controlled.ckpt", trained), tmp_path / "out.safetensors"
    target = saved(tmp_path / "target.safetensors", without(other, CONTROL, VAE, "logvar"))
    lines = transfer_control(base, controlled, target, output, **QUIET)
    assert any("target.safetensors has no VAE: it is taken from" in line for line in lines)
    got = read_state_dict(output)
    assert got.keys() == full.keys()
    for key in got:
        twin = key.replace(CONTROL, UNET)
        if twin.startswith(UNET) and twin in full:
            want = trained[key] + (other[twin] - full[twin])
        else:
            want = other[key] if key.startswith(TEXT) else trained[key]
        assert torch.equal(got[key], want), key
    assert identify(output).layout == "full" and not identify(output).missing


def test_transfer_of_a_control_alone_and_to_its_own_base(
    base: Path, full: dict[str, Tensor], other: dict[str, Tensor], tmp_path: Path
) -> None:
    control = saved(tmp_path / "control.safetensors", only(tiny_full(seed=2), CONTROL))
    target = saved(tmp_path / "target.safetensors", without(other, CONTROL, TEXT))
    lines = transfer_control(base, control, target, tmp_path / "a.pt", **QUIET)
    assert any("has no text encoder: it is taken from" in line and "base.safetensors" in line for line in lines)
    got = read_state_dict(tmp_path / "a.pt")
    assert same(only(got, UNET), only(other, UNET)) and same(only(got, TEXT), only(full, TEXT))
    transfer_control(base, control, base, tmp_path / "b.pt", **QUIET)
    assert same(only(read_state_dict(tmp_path / "b.pt"), CONTROL), read_state_dict(control))
    with pytest.raises(CheckpointError, match="holds no ControlNet"):
        transfer_control(base, target, base, tmp_path / "c.pt", **QUIET)
    with pytest.raises(CheckpointError, match="holds no base model"):
        transfer_control(control, control, base, tmp_path / "c.pt", **QUIET)


def test_transfer_between_families_is_refused(base: Path, full: dict[str, Tensor], tmp_path: Path) -> None:
    wide = {key: tensor.repeat(1, 2) if key.endswith("attn2.to_k.weight") else tensor for key, tensor in full.items()}
    target = saved(tmp_path / "wide.safetensors", without(wide, CONTROL))
    controlled = saved(tmp_path / "controlled.pt", full)
    with pytest.raises(CheckpointError, match="of another kind than .*: they differ in '.*attn2.to_k.weight'"):
        transfer_control(base, controlled, target, tmp_path / "out.pt", **QUIET)


def test_a_base_that_was_trained_too_is_exported_beside_the_control(
    base: Path, full: dict[str, Tensor], tmp_path: Path
) -> None:
    trained = {**full, UNET + "out.2.bias": full[UNET + "out.2.bias"] + 1}
    source = saved(tmp_path / "trained.ckpt", trained)
    lines = convert(source, tmp_path / "control.safetensors", "control", base=base, **QUIET)
    assert any(line.startswith("1 entries of the UNet differ") for line in lines)
    got = read_state_dict(tmp_path / "control_base.safetensors")
    assert same(got, without(trained, CONTROL, "logvar"))
    assert same(read_state_dict(tmp_path / "control.safetensors"), only(full, CONTROL))
    convert(source, tmp_path / "folder", "diffusers", base=base, **QUIET)
    assert identify(tmp_path / "folder_base").layout == "diffusers-pipeline"
    locked = saved(tmp_path / "locked.ckpt", full)
    lines = convert(locked, tmp_path / "plain.pth", "control-plain", base=base, **QUIET)
    assert not (tmp_path / "plain_base.pth").exists() and any("is that of" in line for line in lines)
    lines = convert(locked, tmp_path / "other.pth", "control-plain", **QUIET)
    assert any("--base" in line and "--with-base" in line for line in lines)
    convert(locked, tmp_path / "third.pth", "control-plain", with_base=True, **QUIET)
    assert same(read_state_dict(tmp_path / "third_base.pth"), without(full, CONTROL, "logvar"))


def test_of_two_outputs_what_was_written_is_said(
    base: Path, full: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    model, output = saved(tmp_path / "full.safetensors", full), tmp_path / "c.safetensors"
    needed = (tmp_path / "full.safetensors").stat().st_size
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed))  # not enough, with some to spare
    with pytest.raises(CheckpointError, match="MB are free"):
        convert(model, output, "control", with_base=True, **QUIET)
    assert not output.exists() and "was written" not in caplog.text
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    other = writing._write_safetensors

    def stop(file, tensors, *rest):
        if "model.diffusion_model.out.2.bias" in tensors:
            raise KeyboardInterrupt
        other(file, tensors, *rest)

    monkeypatch.setattr(writing, "_write_safetensors", stop)
    with pytest.raises(KeyboardInterrupt):
        convert(model, output, "control", with_base=True, **QUIET)
    assert output.exists() and f"{output} was written, and {tmp_path / 'c_base.safetensors'} was not" in caplog.text


def test_differences_are_near_exact_and_marked(base: Path, full: dict[str, Tensor], tmp_path: Path) -> None:
    source, difference = saved(tmp_path / "full.pt", full), tmp_path / "difference.safetensors"
    convert(source, difference, "difference", **QUIET)
    with open_weights(difference) as file:
        assert "difference" in file and identify(difference).layout == "difference"
        key = "control_model.input_blocks.1.0.in_layers.2.weight"
        assert torch.equal(file[key].read(), full[key] - full[key.replace(CONTROL, UNET)])
        key = "control_model.zero_convs.0.0.weight"
        assert torch.equal(file[key].read(), full[key])
    with pytest.raises(CheckpointError, match="takes that base with --base"):
        convert(difference, tmp_path / "x.pt", "control", **QUIET)
    convert(difference, tmp_path / "back.pt", "full", base=base, **QUIET)
    got = read_state_dict(tmp_path / "back.pt")
    assert got.keys() == full.keys() and all(torch.allclose(got[k], v, atol=1e-6) for k, v in full.items())


def test_a_difference_is_added_to_a_base_on_an_accelerator(
    full: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On fake CUDA tensors, which no tensor of the CPU may be added to."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from cldm.model import create_model, load_control

    monkeypatch.setattr("cldm.model._READERS", 1)  # fake tensors are not for several threads
    difference = tmp_path / "difference.safetensors"
    convert(saved(tmp_path / "full.pt", full), difference, "difference", **QUIET)
    model = create_model("cldm_tiny", device="meta")
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in model.modules():
            for name, value in module._parameters.items():
                if value is not None:
                    module._parameters[name] = torch.nn.Parameter(torch.empty_like(value, device="cuda"))
    unet = model.state_dict()[UNET + "out.2.bias"]
    with pytest.raises(Exception, match="device"):
        torch.add(torch.ones(unet.shape), unet)
    report = load_control(model, difference)
    assert len(report.loaded) == len(only(full, CONTROL)) and not report.ignored
    assert {p.device.type for p in model.control_model.parameters()} == {"cuda"}


def test_conversions_that_lack_something_say_what(base: Path, full: dict[str, Tensor], tmp_path: Path) -> None:
    control = saved(tmp_path / "control.pt", only(full, CONTROL))
    with pytest.raises(CheckpointError, match="holds no ControlNet.*controlnet add-control"):
        convert(base, tmp_path / "x.pt", "control", **QUIET)
    with pytest.raises(CheckpointError, match="control.pt: has no UNet; name a base model that has one with --base"):
        convert(control, tmp_path / "x.pt", "full", **QUIET)
    with pytest.raises(CheckpointError, match="unknown layout 'onnx'; known are full"):
        convert(control, tmp_path / "x.pt", "onnx", **QUIET)
    (tmp_path / "page.ckpt").write_text("<html>")
    with pytest.raises(CheckpointError, match="HTML"):
        convert(tmp_path / "page.ckpt", tmp_path / "x.pt", "full", **QUIET)
    unknown = saved(tmp_path / "unknown.pt", {"a": torch.ones(1)})
    with pytest.raises(CheckpointError, match="no layout known here"):
        convert(unknown, tmp_path / "x.pt", "full", **QUIET)
    assert not (tmp_path / "x.pt").exists()


def test_a_difference_needs_the_unet_that_it_was_taken_from(
    full: dict[str, Tensor], base: Path, tmp_path: Path
) -> None:
    difference, output = tmp_path / "difference.safetensors", tmp_path / "out.safetensors"
    convert(saved(tmp_path / "full.pt", full), difference, "difference", **QUIET)
    control = saved(tmp_path / "control.pt", only(full, CONTROL))
    with pytest.raises(CheckpointError, match="no UNet was given"):
        convert(difference, output, "control", base=control, **QUIET)
    partial = saved(tmp_path / "partial.pt", without(full, CONTROL, UNET + "input_blocks.1.0.in_layers.2.weight"))
    with pytest.raises(CheckpointError, match="'input_blocks.1.0.in_layers.2.weight' is not in the base model"):
        convert(difference, output, "control", base=partial, **QUIET)
    assert not output.exists()


@pytest.mark.parametrize("lacking", ["zero_convs.3.", "input_blocks.1.0.in_layers.2.weight"])
@pytest.mark.parametrize("role", ["base", "controlled", "target"])
def test_transfer_refuses_what_is_incomplete(
    base: Path, full: dict[str, Tensor], tmp_path: Path, role: str, lacking: str
) -> None:
    files = {"base": base, "controlled": saved(tmp_path / "control.pt", only(full, CONTROL)), "target": base}
    if role == "controlled":
        files[role] = saved(tmp_path / "partial.pt", without(only(full, CONTROL), CONTROL + lacking))
    else:
        files[role] = saved(tmp_path / "partial.pt", without(full, CONTROL, UNET + "out.2."))
    with pytest.raises(CheckpointError, match="partial.pt: its (UNet|ControlNet) is incomplete"):
        transfer_control(**files, output=tmp_path / "out.pt", **QUIET)


@pytest.mark.parametrize("multipliers", [[1, 2], [1, 1, 1, 1, 2]])
def test_transfer_between_models_of_other_depths(tmp_path: Path, multipliers: list[int]) -> None:
    """They have the widths of a known family, and other levels: what counts is that the three files agree."""
    config = load_config("cldm_tiny")
    for part in (config.model.params.unet_config, config.model.params.control_stage_config):
        part.params.update(channel_mult=multipliers, attention_resolutions=[1])
    model = create_model(config).state_dict()
    base, trained = (saved(tmp_path / f"{i}.pt", {k: v + i for k, v in model.items()}) for i in range(2))
    transfer_control(base, trained, base, tmp_path / "out.pt", **QUIET)
    got = read_state_dict(tmp_path / "out.pt")
    for key, value in only(model, CONTROL).items():
        torch.testing.assert_close(got[key], value + 1)
    cut = saved(tmp_path / "cut.pt", without({k: v + 1 for k, v in model.items()}, CONTROL + "zero_convs.3."))
    with pytest.raises(CheckpointError, match="its ControlNet is incomplete: .*zero_convs.3.0.weight"):
        transfer_control(base, cut, base, tmp_path / "no.pt", **QUIET)


def test_transfer_refuses_what_is_incomplete_in_an_unknown_family(full: dict[str, Tensor], tmp_path: Path) -> None:
    wide = {key: tensor.repeat(1, 2) if key.endswith("attn2.to_k.weight") else tensor for key, tensor in full.items()}
    base = saved(tmp_path / "base.pt", without(wide, CONTROL))
    control = saved(tmp_path / "c.pt", without(only(wide, CONTROL), CONTROL + "input_blocks.1.0.in_layers.2.weight"))
    assert identify(base).family == identify(control).family == "unknown"
    with pytest.raises(CheckpointError, match="c.pt: its ControlNet is incomplete: .*in_layers.2.weight"):
        transfer_control(base, control, base, tmp_path / "out.pt", **QUIET)


def test_what_is_incomplete_is_noted(full: dict[str, Tensor], base: Path, tmp_path: Path) -> None:
    lacking = (VAE + "decoder.conv_in.weight", TEXT + "transformer.text_model.final_layer_norm.bias")
    partial = without(full, CONTROL, *lacking) | {
        TEXT + "transformer.text_model.final_layer_norm.weight": torch.ones(3)
    }
    target = saved(tmp_path / "target.safetensors", partial)
    control = saved(tmp_path / "control.pt", only(full, CONTROL))
    convert(base, tmp_path / "pipe", "diffusers-pipeline", **QUIET)
    vae = tmp_path / "pipe" / "vae" / "diffusion_pytorch_model.safetensors"
    saved_vae = read_state_dict(vae)
    vae.unlink()
    saved(vae, without(saved_vae, "decoder.conv_in."))
    for lines in (
        transfer_control(base, control, target, tmp_path / "moved.pt", **QUIET),
        convert(control, tmp_path / "full.pt", "full", base=target, **QUIET),
        convert(target, tmp_path / "whole.pt", "base", **QUIET),
    ):
        assert any("target.safetensors: incomplete: 2 entries" in line for line in lines)
        assert any("target.safetensors: unfit: 1 entries" in line for line in lines)
    lines = convert(control, tmp_path / "piped.pt", "full", base=tmp_path / "pipe", **QUIET)
    assert any(
        "pipe: incomplete: 2 entries are missing, first 'first_stage_model.decoder.conv_in" in line for line in lines
    )
    assert any("incomplete: 2" in line for line in identify(tmp_path / "pipe").suggestions)
    wrong = identify(saved(tmp_path / "wrong.pt", {**full, VAE + "quant_conv.bias": torch.ones(3)})).suggestions
    assert any("unfit: 1" in line for line in wrong) and not any("load it whole" in line for line in wrong)


@pytest.mark.parametrize("to", ["full", "diffusers-pipeline"])
def test_families_are_not_mixed(full: dict[str, Tensor], base: Path, tmp_path: Path, to: str) -> None:
    wide = {key: tensor.repeat(1, 2) if key.endswith("attn2.to_k.weight") else tensor for key, tensor in full.items()}
    control = saved(tmp_path / "control.pt", only(wide, CONTROL))
    with pytest.raises(CheckpointError, match="of another kind than .*: they differ in '.*attn2.to_k.weight'"):
        convert(control, tmp_path / "out.pt", to, base=base, **QUIET)
    assert not (tmp_path / "out.pt").exists()
    with pytest.raises(CheckpointError, match="base.safetensors: does not fit cldm_v15"):
        convert(base, tmp_path / "out.pt", to, config="cldm_v15", **QUIET)


def test_averages_must_have_the_shapes_of_what_they_replace(full: dict[str, Tensor], tmp_path: Path) -> None:
    average = {"model_ema.diffusion_modelout2bias": torch.ones(7)}
    source = saved(tmp_path / "ema.pt", {**without(full, CONTROL), **average})
    with pytest.raises(CheckpointError, match=r"the EMA of '.*out.2.bias' has shape \[7\]"):
        convert(source, tmp_path / "out.pt", "base", ema=True, **QUIET)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_floats_of_one_byte_are_moved(full: dict[str, Tensor], base: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    small = {key: tensor.to(dtype) for key, tensor in only(full, CONTROL).items()}
    control = saved(tmp_path / "control.safetensors", small)
    transfer_control(base, control, base, tmp_path / "moved.safetensors", **QUIET)
    got = read_state_dict(tmp_path / "moved.safetensors")
    convert(control, tmp_path / "difference.safetensors", "difference", base=base, **QUIET)
    difference = read_state_dict(tmp_path / "difference.safetensors")
    for key, tensor in small.items():
        twin = full.get(key.replace(CONTROL, UNET))
        if twin is not None:
            assert torch.equal(got[key], tensor.float())
            assert torch.equal(difference[key], tensor.float() - twin)


def test_inputs_are_never_overwritten(base: Path, full: dict[str, Tensor], tmp_path: Path) -> None:
    before = base.read_bytes()
    source = saved(tmp_path / "full.safetensors", full)
    (tmp_path / "link.safetensors").symlink_to(base)
    force = {"overwrite": True, **QUIET}
    for output in (base, tmp_path / "link.safetensors"):
        for work in (
            lambda output=output: add_control(base, output, **force),
            lambda output=output: convert(base, output, "full", **force),
            lambda output=output: convert(source, output, "control", base=base, **force),
            lambda output=output: add_control(source, output, control_from=base, **force),
            lambda output=output: transfer_control(base, source, source, output, **force),
        ):
            with pytest.raises(CheckpointError, match="is also the input"):
                work()
    beside = saved(tmp_path / "out_base.safetensors", without(full, CONTROL))  # where a changed base would be written
    with pytest.raises(CheckpointError, match="out_base.safetensors: is also the input"):
        convert(source, tmp_path / "out.safetensors", "control", base=beside, with_base=True, **force)
    assert base.read_bytes() == before and not (tmp_path / "out.safetensors").exists()
    folder = tmp_path / "pipe"
    convert(source, folder, "diffusers-pipeline", **QUIET)
    with pytest.raises(CheckpointError, match="is also the input"):
        convert(folder, folder, "diffusers-pipeline", **force)


def test_an_export_into_an_exported_folder_keeps_what_people_added(full: dict[str, Tensor], tmp_path: Path) -> None:
    source, folder = saved(tmp_path / "full.safetensors", full), tmp_path / "folder"
    for to in ("diffusers", "diffusers-pipeline"):
        convert(source, folder / to if folder.exists() else folder, to, overwrite=True, **QUIET)
        out = folder / to if (folder / to).exists() else folder
        for name in ("model_notes.md", "prompt.json"):
            (out / name).write_text("mine")
        convert(source, out, to, overwrite=True, **QUIET)
        assert all((out / name).read_text() == "mine" for name in ("model_notes.md", "prompt.json"))


def test_ema_needs_weights_that_are_averaged(full: dict[str, Tensor], tmp_path: Path) -> None:
    scalars = {"model_ema.decay": torch.tensor(0.999), "model_ema.num_updates": torch.tensor(7)}
    source = saved(tmp_path / "scalars.pt", {**without(full, CONTROL), **scalars})
    with pytest.raises(CheckpointError, match="holds no EMA weights"):
        convert(source, tmp_path / "out.pt", "base", ema=True, **QUIET)
    assert not (tmp_path / "out.pt").exists()
    key = CONTROL + "zero_convs.0.0.bias"
    averaged = {"model_ema." + key.replace(".", ""): torch.full_like(full[key], 3.0)}
    convert(saved(tmp_path / "control.pt", {**full, **averaged}), tmp_path / "out.pt", "control", ema=True, **QUIET)
    assert torch.equal(read_state_dict(tmp_path / "out.pt")[key], averaged["model_ema." + key.replace(".", "")])


@pytest.mark.parametrize("one", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("other", [torch.float32, torch.float16, torch.bfloat16])
def test_a_base_in_another_precision_is_the_same_base(
    full: dict[str, Tensor], tmp_path: Path, one: torch.dtype, other: torch.dtype
) -> None:
    plain = {key: tensor / 100 if key.endswith("out.2.bias") else tensor for key, tensor in full.items()}
    source, base = tmp_path / "full.safetensors", tmp_path / "base.safetensors"
    write_weights(source, plain, dtype=one, **QUIET)
    write_weights(base, without(plain, CONTROL), dtype=other, **QUIET)
    lines = convert(source, tmp_path / "a.safetensors", "control", base=base, **QUIET)
    assert any("is that of" in line for line in lines)
    changed = {**plain, UNET + "out.2.weight": plain[UNET + "out.2.weight"] * 1.05}
    write_weights(source, changed, dtype=one, overwrite=True, **QUIET)
    lines = convert(source, tmp_path / "b.safetensors", "control", base=base, **QUIET)
    assert any(line.startswith("1 entries of the UNet differ") for line in lines)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.uint16, torch.bool, torch.complex64])
def test_weights_that_are_no_floats_are_compared_too(
    base: Path, full: dict[str, Tensor], tmp_path: Path, dtype: torch.dtype
) -> None:
    odd = {**full, UNET + "out.2.weight": (30 * full[UNET + "out.2.weight"]).to(dtype)}
    source = saved(tmp_path / "odd.safetensors", odd)
    lines = convert(source, tmp_path / "a.safetensors", "control", base=base, **QUIET)
    assert any(line.startswith("1 entries of the UNet differ") for line in lines)
    lines = convert(source, tmp_path / "b.safetensors", "control", base=source, **QUIET)
    assert any("is that of" in line for line in lines)


def test_options_and_metadata_that_do_not_belong(base: Path, full: dict[str, Tensor], tmp_path: Path) -> None:
    source = tmp_path / "full.safetensors"
    told = {"modelspec.hash_sha256": "0x1", "sshs_model_hash": "2", "modelspec.title": "mine", "ss_sd_model_hash": "3"}
    write_weights(source, full, told, **QUIET)
    with pytest.raises(CheckpointError, match="--with-base is for layouts"):
        convert(source, tmp_path / "out.safetensors", "full", with_base=True, **QUIET)
    convert(source, tmp_path / "out.safetensors", "control", **QUIET)
    with open_weights(tmp_path / "out.safetensors") as file:  # the hash of the base that was trained on is still right
        assert file.metadata.keys() >= {"modelspec.title", "ss_sd_model_hash"}
        assert not any("hash" in key for key in file.metadata.keys() - {"ss_sd_model_hash"})


# What a file says beside its weights: it follows the part of the model that it is about.


def told(path: Path) -> tuple[str | None, str | None]:
    """What the UNet predicts and whether the ControlNet averages, as the file says."""
    with open_weights(path) as file:
        return file.metadata.get("modelspec.prediction_type"), file.metadata.get("global_average_pooling")


def test_the_scale_is_that_of_the_vae(full: dict[str, Tensor], tmp_path: Path) -> None:
    source, control = tmp_path / "full.safetensors", tmp_path / "control.safetensors"
    write_weights(source, full, {"scale_factor": "0.5"}, **QUIET)
    write_weights(control, only(full, CONTROL), {"scale_factor": "0.7"}, **QUIET)  # which has no latents to scale
    base, folder, back = tmp_path / "base.safetensors", tmp_path / "folder", tmp_path / "back.safetensors"
    joined, alone, moved = (
        tmp_path / "joined.safetensors",
        tmp_path / "alone.safetensors",
        tmp_path / "moved.safetensors",
    )
    convert(source, base, "base", **QUIET)
    convert(source, alone, "control", **QUIET)
    add_control(base, joined, control_from=control, **QUIET)
    transfer_control(base, control, base, moved, **QUIET)
    convert(source, folder, "diffusers-pipeline", **QUIET)
    convert(folder, back, "base", **QUIET)
    assert json.loads((folder / "vae" / "config.json").read_text())["scaling_factor"] == 0.5
    assert [identify(file).told.get("scale_factor") for file in (base, joined, moved, folder, back)] == [0.5] * 5
    assert [identify(file).told.get("scale_factor") for file in (control, alone)] == [None] * 2
    for nonsense in ("half", "nan", "inf", "0", "-0.5"):
        write_weights(base, without(full, CONTROL), {"scale_factor": nonsense}, overwrite=True, **QUIET)
        assert "scale_factor" not in identify(base).told
    for number in (10**400, "half", [0.5], -1):
        (folder / "vae" / "config.json").write_text(json.dumps({"scaling_factor": number}))
        assert "scale_factor" not in identify(folder).told
    # A model with another scale would paint noise: the file is refused before anything is filled.
    with pytest.raises(CheckpointError, match=r"scales latents by 0.5, this model by .*; set `scale_factor: 0.5`"):
        create_model("cldm_tiny", weights=source)
    own = {"scale_factor": f"{load_config('cldm_tiny').model.params.scale_factor:.5f}"}
    create_model("cldm_tiny", weights=write_weights(back, full, own, overwrite=True, **QUIET))


def test_the_prediction_is_that_of_the_unet(full: dict[str, Tensor], tmp_path: Path) -> None:
    plain, control = without(full, CONTROL, "logvar"), tmp_path / "control.safetensors"
    base, v_base = tmp_path / "base.safetensors", tmp_path / "v.safetensors"
    write_weights(base, plain, {"modelspec.prediction_type": "epsilon"}, **QUIET)
    write_weights(v_base, plain, {"ss_v_parameterization": "True"}, **QUIET)
    write_weights(control, only(full, CONTROL), {"modelspec.prediction_type": "epsilon"}, **QUIET)
    v_folder, x_folder, out = tmp_path / "v", tmp_path / "x", tmp_path / "out.safetensors"
    convert(v_base, v_folder, "diffusers-pipeline", **QUIET)
    convert(v_base, x_folder, "diffusers-pipeline", prediction="x0", **QUIET)
    for source, prediction in ((v_base, "v"), (v_folder, "v"), (x_folder, "x0"), (base, "eps")):
        assert identify(source).prediction == prediction
        add_control(source, out, control_from=control, overwrite=True, **QUIET)
        assert told(out)[0] == identify(out).prediction == prediction
        transfer_control(base, control, source, out, overwrite=True, **QUIET)
        assert identify(out).prediction == prediction
        convert(control, out, "full", base=source, overwrite=True, **QUIET)
        assert identify(out).prediction == prediction
        convert(control, tmp_path / "folder", "diffusers-pipeline", base=source, overwrite=True, **QUIET)
        assert identify(tmp_path / "folder").prediction == prediction
        lines = convert(control, tmp_path / "out.ckpt", "full", base=source, overwrite=True, **QUIET)
        assert any(f"cannot say that the model predicts {prediction}" in n for n in lines) == (prediction != "eps")


def test_pooling_is_that_of_the_control(full: dict[str, Tensor], base: Path, tmp_path: Path) -> None:
    pooled, plain, out = (tmp_path / f"{name}.safetensors" for name in ("pooled", "plain", "out"))
    write_weights(pooled, full, {"global_average_pooling": "true"}, **QUIET)
    saved(plain, only(full, CONTROL))
    folder = tmp_path / "folder"
    convert(pooled, folder, "diffusers", **QUIET)
    for control, want in ((pooled, "true"), (folder, "true"), (plain, None)):
        for source in (base, pooled):
            added = add_control(source, out, control_from=control, overwrite=True, **QUIET)
            assert told(out)[1] == want and any("averages" in note for note in added.notes) == (want == "true")
        lines = transfer_control(base, control, base, out, overwrite=True, **QUIET)
        assert told(out)[1] == want and any("averages" in note for note in lines) == (want == "true")
    lines = convert(pooled, tmp_path / "out.pth", "control", with_base=True, **QUIET)
    assert any("cannot say that the ControlNet averages" in line for line in lines)
    convert(pooled, out, "control", global_average_pooling=False, with_base=True, overwrite=True, **QUIET)
    assert told(out)[1] is None
    convert(pooled, out, "control", with_base=True, overwrite=True, **QUIET)
    assert told(out)[1] == "true" and told(tmp_path / "out_base.safetensors")[1] is None
    convert(pooled, out, "base", overwrite=True, **QUIET)
    assert told(out)[1] is None


@pytest.mark.parametrize(
    "scheduler",
    [
        {"beta_end": 0.02},
        {"beta_schedule": "linear"},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"rescale_betas_zero_snr": True},
        {"trained_betas": [0.001 + 1e-5 * i for i in range(1000)]},
    ],
)
def test_the_noise_schedule_is_that_of_the_unet(
    full: dict[str, Tensor], base: Path, tmp_path: Path, scheduler: dict[str, object]
) -> None:
    """Judged by diffusers' own scheduler, from a folder to files and back."""
    diffusers = pytest.importorskip("diffusers")
    folder, control = tmp_path / "pipe", saved(tmp_path / "control.pt", only(full, CONTROL))
    convert(base, folder, "diffusers-pipeline", **QUIET)
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **scheduler}))

    def betas(pipeline: Path) -> Tensor:
        return diffusers.DDIMScheduler.from_pretrained(pipeline / "scheduler").betas

    want = betas(folder)
    outputs = [tmp_path / f"{i}.safetensors" for i in range(4)]
    convert(folder, outputs[0], "base", **QUIET)
    convert(control, outputs[1], "full", base=folder, **QUIET)
    add_control(folder, outputs[2], **QUIET)
    transfer_control(base, control, folder, outputs[3], **QUIET)
    for i, output in enumerate(outputs):
        # diffusers computes in float32, which costs it three digits where it rescales
        assert torch.allclose(read_state_dict(output)["betas"], want, rtol=1e-3), i
        convert(output, tmp_path / f"back{i}", "diffusers-pipeline", **QUIET)
        assert torch.allclose(betas(tmp_path / f"back{i}"), want, rtol=1e-3)
    convert(control, tmp_path / "direct", "diffusers-pipeline", base=folder, **QUIET)
    assert torch.allclose(betas(tmp_path / "direct"), want, rtol=1e-3)


@pytest.mark.parametrize(
    "scheduler",
    [
        {"beta_schedule": ["x"]},
        {"beta_schedule": "sigmoid"},
        {"beta_start": "x"},
        {"beta_start": float("nan")},
        {"beta_end": -0.1},
        {"num_train_timesteps": 1000.0},
        {"num_train_timesteps": 0},
        {"num_train_timesteps": 10**9},
        {"trained_betas": [0.1, "x"]},
        {"trained_betas": {"a": 1}},
        {"trained_betas": [10**400]},
    ],
)
def test_senseless_schedulers_are_refused(base: Path, tmp_path: Path, scheduler: dict[str, object]) -> None:
    from cldm.model import create_model

    convert(base, tmp_path / "pipe", "diffusers-pipeline", **QUIET)
    path = tmp_path / "pipe" / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **scheduler}))
    with pytest.raises(CheckpointError, match="pipe: scheduler_config.json: "):
        convert(tmp_path / "pipe", tmp_path / "out.pt", "base", **QUIET)
    with pytest.raises(CheckpointError, match="pipe: scheduler_config.json: "):
        create_model("cldm_tiny", weights=tmp_path / "pipe")


def test_a_stored_schedule_of_many_millions_is_refused_unread(base: Path) -> None:
    with open_model(base) as model:
        model.tensors["betas"] = LazyTensor((10**9,), torch.float16, lambda: pytest.fail("it was read"))
        with pytest.raises(CheckpointError, match="betas of the noise schedule must be a list of 1 to"):
            model_betas(model_params(CONFIG), model)


@pytest.mark.parametrize(
    "content",
    [
        {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": [1]},
        {"target": "cldm.cldm.ControlLDM", "params": {"image_size": 8}},
        {"target": "cldm.cldm.ControlLDM", "params": {"unet_config": {"params": 3}, "control_stage_config": 3}},
        {"target": "cldm.cldm.ControlLDM"},
    ],
)
@pytest.mark.parametrize("to", ["diffusers", "diffusers-pipeline"])
def test_configurations_of_something_else_are_refused(
    full: dict[str, Tensor], tmp_path: Path, content: dict[str, object], to: str
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps({"model": content}))
    source = saved(tmp_path / "full.pt", full | {UNET + "input_blocks.0.0.weight": torch.zeros(8, 4, 3, 3)})
    assert identify(source).config is None
    with pytest.raises((CheckpointError, ConfigError)):
        convert(source, tmp_path / "folder", to, config=config, **QUIET)
