"""HED, both published networks, against the public reference."""

import numpy as np
import pytest
import torch

from annotator.hed import HEDdetector, nms
from annotator.network import to_tensor
from annotator.util import nms as nms_of_util
from annotator.weights import WeightsError
from tests.annotator.cases import assert_close, assert_map, case_state_dict, open_cases, open_manifest

ARRAYS, META = open_cases("hed")
OLDER, OLDER_META = open_cases("hed_bsds500")


def load(tmp_path, manifest: str, case: dict) -> HEDdetector:
    path = tmp_path / f"{manifest}.pth"
    torch.save(case_state_dict(manifest, case), path)
    detector = HEDdetector(device="cpu", weights=tmp_path)
    path.unlink()
    assert {key: list(tensor.shape) for key, tensor in detector.network.state_dict().items()} == {
        key: shape for key, (shape, _) in open_manifest(manifest).items()
    }
    return detector


def assert_steps(got: np.ndarray, want: np.ndarray) -> None:
    assert set(np.unique(got)) <= {0, 127, 255} and (got != want).mean() <= 0.0005


@pytest.mark.parametrize("case", META["cases"])
def test_the_network_and_its_maps_equal_the_reference(tmp_path, case):
    detector = load(tmp_path, "ControlNetHED", META["cases"][case])
    image = ARRAYS[f"{case}/input"]
    with torch.no_grad():
        projections = detector.network(to_tensor(image)[None])
    for number, projection in enumerate(projections, start=1):
        assert_close(projection, ARRAYS[f"{case}/projection{number}"], 1e-4)
    assert_map(detector(image), ARRAYS[f"{case}/map"])
    assert_steps(detector(image, safe=True), ARRAYS[f"{case}/map_safe"])


@pytest.mark.parametrize("case", OLDER_META["cases"])
def test_the_older_network_is_recognised_and_equals_the_reference(tmp_path, case):
    detector = load(tmp_path, "network-bsds500", OLDER_META["cases"][case])
    image = OLDER[f"{case}/input"]
    x = to_tensor(image[:, :, ::-1])[None] / 255
    with torch.no_grad():
        scores, output = detector.network.scores(x), detector.network(x)
    compared = 0
    for number, score in enumerate(scores, start=1):
        if f"{case}/score{number}" in OLDER:
            assert_close(score, OLDER[f"{case}/score{number}"], 1e-4)
            compared += 1
    assert compared >= 4
    assert_close(output, OLDER[f"{case}/output"], 1e-5)
    assert_map(detector(image), OLDER[f"{case}/map"])


def test_unusual_pictures_and_weights(tmp_path):
    detector = load(tmp_path, "ControlNetHED", META["cases"]["astronaut_256x256"])
    image = ARRAYS["astronaut_256x256/input"]
    for height, width in ((1, 100), (37, 1), (15, 15), (1, 1)):
        assert detector(image[:height, :width]).shape == (height, width)
    # What is padded is the picture with its last row repeated.
    row = image[100:101]
    assert np.array_equal(detector(row)[0], detector(np.pad(row, [(0, 15), (0, 0), (0, 0)], mode="edge"))[0])
    for level in (0, 255):
        assert detector(np.full((33, 47), level, dtype=np.uint8)).shape == (33, 47)
    with pytest.raises(ValueError, match="float32"):
        detector(image.astype(np.float32))
    with pytest.raises(ValueError, match="10000x10000 pixels is too large"):
        detector(np.broadcast_to(np.uint8(0), (10000, 10000, 3)))
    assert nms is nms_of_util
    torch.save({"a.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(WeightsError, match=r"other\.pth does not fit ControlNetHED"):
        HEDdetector(device="cpu", weights=tmp_path / "other.pth")
