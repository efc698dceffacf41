"""Creating and loading models: packaged configurations, every way weights come, and errors that say what is wrong."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from cldm.checkpoint import CheckpointError, add_control, convert
from cldm.checkpoint.expected import build_entries, expected_entries
from cldm.config import load_config, override
from cldm.model import create_model, load_control, load_state_dict, load_weights
from ldm.files import write_weights
from ldm.util import ConfigError
from tests.cldm.fake_tensors import fake_tensors
from tests.cldm.tiny import tiny_config, tiny_model
from tutorial_train import Settings

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A filled small model, its configuration file and its weights in fp32 and fp16."""
    folder = tmp_path_factory.mktemp("model")
    model = tiny_model("sd2")
    OmegaConf.save({"model": tiny_config("sd2")}, folder / "small.yaml")
    write_weights(folder / "full.safetensors", model.state_dict(), progress=False)
    write_weights(folder / "half.ckpt", model.state_dict(), dtype=torch.float16, progress=False)
    return model, folder


def test_the_published_idiom_and_the_quick_way_give_the_same_model(saved):
    model, folder = saved
    idiom = create_model(str(folder / "small.yaml")).cpu()
    idiom.load_state_dict(load_state_dict(folder / "full.safetensors", location="cpu"))
    quick = create_model(folder / "small.yaml", weights=folder / "full.safetensors")
    for other in (idiom, quick):
        assert other.state_dict().keys() == model.state_dict().keys()
        assert all(torch.equal(v, model.state_dict()[k]) for k, v in other.state_dict().items())
    assert not any(b.is_meta for b in [*quick.buffers(), *quick.parameters()])
    wanted = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n for n, p in quick.named_parameters() if p.requires_grad} == wanted
    assert quick.device == quick.first_stage_model.device == torch.device("cpu")
    torch.testing.assert_close(quick.lvlb_weights, model.lvlb_weights)


def test_half_precision_files_fill_single_precision_models(saved):
    model, folder = saved
    loaded = create_model(folder / "small.yaml", weights=folder / "half.ckpt")
    key = "control_model.input_blocks.1.0.in_layers.2.weight"
    assert loaded.state_dict()[key].dtype == torch.float32
    torch.testing.assert_close(loaded.state_dict()[key], model.state_dict()[key].half().float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e5m2])
def test_a_schedule_in_half_precision_is_not_taken(saved, tmp_path, dtype):
    """Its alpha-bar has too few digits to sample with; the configuration has them all."""
    model, folder = saved
    entries = {k: v.to(dtype) if v.is_floating_point() else v for k, v in model.state_dict().items()}
    write_weights(tmp_path / "half.safetensors", entries, progress=False)
    loaded = create_model(folder / "small.yaml", weights=tmp_path / "half.safetensors")
    assert torch.equal(loaded.alphas_cumprod, model.alphas_cumprod)
    published = create_model(folder / "small.yaml")
    published.load_state_dict(load_state_dict(tmp_path / "half.safetensors"))
    assert torch.equal(published.alphas_cumprod, model.alphas_cumprod)
    # Another schedule is the file's own, as many digits as it may have.
    entries |= {"betas": torch.full((1000,), 0.01).to(dtype)}
    write_weights(tmp_path / "other.safetensors", entries, progress=False)
    other = create_model(folder / "small.yaml", weights=tmp_path / "other.safetensors")
    assert torch.allclose(other.betas, torch.tensor(0.01), rtol=0.2)


def test_a_model_made_in_inference_mode_is_an_ordinary_one(saved):
    _, folder = saved
    with torch.inference_mode():
        made = create_model(folder / "small.yaml", weights=folder / "full.safetensors")
    assert not any(p.is_inference() for p in made.parameters())


def test_published_files_lack_logvar(saved, tmp_path):
    model, folder = saved
    entries = {k: v for k, v in model.state_dict().items() if k != "logvar"}
    write_weights(tmp_path / "published.safetensors", entries, progress=False)
    loaded = create_model(folder / "small.yaml", weights=tmp_path / "published.safetensors")
    assert torch.equal(loaded.logvar, torch.zeros(1000))


