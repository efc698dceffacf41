"""Pairs from photographs: parts, sizes, names and prompts."""

import json
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from cldm.data.folders import claim_folder, claimed_folder
from cldm.data.pairs import DataError
from cldm.data.photos import Framing, PhotoPair, bucket_sizes, parse_size, plan_pairs, read_prompts, write_pair


def test_sizes():
    assert parse_size("512") == (512, 512) and parse_size("768x512") == (512, 768)
    for wrong in ("", "500", "0", "-64", "64x", "64x64x64", "1e3", "²"):
        with pytest.raises(ValueError, match="multiples of 64|WIDTHxHEIGHT"):
            parse_size(wrong)


@pytest.mark.parametrize("side", [64, 256, 512, 1024])
def test_buckets_have_equal_areas_and_cover_all_shapes(side):
    sizes = bucket_sizes(side * side)
    assert (side, side) in sizes and {(w, h) for h, w in sizes} == set(sizes)
    assert all(h % 64 == w % 64 == 0 and abs(h * w / side**2 - 1) <= 0.1 for h, w in sizes)
    if side == 512:
        assert {(448, 576), (384, 704), (320, 832), (256, 1024)} <= set(sizes)
        framing = Framing(side, side, buckets=True)
        assert framing.size_of(300, 300) == (512, 512)
        assert framing.size_of(3000, 4000) == (448, 576) and framing.size_of(40, 30) == (576, 448)
        assert framing.size_of(1, 10_000) == (256, 1024)


def test_the_middle_is_the_largest_part_of_the_wanted_shape():
    assert Framing(64, 64).part_of(100, 161, "a") == (slice(0, 100), slice(30, 130))
    assert Framing(64, 128).part_of(100, 100, "a") == (slice(25, 75), slice(0, 100))
    assert Framing(64, 64).part_of(1, 5000, "a") == (slice(0, 1), slice(2500, 2501))


def test_random_parts_lie_inside_differ_and_can_be_repeated():
    framing = Framing(64, 128, random=True, seed=3)
    parts = [framing.part_of(300, 500, f"a-{k}") for k in range(200)]
    assert parts == [framing.part_of(300, 500, f"a-{k}") for k in range(200)]
    assert parts[:20] != [Framing(64, 128, random=True, seed=4).part_of(300, 500, f"a-{k}") for k in range(20)]
    heights = np.array([rows.stop - rows.start for rows, _ in parts])
    widths = np.array([columns.stop - columns.start for _, columns in parts])
    assert all(0 <= r.start and r.stop <= 300 and 0 <= c.start and c.stop <= 500 for r, c in parts)
    assert np.abs(widths - 2 * heights).max() <= 1
    assert heights.min() >= 75 and heights.max() > 240  # from 0.3 of the largest part, which is 250 x 500, to all of it
    assert len({r.start for r, _ in parts}) > 50 and len({c.start for _, c in parts}) > 50
    # Nothing is cut smaller than what is wanted, and small photographs are taken as a whole.
    assert all(r.stop - r.start >= 64 for r, _ in (framing.part_of(80, 160, str(k)) for k in range(50)))
    assert framing.part_of(32, 64, "a") == (slice(0, 32), slice(0, 64))


def test_no_two_photographs_share_a_name():
    folder = Path("photos")
    files = ["a.jpg", "a.png", "A.webp", "b.jpg", "c.png.jpg", "c.png", "sub/a.jpg", "sub/b.v2.png", "sub/b.v3.png"]
    photos = [folder / file for file in files]
    prompts = dict.fromkeys(photos, "x")
    names = {str(p.picture.relative_to(folder)): p.name for p in plan_pairs(folder, prompts, photos, None)}
    assert len({name.lower() for name in names.values()}) == len(files)
    assert names["a.jpg"] == "a.jpg" and names["b.jpg"] == "b" and names["sub/a.jpg"] == "sub/a"
    assert names["sub/b.v2.png"] == "sub/b.v2" and names["c.png.jpg"] != names["c.png"]
    # A prompt more or less changes no name.
    del prompts[folder / "a.png"]
    assert names.items() >= {
        (str(p.picture.relative_to(folder)), p.name) for p in plan_pairs(folder, prompts, photos, None)
    }
    crops = plan_pairs(folder, prompts, photos, 3)
    assert len({pair.target for pair in crops}) == 3 * len(prompts)
    assert [pair.name for pair in crops if pair.picture.name == "b.jpg"] == ["b-0", "b-1", "b-2"]


def test_prompts_beside_the_photographs(tmp_path):
    photos = [tmp_path / name for name in ("a.jpg", "a.png", "b.png", "c.png", "d.png")]
    (tmp_path / "a.txt").write_text("\ufeffa red\n  house \n", encoding="utf-8")
    (tmp_path / "a.png.txt").write_text("another")
    (tmp_path / "b.txt").write_text(" \n")
    (tmp_path / "c.txt").write_bytes(b"\xff\xfe\xfa")
    prompts, complaints = read_prompts(tmp_path, photos)
    assert prompts == {photos[0]: "a red house", photos[1]: "another"}
    for complaint, words in zip(complaints, ("b.txt is empty", "c.txt is not UTF-8", "no d.txt"), strict=True):
        assert words in complaint and "\n" not in complaint
    with pytest.raises(DataError, match="none of the 1 pictures .* --captions"):
        read_prompts(tmp_path, photos[-1:])
    assert read_prompts(tmp_path, photos, prompt="") == (dict.fromkeys(photos, ""), [])


