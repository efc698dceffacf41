"""`tutorial_dataset.py CONDITION PHOTOS OUT` on pictures good and bad, and the main job on what it makes."""

import json
import os
import sys

import cv2
import numpy as np
import pytest
from PIL import Image

import tutorial_dataset
import tutorial_train
from annotator.canny import CannyDetector
from cldm.data.pairs import read_rgb
from cldm.data.photos import Framing, PhotoPair, cut_part
from tests.annotator.cases import open_cases

ARRAYS, _ = open_cases("canny")
PHOTO = ARRAYS["astronaut/input"]


@pytest.fixture
def photos(tmp_path):
    """Pictures of many kinds, with captions, but for one."""
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(PHOTO).save(folder / "a.png")
    Image.fromarray(PHOTO[:, :, 0]).save(folder / "a.jpg")  # grey
    Image.fromarray(PHOTO[:90, :160]).save(folder / "sub/turned.jpg", exif=turned, quality=98)
    Image.fromarray(np.dstack([PHOTO, PHOTO[:, :, 0]])).save(folder / "sub/clear.webp", lossless=True)
    Image.fromarray(PHOTO[:, :, 1].astype(np.uint16) * 257).save(folder / "sub/deep.tif")
    Image.fromarray(PHOTO[50:60, 50:70]).save(folder / "small.bmp")
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        path.with_suffix(".txt").write_text(f"a picture called {path.stem}")
    return folder


def listed(out) -> dict[str, str]:
    """Prompts by name; the files that are listed are there, and equally large."""
    entries = [json.loads(line) for line in (out / "prompt.json").read_text().splitlines()]
    for entry in entries:
        assert read_rgb(out / entry["source"]).shape == read_rgb(out / entry["target"]).shape
        assert entry["source"].replace("source/", "target/", 1) == entry["target"]
    return {entry["target"].removeprefix("target/").removesuffix(".png"): entry["prompt"] for entry in entries}


def files(out) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*.*"))}


def run(*command) -> int:
    return tutorial_dataset.main([str(word) for word in command])


def test_pairs_of_pictures_of_all_kinds(photos, tmp_path, capsys):
    out = tmp_path / "out"
    assert run("canny", photos, out, "--size", "128x64", "--low-threshold", 40, "--high-threshold", 90) == 0
    assert "6 pairs of 6 pictures" in capsys.readouterr().out
    prompts = listed(out)
    assert list(prompts) == ["a.jpg", "a.png", "small", "sub/clear", "sub/deep", "sub/turned"]
    assert prompts["sub/turned"] == "a picture called turned" and prompts["a.jpg"] == prompts["a.png"]
    height, width = PHOTO.shape[:2]
    part = PHOTO[round((height - width / 2) / 2) :][: round(width / 2)]
    target = read_rgb(out / "target/a.png.png")
    assert np.array_equal(target, cv2.resize(part, (128, 64), interpolation=cv2.INTER_AREA))
    for name in prompts:
        source, target = (read_rgb(out / kind / f"{name}.png") for kind in ("source", "target"))
        assert source.shape == (64, 128, 3) and np.array_equal(source[:, :, 0], CannyDetector()(target, 40, 90))
    # What was turned by the camera stands upright: 160 x 90 pixels, its first row once the first column.
    upright = cv2.rotate(PHOTO[:90, :160], cv2.ROTATE_90_CLOCKWISE)[round((160 - 45) / 2) :][:45]
    wanted = cv2.resize(upright, (128, 64), interpolation=cv2.INTER_LANCZOS4).astype(int)
    assert np.abs(read_rgb(out / "target/sub/turned.png") - wanted).mean() < 6
    assert (read_rgb(out / "target/sub/deep.png").std(axis=2) == 0).all()
    assert not [name for name in files(out) if name.endswith(".tmp")]


