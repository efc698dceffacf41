"""Folders with captions: which pictures belong together, where prompts come from, and what is no data."""

import json

import pytest
from PIL import Image

from cldm.data.captions import read_captions
from cldm.data.pairs import DataError, PairDataset


def make(root, names, suffix=".png"):
    for part in ("source", "target"):
        for name in names:
            path = root / part / f"{name}{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (64, 64), (10, 20, 30)).save(path)


def test_texts_beside_targets(tmp_path):
    make(tmp_path, ["b", "a", "sub/c"])
    (tmp_path / "target/a.png").rename(tmp_path / "target/a.webp")  # only names must agree
    for name in ("a", "b", "sub/c"):
        (tmp_path / f"target/{name}.txt").write_text(f"a picture\nof {name} ")
    dataset = PairDataset(tmp_path)
    assert dataset.prompts() == ["a picture of a", "a picture of b", "a picture of sub/c"]
    assert dataset[0]["jpg"].shape == (64, 64, 3) and dataset.sizes() == [(64, 64)] * 3


@pytest.mark.parametrize(("place", "prefix"), [(".", "target/"), ("target", "")])
def test_a_listing(tmp_path, place, prefix):
    make(tmp_path, ["a", "b"], ".jpg")
    lines = [{"file_name": f"{prefix}{name}.jpg", "text": f"this is {name}"} for name in "ba"]
    (tmp_path / place / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert PairDataset(tmp_path).prompts() == ["this is a", "this is b"]


def test_what_lacks_its_partner_or_prompt_is_named(tmp_path):
    make(tmp_path, ["a", "b", "c"])
    (tmp_path / "target/a.txt").write_text("good")
    (tmp_path / "source/b.png").unlink()
    with pytest.raises(DataError, match=r"b\.png has no picture of its name in .*source; and 1 more"):
        PairDataset(tmp_path)
    left = PairDataset(tmp_path, leave_out=True)
    assert left.prompts() == ["good"] and len(left.complaints) == 2 and "c.png has no prompt" in left.complaints[1]
    (tmp_path / "target/a.txt").unlink()
    with pytest.raises(DataError, match="put a .txt file beside each, or a captions.jsonl into"):
        PairDataset(tmp_path)


def test_hidden_files_and_notebook_copies_are_no_data(tmp_path):
    make(tmp_path, ["a", ".hidden", ".ipynb_checkpoints/a-checkpoint", "sub/.cache/x"])
    (tmp_path / "target/a.txt").write_text("good")
    (tmp_path / "target/notes.md").write_text("no picture")
    pairs, complaints = read_captions(tmp_path)
    assert [pair.target.name for pair in pairs] == ["a.png"] and not complaints


def test_a_format_that_pillow_has_learned_since_the_last_call_is_read(tmp_path, monkeypatch):
    for name in ("source", "target"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name / "a.new", "PNG")
    (tmp_path / "target/a.txt").write_text("good")
    with pytest.raises(DataError):
        read_captions(tmp_path)
    monkeypatch.setitem(Image.EXTENSION, ".new", "PNG")  # as pillow-heif and others do when they are registered
    pairs, complaints = read_captions(tmp_path)
    assert [pair.target.name for pair in pairs] == ["a.new"] and not complaints


def test_two_pictures_of_one_name_are_ambiguous(tmp_path):
    make(tmp_path, ["a", "b"])
    Image.new("RGB", (64, 64)).save(tmp_path / "source/a.jpg")
    for name in "ab":
        (tmp_path / f"target/{name}.txt").write_text(name)
    with pytest.raises(DataError, match="several pictures called a: a.jpg, a.png"):
        PairDataset(tmp_path)
    assert PairDataset(tmp_path, leave_out=True).prompts() == ["b"]


def test_a_folder_without_either_layout(tmp_path):
    with pytest.raises(DataError, match="folders source/ and target/ with captions"):
        PairDataset(tmp_path)
