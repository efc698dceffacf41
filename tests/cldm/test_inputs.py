"""Hints, pictures and masks in every form that people have them in, fitted to one size."""

import numpy as np
import pytest
import torch
from PIL import Image

from annotator.registry import Hint, load
from cldm.inputs import count_of, fingerprint, fit, hint_tensor, mask_tensor, pad, picture_tensor

RGB = np.random.default_rng(0).integers(0, 255, (40, 56, 3), dtype=np.uint8)
WANTED = torch.from_numpy(RGB.astype(np.float32) / 255).permute(2, 0, 1)[None]


def test_every_form_is_the_same_picture(tmp_path):
    Image.fromarray(RGB).save(tmp_path / "a.png")
    forms = [RGB, Image.fromarray(RGB), tmp_path / "a.png", str(tmp_path / "a.png"), RGB[None], RGB.astype(np.float32) / 255,
             RGB / 255.0, WANTED, WANTED[0], (WANTED * 255).round().to(torch.uint8), WANTED.double(), [RGB],
             Hint(load("canny").info, RGB, RGB)]  # fmt: skip
    for form in forms:
        for convert in (hint_tensor, picture_tensor):
            found = convert(form)
            assert found.dtype == torch.float32 and found.is_contiguous()
            torch.testing.assert_close(found, WANTED, atol=1e-6, rtol=0)
        assert count_of(form) == 1
    assert (
        torch.equal(hint_tensor([RGB, tmp_path / "a.png"]), torch.cat([WANTED, WANTED])) and count_of([RGB, RGB]) == 2
    )


def test_grey_and_transparent_pictures_and_other_channel_counts():
    grey = RGB[:, :, 0]
    three = torch.from_numpy(grey.astype(np.float32) / 255)[None, None].expand(1, 3, -1, -1)
    for form in (grey, grey[:, :, None], Image.fromarray(grey), three[:, :1]):
        torch.testing.assert_close(hint_tensor(form), three)
    assert hint_tensor(grey, channels=1).shape == (1, 1, 40, 56)
    rgba = np.dstack([RGB, np.full((40, 56), 51, np.uint8)])
    torch.testing.assert_close(hint_tensor(rgba), 0.2 * WANTED + 0.8)
    assert hint_tensor(rgba, channels=4).shape == (1, 4, 40, 56)
    assert hint_tensor(torch.rand(2, 6, 8, 8), channels=6).shape == (2, 6, 8, 8)
    with pytest.raises(ValueError, match=r"a hint must have 6 channels, found 3 in \(N, C, H, W\) = \(1, 3, 40, 56\)"):
        hint_tensor(RGB, channels=6)


def test_the_hole_of_an_inpainting_hint_stays_a_hole():
    picture = np.dstack([RGB, np.full((40, 56), 255, np.uint8)])
    picture[10:20, 10:30, 3] = 0
    made = load("inpaint").make_hint(picture, resolution=None, blur=0.0)
    hint = hint_tensor(made)
    assert torch.equal(hint_tensor(made.hint), hint) and float(hint.min()) == -1
    assert set((hint == -1).sum(dim=(2, 3)).flatten().tolist()) == {200}
    larger = hint_tensor(made, size=(80, 112))
    assert set((larger == -1).sum(dim=(2, 3)).flatten().tolist()) == {800}
    assert not ((larger < 0) & (larger != -1)).any()  # nothing between a hole and a colour
    with pytest.raises(ValueError, match="only a hint may hold -1"):
        picture_tensor(made.hint)


def test_masks_are_white_where_to_paint():
    mask = np.zeros((40, 56), np.uint8)
    mask[:20] = 255
    wanted = torch.from_numpy(mask / 255.0).float()[None, None]
    forms = [mask, mask > 0, Image.fromarray(mask), Image.fromarray(mask).convert("1"), torch.from_numpy(mask > 0)[None],
             np.dstack([mask] * 3)]  # fmt: skip
    for form in forms:
        assert torch.equal(mask_tensor(form), wanted)


def test_fitting_covers_and_cuts_evenly():
    x = torch.arange(64.0).reshape(1, 1, 1, 64).expand(1, 1, 32, 64) / 64
    assert fit(x, (32, 64)) is x
    square = fit(x, (32, 32))
    assert torch.equal(square, x[:, :, :, 16:48])
    assert fit(x, (16, 64)).shape == (1, 1, 16, 64) and torch.equal(fit(x, (16, 64)), x[:, :, 8:24])
    torch.testing.assert_close(fit(x, (64, 128))[0, 0, 10, 2:-2:2], x[0, 0, 0, 1:-1], atol=0.01, rtol=0)
    padded = pad(x, (40, 72))
    assert (
        padded.shape == (1, 1, 40, 72)
        and torch.equal(padded[:, :, :32, :64], x)
        and (padded[..., 64:] == 63 / 64).all()
    )
    assert fingerprint(x) == fingerprint(x.clone()) != fingerprint(x[:, :, :16])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("no.png", "no.png"),
        (3, "must be a picture .* found int"),
        ([], "the list is empty"),
        (np.zeros((4, 4, 2), np.uint8), "3 channels, found 2"),
        (np.zeros((64, 64, 3), np.int64), "must be uint8 .* found"),
        (np.zeros((0, 8, 3), np.uint8), r"found \(0, 8, 3\)"),
        (np.zeros((1, 2, 3, 4, 5), np.uint8), r"\(N, H, W, C\), found"),
        (np.full((8, 8, 3), 2.0), r"\[0, 1\] .* found values from 2 to 2"),
        (np.full((8, 8, 3), np.nan), "nan"),
        (torch.full((1, 3, 64, 64), -0.5), r"\[0, 1\]"),
        (torch.zeros(8, 8), r"\(C, H, W\) or \(N, C, H, W\), found \(8, 8\)"),
        (np.zeros((4, 4, 3), np.uint8), "sides must be from 8 to 8192 pixels, found 4 x 4"),
    ],
)
def test_what_is_no_hint_is_named(given, message):
    with pytest.raises(ValueError, match=message):
        hint_tensor(given)


@pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")
def test_a_very_thin_picture_is_cut_before_it_is_scaled():
    thin = np.linspace(0, 1, 8000, dtype=np.float32)[None, :, None].repeat(3, axis=2)
    found = hint_tensor(thin, 3, (512, 8))
    assert found.shape == (1, 3, 512, 8) and abs(float(found.mean()) - 0.5) < 0.01
    matrix = np.matrix(np.eye(8))  # whose parts are matrices again
    assert torch.equal(hint_tensor(matrix), hint_tensor(np.eye(8)))
