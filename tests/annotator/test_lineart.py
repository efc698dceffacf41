"""Line art, fine and coarse, against the public reference."""

import numpy as np
import pytest
import torch

from annotator.lineart import LineartDetector
from annotator.weights import WeightsError
from tests.annotator.cases import assert_close, assert_map, case_state_dict, open_cases, open_manifest
from tests.parity import noise

ARRAYS, META = open_cases("lineart")
CASES = META["cases"]
GAINS = {"sk_model.pth": CASES["photo_coffee"]["gain"], "sk_model2.pth": CASES["photo_coffee"]["gain_coarse"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lineart")
    for name, gain in GAINS.items():
        torch.save(case_state_dict("sk_model", {"gain": gain}), folder / name)
    return folder


@pytest.fixture(scope="module")
def detector(folder) -> LineartDetector:
    detector = LineartDetector(device="cpu", weights=folder)
    assert sorted(detector.network.state_dict()) == sorted(open_manifest("sk_model"))
    return detector


def test_the_network_equals_the_reference(detector):
    x = torch.from_numpy(noise(CASES["raw"]["input_noise"], CASES["raw"]["input_shape"]))
    with torch.no_grad():
        assert_close(detector.network(x), ARRAYS["raw/output"], 3e-5)


@pytest.mark.parametrize("case", [name for name in CASES if name.startswith("photo_")])
def test_maps_equal_the_reference(detector, case):
    image = ARRAYS[f"{case}/input"]
    assert_map(detector(image), ARRAYS[f"{case}/map"])
    assert_map(detector(image, coarse=True), ARRAYS[f"{case}/map_coarse"])


def test_coarse_weights_are_looked_for_when_asked_for(folder, tmp_path):
    image = ARRAYS["photo_coffee/input"][:40, :40]
    file = LineartDetector(device="cpu", weights=folder / "sk_model.pth")
    assert np.array_equal(file(image, True), LineartDetector(device="cpu", weights=folder)(image, True))
    alone = tmp_path / "mine.pth"
    alone.write_bytes((folder / "sk_model.pth").read_bytes())
    alone = LineartDetector(device="cpu", weights=alone)
    assert np.array_equal(alone(image), file(image))
    with pytest.raises(WeightsError, match=r"sk_model2\.pth"):
        alone(image, coarse=True)


def test_unusual_pictures(detector):
    image = ARRAYS["photo_coffee/input"]
    for height, width in ((1, 30), (4, 4), (41, 2)):
        assert detector(image[:height, :width]).shape == (height, width)
    assert detector(image[:5, :9]).shape == (8, 12)  # as in the reference, see the docstring
    for level in (0, 255):
        assert detector(np.full((16, 24, 3), level, dtype=np.uint8)).shape == (16, 24)