def test_prompts_from_a_listing(tmp_path):
    photos = [tmp_path / name for name in ("a.jpg", "sub/b.png", "c.png")]
    listing = tmp_path / "captions.jsonl"
    entries = [
        {"file": "a.jpg", "prompt": "one"},
        {"image": "./sub/b.png", "text": "two "},
        {"file_name": "x.png", "caption": "y"},
    ]
    listing.write_text("\n\n".join(map(json.dumps, entries)) + "\n")
    prompts, complaints = read_prompts(tmp_path, photos, listing)
    assert prompts == {photos[0]: "one", photos[1]: "two"}
    assert "line 5: there is no picture" in complaints[0] and "x.png" in complaints[0]
    assert "c.png has no prompt" in complaints[1] and len(complaints) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "line 1 must be an object"),
        ('{"file": "a.jpg"}', "line 1 needs a text under"),
        ('{"file": "a.jpg", "prompt": 3}', "line 1 needs a text under"),
        ('{"file": "a.jpg", "prompt": "x"}\n{"image": "./a.jpg", "prompt": "y"}', "line 2 names ./a.jpg again"),
        ("{", "line 1 is not valid JSON"),
        (r'{"file": "a\u0000", "prompt": "x"}', "line 1 names no file"),
        ("", "none of the 1 pictures"),
        (None, "cannot be read"),
    ],
)
def test_broken_listings(tmp_path, text, message):
    listing = tmp_path / "captions.jsonl"
    if text is not None:
        listing.write_text(text)
    with pytest.raises(DataError, match=message):
        read_prompts(tmp_path, [tmp_path / "a.jpg"], listing)


def test_a_folder_is_claimed_once(tmp_path):
    out = tmp_path / "new" / "out"
    out.mkdir(parents=True)
    (out / ".0a.tmp").touch()  # a note that another process is just writing
    with claimed_folder(out, "note.json", {"size": 1, "seed": 0}):
        with pytest.raises(ValueError, match=r"just being made with other settings \(size; see .* or delete that file"):
            claim_folder(out, "note.json", {"size": 2, "seed": 0})
        with claimed_folder(out, "note.json", {"size": 1, "seed": 0}):
            pass
        assert (out / "note.json").exists()  # it goes with the run that wrote it
    assert not (out / "note.json").exists()  # nothing was made with the first settings
    with claimed_folder(out, "other.json", {"size": 1}):
        (out / "a.png").touch()
        (out / "other.json").unlink()  # by the run that wrote it, which made nothing
    assert json.loads((out / "other.json").read_text()) == {"size": 1}
    (out / "other.json").unlink()
    (out / "a.png").unlink()
    (out / "note.json").touch()  # such as a full disk leaves it
    claim_folder(out, "note.json", {"size": 2, "seed": 0})
    (out / "target").mkdir()
    (out / "target" / "a.png").touch()
    claim_folder(out, "note.json", {"size": 2, "seed": 0})
    with pytest.raises(ValueError, match=r"other settings \(seed; see"):
        claim_folder(out, "note.json", {"size": 2, "seed": 1})
    (out / "note.json").write_text("[")
    with pytest.raises(ValueError, match="other settings"):
        claim_folder(out, "note.json", {"size": 2, "seed": 0})
    (out / "note.json").unlink()
    with pytest.raises(ValueError, match="not made by this command"):
        claim_folder(out, "note.json", {"size": 2})


def test_of_processes_that_claim_a_folder_at_once_one_wins(tmp_path):
    def claim(seed):
        try:
            return claim_folder(tmp_path / "out", "note.json", {"seed": seed})
        except DataError:
            return None

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(claim, range(40)))
    assert found.count(True) == 1 and found.count(None) == 39
    assert json.loads((tmp_path / "out" / "note.json").read_text()) == {"seed": found.index(True)}
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["note.json"]


def test_a_photograph_is_made_again_when_it_has_changed(tmp_path):
    """By its date, or as one of older date that took its place; a date in the future, of a camera's clock, is none."""
    photo, other = tmp_path / "a.jpg", tmp_path / "other.jpg"
    photo.touch()
    other.touch()
    os.utime(photo, (4e9, 4e9))
    os.utime(other, (1e9, 1e9))
    pair = PhotoPair(photo, "a", "x")
    black = np.zeros((64, 64, 3), np.uint8)
    time.sleep(0.02)
    write_pair(tmp_path, pair, black, black)
    assert pair.is_current(tmp_path)
    time.sleep(0.02)
    shutil.copy2(other, photo)
    assert not pair.is_current(tmp_path)
    time.sleep(0.02)
    write_pair(tmp_path, pair, black, black)
    assert pair.is_current(tmp_path)
