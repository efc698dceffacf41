"""`python -m annotator` on files and folders of photographs, good and broken."""

import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from annotator.__main__ import main
from annotator.canny import CannyDetector
from annotator.network import LazyNetwork, NetworkDetector, to_tensor
from annotator.pictures import SETTINGS, as_array, read_image, save_png, to_uint8
from annotator.registry import CONDITIONS, REGISTRY
from annotator.shuffle import ContentShuffleDetector
from tests.annotator import tiny_models
from tests.annotator.cases import case_state_dict, open_cases

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
    before = maps(target)["a.png"]
    other = tmp_path / "other.png"
    Image.fromarray(255 - PHOTOS[0]).save(other)
    os.utime(other, (1e9, 1e9))
    time.sleep(0.02)  # the clock of files is coarse
    shutil.copy2(other, photos / "a.png")  # with its old date
    assert main(command) == 0
    assert "1 written" in capsys.readouterr().out.splitlines()[-1]
    assert not np.array_equal(maps(target)["a.png"], before)


def test_a_mask_that_changed_is_used_again(photos, tmp_path, capsys):
    target, mask = tmp_path / "maps", tmp_path / "masks"
    hole = np.zeros((8, 8), np.uint8)
    for name in ("a", "sub/b", "sub/deep/c d"):
        save_png(mask / f"{name}.png", hole)
    command = ["inpaint", str(photos), str(target), "--mask", str(mask), "--workers", "1"]
    assert main(command) == 0
    time.sleep(0.02)
    save_png(mask / "a.png", 255 - hole)
    assert main(command) == 0
    assert "1 written" in capsys.readouterr().out.splitlines()[-1]
    assert not maps(target)["a.png"][:, :, 3].any()


def test_a_date_in_the_future_does_not_make_a_picture_anew_each_time(photos, tmp_path, capsys):
    os.utime(photos / "a.png", (4e9, 4e9))
    for written in ("3 written", "0 written"):
        assert main(["scribble", str(photos), str(tmp_path / "maps"), "--workers", "1"]) == 0
        assert written in capsys.readouterr().out


def test_a_run_that_made_nothing_binds_nothing(photos, tmp_path, capsys):
    target = tmp_path / "maps"
    assert main(["hed", str(photos), str(target), "--weights", str(tmp_path / "none")]) == 2
    assert main(["canny", str(photos), str(target), "--workers", "1"]) == 0


def test_maps_of_other_settings_do_not_mix_under_other_names(photos, tmp_path, capsys):
    target = str(tmp_path / "maps")
    assert main(["canny", str(photos / "sub"), target]) == 0
    save_png(tmp_path / "more" / "other.png", PHOTOS[0])
    for command in (["tile"], ["canny", "--low-threshold", "5"]):
        assert main([command[0], str(tmp_path / "more"), target, *command[1:]]) == 2
        assert "made with other settings" in capsys.readouterr().err
    assert main(["canny", str(tmp_path / "more"), target]) == 0
    assert list(maps(tmp_path / "maps")) == ["b.png", "deep/c d.png", "other.png"]


def test_of_two_processes_with_different_settings_one_is_refused(photos, tmp_path, capsys, monkeypatch):
    """The second one starts when the first has noted its settings, and has made no map yet."""
    first, target = CannyDetector.detect, str(tmp_path / "maps")
    second = []

    def detect(self, *args, **parameters):
        second.append(second or main(["tile", str(photos), target]))
        return first(self, *args, **parameters)

    monkeypatch.setattr(CannyDetector, "detect", detect)
    assert main(["canny", str(photos), target, "--workers", "1"]) == 0
    assert second[0] == 2 and "other settings (condition" in capsys.readouterr().err


def test_a_broken_note_in_a_folder_without_maps_binds_nothing(photos, tmp_path, capsys):
    """As a version before this one, or a disk, may leave it."""
    target = tmp_path / "maps"
    target.mkdir()
    (target / SETTINGS).touch()
    assert main(["tile", str(photos), str(target), "--workers", "1"]) == 0
    (target / SETTINGS).write_bytes(b"{")
    assert main(["tile", str(photos), str(target), "--workers", "1"]) == 2
    assert "other settings" in capsys.readouterr().err


