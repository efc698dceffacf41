"""Data that cannot be trained on is found before the first step, and what breaks during a run is replaced and counted."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

import tutorial_dataset
from cldm.data.checking import ReplaceBroken, Selected, check_batch, check_dataset, check_item, checked
from cldm.data.fill import generate_fill
from cldm.data.folders import note_count
from cldm.data.pairs import DataError, PairDataset


@pytest.fixture
def data(tmp_path):
    generate_fill(tmp_path / "fill", count=6, size=64, palette="clear", progress=False)
    return tmp_path / "fill"


def break_some(data):
    """A file that does not decode to its end, one of another size, and a line that is no pair."""
    half = data / "target/1.png"
    half.write_bytes(half.read_bytes()[:150])  # the header is whole
    Image.new("RGB", (128, 64)).save(data / "source/4.png")
    with open(data / "prompt.json", "a") as listing:
        listing.write('{"source": "source/0.png", "target": "target/0.png", "prompt": 7}\n')


def test_a_sound_data_set_passes_as_it_is(data, capsys):
    dataset = PairDataset(data)
    assert check_dataset(dataset, progress=False) == []
    assert checked(dataset, progress=False) is dataset
    assert tutorial_dataset.main(["--check", str(data)]) == 0
    assert "all 6 pairs are fine" in capsys.readouterr().out


def test_a_prompt_that_no_encoder_reads_is_found_before_training(data):
    lines = (data / "prompt.json").read_text().splitlines()
    lines[2] = json.dumps({**json.loads(lines[2]), "prompt": "a" * 20_001})
    (data / "prompt.json").write_text("\n".join(lines))
    (problem,) = check_dataset(PairDataset(data), progress=False)
    assert problem.index == 2 and "20,001 characters; at most 20,000" in problem.message


def test_what_is_broken_is_named_and_left_out_if_asked(data, capsys, caplog):
    break_some(data)
    with pytest.raises(DataError, match="line 7 needs a text under 'prompt', found int"):
        PairDataset(data)
    dataset = PairDataset(data, leave_out=True)
    problems = check_dataset(dataset, progress=False)
    assert [p.index for p in problems] == [-1, -1, 1, 4] or [p.index for p in problems] == [-1, 1, 4]
    with pytest.raises(DataError, match=r"target/1\.png does not decode.*source/4\.png is 128x64.*broken=leave_out"):
        checked(dataset, "stop", progress=False)
    kept = checked(dataset, "leave_out", progress=False)
    assert isinstance(kept, Selected) and len(kept) == 4
    assert "Left out" in caplog.text
    assert [kept.name(i)[-5:] for i in range(4)] == ["0.png", "2.png", "3.png", "5.png"]
    assert kept.sizes() == [(64, 64)] * 4 and kept.prompts() == [dataset.pairs[i].prompt for i in (0, 2, 3, 5)]
    assert kept.fingerprint(1) == dataset.fingerprint(2) and kept[3]["txt"] == dataset.pairs[5].prompt
    assert tutorial_dataset.main(["--check", str(data)]) == 1
    shown = capsys.readouterr()
    assert "4 of 6 pairs" in shown.out and "line 7" in shown.err and "1.png" in shown.err
    with pytest.raises(DataError, match="broken must be one of"):
        checked(dataset, "ignore", progress=False)


def test_a_data_set_whose_making_was_interrupted_is_told_from_a_whole_one(data, tmp_path, capsys):
    note_count(data, "fill.json", 18_000)  # as `generate_fill` begins, and an interruption leaves it
    with pytest.raises(DataError, match="holds 6 of 18,000 pairs: its making was interrupted; start the command"):
        checked(PairDataset(data), progress=False)
    assert len(checked(PairDataset(data), "leave_out", progress=False)) == 6
    assert tutorial_dataset.main(["--check", str(data)]) == 1
    generate_fill(data, count=7, size=64, palette="clear", progress=False)  # going on is allowed, and mends it
    assert checked(PairDataset(data), progress=False)
    (data / "prompt.json").unlink()
    with pytest.raises(DataError, match="was interrupted; start the command that made it again"):
        PairDataset(data)
    assert tutorial_dataset.main(["--check", str(tmp_path / "nothing")]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) >= 2


def test_photographs_that_fail_do_not_make_a_set_unfinished(tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(3):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (80, 80, 3), np.uint8)).save(photos / f"{i}.png")
    (photos / "3.png").write_bytes(b"no picture")
    out = tmp_path / "out"
    assert tutorial_dataset.main(["canny", str(photos), str(out), "--size", "64", "--prompt", "noise"]) == 1
    assert json.loads((out / "photos.json").read_text())["pairs"] == 3
    assert len(checked(PairDataset(out), progress=False)) == 3


@pytest.mark.parametrize("workers", [0, 2])
def test_what_breaks_during_the_run_is_replaced_by_the_same_item_always(data, workers, caplog):
    dataset = ReplaceBroken(PairDataset(data))
    expected = [PairDataset(data)[i]["txt"] for i in (0, 3, 3, 3, 4, 5)]
    for i in (1, 2):
        (data / f"target/{i}.png").write_bytes(b"gone")
    for epoch in (1, 2):
        found = [text for batch in DataLoader(dataset, 2, num_workers=workers) for text in batch["txt"]]
        assert found == expected
        assert dataset.replaced == 2 * epoch
    assert [name[-5:] for name in dataset.broken()] == ["1.png", "2.png"]
    if not workers:
        assert caplog.text.count("is replaced") == 2  # once each
    assert dataset.prompts()[0] == expected[0]  # what the data set behind tells


def test_a_replacement_has_the_same_size_and_a_lost_disk_is_an_error(data):
    for name in ("source", "target"):
        Image.new("RGB", (128, 64)).save(data / name / "2.png")
    plain = PairDataset(data)
    sizes = plain.sizes()
    (data / "target/1.png").write_bytes(b"gone")
    assert ReplaceBroken(plain, sizes)[1]["txt"] == plain.pairs[3].prompt
    (data / "target/2.png").write_bytes(b"gone")
    with pytest.raises(DataError, match="2.png and the next"):
        ReplaceBroken(plain, sizes)[2]


GOOD = {"jpg": torch.zeros(2, 64, 64, 3), "hint": torch.ones(2, 64, 64, 3), "txt": ["a", "b"]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"jpg": torch.zeros(2, 64, 64, 3, dtype=torch.uint8)}, "'jpg' holds uint8.*x / 127.5 - 1"),
        ({"hint": torch.full((2, 64, 64, 3), 255.0)}, r"'hint' holds values from 255 to 255 where \[0, 1\].*x / 255"),
        ({"jpg": torch.full((2, 64, 64, 3), 255.0)}, r"'jpg' holds values.*\[-1, 1\]"),
        ({"jpg": torch.zeros(2, 3, 64, 64)}, "'jpg' has its channels first"),
        ({"hint": torch.zeros(2, 3, 64, 64)}, "'hint' has its channels first"),
        ({"hint": torch.full((2, 64, 64, 3), float("nan"))}, "'hint' holds values that are not finite"),
        ({"hint": torch.zeros(64, 64)}, r"must have the shape \(B, H, W, C\)"),
    ],
)
def test_batches_of_another_type_range_or_layout(change, message):
    check_batch(GOOD)
    check_batch({**GOOD, "hint": torch.full((2, 64, 64, 3), -1.0)})  # a hole, as inpainting marks it
    check_batch(
        {"moments": torch.zeros(1, 8, 8, 8), "hint": torch.zeros(1, 64, 64, 6)}
    )  # cached, and a hint of six channels
    with pytest.raises(DataError, match=message):
        check_batch({**GOOD, **change})


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ([], "must be a dict"),
        ({"jpg": 0, "hint": 0}, "needs 'txt'"),
        ({"jpg": np.zeros((64, 64, 3), np.float32), "hint": np.zeros((64, 64, 3), np.float32), "txt": 1}, "found int"),
        ({"jpg": np.zeros((64, 64, 3), np.float32), "hint": np.zeros((64, 128, 3), np.float32), "txt": ""}, "equal sizes"),
        ({"jpg": np.zeros((96, 64, 3), np.float32), "hint": np.zeros((96, 64, 3), np.float32), "txt": ""}, "multiples of 64"),
        ({"jpg": np.zeros((64, 64), np.float32), "hint": np.zeros((64, 64, 3), np.float32), "txt": ""}, "shape"),
    ],
)  # fmt: skip
def test_items(item, message):
    with pytest.raises(DataError, match=message):
        check_item(item)
