"""What the published gradio apps do between picture and control, in their calls: constructors without arguments, positional numbers."""

import cv2
import numpy as np
import pytest
import torch

from annotator import describe, load, use_version
from tests.annotator.cases import open_cases
from tests.annotator.test_controlnet_aux import publish

PHOTO = open_cases("canny")[0]["astronaut/input"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ckpts")
    for name in ("HEDdetector", "PidiNetDetector", "LineartDetector", "MLSDdetector"):
        publish(name, folder)
    return folder


@pytest.fixture
def ckpts(folder, monkeypatch):
    """Weights where the variable says, computed on the CPU."""
    monkeypatch.setenv("ANNOTATOR_CKPTS", str(folder))
    monkeypatch.setattr("annotator.network.choose_device", lambda device=None: torch.device("cpu"))
    yield
    use_version(None)


def make(name: str, version: str, **options):
    return load(name, version=version).make_hint(PHOTO, 192, **options)


def test_the_apps_of_1_0(ckpts):
    from annotator.canny import CannyDetector
    from annotator.hed import HEDdetector, nms
    from annotator.mlsd import MLSDdetector
    from annotator.util import HWC3, resize_image

    img = resize_image(HWC3(PHOTO), 192)
    H, W, _ = img.shape
    detected_map = HWC3(CannyDetector()(img, 40, 90))
    assert np.array_equal(detected_map, make("canny", "1.0", low_threshold=40, high_threshold=90).map)

    detected_map = HWC3(HEDdetector()(resize_image(PHOTO, 128)))
    detected_map = cv2.resize(detected_map, (W, H), interpolation=cv2.INTER_LINEAR)
    assert np.array_equal(detected_map, make("hed", "1.0", detect_resolution=128).map)
    detected_map = cv2.GaussianBlur(nms(detected_map, 127, 3.0), (0, 0), 3.0)
    detected_map[detected_map > 4] = 255
    detected_map[detected_map < 255] = 0
    assert np.array_equal(detected_map, make("fake_scribble", "1.0", detect_resolution=128).map)

    detected_map = HWC3(MLSDdetector()(resize_image(PHOTO, 128), 0.1, 0.1))
    detected_map = cv2.resize(detected_map, (W, H), interpolation=cv2.INTER_NEAREST)
    found = make("mlsd", "1.0", detect_resolution=128)
    assert np.array_equal(detected_map, found.map)
    assert np.array_equal(
        255 - cv2.dilate(detected_map, np.ones(shape=(3, 3), dtype=np.uint8), iterations=1), found.shown
    )


def test_the_apps_of_1_1(ckpts, monkeypatch):
    monkeypatch.setenv("ANNOTATOR_VERSION", "1.1")
    from annotator.hed import HEDdetector
    from annotator.lineart import LineartDetector
    from annotator.midas import MidasDetector
    from annotator.openpose import OpenposeDetector, draw_pose
    from annotator.pidinet import PidiNetDetector
    from annotator.shuffle import ContentShuffleDetector
    from annotator.util import HWC3, annotator_ckpts_path, resize_image

    assert annotator_ckpts_path.endswith("ckpts") and callable(draw_pose)
    img = resize_image(PHOTO, 192)
    H, W, _ = img.shape
    for preprocessor, name in ((HEDdetector(), "hed"), (PidiNetDetector(), "pidinet")):
        detected_map = HWC3(preprocessor(resize_image(PHOTO, 128), safe=True))
        detected_map = cv2.resize(detected_map, (W, H), interpolation=cv2.INTER_LINEAR)
        assert np.array_equal(detected_map, make(name, "1.1", detect_resolution=128, safe=True).map)
    detected_map = HWC3(LineartDetector()(resize_image(PHOTO, 128), coarse=True))
    detected_map = cv2.resize(detected_map, (W, H), interpolation=cv2.INTER_LINEAR)
    control = 1.0 - torch.from_numpy(detected_map.copy()).float() / 255.0
    assert np.array_equal(control.numpy(), make("lineart", "1.1", detect_resolution=128, coarse=True).hint)
    np.random.seed(5)
    detected_map = ContentShuffleDetector()(PHOTO, w=W, h=H, f=256)
    np.random.seed(5)
    assert np.array_equal(detected_map, make("shuffle", "1.1").map)
    # Where the two versions differ, constructors and `load` follow the choice.
    for detector in (MidasDetector, OpenposeDetector):
        monkeypatch.setattr(detector, "load", lambda self, **parameters: None)
        assert detector().version == "1.1" and detector(version="1.0").version == "1.0"
    assert load("canny").info is describe("canny", "1.1")


def test_version_1_1_does_not_take_the_older_hed(folder, tmp_path, ckpts):
    from annotator.hed import HEDdetector
    from annotator.weights import WeightsError

    (tmp_path / "network-bsds500.pth").write_bytes((folder / "table5_pidinet.pth").read_bytes())
    with pytest.raises(WeightsError, match="network-bsds500.pth"):  # 1.0 looks at it
        HEDdetector("cpu", tmp_path)
    with pytest.raises(WeightsError, match="neither a file nor a folder that holds ControlNetHED.pth "):
        HEDdetector("cpu", tmp_path, version="1.1")
