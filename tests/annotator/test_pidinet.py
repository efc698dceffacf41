"""PiDiNet against the public reference, and its difference convolutions against their definitions."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from annotator.network import to_tensor
from annotator.pidinet import PidiNetDetector
from annotator.pidinet.model import angular_difference, central_difference, radial_difference
from tests.annotator.cases import assert_close, assert_map, case_state_dict, open_cases, open_manifest

ARRAYS, META = open_cases("pidinet")
MANIFEST = "table5_pidinet"


@pytest.fixture(scope="module")
def detector(tmp_path_factory) -> PidiNetDetector:
    path = tmp_path_factory.mktemp("pidinet") / f"{MANIFEST}.pth"
    state_dict = case_state_dict(MANIFEST, META["cases"]["photo_coffee"])
    torch.save({"state_dict": {f"module.{key}": tensor for key, tensor in state_dict.items()}, "epoch": 19}, path)
    detector = PidiNetDetector(device="cpu", weights=path.parent)
    assert sorted(detector.network.state_dict()) == sorted(open_manifest(MANIFEST))
    return detector


@pytest.mark.parametrize("case", META["cases"])
def test_outputs_and_maps_equal_the_reference(detector, case):
    assert META["cases"][case]["gain"] == 1.0
    image = ARRAYS[f"{case}/input"]
    with torch.no_grad():
        outputs = detector.network(to_tensor(image[:, :, ::-1])[None] / 255)
    for number, output in enumerate(outputs, start=1):
        if f"{case}/output{number}" in ARRAYS:
            assert_close(output, ARRAYS[f"{case}/output{number}"], 3e-5)
    assert len(outputs) == 5
    assert_map(detector(image), ARRAYS[f"{case}/map"])
    assert (detector(image, safe=True) != ARRAYS[f"{case}/map_safe"]).mean() <= 0.0005


def test_difference_convolutions_are_sums_over_weighted_differences_of_pixels():
    numbers = torch.Generator().manual_seed(0)
    weight = torch.randn(1, 1, 3, 3, generator=numbers, dtype=torch.float64)
    patch = torch.randn(1, 1, 5, 5, generator=numbers, dtype=torch.float64)
    pixel = {(y, x): patch[0, 0, y + 2, x + 2] for y in range(-2, 3) for x in range(-2, 3)}
    around = [(-1, -1), (-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1)]  # clockwise
    weights = {(y, x): weight[0, 0, y + 1, x + 1] for y in range(-1, 2) for x in range(-1, 2)}

    central = sum(weights[at] * (pixel[at] - pixel[0, 0]) for at in around)
    angular = sum(weights[at] * (pixel[at] - pixel[around[(i + 1) % 8]]) for i, at in enumerate(around))
    rows = sorted(around)  # the eight directions, row by row, take all weights but the first
    radial = sum(w * (pixel[2 * y, 2 * x] - pixel[y, x]) for w, (y, x) in zip(weight.flatten()[1:], rows, strict=True))
    middle = patch[:, :, 1:4, 1:4]
    assert torch.allclose(F.conv2d(middle, central_difference(weight)).squeeze(), central)
    assert torch.allclose(F.conv2d(middle, angular_difference(weight)).squeeze(), angular)
    assert torch.allclose(F.conv2d(patch, radial_difference(weight)).squeeze(), radial)


def test_unusual_pictures(detector):
    image = ARRAYS["photo_coffee/input"]
    for height, width in ((1, 60), (61, 1), (7, 9), (45, 31)):
        assert detector(image[:height, :width]).shape == (height, width)
    for level in (0, 255):
        assert detector(np.full((20, 30, 3), level, dtype=np.uint8)).shape == (20, 30)
    with pytest.raises(ValueError, match="empty"):
        detector(image[:0])