@pytest.mark.parametrize("prefix", ["control_model.", ""])
def test_a_controlnet_alone(saved, tmp_path, prefix):
    model, folder = saved
    entries = {prefix + k: v + 1 for k, v in model.control_model.state_dict().items()}
    write_weights(tmp_path / "control.safetensors", entries, progress=False)
    loaded = create_model(folder / "small.yaml", weights=folder / "full.safetensors")
    report = load_control(loaded, tmp_path / "control.safetensors")
    assert len(report.loaded) == len(entries) and not report.ignored
    assert torch.equal(loaded.control_model.zero_convs[0][0].weight, model.control_model.zero_convs[0][0].weight + 1)


@pytest.mark.parametrize("to", ["full", "control", "control-plain", "difference", "diffusers", "diffusers.safetensors"])
def test_a_controlnet_of_every_layout_loads_onto_a_model(saved, tmp_path, to):
    model, folder = saved
    full = folder / "full.safetensors"
    output = full if to == "full" else tmp_path / ("control" if to == "diffusers" else "control.safetensors")
    if to != "full":
        convert(full, output, to.partition(".")[0], base=full, config=folder / "small.yaml", progress=False)
    loaded = create_model(folder / "small.yaml", weights=folder / "full.safetensors")
    loaded.control_model.load_state_dict({k: torch.zeros_like(v) for k, v in loaded.control_model.state_dict().items()})
    report = load_control(loaded, output)
    wanted = model.control_model.state_dict()
    assert len(report.loaded) == len(wanted) and not report.kept and bool(report.ignored) == (to == "full")
    tolerance = 1e-6 if to == "difference" else 0.0
    for key, value in loaded.control_model.state_dict().items():
        torch.testing.assert_close(value, wanted[key], rtol=0, atol=tolerance)
    if to == "difference":
        with pytest.raises(CheckpointError, match="load_control"):
            load_state_dict(output)
    elif to != "full":
        read = load_state_dict(output)
        assert read.keys() == {f"control_model.{k}" for k in wanted}
        assert all(torch.equal(v, wanted[k.removeprefix("control_model.")]) for k, v in read.items())


def test_a_pipeline_of_diffusers_fills_a_model_and_gives_its_state_dict(tmp_path):
    tiny = create_model("cldm_tiny")
    write_weights(tmp_path / "full.safetensors", tiny.state_dict(), progress=False)
    convert(tmp_path / "full.safetensors", tmp_path / "pipeline", "diffusers-pipeline", progress=False)
    loaded = create_model("cldm_tiny", weights=tmp_path / "pipeline")
    read = load_state_dict(tmp_path / "pipeline")
    for key, value in tiny.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value) and torch.equal(read[key], value), key
    assert create_model("cldm_tiny").load_state_dict(read)


@pytest.mark.parametrize("as_file", [False, True])
def test_a_pipeline_of_other_widths_fills_a_model(tmp_path, as_file):
    """Its family is unknown, so its noise schedule is that of the configuration that was given."""
    config = load_config("cldm_tiny")
    params = config.model.params
    params.linear_end = 0.02
    for part in (params.unet_config, params.control_stage_config):
        part.params.update(model_channels=96, context_dim=48)
    params.cond_stage_config.params.width = 48
    OmegaConf.save(config, tmp_path / "wide.yaml")
    wide = create_model(config)
    write_weights(tmp_path / "full.safetensors", wide.state_dict(), progress=False)
    convert(
        tmp_path / "full.safetensors",
        tmp_path / "p",
        "diffusers-pipeline",
        config=tmp_path / "wide.yaml",
        progress=False,
    )
    (tmp_path / "p" / "scheduler" / "scheduler_config.json").unlink()
    loaded = create_model(tmp_path / "wide.yaml" if as_file else config, weights=tmp_path / "p")
    assert all(torch.equal(loaded.state_dict()[key], value) for key, value in wide.state_dict().items())


