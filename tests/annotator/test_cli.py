"""`python -m annotator` on files and folders of photographs, good and broken."""

import os
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from torch import nn

from annotator import describe, folder, load
from annotator.__main__ import main
from annotator.canny import CannyDetector
from annotator.detector import NetworkDetector
from annotator.folder import read_image, write_png
from annotator.registry import REGISTRY
from annotator.util import to_uint8
from tests.annotator.cases import open_cases

ARRAYS, _ = open_cases("canny")
PHOTOS = [ARRAYS[f"{name}/input"] for name in ("astronaut", "chelsea", "coffee")]


@pytest.fixture
def photos(tmp_path):
    """Three photographs in a folder with a sub-folder, and a text file that is none."""
    source = tmp_path / "photos"
    for name, photo in zip(("a.png", "sub/b.png", "sub/deep/c d.webp"), PHOTOS, strict=True):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photo).save(source / name, lossless=True)
    (source / "notes.txt").write_text("no picture")
    return source


def maps(target) -> dict[str, np.ndarray]:
    return {str(path.relative_to(target)): read_image(path) for path in sorted(target.rglob("*.png"))}


def test_a_folder_keeps_names_and_sub_folders(photos, tmp_path, capsys):
    target = tmp_path / "maps"
    assert main(["canny", str(photos), str(target), "--low-threshold", "40", "--high-threshold", "90"]) == 0
    assert "3 written" in capsys.readouterr().out
    found = maps(target)
    assert list(found) == ["a.png", "sub/b.png", "sub/deep/c d.png"]
    for got, photo in zip(found.values(), PHOTOS, strict=True):
        assert got.shape == photo.shape and np.array_equal(got[:, :, 0], CannyDetector()(photo, 40, 90))
    assert not list(target.rglob("*.tmp"))


def test_a_run_goes_on_where_it_stopped(photos, tmp_path, capsys):
    target = tmp_path / "maps"
    command = ["canny", str(photos), str(target), "--workers", "1"]
    assert main(command) == 0
    (target / "a.png").unlink()
    untouched = (target / "sub/b.png").stat().st_mtime_ns
    assert main(command) == 0
    assert "1 written" in capsys.readouterr().out.splitlines()[-1]
    assert (target / "a.png").exists() and (target / "sub/b.png").stat().st_mtime_ns == untouched
    # Other settings do not mix with what is there, unless all of it is made anew.
    assert main([*command, "--save", "shown"]) == 2
    assert "other settings" in capsys.readouterr().err
    assert main([*command, "--save", "shown", "--force"]) == 0
    assert all(found.mean() > 127 for found in maps(target).values())


def test_a_picture_that_changed_is_done_again(photos, tmp_path, capsys):
    target = tmp_path / "maps"
    command = ["scribble", str(photos), str(target), "--workers", "1"]
    assert main(command) == 0
    later = (target / "a.png").stat().st_mtime + 5
    Image.fromarray(255 - PHOTOS[0]).save(photos / "a.png")
    os.utime(photos / "a.png", (later, later))
    os.utime(target / "a.png", (later - 1, later - 1))
    before = maps(target)["a.png"]
    assert main(command) == 0
    assert "1 written" in capsys.readouterr().out.splitlines()[-1]
    assert not np.array_equal(maps(target)["a.png"], before)


def test_a_run_that_made_nothing_binds_nothing(photos, tmp_path, capsys):
    target = tmp_path / "maps"
    assert main(["hed", str(photos), str(target), "--weights", str(tmp_path / "none")]) == 2
    assert main(["canny", str(photos), str(target), "--workers", "1"]) == 0


def test_workers_end_with_a_parent_that_is_killed(tmp_path):
    source = tmp_path / "many"
    source.mkdir()
    for number in range(400):
        write_png(source / f"{number}.png", np.repeat(PHOTOS[0], 2, axis=0))
    command = [sys.executable, "-m", "annotator", "canny", str(source), str(tmp_path / "maps"), "--workers", "2"]
    parent = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 60
    while not list(tmp_path.glob("maps/*.png")) and parent.poll() is None and time.time() < deadline:
        time.sleep(0.05)
    children = psutil.Process(parent.pid).children(recursive=True)
    parent.kill()
    parent.wait()
    assert len(children) >= 2
    assert not psutil.wait_procs(children, timeout=20)[1]


def test_files_that_something_else_made_are_not_overwritten(photos, tmp_path, capsys):
    target = tmp_path / "maps"
    write_png(target / "a.png", PHOTOS[1])
    assert main(["canny", str(photos), str(target)]) == 2
    assert "a.png" in capsys.readouterr().err
    assert np.array_equal(maps(target)["a.png"], PHOTOS[1])


