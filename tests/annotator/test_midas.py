"""MiDaS, its depth and its normals, against the public reference."""

import numpy as np
import pytest
import torch

from annotator.midas import MidasDetector, depth_to_map, depth_to_normals
from annotator.network import to_tensor
from tests.annotator.cases import assert_close, assert_map, case_state_dict, open_cases, open_manifest
from tests.parity import noise

ARRAYS, META = open_cases("midas")
MANIFEST = "dpt_hybrid-midas-501f0c75"
PHOTOS = [case for case in META["cases"] if case.startswith("photo")]
GIVEN_DEPTH = [case for case in META["cases"] if case.startswith("post")]


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    folder = tmp_path_factory.mktemp("midas")
    raw = META["cases"]["raw"]
    assert all(META["cases"][case]["adjust"] == raw["adjust"] for case in PHOTOS)  # one network serves all
    torch.save({"optimizer": {}, "model": case_state_dict(MANIFEST, raw)}, folder / f"{MANIFEST}.pt")
    detector = MidasDetector(device="cpu", weights=folder)
    (folder / f"{MANIFEST}.pt").unlink()
    return detector


def settings(case: str):
    """Each array of normals with its `a` and `bg_th`."""
    for name in META["cases"][case]["arrays"]:
        if name.startswith("normal"):
            a, bg_th = name.removeprefix("normal_a").split("_bg")
            yield ARRAYS[f"{case}/{name}"], 2 * np.pi if a == "6.283" else float(a), float(bg_th)


def test_it_has_the_published_entries(detector):
    entries = {key: list(tensor.shape) for key, tensor in detector.network.state_dict().items()}
    assert entries == {key: shape for key, (shape, _) in open_manifest(MANIFEST).items()}


def test_activations_and_depth_equal_the_reference(detector):
    case = META["cases"]["raw"]
    x = torch.from_numpy(np.asarray(noise(case["input_noise"], case["input_shape"]) * np.float32(case["input_scale"])))
    with torch.no_grad():
        activations = detector.network.pretrained.activations(x)
        depth = detector.network(x)
    for number, activation in enumerate(activations, start=1):
        axis = activation[:, ::32] if activation.dim() == 4 else activation[..., ::32]
        assert_close(axis, ARRAYS[f"raw/activation_{number}_every_32nd_channel"], 2e-3 if number > 2 else 1e-4)
    assert_close(depth, ARRAYS["raw/output"], 5e-4)


@pytest.mark.parametrize("case", PHOTOS)
def test_photographs(detector, case):
    image = ARRAYS[f"{case}/input"]
    with torch.no_grad():
        assert_close(detector.network(to_tensor(image)[None] / 127.5 - 1), ARRAYS[f"{case}/depth"], 5e-4)
    for want, a, bg_th in settings(case):
        depth, normals = detector(image, a=a, bg_th=bg_th)
        assert_map(depth, ARRAYS[f"{case}/depth_map"])
        # Pixels whose depth lies on the background's threshold may fall to either side.
        assert (np.abs(normals.astype(int) - want.astype(int)) > 1).mean() <= 0.002


@pytest.mark.parametrize("case", GIVEN_DEPTH)
def test_maps_of_given_depth_are_exact(case):
    depth = ARRAYS[f"{case}/depth"]
    assert np.array_equal(depth_to_map(depth), ARRAYS[f"{case}/depth_map"])
    for want, a, bg_th in settings(case):
        assert np.array_equal(depth_to_normals(depth, a, bg_th), want)


def test_version_1_1_gives_the_depth_alone(detector, monkeypatch):
    image = np.random.RandomState(0).randint(0, 256, (64, 64, 3), dtype=np.uint8)
    depth, _ = detector(image)
    monkeypatch.setattr(detector, "version", "1.1")
    assert np.array_equal(detector(image), depth)


def test_flat_depth_faces_the_viewer():
    flat = np.full((5, 7), 3.0, dtype=np.float32)
    assert not depth_to_map(flat).any()
    assert (depth_to_normals(flat) == (127, 127, 255)).all()


@pytest.mark.parametrize("shape", [(1, 40), (33, 47), (64, 64, 4)])
def test_pictures_of_any_size_and_kind(detector, shape):
    for value in (0, 255):
        depth, normals = detector(np.full(shape, value, dtype=np.uint8))
        assert (
            depth.shape == shape[:2] and normals.shape == (*shape[:2], 3) and depth.dtype == normals.dtype == np.uint8
        )


@pytest.mark.parametrize("settings", [{"a": 0}, {"a": float("nan")}, {"bg_th": -0.1}, {"bg_th": 1.5}])
def test_numbers_out_of_range_are_named(detector, settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        detector(np.zeros((64, 64, 3), dtype=np.uint8), **settings)
