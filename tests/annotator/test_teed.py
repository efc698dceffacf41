"""TEED against the published network with the same made-up weights, and its detector."""

import numpy as np
import pytest
import torch
from PIL import Image

import annotator
from annotator.teed import TED, TEEDdetector
from tests.annotator.cases import assert_close, assert_map, case_state_dict, open_cases, open_manifest

ARRAYS, META = open_cases("teed")
MANIFEST = "5_model"


def test_outputs_equal_those_of_the_published_network():
    network = TED().eval()
    network.load_state_dict(case_state_dict(MANIFEST, META["cases"]["photo"]))
    assert list(network.state_dict()) and sorted(network.state_dict()) == sorted(open_manifest(MANIFEST))
    image = torch.from_numpy(ARRAYS["photo/input"]).float().permute(2, 0, 1)[None]
    with torch.no_grad():
        outputs = network(image)[0]
    assert_close(outputs, ARRAYS["photo/outputs"], 1e-4)
    assert np.abs(ARRAYS["photo/outputs"]).max() > 10


@pytest.fixture(scope="module")
def detector(tmp_path_factory) -> TEEDdetector:
    folder = tmp_path_factory.mktemp("teed")
    torch.save(case_state_dict(MANIFEST, META["cases"]["photo"]), folder / "7_model.pth")
    return TEEDdetector("cpu", folder)


def test_maps_equal_the_published_detectors(detector):
    image = ARRAYS["photo/input"]
    assert (detector(image) != ARRAYS["photo/map_safe"]).mean() < 0.0005
    assert_map(detector(image, safe_steps=0), ARRAYS["photo/map"])
    levels = np.unique(detector(image, safe_steps=4))
    assert set(levels.tolist()) <= {0, 63, 127, 191, 255} and len(levels) > 3


def test_all_kinds_of_pictures_and_calls(detector):
    image = ARRAYS["photo/input"]
    for view in (image[:, :, 0], image[:1, :40], image[:47, :33], image[:1, :1]):
        assert detector(view).shape == view.shape[:2]
    outputs = detector.run(torch.stack([detector.prepare(image), detector.prepare(image[::-1])]))
    assert (detector.finish(outputs[1], image) != detector(image[::-1])).mean() < 0.001
    folder = detector.weights
    made = TEEDdetector.from_pretrained(str(folder), filename="7_model.pth")
    result = made(Image.fromarray(image), detect_resolution=128, safe_steps=2)
    assert isinstance(result, Image.Image) and result.size == (96, 80)  # the picture's, as in controlnet_aux
    assert annotator.load("teed", "cpu", folder).make_hint(image, 64).hint.shape == (64, 64, 3)