def test_broken_pictures_are_reported_and_the_rest_is_done(photos, tmp_path, capsys):
    (photos / "broken.jpg").write_bytes(b"\xff\xd8\xff nonsense")
    Image.fromarray(PHOTOS[0]).save(photos / "cut.jpg")
    whole = (photos / "cut.jpg").read_bytes()
    (photos / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (photos / "empty.png").touch()
    target = tmp_path / "maps"
    assert main(["canny", str(photos), str(target), "--workers", "2"]) == 1
    printed = capsys.readouterr()
    assert "3 written" in printed.out and "3 failed" in printed.out
    complaints = printed.err.strip().splitlines()
    assert len(complaints) == 3
    for name, line in zip(("broken.jpg", "cut.jpg", "empty.png"), complaints, strict=True):
        assert name in line
    assert len(maps(target)) == 3


def test_one_picture_at_the_size_of_the_apps(photos, tmp_path, capsys):
    target = tmp_path / "new" / "map.png"
    assert main(["scribble", str(photos / "a.png"), str(target), "--resolution", "128"]) == 0
    assert read_image(target).shape == (128, 128, 3)
    assert main(["canny", str(photos / "sub" / "b.png"), str(tmp_path / "new")]) == 0
    assert read_image(tmp_path / "new" / "b.png").shape == PHOTOS[1].shape
    assert main(["canny", str(photos / "sub" / "b.png"), str(tmp_path / "new")]) == 2
    assert "--force" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ([], "which condition"),
        (["cany", "IN", "OUT"], "cany"),
        (["canny", "IN"], "OUT"),
        (["canny", "IN/missing.png", "OUT"], "missing.png"),
        (["canny", "IN", "OUT", "--low-threshold", "900"], "low_threshold must be a whole number from 1 to 255"),
        (["canny", "IN", "OUT", "--low-threshold", "x"], "--low-threshold"),
        (["canny", "IN", "OUT", "--safe"], "--safe"),
        (["canny", "IN", "OUT", "--detect-resolution", "512"], "--detect-resolution"),
        (["tile", "IN", "OUT", "--version", "1.0"], "tile exists in version 1.1"),
        (["canny", "IN", "OUT", "--workers", "0"], "--workers"),
        (["canny", "IN", "OUT", "--resolution", "3"], "--resolution"),
        (["canny", "IN", "IN"], "same folder"),
        (["canny", "IN/sub/deep", "IN/a.png"], "is a file"),
        (["canny", "IN/a.png", "OUT.jpg"], ".png"),
        (["canny", "IN/none", "OUT"], "none"),
        (["hed", "IN", "OUT", "--weights", "IN"], "ControlNetHED.pth"),
    ],
)
def test_mistakes_are_one_line_and_status_2(photos, tmp_path, capsys, command, message):
    places = {"IN": str(photos), "OUT": str(tmp_path / "out")}
    command = [place.replace(name, places[name]) if (name := place.split("/")[0].split(".")[0]) in places else place
               for place in command]  # fmt: skip
    assert main(command) == 2
    complaint = capsys.readouterr().err.strip()
    assert message in complaint and "\n" not in complaint


class Counting(nn.Conv2d):
    """A network that remembers with how many pictures it ran."""

    def forward(self, x):
        self.batches = [*getattr(self, "batches", []), len(x)]
        return super().forward(x)


class Brightness(NetworkDetector):
    filename = "brightness.pth"

    def build_network(self):
        return Counting(3, 1, 1)

    def __call__(self, img):
        return to_uint8(self.network(self.tensor(self.prepare(img)))[0, 0].cpu().numpy())


def test_network_detectors_run_in_batches(tmp_path, monkeypatch):
    torch.save({"weight": torch.full((1, 3, 1, 1), 1 / 3), "bias": torch.zeros(1)}, tmp_path / "brightness.pth")
    info = replace(describe("hed"), detector=f"{__name__}.Brightness")
    monkeypatch.setitem(REGISTRY, ("hed", "1.0"), info)
    loaded = []
    monkeypatch.setattr(folder, "load", lambda *args: loaded.append(load(*args)) or loaded[-1])
    for index in range(7):
        write_png(tmp_path / "photos" / f"{index}.png", PHOTOS[index % 2][:, : 128 + index])
    (tmp_path / "photos" / "broken.png").touch()
    command = ["hed", str(tmp_path / "photos"), "", "--weights", str(tmp_path), "--device", "cpu"]
    results = []
    for batch in ("1", "4"):
        command[2] = str(tmp_path / f"maps{batch}")
        assert main([*command, "--batch", batch]) == 1
        results.append(maps(tmp_path / f"maps{batch}"))
    alone, joined = (annotator.detector.network.batches for annotator in loaded)
    assert alone == [1] * 7 and sum(joined) == 7 and max(joined) > 1
    assert results[0].keys() == results[1].keys() and len(results[0]) == 7
    for name, found in results[0].items():
        assert found.mean() > 0 and np.abs(found.astype(int) - results[1][name].astype(int)).max() <= 1
    # Maps of another network do not mix with these.
    torch.save({"weight": torch.zeros(1, 3, 1, 1), "bias": torch.zeros(1)}, tmp_path / "other.pth")
    command[4] = str(tmp_path / "other.pth")
    assert main(command) == 2 and len(loaded) == 2


def test_pictures_of_all_kinds_are_read(tmp_path):
    grey = PHOTOS[0][:20, :30, 0]
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    assert np.array_equal(read_image(tmp_path / "grey.png"), grey)
    assert np.array_equal(read_image(tmp_path / "deep.png"), grey)
    palette = Image.fromarray(PHOTOS[0][:20, :30]).convert("P")
    palette.save(tmp_path / "palette.png")
    assert read_image(tmp_path / "palette.png").shape == (20, 30, 3)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned
    Image.fromarray(PHOTOS[0][:16, :32]).save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg").shape == (32, 16, 3)
    for image in (grey, PHOTOS[0], np.dstack([PHOTOS[0], PHOTOS[0][:, :, 0]])):
        write_png(tmp_path / "again.png", image)
        assert np.array_equal(read_image(tmp_path / "again.png"), image)


def test_the_module_runs_and_lists_itself():
    ran = subprocess.run([sys.executable, "-m", "annotator", "--list"], capture_output=True, text=True, check=True)
    assert "low_threshold=100" in ran.stdout and "pidinet" in ran.stdout and not ran.stderr
