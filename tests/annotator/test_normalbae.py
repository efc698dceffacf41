"""NormalBae against the public reference."""

import numpy as np
import pytest
import torch

from annotator.normalbae import NormalBaeDetector
from tests.annotator.cases import assert_close, assert_map, case_state_dict, open_cases, open_manifest
from tests.parity import noise

ARRAYS, META = open_cases("normalbae")


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    folder = tmp_path_factory.mktemp("normalbae")
    cases = META["cases"]
    assert cases["raw"]["gain"] == cases["photo_astronaut"]["gain"]  # one network serves both
    weights = {f"module.{key}": value for key, value in case_state_dict("scannet", cases["raw"]).items()}
    torch.save({"model": weights}, folder / "scannet.pt")
    detector = NormalBaeDetector(device="cpu", weights=folder)
    (folder / "scannet.pt").unlink()
    return detector


def test_it_has_the_published_entries(detector):
    entries = {key: list(tensor.shape) for key, tensor in detector.network.state_dict().items()}
    assert entries == {key: shape for key, (shape, _) in open_manifest("scannet").items()}


def test_all_four_outputs_equal_the_reference(detector):
    case = META["cases"]["raw"]
    x = torch.from_numpy(noise(case["input_noise"], case["input_shape"]))
    with torch.no_grad():
        outputs = detector.network(x)
    for number, output in enumerate(outputs, start=1):
        assert_close(output, ARRAYS[f"raw/output{number}"], 3e-4)
    torch.testing.assert_close(outputs[-1][:, :3].norm(dim=1), torch.ones(1, 96, 128))


def test_the_map_equals_the_reference(detector):
    assert_map(detector(ARRAYS["photo_astronaut/input"]), ARRAYS["photo_astronaut/map"])


@pytest.mark.parametrize("shape", [(1, 40), (33, 47), (64, 64, 4)])
def test_pictures_of_any_size_and_kind(detector, shape):
    for value in (0, 255):
        found = detector(np.full(shape, value, dtype=np.uint8))
        assert found.shape == (*shape[:2], 3) and found.dtype == np.uint8
