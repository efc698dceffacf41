"""Files are whole or not there: whatever fails leaves what was there before, and nothing beside it."""

import os

import numpy as np
import pytest

from cldm.data.folders import claim_folder, write_listing
from cldm.files import write_whole
from cldm.pictures import save_png


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("note.txt", lambda folder: write_whole(folder / "note.txt", b"new")),
        ("a.png", lambda folder: save_png(folder / "a.png", np.zeros((4, 4, 3), np.uint8))),
        ("prompt.json", lambda folder: write_listing(folder, [{"source": "a", "target": "b", "prompt": "c"}])),
        ("fill.json", lambda folder: claim_folder(folder, "fill.json", {"size": 64})),
    ],
)
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, name, write):
    (tmp_path / name).write_bytes(b"old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            write(tmp_path)
    assert (tmp_path / name).read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1
    write(tmp_path)
    assert (tmp_path / name).read_bytes() != b"old" and len(list(tmp_path.iterdir())) == 1


def test_a_picture_that_png_cannot_hold_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr("annotator.pictures.cv2.imencode", lambda *args: (False, np.zeros(0, np.uint8)))
    with pytest.raises(ValueError, match="cannot be written as PNG"):
        save_png(tmp_path / "a.png", np.zeros((4, 4, 3), np.uint8))
    assert not list(tmp_path.iterdir())
