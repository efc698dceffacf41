"""What can be chosen: names in listings and nothing else; messages without paths."""

import tempfile
from pathlib import Path

import pytest

from controlnet.app.files import TINY, Folders, choose, new_name


@pytest.fixture
def folders(tmp_path) -> Folders:
    files = """models/sd/a.safetensors models/.hidden.safetensors models/notes.txt runs/one/model.safetensors
               runs/one/exports/control-1.safetensors data/pairs/prompt.json data/photos/a.jpg outside.safetensors"""
    for name in files.split():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "models" / "pipeline").mkdir()
    (tmp_path / "models" / "pipeline" / "model_index.json").touch()
    return Folders((tmp_path / "models",), (tmp_path / "data",), tmp_path / "runs", tmp_path / "outputs")


def test_listings(folders):
    assert list(folders.weights()) == [
        TINY, "models/pipeline", "models/sd/a.safetensors", "runs/one", "runs/one/exports/control-1.safetensors",
    ]  # fmt: skip
    assert list(folders.pairs()) == ["data/pairs"] and list(folders.picture_folders()) == ["data/photos"]


def test_links_that_lead_nowhere_or_to_themselves_are_left_out(folders, tmp_path):
    before = folders.weights()
    (tmp_path / "models" / "loop.safetensors").symlink_to("loop.safetensors")
    (tmp_path / "models" / "gone.safetensors").symlink_to("nowhere.safetensors")
    (tmp_path / "runs" / "one" / "exports" / "loop.safetensors").symlink_to("loop.safetensors")
    (tmp_path / "outputs").symlink_to("outputs")
    assert folders.weights() == before
    assert folders.hide_paths(f"{tmp_path}/models/a.pth: broken") == "models/a.pth: broken"


def test_folders_that_are_not_there_are_empty(tmp_path):
    folders = Folders((tmp_path / "a",), (tmp_path / "b",), tmp_path / "c", tmp_path / "d")
    assert list(folders.weights()) == [TINY] and folders.pairs() == folders.picture_folders() == {}


@pytest.mark.parametrize(
    "name",
    ["../outside.safetensors", "models/../outside.safetensors", "/etc/passwd", "models", "", None, 3, ["models/sd/a.safetensors"],
     "models/.hidden.safetensors", "models/notes.txt"],
)  # fmt: skip
def test_only_listed_names_are_opened(folders, name):
    with pytest.raises(ValueError, match="choose a file from the list"):
        choose(folders.weights(), name, "a file")


@pytest.mark.parametrize(
    "name", ["", " ", "../a", "a/b", "a\\b", ".hidden", "-x", "a.", "a" * 81, "a\0b", "a\nb", None, 5, "C:a", "~"]
)
def test_names_that_lead_elsewhere_are_refused(name):
    with pytest.raises(ValueError, match="needs a name"):
        new_name(name, "a run")


def test_new_names():
    assert new_name(" my run-1.2 ", "a run") == "my run-1.2"
    with pytest.raises(ValueError, match="must end in .ckpt or .pt"):
        new_name("a.txt", "a file", (".ckpt", ".pt"))


def test_messages_name_configured_folders_and_hide_all_others(folders, tmp_path):
    hide = folders.hide_paths
    assert hide(f"{tmp_path}/models/sd/a.safetensors: is broken") == "models/sd/a.safetensors: is broken"
    assert hide("no file /home/me/secret/key.pem here") == "no file …/key.pem here"
    assert hide("'C:\\Users\\me\\key.pem'") == "'…/key.pem'"
    assert (
        hide("see https://huggingface.co/a/b and models/x/y.pth, 3 / 4")
        == "see https://huggingface.co/a/b and models/x/y.pth, 3 / 4"
    )
    assert tempfile.gettempdir() not in hide(str(Path(tempfile.gettempdir()) / "controlnet-x" / "a.png"))