def test_a_second_run_goes_on_and_gives_the_same(photos, tmp_path, capsys, monkeypatch):
    out, again = tmp_path / "out", tmp_path / "again"
    command = ["shuffle", photos, out, "--size", 64, "--crops", 3, "--seed", 5, "--f", 32]
    write, done = tutorial_dataset.write_pair, []

    def stop_after_five(out, pair, source, target):
        if len(done) == 5:
            raise KeyboardInterrupt
        done.append(pair.name)
        write(out, pair, source, target)

    monkeypatch.setattr(tutorial_dataset, "write_pair", stop_after_five)
    assert run(*command, "--workers", 1) == 130
    assert "goes on" in capsys.readouterr().err and list(listed(out)) == done
    monkeypatch.undo()
    untouched = (out / f"target/{done[0]}.png").stat().st_mtime_ns
    assert run(*command) == 0
    assert len(listed(out)) == 18 and (out / f"target/{done[0]}.png").stat().st_mtime_ns == untouched
    assert run(*[again if word is out else word for word in command], "--workers", 3) == 0
    assert files(out) == files(again)
    # More parts go on; another seed or another condition does not.
    more = [*command[:6], 4, *command[7:]]
    assert run(*more) == 0 and len(listed(out)) == 24
    assert files(out).items() >= {
        (k, v) for k, v in files(again).items() if k not in ("prompt.json", "photos.json")
    }  # which count the pairs
    assert run(*more, "--seed", 6) == 2 and run("canny", photos, out, "--size", 64, "--crops", 4, "--seed", 5) == 2
    complaints = capsys.readouterr().err
    assert "other settings (seed; " in complaints and "other settings (condition" in complaints
    assert run(*more, "--f", 33) == 2 and "other settings (f; " in capsys.readouterr().err
    # A photograph that has changed since is done again, one that is gone is no longer listed.
    before = files(out)
    Image.fromarray(PHOTO[::-1]).save(photos / "a.png")
    # Newer than every file there; a clock that was set back meanwhile may have made the listing older than the pairs.
    newer = max(path.stat().st_mtime for path in out.rglob("*.*")) + 1
    os.utime(photos / "a.png", (newer, newer))
    (photos / "small.bmp").unlink()
    assert run(*more) == 0 and len(listed(out)) == 20
    changed = {name for name, data in files(out).items() if data != before[name]}
    assert changed == {"prompt.json", "photos.json"} | {
        f"{kind}/a.png-{k}.png" for k in range(4) for kind in ("source", "target")
    }


def test_a_photograph_that_changes_is_read_again_in_the_same_process(photos):
    """What was read last is kept, since the parts of one photograph are cut one after the other."""
    pair, framing = PhotoPair(photos / "a.png", "a.png", "x"), Framing(64, 64)
    before = [cut_part(pair, framing)[0] for _ in range(2)]
    assert np.array_equal(*before)
    Image.fromarray(PHOTO[::-1]).save(photos / "a.png")
    os.utime(photos / "a.png", (1e9, 1e9))  # a clock of coarse steps may show no change otherwise
    assert np.array_equal(cut_part(pair, framing)[0][::-1], before[0])