def test_a_full_disk_leaves_no_note(photos, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        assert main(["tile", str(photos), str(tmp_path / "maps")]) == 2
    assert list((tmp_path / "maps").iterdir()) == []
    assert main(["canny", str(photos), str(tmp_path / "maps"), "--workers", "1"]) == 0


def test_a_disk_that_fills_up_ends_the_run_in_one_line(photos, tmp_path, monkeypatch, capsys):
    flush, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) > 2:  # the note and a map
            raise OSError(28, "No space left on device")
        flush(descriptor)

    command = ["tile", str(photos), str(tmp_path / "maps"), "--workers", "1"]
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        assert main(command) == 2
    (told,) = capsys.readouterr().err.splitlines()
    assert told.startswith("python -m annotator: [Errno 28] No space left on device: ") and "maps" in told
    assert len(maps(tmp_path / "maps")) == 1 and main(command) == 0


def test_a_run_that_fails_leaves_the_note_of_another(photos, tmp_path, monkeypatch):
    """The second one makes nothing, and ends when the first has made no map yet."""
    first, target, broken = CannyDetector.detect, str(tmp_path / "maps"), tmp_path / "broken"
    broken.mkdir()
    (broken / "x.png").write_bytes(b"nonsense")
    second = []

    def detect(self, *args, **parameters):
        second.append(second or main(["canny", str(broken), target]))
        return first(self, *args, **parameters)

    monkeypatch.setattr(CannyDetector, "detect", detect)
    assert main(["canny", str(photos), target, "--workers", "1"]) == 0
    assert second[0] == 1 and (tmp_path / "maps" / SETTINGS).exists()


def test_the_note_comes_back_if_the_run_that_wrote_it_took_it_away(photos, tmp_path, monkeypatch):
    """As the other one of two runs does that makes nothing."""
    target = tmp_path / "maps"

    def detect(self, image, **parameters):
        (target / SETTINGS).unlink(missing_ok=True)
        return image[:, :, 0]

    monkeypatch.setattr(CannyDetector, "detect", detect)
    command = ["canny", str(photos), str(target), "--workers", "1"]
    assert main(command) == 0 and (target / SETTINGS).exists() and main(command) == 0


def test_a_single_picture_does_not_mix_into_a_folder_of_maps(photos, tmp_path, capsys):
    target = tmp_path / "maps"
    assert main(["canny", str(photos), str(target), "--workers", "1"]) == 0
    before = maps(target)["a.png"]
    for extra in ([], ["--force"]):
        for place in (target, target / "new.png"):
            assert main(["invert", str(photos / "a.png"), str(place), *extra]) == 2
    assert "made with other settings (condition" in capsys.readouterr().err
    assert np.array_equal(maps(target)["a.png"], before) and not (target / "new.png").exists()
    assert main(["canny", str(photos / "a.png"), str(target / "new.png")]) == 0


def test_files_that_something_else_made_are_not_overwritten(photos, tmp_path, capsys):
    target = tmp_path / "maps"
    save_png(target / "a.png", PHOTOS[1])
    for extra in ([], ["--force"]):
        assert main(["canny", str(photos), str(target), *extra]) == 2
        assert "a.png" in capsys.readouterr().err
    assert np.array_equal(maps(target)["a.png"], PHOTOS[1])


def test_a_folder_of_something_else_is_not_written_into(photos, tmp_path, capsys):
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "will.txt").write_text("mine")
    (tmp_path / "link").symlink_to("letters")
    for target in ("letters", "link"):
        assert main(["canny", str(photos), str(tmp_path / target)]) == 2
        told = f"{tmp_path / target} already holds will.txt, made by something else; choose another name for the folder"
        assert capsys.readouterr().err == f"python -m annotator: {told}\n"
    assert [path.name for path in (tmp_path / "letters").iterdir()] == ["will.txt"]
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / ".gitkeep").touch()
    for _ in range(2):  # the second time it is the command's own folder, whatever else was put there
        assert main(["canny", str(photos), str(tmp_path / "empty"), "--workers", "1"]) == 0
        (tmp_path / "empty" / "more.txt").touch()
    assert "0 written" in capsys.readouterr().out


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
    complaints = sorted(printed.err.strip().splitlines())
    assert len(complaints) == 3
    for name, line in zip(("broken.jpg", "cut.jpg", "empty.png"), complaints, strict=True):
        assert name in line
    assert len(maps(target)) == 3


@pytest.mark.skipif(sys.platform == "win32", reason="its names have neither line breaks nor single bytes")
def test_names_of_any_bytes(tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "bro\nken.png").touch()
    save_png(tmp_path / "photos" / os.fsdecode(b"\xff.png"), PHOTOS[0])
    maps = tmp_path / os.fsdecode(b"maps \xff")
    assert main(["shuffle", str(tmp_path / "photos"), str(maps), "--seed", "1"]) == 1
    printed = capsys.readouterr()
    assert "1 written" in printed.out and len(printed.err.splitlines()) == 1
    assert "bro ken.png does not decode as a picture: cannot identify" in printed.err


