"""Depth of any model of transformers, and normals from it, on tiny random networks saved as published ones are."""

import numpy as np
import pytest
import torch
from PIL import Image

import annotator
from annotator.depth_anything import DepthAnythingDetector, DepthNormalDetector
from annotator.midas import depth_to_map
from tests.annotator import tiny_models

transformers = tiny_models.transformers
IMAGE = np.random.RandomState(0).randint(0, 256, (75, 120, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_models.depth_anything(tmp_path_factory.mktemp("models") / "relative")


@pytest.fixture(scope="module")
def detector(folder):
    return DepthAnythingDetector("cpu", folder)


def library_depth(folder) -> np.ndarray:
    """What the library's own pipeline gives for IMAGE: (75, 120)."""
    pipeline = transformers.pipeline("depth-estimation", model=str(folder), device="cpu")
    return pipeline(Image.fromarray(IMAGE))["predicted_depth"].squeeze().numpy()


def test_relative_models_give_the_pipelines_depth(detector, folder):
    depth = library_depth(folder)
    assert depth.std() > 0.01
    assert np.abs(detector(IMAGE).astype(int) - depth_to_map(depth)).max() <= 1
    assert type(detector.network).__name__ == "DepthAnythingForDepthEstimation"


@pytest.mark.parametrize("kind", ["metric", "zoedepth", "dpt"])
def test_distances_are_inverted(kind, tmp_path):
    if kind == "metric":
        tiny_models.depth_anything(tmp_path, depth_estimation_type="metric", max_depth=20)
    else:
        getattr(tiny_models, kind)(tmp_path)
    depth = library_depth(tmp_path)
    inverse = depth if kind == "dpt" else 1.0 / depth.clip(1e-4)
    found = DepthAnythingDetector("cpu", tmp_path)(IMAGE, distances=False).astype(int)
    assert found.std() > 5 and np.abs(found - depth_to_map(inverse)).max() <= 1


def test_distances_can_be_said(detector, folder):
    inverse = 1.0 / library_depth(folder).clip(1e-4)
    assert np.abs(detector(IMAGE, distances=True).astype(int) - depth_to_map(inverse)).max() <= 1


def test_a_batch_equals_its_pictures(detector):
    pictures = [IMAGE, IMAGE[::-1].copy()]
    outputs = detector.run(torch.stack([detector.prepare(picture) for picture in pictures]))
    for output, picture in zip(outputs, pictures, strict=True):
        assert np.abs(detector.finish(output, picture).astype(int) - detector(picture)).max() <= 1


def test_all_kinds_of_pictures_and_calls(detector, folder):
    rgba = np.dstack([IMAGE, np.full(IMAGE.shape[:2], 255, np.uint8)])
    assert (detector(rgba) == detector(IMAGE)).all()
    for image in (IMAGE[:, :, 0], IMAGE[:1, :40], IMAGE[:47, :33], IMAGE[:3, :3]):
        assert detector(image).shape == image.shape[:2]
    assert detector(np.zeros_like(IMAGE)).shape == IMAGE.shape[:2]
    made = DepthAnythingDetector.from_pretrained(str(folder))
    result = made(Image.fromarray(IMAGE), detect_resolution=64, image_resolution=128)
    assert isinstance(result, Image.Image) and result.size == (256, 128)
    hint = annotator.load("depth_anything", "cpu", folder).make_hint(IMAGE, 128)
    assert hint.hint.shape == (128, 192, 3) and hint.hint.min() < 0.1 and hint.hint.max() > 0.9


def test_normals_face_the_viewer_where_it_is_flat_and_lean_with_slopes():
    class Ramp(DepthNormalDetector):
        def __init__(self) -> None:
            self.network = type("Network", (), {"config": transformers.DepthAnythingConfig()})

    size = 40, 60
    flat = Ramp().decode(torch.full(size, 3.0), size)
    assert (flat == (127, 127, 255)).all()
    to_the_right = torch.linspace(0, 1, size[1]).expand(size)  # nearer to the right: it faces left, which is red
    red, green, blue = np.moveaxis(Ramp().decode(to_the_right, size, bg_th=0.0)[:, 2:-2], 2, 0)
    assert (red > 200).all() and (abs(green.astype(int) - 127) <= 1).all() and (blue < 200).all()
    flatter = Ramp().decode(to_the_right, size, a=20.0, bg_th=0.0)[:, 2:-2]
    assert (flatter[:, :, 2] > blue).all()
    assert (Ramp().decode(to_the_right, size, bg_th=0.5)[:, 2:25] == (127, 127, 255)).all()  # background


def test_the_registry_makes_normals(folder):
    found = annotator.load("normal_from_depth", "cpu", folder)
    assert found.make_hint(IMAGE, 64, a=3.0).map.shape == (64, 128, 3)
