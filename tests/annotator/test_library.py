"""Where models of transformers are looked for, and what is said if something is missing."""

import sys
from pathlib import Path

import pytest

from annotator.depth_anything import DepthAnythingDetector
from annotator.library import find_model
from annotator.weights import CKPTS, Hub, WeightsError
from tests.annotator import tiny_models

MODEL = "owner/some-model"


def model_folder(path: Path) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    return path


def test_folders_are_found_by_path_and_by_the_models_name(tmp_path, monkeypatch):
    folder = model_folder(tmp_path / "some-model")
    assert find_model(folder, "owner/other") == folder == find_model(str(folder), MODEL)
    assert find_model(tmp_path, MODEL) == folder
    monkeypatch.setenv("ANNOTATOR_CKPTS", str(tmp_path))
    assert find_model(None, MODEL) == folder


def test_what_is_neither_folder_nor_id_is_refused(tmp_path):
    (tmp_path / "weights.pth").write_bytes(b"")
    for wrong in (tmp_path, tmp_path / "weights.pth"):
        with pytest.raises(WeightsError, match="is no folder of a model of transformers: it holds no config.json"):
            find_model(wrong, MODEL)
    with pytest.raises(
        WeightsError, match=r"there is no folder nope, and it is no model's id either \(such as owner/some-model\)"
    ):
        find_model("nope", MODEL)


def test_the_hubs_cache_serves_without_a_network(tmp_path, monkeypatch):
    snapshot = tmp_path / "models--owner--some-model" / "snapshots" / "abc"
    model_folder(snapshot)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("abc")
    (snapshot / "model.safetensors").write_bytes(b"")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert find_model(Hub(MODEL, cache_dir=str(tmp_path)), "owner/other") == snapshot
    (snapshot / "model.safetensors").unlink()  # interrupted
    with pytest.raises(
        WeightsError, match="cannot get the model owner/some-model from the hub: its weights are not there"
    ):
        find_model(Hub(MODEL, cache_dir=str(tmp_path)), "owner/other")
    with pytest.raises(WeightsError, match="owner/missing"):
        find_model(Hub("owner/missing", cache_dir=str(tmp_path)), MODEL)


def test_where_a_models_folder_belongs_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("ANNOTATOR_CKPTS", str(tmp_path))
    with pytest.raises(WeightsError) as raised:
        find_model(None, "owner/missing")
    told = str(raised.value)
    assert told.startswith(
        f"cannot get the model owner/missing: not in {CKPTS / 'missing'}, {tmp_path / 'missing'}; fetching"
    )
    assert f"put its folder at {tmp_path / 'missing'}, or name" in told
    assert "the environment variable ANNOTATOR_CKPTS, or it as weights (--weights)" in told


def test_the_missing_library_is_named_before_anything_is_fetched(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"this detector needs transformers: pip install 'controlnet\[detectors\]'"):
        DepthAnythingDetector("cpu", MODEL)


def test_a_folder_with_a_broken_file_is_named(tmp_path):
    folder = tiny_models.depth_anything(tmp_path / "model")
    (folder / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(WeightsError, match=f"{folder} holds no model that DepthAnythingDetector can use"):
        DepthAnythingDetector("cpu", folder)


def test_code_in_a_models_repository_is_never_run(tmp_path):
    folder = tiny_models.depth_anything(tmp_path / "model")
    config = (folder / "config.json").read_text()
    code = '{"auto_map": {"AutoConfig": "evil.Config", "AutoModelForDepthEstimation": "evil.Model"}, '
    (folder / "config.json").write_text(config.replace("{", code, 1).replace('"depth_anything"', '"evil"'))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(WeightsError, match="holds no model that DepthAnythingDetector can use"):
        DepthAnythingDetector("cpu", folder)
    assert not (tmp_path / "ran").exists()