def test_a_picture_of_too_many_pixels_says_what_to_do(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    save_png(tmp_path / "large.png", PHOTOS[0][:20, :20])
    assert main(["canny", str(tmp_path / "large.png"), str(tmp_path / "map.png")]) == 1
    assert "large.png has more than 200 pixels; make it smaller first" in capsys.readouterr().err


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
        (["canny", "IN", ""], "OUT: it is empty; give a file or a folder"),
        (["canny", "", "OUT"], "IN: it is empty"),
        (["hed", "IN", "OUT", "--weights", ""], "--weights: it is empty"),
        (["inpaint", "IN", "OUT", "--mask", ""], "--mask: it is empty"),
        (["canny", "IN/none", "OUT"], "none"),
        (["hed", "IN", "OUT", "--weights", "IN"], "ControlNetHED.pth"),
        (["canny", "IN", "OUT", "--device", "gpu"], "--device"),
        (["canny", "IN", "OUT", "--weights", "nope"], "--weights"),
        (["canny", "IN", "OUT", "--low-threshold", "200", "--high-threshold", "100"], "must not be above"),
        (["shuffle", "IN", "OUT", "--detect-resolution", "512"], "--detect-resolution"),
    ],
)
def test_mistakes_are_one_line_and_status_2(photos, tmp_path, capsys, command, message):
    places = {"IN": str(photos), "OUT": str(tmp_path / "out")}
    command = [place.replace(name, places[name]) if (name := place.split("/")[0].split(".")[0]) in places else place
               for place in command]  # fmt: skip
    assert main(command) == 2
    complaint = capsys.readouterr().err.strip()
    assert message in complaint and "\n" not in complaint


