"""Pictures of a visitor, and settings that come back from files."""

import errno
import json

import gradio as gr
import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from cldm.results import PNG_KEY, Pictures
from controlnet.app import gallery as module
from controlnet.app.errors import complaint, shown
from controlnet.app.gallery import Gallery, read_notes, visitor_key


def pictures(count: int = 1) -> Pictures:
    return Pictures(np.zeros((count, 8, 8, 3), np.uint8), {"prompt": "x", "seed": list(range(count))}, {})


def test_each_visitor_has_a_folder_of_his_own(tmp_path):
    mine, other = Gallery(tmp_path, visitor_key(None)), Gallery(tmp_path, visitor_key(""))
    assert mine.visitor != other.visitor and visitor_key(mine.visitor) == mine.visitor
    mine.add(pictures(2), {"base": "b"})
    assert len(mine.files()) == 2 and other.files() == []
    settings, notes = read_notes(mine.files()[0])
    assert settings["prompt"] == "x" and notes == {"base": "b"}


@pytest.mark.parametrize(
    "text", ['{"settings": {"prompt": "\\ud800"}}', '{"settings": {"steps": ' + "[" * 100_000 + "]" * 100_000 + "}}"]
)
def test_settings_that_no_page_can_show_are_damaged(tmp_path, text):
    info = PngImagePlugin.PngInfo()
    info.add_itxt(PNG_KEY, text)
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png", pnginfo=info)
    with pytest.raises(ValueError, match="the settings in this picture are damaged"):
        read_notes(tmp_path / "a.png")


@pytest.mark.parametrize("key", ["../x", "", "a" * 31, "A" * 32, "a" * 32 + "/..", None, 3, {"a": 1}, ["a"]])
def test_keys_that_are_none(tmp_path, key):
    assert visitor_key(key) != key
    with pytest.raises(ValueError, match="this browser's key is not known"):
        Gallery(tmp_path, key).files()


def test_files_without_settings(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="carries no settings"):
        read_notes(tmp_path / "a.png")
    info = PngImagePlugin.PngInfo()
    info.add_itxt(PNG_KEY, json.dumps({"settings": {"steps": 3}, module.NOTES: ["no dict"]}))
    Image.new("RGB", (4, 4)).save(tmp_path / "b.png", pnginfo=info)
    assert read_notes(tmp_path / "b.png") == ({"steps": 3}, {})


def test_a_full_disk_is_a_message(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device", "/secret/place")

    monkeypatch.setattr("cldm.results.write_whole", full)
    listener = shown(lambda: Gallery(tmp_path, visitor_key(None)).add(pictures(), {}), lambda text: text)
    with pytest.raises(gr.Error, match="The disk of the server is full") as raised:
        listener()
    assert "secret" not in str(raised.value)


def test_errors_are_sentences_without_markup_paths_or_stacks(caplog):
    def fail(error):
        raise error

    for error, text in (
        (ValueError("no <b>such</b> thing"), "No &lt;b&gt;such&lt;/b&gt; thing"),
        (MemoryError(), "not enough memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "not enough memory"),
        (KeyError("x"), "Something went wrong on the server"),
    ):
        with pytest.raises(gr.Error) as raised:
            shown(fail, lambda text: text)(error)
        assert text in str(raised.value.message) and raised.value.__cause__ is None
    assert "KeyError" in caplog.text  # what is no mistake of a visitor is in the log
    assert complaint(ValueError("a b")) == "A b"
    assert complaint(ValueError("control.pth: is broken")) == "control.pth: is broken"
    assert complaint(OSError(errno.EACCES, "Permission denied", "/x/y")) == "Permission denied: /x/y"

    def some():
        yield 1
        raise ValueError("broken half way")

    found = shown(some, str.upper)()
    assert next(found) == 1
    with pytest.raises(gr.Error, match="BROKEN HALF WAY"):
        next(found)
