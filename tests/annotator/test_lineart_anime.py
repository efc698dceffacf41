"""Anime line art against the public reference."""

import numpy as np
import pytest
import torch

from annotator.lineart_anime import LineartAnimeDetector
from tests.annotator.cases import assert_close, assert_map, case_state_dict, open_cases, open_manifest
from tests.parity import noise

ARRAYS, META = open_cases("lineart_anime")
CASES = META["cases"]


@pytest.fixture(scope="module")
def detector(tmp_path_factory) -> LineartAnimeDetector:
    path = tmp_path_factory.mktemp("lineart_anime") / "netG.pth"
    state_dict = case_state_dict("netG", CASES["raw"])
    torch.save({f"module.{key}": tensor for key, tensor in state_dict.items()}, path)
    detector = LineartAnimeDetector(device="cpu", weights=path)
    path.unlink()  # 200 MB
    assert sorted(detector.network.state_dict()) == sorted(open_manifest("netG"))
    return detector


def test_the_network_equals_the_reference(detector):
    x = torch.from_numpy(noise(CASES["raw"]["input_noise"], CASES["raw"]["input_shape"]))
    with torch.no_grad():
        assert_close(detector.network(x), ARRAYS["raw/output"], 3e-5)


@pytest.mark.parametrize("case", [name for name in CASES if name.startswith("photo_")])
def test_maps_equal_the_reference(detector, case):
    assert CASES[case]["adjust"] == CASES["raw"]["adjust"] and CASES[case]["gain"] == CASES["raw"]["gain"]
    assert_map(detector(ARRAYS[f"{case}/input"]), ARRAYS[f"{case}/map"])


def test_unusual_pictures(detector):
    image = ARRAYS["photo_chelsea/input"]
    assert detector(image[:1, :90]).shape == (1, 90)
    assert detector(np.full((35, 1), 255, dtype=np.uint8)).shape == (35, 1)
    with pytest.raises(ValueError, match="1x100000 pixels is enlarged to 256x100096"):
        detector(np.zeros((1, 100000, 3), dtype=np.uint8))