def test_a_wrong_version_in_the_environment_is_one_line(photos, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("ANNOTATOR_VERSION", "1.2")
    assert main(["canny", str(photos), str(tmp_path / "out")]) == 2
    wrong = "python -m annotator: ANNOTATOR_VERSION must be one of '1.0', '1.1', got '1.2'\n"
    assert capsys.readouterr().err == wrong


class Counting(nn.Conv2d):
    """A network that remembers with how many pictures it ran, and has memory for four."""

    batches: list[int] = []

    def forward(self, x):
        self.batches.append(len(x))
        if len(x) > 4:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return super().forward(x)


class Brightness(NetworkDetector):
    network = LazyNetwork("brightness.pth")

    def build_network(self):
        return Counting(3, 1, 1)

    def encode(self, image):
        return to_tensor(image)

    def decode(self, output, size):
        return to_uint8(output[0].numpy())


@pytest.fixture
def brightness(tmp_path, monkeypatch):
    """The condition "hed" with a small network, and its weights."""
    monkeypatch.setattr(Counting, "batches", [])
    info = replace(REGISTRY["hed", "1.0"], detector=f"{__name__}.Brightness")
    monkeypatch.setitem(REGISTRY, ("hed", "1.0"), info)
    weights = tmp_path / "brightness.pth"
    torch.save({"weight": torch.full((1, 3, 1, 1), 1 / 3), "bias": torch.zeros(1)}, weights)
    return weights


def test_network_detectors_run_in_batches(brightness, tmp_path, capsys):
    for index in range(7):
        save_png(tmp_path / "photos" / f"{index}.png", PHOTOS[index % 2][:, : 128 + index])
    (tmp_path / "photos" / "broken.png").touch()
    command = ["hed", str(tmp_path / "photos"), "", "--weights", str(tmp_path), "--device", "cpu"]
    results = []
    for batch in ("1", "4"):
        Counting.batches.clear()
        command[2] = str(tmp_path / f"maps{batch}")
        assert main([*command, "--batch", batch]) == 1
        results.append(maps(tmp_path / f"maps{batch}"))
        assert Counting.batches == [1] * 7 if batch == "1" else sum(Counting.batches) == 7 > len(Counting.batches)
    assert results[0].keys() == results[1].keys() and len(results[0]) == 7
    for name, found in results[0].items():
        assert found.mean() > 0 and np.abs(found.astype(int) - results[1][name].astype(int)).max() <= 1


def test_a_batch_that_does_not_fit_into_memory_is_halved(brightness, tmp_path, capsys):
    for index in range(20):
        save_png(tmp_path / "photos" / f"{index}.png", PHOTOS[0])
    command = ["hed", str(tmp_path / "photos"), str(tmp_path / "maps"), "--weights", str(brightness), "--device", "cpu"]
    assert main([*command, "--batch", "8"]) == 0
    assert "20 written" in capsys.readouterr().out and len(maps(tmp_path / "maps")) == 20
    assert Counting.batches == [8, 4, 4, 4, 4, 4]  # which is remembered


def test_a_picture_that_the_network_fails_on_does_not_stop_its_batch(brightness, tmp_path, capsys, monkeypatch):
    def needs_light(self, x):
        if (x == 0).flatten(1).all(dim=1).any():
            raise RuntimeError("no light")
        return nn.Conv2d.forward(self, x)

    monkeypatch.setattr(Counting, "forward", needs_light)
    for index in range(12):
        save_png(tmp_path / "photos" / f"{index:02}.png", PHOTOS[0] * (index != 3))
    command = ["hed", str(tmp_path / "photos"), str(tmp_path / "maps"), "--weights", str(brightness), "--device", "cpu"]
    assert main([*command, "--batch", "4"]) == 1
    printed = capsys.readouterr()
    assert "11 written" in printed.out and "1 failed" in printed.out and len(maps(tmp_path / "maps")) == 11
    assert "03.png: RuntimeError: no light" in printed.err and printed.err.count("RuntimeError") == 1


def test_maps_of_other_weights_do_not_mix(brightness, tmp_path, capsys):
    """Not even if they were put in the place of those before, under the same name and of the same size."""
    save_png(tmp_path / "photos" / "a.png", PHOTOS[0])
    command = ["hed", str(tmp_path / "photos"), str(tmp_path / "maps"), "--weights", str(tmp_path), "--device", "cpu"]
    assert main(command) == 0
    save_png(tmp_path / "photos" / "b.png", PHOTOS[1])
    copy = brightness.read_bytes()
    brightness.write_bytes(copy)  # the same weights, later
    assert main(command) == 0
    torch.save({"weight": torch.full((1, 3, 1, 1), 0.5), "bias": torch.zeros(1)}, brightness)
    capsys.readouterr()
    assert main(command) == 2
    assert "other settings (weights)" in capsys.readouterr().err and len(maps(tmp_path / "maps")) == 2


def test_coarse_line_art_needs_its_own_file_alone_and_loads_it_once(tmp_path, capsys, monkeypatch):
    from annotator.lineart import LineartDetector

    _, meta = open_cases("lineart")
    for index in range(3):
        save_png(tmp_path / "photos" / f"{index}.png", PHOTOS[0][:64, :64])
    command = ["lineart", str(tmp_path / "photos"), str(tmp_path / "maps"), "--coarse", "--detect-resolution", "64",
               "--weights", str(tmp_path / "weights"), "--device", "cpu", "--batch", "3"]  # fmt: skip
    (tmp_path / "weights").mkdir()
    assert main(command) == 2  # at once, not for every picture
    complaint = capsys.readouterr().err.strip()
    assert "sk_model2.pth" in complaint and "\n" not in complaint and not (tmp_path / "maps").exists()
    state_dict = case_state_dict("sk_model", {"gain": meta["cases"]["photo_coffee"]["gain_coarse"]})
    torch.save(state_dict, tmp_path / "weights" / "sk_model2.pth")
    loaded, batches = [], []
    load, forward = LineartDetector.load_network, LineartDetector.forward
    monkeypatch.setattr(LineartDetector, "load_network", lambda self, *a: loaded.append(a) or load(self, *a))
    monkeypatch.setattr(
        LineartDetector, "forward", lambda self, x, **p: batches.append(len(x)) or forward(self, x, **p)
    )
    assert main(command) == 0
    assert len(loaded) == 1 and batches == [3] and len(maps(tmp_path / "maps")) == 3


def test_every_picture_is_shuffled_in_its_own_way_that_can_be_repeated(tmp_path):
    for name in ("a", "b"):
        save_png(tmp_path / "photos" / f"{name}.png", PHOTOS[0])
    found = []
    for target in ("one", "two"):
        assert main(["shuffle", str(tmp_path / "photos"), str(tmp_path / target), "--seed", "5"]) == 0
        found.append(maps(tmp_path / target))
    assert np.array_equal(found[0]["a.png"], found[1]["a.png"]) and np.array_equal(found[0]["b.png"], found[1]["b.png"])
    assert not np.array_equal(found[0]["a.png"], found[0]["b.png"])
    assert main(["shuffle", str(tmp_path / "photos" / "a.png"), str(tmp_path / "c.png"), "--seed", "5"]) == 0
    assert np.array_equal(read_image(tmp_path / "c.png"), ContentShuffleDetector()(PHOTOS[0], seed=5))


def test_inpainting_keeps_its_hole_and_takes_masks(photos, tmp_path, capsys):
    target = tmp_path / "maps"
    assert main(["inpaint", str(photos), str(target)]) == 1  # no picture has a hole
    assert capsys.readouterr().err.count("needs a mask") == 3
    assert not list(target.iterdir())  # so that the same folder will do for the right command
    masks = tmp_path / "masks"
    for name in ("a", "sub/b", "sub/deep/c d"):
        mask = np.zeros((50, 50), np.uint8)
        mask[10:40, 10:40] = 255
        save_png(masks / f"{name}.png", mask)
    assert main(["inpaint", str(photos), str(tmp_path / "holes"), "--mask", str(masks), "--blur", "0"]) == 0
    for found, photo in zip(maps(tmp_path / "holes").values(), PHOTOS, strict=True):
        assert np.array_equal(found[:, :, :3], photo) and 0.3 < (found[:, :, 3] == 0).mean() < 0.4
    one = ["inpaint", str(photos / "a.png"), str(tmp_path / "one.png"), "--mask", str(masks / "a.png"), "--blur", "0"]
    assert main(one) == 0 and np.array_equal(read_image(tmp_path / "one.png"), maps(tmp_path / "holes")["a.png"])
    capsys.readouterr()
    (masks / "a.png").unlink()
    for wrong, message in (
        (["--mask", str(tmp_path / "none")], "there is no mask"),
        (["--save", "hint"], "--save map"),
    ):
        assert main(["inpaint", str(photos), str(tmp_path / "other"), *wrong]) == 2
        assert message in capsys.readouterr().err and not (tmp_path / "other").exists()
    assert main(["inpaint", str(photos), str(tmp_path / "other"), "--mask", str(masks)]) == 1
    assert "a.png is missing" in capsys.readouterr().err and len(maps(tmp_path / "other")) == 2


def test_names_may_be_as_long_as_the_system_allows(tmp_path):
    name = "字" * 83 + ".png"  # 253 bytes of the 255 that a name may have
    save_png(tmp_path / "photos" / name, PHOTOS[0])
    assert main(["tile", str(tmp_path / "photos"), str(tmp_path / "maps")]) == 0
    assert list(maps(tmp_path / "maps")) == [name]


def test_hidden_folders_are_left_out(photos, tmp_path):
    save_png(photos / ".ipynb_checkpoints" / "a-checkpoint.png", PHOTOS[0])
    save_png(photos / "sub" / ".thumbs" / "deep" / "b.png", PHOTOS[0])
    assert main(["canny", str(photos), str(tmp_path / "maps")]) == 0
    assert list(maps(tmp_path / "maps")) == ["a.png", "sub/b.png", "sub/deep/c d.png"]


def test_a_folder_that_cannot_be_read_is_named(photos, tmp_path, monkeypatch, caplog):
    scandir = os.scandir

    def refuse(path):  # file permissions do not hold for the user that tests often run as
        if os.path.basename(path) == "deep":
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert main(["canny", str(photos), str(tmp_path / "maps")]) == 0
    monkeypatch.undo()
    assert list(maps(tmp_path / "maps")) == ["a.png", "sub/b.png"]
    assert f"left out the folder '{photos / 'sub' / 'deep'}', which cannot be read (Permission denied)" in caplog.text


def test_pictures_of_formats_that_are_not_read_are_named(photos, tmp_path, caplog):
    for name in ("sub/IMG_0001.HEIC", "b.gif", ".hidden.gif"):
        (photos / name).write_bytes(b"")
    assert main(["canny", str(photos), str(tmp_path / "maps")]) == 0
    assert "pictures of kinds that are not read (2, such as '" in caplog.text and "PNG or JPEG" in caplog.text
    assert len(maps(tmp_path / "maps")) == 3


def test_threads_that_write_leave_the_umask_alone(tmp_path):
    old = os.umask(0o027)
    try:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda k: save_png(tmp_path / f"{k}.png", PHOTOS[0][:8, :8]), range(200)))
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(old)
    assert {(path.stat().st_mode & 0o777) for path in tmp_path.iterdir()} == {0o640}