def test_what_is_broken_is_reported_and_the_rest_is_done(photos, tmp_path, capsys):
    (photos / "broken.jpg").write_bytes(b"\xff\xd8\xff nonsense")
    (photos / "broken.txt").write_text("broken")
    (photos / "a.png").write_bytes((photos / "a.png").read_bytes()[:5000])
    (photos / "small.txt").unlink()
    out = tmp_path / "out"
    assert run("canny", photos, out, "--size", 64, "--crops", 2) == 1
    printed = capsys.readouterr()
    assert "8 pairs of 4 of the 7 pictures" in printed.out
    complaints = [line for line in printed.err.splitlines() if line.startswith("tutorial_dataset.py: ")]
    for line, words in zip(
        complaints, ("small.bmp has no prompt", "a.png does not decode", "broken.jpg does"), strict=True
    ):
        assert words in line
    assert {name.split("-")[0] for name in listed(out)} == {"a.jpg", "sub/clear", "sub/deep", "sub/turned"}
    # Mended, they join the rest.
    Image.fromarray(PHOTO).save(photos / "a.png")
    (photos / "broken.jpg").unlink()
    assert run("canny", photos, out, "--size", 64, "--crops", 2, "--prompt", "anything") == 0
    assert len(listed(out)) == 12 and set(listed(out).values()) == {"anything"}


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["cany", "IN", "OUT"], "cany"),
        (["inpaint", "IN", "OUT"], "inpaint"),
        (["canny", "IN"], "OUT"),
        (["canny", "IN/none", "OUT"], "there is no folder"),
        (["canny", "IN/a.png", "OUT"], "there is no folder"),
        (["canny", "IN", "IN"], "same folder"),
        (["canny", "IN", "IN/sub"], "not made by this command"),
        (["canny", "IN", "IN/a.png"], "is a file"),
        (["canny", "IN", "OUT", "--size", "100"], "multiples of 64"),
        (["canny", "IN", "OUT", "--crops", "0"], "--crops must lie within 1 and 10,000, found 0"),
        (["canny", "IN", "OUT", "--crops", "99999999"], "--crops must lie within 1 and 10,000"),
        (["canny", "", "OUT"], "argument PHOTOS: it is empty; give a file or a folder"),
        (["canny", "IN", ""], "argument OUT: it is empty"),
        (["canny", "IN", "OUT", "--captions", "IN/none.jsonl"], "none.jsonl cannot be read"),
        (["canny", "IN", "OUT", "--captions", "IN/a.txt"], "a.txt, line 1 is not valid JSON"),
        (["canny", "IN", "OUT", "--captions", "x", "--prompt", "y"], "not allowed with"),
        (["canny", "IN", "OUT", "--low-threshold", "300"], "low_threshold must be"),
        (["canny", "IN", "OUT", "--detect-resolution", "512"], "takes no --detect-resolution"),
        (["tile", "IN", "OUT", "--version", "1.0"], "tile exists in version 1.1"),
        (["hed", "IN", "OUT", "--weights", "IN"], "ControlNetHED.pth"),
        (["--out", "OUT", "--palette", "pale"], "pale"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_and_exit_2(photos, tmp_path, capsys, command, message):
    places = {"IN": str(photos), "OUT": str(tmp_path / "out")}
    command = [
        word.replace(start, places[start], 1) if (start := word.split("/")[0]) in places else word for word in command
    ]
    before = files(photos)
    assert run(*command) == 2
    complaint = capsys.readouterr().err.strip().splitlines()[-1]
    assert complaint.startswith("tutorial_dataset.py: ") and message in complaint
    assert files(photos) == before and not (tmp_path / "out" / "prompt.json").exists()


def test_a_network_sees_the_photograph_at_its_own_size(photos, tmp_path, monkeypatch):
    """Canny of 1.1 stands in for a network: it works at `--detect-resolution` on the part, not on the small result."""
    seen = []
    detect = CannyDetector.detect
    monkeypatch.setattr(
        CannyDetector, "detect", lambda self, image, **k: seen.append(image.shape) or detect(self, image, **k)
    )
    out = tmp_path / "out"
    assert run("canny", photos, out, "--size", 64, "--version", "1.1", "--detect-resolution", 192, "--prompt", "x") == 0
    assert set(seen) == {(192, 192, 3)} and len(listed(out)) == 6


def test_the_main_job_runs_on_buckets(tmp_path):
    folder, out, result = tmp_path / "photos", tmp_path / "data", tmp_path / "run"
    folder.mkdir()
    for name, photo in (("wide", PHOTO[:100]), ("square", PHOTO), ("tall", PHOTO[:, :100])):
        Image.fromarray(photo).save(folder / f"{name}.png")
    assert run("canny", folder, out, "--size", "256x64", "--buckets", "--crops", 3, "--prompt", "an astronaut") == 0
    assert {read_rgb(path).shape for path in out.rglob("*.png")} == {(64, 256, 3), (128, 128, 3), (256, 64, 3)}
    settings = {"data": out, "out": result, "held_out": 3, "batch_size": 2, "steps": 3, "log_every": 3, "sample_steps": 2,
                "accelerator": "cpu"}  # fmt: skip
    assert tutorial_train.main([f"{key}={value}" for key, value in settings.items()]) == 0
    assert (result / "result.png").is_file() and (result / "model.safetensors").is_file()
    assert list((result / "pictures").glob("step_*.png"))


@pytest.mark.skipif(sys.platform == "win32", reason="its names have no single bytes")
def test_the_folders_may_be_called_anything(photos, tmp_path, capsys):
    """Also by bytes that are no text, which stdout cannot express."""
    out = tmp_path / os.fsdecode(b"caf\xe9")
    assert run("canny", photos, out, "--size", 64) == 0
    (out / "source/small.png").unlink()
    assert run("--check", out) == 1
    assert run("--out", tmp_path / os.fsdecode(b"\xff"), "--count", 2, "--size", 64) == 0
    told = capsys.readouterr().out
    assert "6 pictures are in" in told and "5 of 6 pairs in" in told and "2 pairs are in" in told