class OwnText(torch.nn.Module):
    """A user's text encoder: a buffer that no file holds, and a weight under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = torch.nn.Embedding(9, 4), torch.nn.Linear(4, 9, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("scale", torch.tensor(2.0), persistent=False)


class TiedText(OwnText):
    def __init__(self) -> None:
        super().__init__()
        del self.scale


@pytest.mark.parametrize("name", ["OwnText", "TiedText"])
def test_networks_of_ones_own_are_filled(tmp_path, name):
    config = tiny_config("sd2", cond_stage_config={"target": f"{__name__}.{name}"})
    made = create_model(config)
    write_weights(tmp_path / "full.safetensors", made.state_dict(), progress=False)
    loaded = create_model(config, weights=tmp_path / "full.safetensors")
    text = loaded.cond_stage_model
    assert text.head.weight is text.embedding.weight and len(list(loaded.parameters())) == len(list(made.parameters()))
    assert all(torch.equal(loaded.state_dict()[key], value) for key, value in made.state_dict().items())
    assert name == "TiedText" or float(text.scale) == 2


def test_an_average_that_a_file_lacks_begins_at_the_weights(saved, caplog):
    model, folder = saved
    loaded = create_model(tiny_config("sd2", use_ema=True), weights=folder / "full.safetensors", dtype="float16")
    average = loaded.model_ema.state_dict()
    name = "control_model.zero_convs.0.0.weight"
    half = model.state_dict()[name].half()
    assert torch.equal(average[name.replace(".", "")], half.float()) and int(average["num_updates"]) == 0
    report = load_weights(loaded, folder / "full.safetensors")
    assert "the EMA begins at the weights, as the file has none" in report.notes
    before = loaded.model_ema
    write_weights(folder / "averaged.safetensors", loaded.state_dict(), progress=False)
    load_weights(loaded, folder / "averaged.safetensors")
    assert loaded.model_ema is before


def test_an_incomplete_file_is_never_silent(tmp_path, caplog):
    state_dict = create_model("cldm_tiny").state_dict()
    del state_dict["model.diffusion_model.out.2.bias"]
    write_weights(tmp_path / "cut.safetensors", state_dict, progress=False)
    load_state_dict(tmp_path / "cut.safetensors")
    assert "1 entries are missing (model.diffusion_model.out.2.bias)" in caplog.text


def test_what_does_not_fit_is_named_and_changes_nothing(saved, tmp_path):
    model, folder = saved
    write_weights(tmp_path / "base.safetensors", model.model.state_dict(prefix="model."), progress=False)
    with pytest.raises(CheckpointError, match="entries are missing"):
        create_model(folder / "small.yaml", weights=tmp_path / "base.safetensors")
    with pytest.raises(CheckpointError, match="holds no ControlNet"):
        load_control(model, tmp_path / "base.safetensors")
    other = tiny_model("sd1")
    before = {k: v.clone() for k, v in other.state_dict().items()}
    with pytest.raises(
        CheckpointError, match=r"another shape, e.g. .*proj_in.* is \[\d+, \d+\] where \[\d+, \d+, 1, 1\]"
    ):
        load_weights(other, folder / "full.safetensors")
    assert all(torch.equal(v, before[k]) for k, v in other.state_dict().items())
    no_control = {k: v for k, v in model.state_dict().items() if not k.startswith("control_model.")}
    write_weights(tmp_path / "plain.safetensors", no_control, progress=False)
    with pytest.raises(CheckpointError, match="controlnet add-control"):
        create_model(folder / "small.yaml", weights=tmp_path / "plain.safetensors")
    with pytest.raises(CheckpointError, match="nowhere"):
        load_state_dict(tmp_path / "nowhere.ckpt")


def test_what_a_file_tells_of_its_model_is_not_passed_over(saved, tmp_path, caplog):
    model, folder = saved  # predicts v, does not average
    control = {"control_model." + k: v for k, v in model.control_model.state_dict().items()}
    shuffle, other = tmp_path / "shuffle.safetensors", tmp_path / "other.safetensors"
    write_weights(shuffle, {**control, "beside": torch.ones(1)}, {"global_average_pooling": "true"}, progress=False)
    write_weights(other, model.state_dict(), {"modelspec.prediction_type": "epsilon"}, progress=False)
    loaded = create_model(folder / "small.yaml", weights=folder / "full.safetensors")
    assert not loaded.global_average_pooling
    report = load_control(loaded, shuffle)
    assert loaded.global_average_pooling and report.ignored == ["beside"]
    assert any("global_average_pooling is set to True" in note for note in report.notes)
    assert any("1 entries" in note and "left out" in note for note in report.notes)
    for load in (load_control, load_weights):
        with pytest.raises(CheckpointError, match="predicts eps, and this one is configured to predict v: set"):
            load(loaded, other)
    with pytest.raises(CheckpointError, match="parameterization: eps"):
        create_model(folder / "small.yaml", weights=other)
    write_weights(other, model.state_dict(), {"modelspec.prediction_type": "v"}, overwrite=True, progress=False)
    load_state_dict(other)
    assert "parameterization: v" in caplog.text
    assert create_model(folder / "small.yaml", weights=other).parameterization == "v"


def test_names_in_a_file_cannot_write_to_the_terminal(saved, tmp_path, caplog):
    model, folder = saved
    odd = {"\x1b[2Jkey": torch.ones(1)}
    write_weights(tmp_path / "odd.pt", {**model.state_dict(), **odd}, progress=False)
    with caplog.at_level("INFO"):
        create_model(folder / "small.yaml", weights=tmp_path / "odd.pt")
    assert "[2Jkey" in caplog.text and "\x1b" not in caplog.text
    write_weights(tmp_path / "odd.pt", odd, overwrite=True, progress=False)
    with pytest.raises(CheckpointError, match=r"\[2Jkey") as raised:
        create_model(folder / "small.yaml", weights=tmp_path / "odd.pt")
    assert str(raised.value).isprintable()


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("dtype", [None, "float16", torch.bfloat16])
def test_precision_and_device_of_a_new_model(saved, weights, dtype):
    model, folder = saved
    made = create_model(folder / "small.yaml", folder / "full.safetensors" if weights else None, "cpu", dtype)
    wanted = {"float16": torch.float16, None: torch.float32}.get(dtype, dtype)
    assert {p.dtype for p in made.parameters()} == {wanted}
    own = {n: b for n, b in made.named_buffers() if "." not in n}
    assert {b.dtype for b in own.values()} == {torch.float32} and torch.equal(own["betas"], model.betas)
    if weights:
        key = "control_model.zero_convs.0.0.weight"
        assert torch.equal(made.state_dict()[key], model.state_dict()[key].to(wanted))
    assert not any(t.is_meta for t in [*made.parameters(), *made.buffers()])


def test_every_parameter_and_buffer_goes_to_the_device(saved):
    _, folder = saved
    made = create_model(folder / "small.yaml", device="meta")
    assert all(t.is_meta for t in [*made.parameters(), *made.buffers()])
    with fake_tensors():
        made = create_model("cldm_tiny", device="cuda")
        assert {t.device.type for t in [*made.parameters(), *made.buffers()]} == {"cuda"}


@pytest.mark.parametrize("use_ema", [False, True])
def test_starting_weights_fill_the_control_too(saved, tmp_path, use_ema):
    _, folder = saved
    source = tiny_model("sd2", use_ema=use_ema)
    if use_ema:
        source.model_ema.num_updates.fill_(7)
    write_weights(tmp_path / "whole.safetensors", source.state_dict(), progress=False)
    config = tiny_config("sd2", use_ema=True, ckpt_path=str(tmp_path / "whole.safetensors"))
    made = create_model(config)
    assert all(torch.equal(made.state_dict()[key], value) for key, value in source.state_dict().items())
    assert int(made.model_ema.num_updates) == (7 if use_ema else 0)
    if not use_ema:  # the average begins at the weights
        first = made.model_ema.state_dict()["control_modelzero_convs00weight"]
        assert torch.equal(first, source.control_model.zero_convs[0][0].weight)


def test_starting_weights_are_not_read_where_others_follow(saved):
    model, folder = saved
    config = tiny_config("sd2", ckpt_path=str(folder / "nowhere.safetensors"))
    made = create_model(config, weights=folder / "full.safetensors")
    assert all(torch.equal(made.state_dict()[key], value) for key, value in model.state_dict().items())
    assert all(t.is_meta for t in create_model(config, device="meta").parameters())
    OmegaConf.save({"model": config}, folder / "start.yaml")
    assert build_entries(folder / "start.yaml").keys() == model.state_dict().keys()


def test_a_missing_configuration_is_a_file_not_found_error(tmp_path):
    for path in (tmp_path / "no.yaml", "cldm_v99"):
        with pytest.raises(FileNotFoundError):
            create_model(path)
    with pytest.raises(FileNotFoundError):
        create_model("cldm_tiny", weights=tmp_path / "no.ckpt")


def test_packaged_weights_are_found_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    add_control("cldm_tiny.safetensors", "ini.safetensors", progress=False)
    made = create_model("cldm_tiny", weights="ini.safetensors")
    with pytest.raises(CheckpointError, match="holds no ControlNet: add one with controlnet add-control"):
        create_model("cldm_tiny", weights="cldm_tiny.safetensors")
    tiny = load_state_dict("cldm_tiny.safetensors")["model.diffusion_model.out.2.bias"]
    assert torch.equal(made.state_dict()["model.diffusion_model.out.2.bias"], tiny.float())


def test_configurations_are_found_by_name_and_mistakes_named(tmp_path):
    assert load_config("cldm_tiny").model.target == "cldm.cldm.ControlLDM"
    # ControlNet 1.1's names, as its apps write them
    canny = load_config("./models/control_v11p_sd15_canny.yaml")
    assert canny == load_config("cldm_v15") == load_config("control_v11p_sd15s2_lineart_anime")
    assert canny == load_config("./models/control_v11u_sd15_tile.yaml") == load_config("control_v11p_sd15_depth")
    shuffle = load_config("./models/control_v11e_sd15_shuffle.yaml")
    assert shuffle.model.params.pop("global_average_pooling") is True and shuffle == canny
    with pytest.raises(ConfigError):
        load_config("control_v11p_sd15_cany.yaml")
    with pytest.raises(ConfigError, match="cldm_v15"):
        load_config("cldm_v99")
    for broken in ("model: [1, 2", "a: " + "[" * 5000 + "]" * 5000, "a: " + "9" * 5000, "a: ${b}\nb: ${a}", "a: \xff"):
        (tmp_path / "broken.yaml").write_text(broken, encoding="latin-1")
        for read in (load_config, expected_entries):
            with pytest.raises(ConfigError, match="not valid YAML"):
                read(tmp_path / "broken.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n- 2")
    with pytest.raises(ConfigError, match="must hold a mapping"):
        load_config(tmp_path / "list.yaml")
    (tmp_path / "empty.yaml").write_text("training: 3")
    with pytest.raises(ConfigError, match="`model:`"):
        create_model(tmp_path / "empty.yaml")


def test_overrides_are_typed():
    settings = override(Settings(), ["steps=7", "sd_locked=false", "out=/x/y", "learning_rate=1e-5"])
    assert (settings.steps, settings.sd_locked, settings.out, settings.learning_rate) == (7, False, "/x/y", 1e-5)
    for wrong in (["steps=1.5"], ["sd_locked=perhaps"], ["nosuch=1"]):
        with pytest.raises(ConfigError, match=wrong[0].split("=")[0]):
            override(Settings(), wrong)


def test_importing_the_core_is_light():
    code = (
        "import sys, cldm.cldm, cldm.model; print([m for m in ('open_clip', 'diffusers', 'timm') if m in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