def test_pictures_of_all_kinds_are_read(tmp_path):
    grey = PHOTOS[0][:20, :30, 0]
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    assert np.array_equal(read_image(tmp_path / "grey.png"), grey)
    assert np.array_equal(read_image(tmp_path / "deep.png"), grey)
    wide = Image.fromarray(grey.astype(np.int32))  # mode I: its 32 bits may hold 8 or 16
    assert wide.mode == "I" and np.array_equal(as_array(wide), grey)
    assert np.array_equal(as_array(Image.fromarray(grey.astype(np.int32) * 257)), grey)
    dark = Image.fromarray(np.full((2, 2), 255, np.uint16))
    assert dark.mode == "I;16" and as_array(dark).max() == 0
    for wrong in (-1, 2**16):
        with pytest.raises(ValueError, match=f"it holds numbers from .*{wrong}"):
            as_array(Image.fromarray(np.full((2, 2), wrong, np.int32)))
    palette = Image.fromarray(PHOTOS[0][:20, :30]).convert("P")
    palette.save(tmp_path / "palette.png")
    assert read_image(tmp_path / "palette.png").shape == (20, 30, 3)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned
    Image.fromarray(PHOTOS[0][:16, :32]).save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg").shape == (32, 16, 3)
    for image in (grey, PHOTOS[0], np.dstack([PHOTOS[0], PHOTOS[0][:, :, 0]])):
        save_png(tmp_path / "again.png", image)
        assert np.array_equal(read_image(tmp_path / "again.png"), image)


