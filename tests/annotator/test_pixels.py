"""Conditions made of pixels: their definitions, on pictures whose results are known."""

import cv2
import numpy as np
import pytest
from PIL import Image

from annotator.pixels import (
    BlurDetector,
    ColourDetector,
    GaussianTileDetector,
    GreyDetector,
    InvertDetector,
    ThresholdDetector,
)

IMAGE = np.random.RandomState(0).randint(0, 256, (70, 130, 3), dtype=np.uint8)
ALL = (BlurDetector, ColourDetector, GaussianTileDetector, GreyDetector, InvertDetector, ThresholdDetector)


def test_inverting_twice_gives_the_picture():
    invert = InvertDetector()
    assert (invert(IMAGE) == 255 - IMAGE).all() and (invert(invert(IMAGE)) == IMAGE).all()


def test_threshold_looks_at_the_darkest_channel():
    pixels = np.array([[[128, 200, 255], [127, 255, 255], [0, 0, 0], [255, 255, 255]]], dtype=np.uint8)
    assert ThresholdDetector()(pixels).tolist() == [[255, 0, 0, 255]]
    assert ThresholdDetector()(pixels, threshold=126).tolist() == [[255, 255, 0, 255]]
    assert ThresholdDetector()(pixels, 255).max() == 0


def test_blur_spreads_a_dot_as_a_gaussian():
    dot = np.zeros((61, 61, 3), dtype=np.uint8)
    dot[30, 30] = 255
    blurred = BlurDetector()(np.maximum(cv2.dilate(dot, np.ones((9, 9), np.uint8)), 0), sigma=3.0)[:, :, 0].astype(
        float
    )
    column, row = blurred.sum(axis=0), np.arange(61)
    mean = (column * row).sum() / column.sum()
    variance = (column * (row - mean) ** 2).sum() / column.sum()
    assert mean == pytest.approx(30, abs=0.05)
    assert variance == pytest.approx(3.0**2 + (9**2 - 1) / 12, rel=0.05)  # the gaussian's and the square's


def test_grey_keeps_grey_and_knows_luminance_from_intensity():
    ramp = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, axis=2)
    assert np.abs(GreyDetector()(ramp, intensity=True)[0].astype(int) - np.arange(256)).max() == 0
    luminance = GreyDetector()(ramp)[0].astype(int)  # L of CIELAB: middle grey of 119 is 50%
    assert luminance[0] == 0 and luminance[255] == 255 and abs(luminance[119] - 127.5) < 2
    assert (np.diff(luminance) >= 0).all()
    colours = np.array([[[0, 0, 255], [0, 255, 0]]], dtype=np.uint8)
    blue, green = GreyDetector()(colours)[0]
    assert blue < green and GreyDetector()(colours, intensity=True).tolist() == [[255, 255]]
    assert GreyDetector()(np.full((1, 1, 3), 51, np.uint8), gamma=2.0, intensity=True)[0, 0] == 10  # 0.2 squared


def test_colours_are_a_grid_of_cells():
    cells = ColourDetector()(IMAGE, cell=10)
    assert cells.shape == IMAGE.shape
    assert (cells.reshape(7, 10, 13, 10, 3) == cells[::10, ::10].reshape(7, 1, 13, 1, 3)).all()
    assert len(np.unique(ColourDetector()(IMAGE, cell=4096).reshape(-1, 3), axis=0)) == 1
    assert (ColourDetector()(np.full((64, 64, 3), (9, 99, 200), np.uint8)) == (9, 99, 200)).all()


def test_gaussian_tile_removes_detail_and_keeps_the_rest():
    smooth = cv2.GaussianBlur(IMAGE, (0, 0), 12)
    tile = GaussianTileDetector()
    assert np.abs(tile(smooth).astype(int) - smooth).max() <= 2
    assert (tile(IMAGE) == cv2.GaussianBlur(IMAGE, (3, 3), 1.0)).all()  # the defaults blur alone
    soft = [tile(IMAGE, scale_factor=factor, blur_strength=1).astype(float).std() for factor in (1, 2, 4)]
    assert soft[0] > soft[1] > soft[2]


@pytest.mark.parametrize("kind", ALL)
def test_all_kinds_of_pictures(kind):
    for image in (IMAGE[:, :, 0], np.dstack([IMAGE, IMAGE[:, :, 0]]), IMAGE[:1, :1], IMAGE[:1]):
        result = kind()(image)
        assert result.dtype == np.uint8 and result.shape[:2] == image.shape[:2]
    before = IMAGE.copy()
    kind()(IMAGE)
    assert (IMAGE == before).all()
    with pytest.raises(ValueError, match="uint8"):
        kind()(IMAGE / 255.0)


@pytest.mark.parametrize(
    ("kind", "parameters"),
    [
        (ThresholdDetector, {"threshold": 256}),
        (BlurDetector, {"sigma": 0}),
        (BlurDetector, {"sigma": float("nan")}),
        (GreyDetector, {"gamma": 0}),
        (ColourDetector, {"cell": 0}),
        (GaussianTileDetector, {"scale_factor": 0.5}),
        (GaussianTileDetector, {"blur_strength": 0}),
    ],
)
def test_parameters_out_of_range_are_named(kind, parameters):
    with pytest.raises(ValueError, match=f"{next(iter(parameters))} must be a .*number from"):
        kind()(IMAGE, **parameters)
    with pytest.raises(ValueError, match="must be a .*number from"):
        kind()(Image.fromarray(IMAGE), **parameters)


def test_arguments_by_position_are_checked_too():
    with pytest.raises(ValueError, match="blur_strength must be a number from 1 to 64, got 65"):
        GaussianTileDetector()(IMAGE, 2, 65)
