"""Results: arrays with settings, saved as PNG text and read back."""

import pickle

import numpy as np
import pytest
from PIL import Image

from cldm.results import Pictures, read_png_text, read_settings

SETTINGS = {"prompt": ["a", "ß 猫"], "negative_prompt": "", "seed": [4, 9], "steps": 20, "strength": [1.0, 0.5]}


def pictures(count=2):
    data = np.random.default_rng(1).integers(0, 255, (count, 8, 16, 3), dtype=np.uint8)
    return Pictures(data, SETTINGS, {"hint": ["ab"]})


def test_they_are_arrays():
    made = pictures()
    assert made.shape == (2, 8, 16, 3) and made.dtype == np.uint8 and np.array_equal(made, np.asarray(made))
    assert made.settings == SETTINGS and made[0].settings is None and made.astype(int).settings is None
    assert np.array_equal(np.asarray(made.to_pil()[1]), made[1])


def test_another_process_gets_them_with_their_settings():
    made = pictures()
    sent = pickle.loads(pickle.dumps(made))
    assert np.array_equal(sent, made) and sent.settings == SETTINGS and sent.inputs == made.inputs
    part = pickle.loads(pickle.dumps(made[1:]))
    assert np.array_equal(part, made[1:]) and part.settings is None


def test_saved_pictures_carry_their_own_settings(tmp_path):
    made = pictures()
    files = made.save(tmp_path / "out", notes={"weights": "x.safetensors"})
    assert [file.relative_to(tmp_path).as_posix() for file in files] == ["out/4.png", "out/9.png"]
    assert [file.name for file in made.save(tmp_path / "a.png")] == ["a_4.png", "a_9.png"]
    assert np.array_equal(np.asarray(Image.open(files[1])), made[1])
    assert read_settings(files[1]) == {**SETTINGS, "prompt": "ß 猫", "seed": 9}
    assert (
        read_png_text(files[0])["inputs"] == {"hint": ["ab"]} and read_png_text(files[0])["weights"] == "x.safetensors"
    )
    one = Pictures(np.asarray(made[:1]), {"prompt": "a", "seed": [4]}, {})
    assert one.save(tmp_path / "b.png") == [tmp_path / "b.png"] and read_settings(tmp_path / "b.png")["seed"] == 4
    assert not [path for path in tmp_path.rglob("*") if path.suffix == ".tmp"]


def test_what_cannot_be_saved_or_read_is_named(tmp_path):
    with pytest.raises(ValueError, match="suffix '.jpg'"):
        pictures().save(tmp_path / "a.jpg")
    with pytest.raises(ValueError, match="has no settings"):
        pictures()[:1].save(tmp_path / "a.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    (tmp_path / "broken.png").write_bytes(b"x")
    for name, message in (
        ("plain.png", "carries no settings"),
        ("broken.png", "cannot be read"),
        ("none.png", "none.png"),
    ):
        with pytest.raises(ValueError, match=message):
            read_settings(tmp_path / name)