def test_the_module_runs_and_lists_itself():
    ran = subprocess.run([sys.executable, "-m", "annotator", "--list"], capture_output=True, text=True, check=True)
    assert "low_threshold=100" in ran.stdout and "pidinet" in ran.stdout and not ran.stderr
    assert len(ran.stdout.splitlines()) == len(CONDITIONS)
    command = [sys.executable, "-m", "annotator", "normal", "--help"]
    ran = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | {"COLUMNS": "200"})
    assert "0.1 to 20, default 6.28319" in ran.stdout and "0 to 1, default 0.4" in ran.stdout


def test_sets_made_in_the_folder_are_not_photographs(photos, tmp_path, capsys):
    for part in ("source", "target"):
        save_png(photos / "training" / part / "a.png", PHOTOS[0])
    (photos / "training" / "photos.json").write_text("{}")
    assert main(["tile", str(photos), str(tmp_path / "maps"), "--workers", "1"]) == 0
    assert "3 written" in capsys.readouterr().out
    # Folders of these names alone, or the set itself when it is named, are as good as any.
    (photos / "training" / "photos.json").rename(photos / "note.json")
    assert main(["tile", str(photos), str(tmp_path / "more"), "--workers", "1"]) == 0
    assert "5 written" in capsys.readouterr().out


def test_names_of_pictures_cannot_write_to_the_terminal(photos, tmp_path, capsys):
    (photos / "bro\x1b[31mken.png").write_bytes(b"nonsense")
    assert main(["tile", str(photos), str(tmp_path / "maps"), "--workers", "1"]) == 1
    assert "bro?[31mken.png" in (told := capsys.readouterr().err) and "\x1b" not in told


def test_a_task_that_a_model_has_not_is_a_mistake_in_the_command(photos, tmp_path, capsys):
    model = str(tiny_models.segformer(tmp_path / "segformer"))
    command = ["segmentation", str(photos), str(tmp_path / "maps"), "--weights", model, "--task", "panoptic"]
    assert main(command) == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith("the model segformer gives no panoptic segmentation")


def test_what_else_lies_in_a_models_folder_is_not_its_weights(photos, tmp_path):
    model = tiny_models.depth_anything(tmp_path / "depth")
    command = ["depth_anything", str(photos), str(tmp_path / "maps"), "--weights", str(model), "--workers", "1"]
    assert main(command) == 0
    (model / "README.md").write_text("hi")
    assert main(command) == 0


def test_work_that_nobody_watches_any_more_is_no_success(photos, tmp_path):
    """stderr, where a broken picture is told of, goes to a program that has ended."""
    (photos / "0.png").write_bytes(b"broken")
    command = [sys.executable, "-m", "annotator", "tile", str(photos), str(tmp_path / "maps"), "--workers", "1"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        process.stderr.close()
    assert process.returncode != 0


def test_a_list_that_nobody_reads_to_its_end(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-m", "annotator", "--list"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdout.close()
        assert (process.stderr.read(), process.wait()) == (b"", 0)
