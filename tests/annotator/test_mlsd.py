"""M-LSD against the public reference: network, decoding, drawing, and the chain of the app."""

import re

import numpy as np
import pytest
import torch

from annotator import describe
from annotator.mlsd import MLSDdetector, decode_lines, draw_lines
from annotator.registry import Annotator
from tests.annotator.cases import Given, assert_close, case_state_dict, open_cases, open_manifest
from tests.parity import noise

ARRAYS, META = open_cases("mlsd")
CASES = META["cases"]
MANIFEST = "mlsd_large_512_fp32"


def with_thresholds(kind: str, cases: tuple[str, ...]) -> list:
    """Names of the arrays `case/<kind>_v<thr_v>_d<thr_d>` with what their names say."""
    names = [re.fullmatch(rf"((?:{'|'.join(cases)})\w*)/{kind}_v(.+)_d(.+)", name) for name in ARRAYS.files]
    return [pytest.param(m[0], m[1], float(m[2]), float(m[3]), id=m[0]) for m in names if m]


@pytest.fixture(scope="module")
def detector(tmp_path_factory) -> MLSDdetector:
    path = tmp_path_factory.mktemp("mlsd") / f"{MANIFEST}.pth"
    torch.save(case_state_dict(MANIFEST, CASES["raw"]), path)
    detector = MLSDdetector(device="cpu", weights=path.parent)
    assert sorted(detector.network.state_dict()) == sorted(open_manifest(MANIFEST))
    return detector


def assert_lines(got: np.ndarray, want: np.ndarray, tolerance: float) -> None:
    """The stored lines are sorted by their coordinates."""
    assert_close(got[np.lexsort(got.T[::-1])], want, tolerance)


def test_the_network_equals_the_reference(detector):
    x = torch.from_numpy(noise(CASES["raw"]["input_noise"], CASES["raw"]["input_shape"]))
    with torch.no_grad():
        assert_close(detector.network(x), ARRAYS["raw/output"], 3e-4)


@pytest.mark.parametrize("case", [name for name in CASES if name.startswith("photo_")])
def test_the_network_sees_photos_as_the_reference_does(detector, case):
    seen = []
    hook = detector.network.register_forward_hook(lambda module, inputs, output: seen.append(output))
    detector(ARRAYS[f"{case}/input"])
    hook.remove()
    assert_close(seen[0][:, :5], ARRAYS[f"{case}/net_output_channels_0_to_4"], 3e-4)


@pytest.mark.parametrize("name, case, thr_v, thr_d", with_thresholds("lines", ("photo",)))
def test_lines_of_photos_equal_the_reference(detector, name, case, thr_v, thr_d):
    assert_lines(detector.lines(ARRAYS[f"{case}/input"], thr_v, thr_d), ARRAYS[name], 1e-3)


@pytest.mark.parametrize("name, case, thr_v, thr_d", with_thresholds("map", ("photo",)))
def test_maps_of_photos_equal_the_reference(detector, name, case, thr_v, thr_d):
    assert np.array_equal(detector(ARRAYS[f"{case}/input"], thr_v, thr_d), ARRAYS[name])


@pytest.mark.parametrize("name, case, thr_v, thr_d", with_thresholds("lines", ("decode",)))
def test_decoding_equals_the_reference(name, case, thr_v, thr_d):
    (height, width, _), (net_height, net_width) = CASES[case]["image_shape"], CASES[case]["input_shape"]
    output = torch.from_numpy(ARRAYS[f"{case}/net_output"])[0]
    lines = decode_lines(output, thr_v, thr_d, (width / net_width, height / net_height))
    assert_lines(lines, ARRAYS[name], 1e-4)
    drawn = name.replace("/lines", "/map")
    assert (case == "decode_same_size") == (drawn in ARRAYS)
    if drawn in ARRAYS:
        assert np.array_equal(draw_lines(lines, height, width), ARRAYS[drawn])


def test_lines_fall_in_score_and_respect_both_thresholds():
    output = torch.full((5, 12, 20), -9.0)
    output[0, 3, 4], output[0, 8, 15], output[0, 8, 4] = 1.0, 2.0, 3.0
    output[1:, 3, 4] = torch.tensor([-2.0, 0.0, 2.0, 0.0])
    output[1:, 8, 15] = torch.tensor([0.0, -3.0, 0.0, 3.0])
    output[1:, 8, 4] = torch.tensor([float("nan"), 0.0, 1.0, 0.0])
    first, second = [30.0, 10.0, 30.0, 22.0], [4.0, 6.0, 12.0, 6.0]
    assert decode_lines(output, 0.5, 1.0).tolist() == [first, second]
    assert decode_lines(output, 0.8, 1.0).tolist() == [first]
    assert decode_lines(output, 0.5, 4.0).tolist() == [first]
    assert decode_lines(output, 1.0, 1.0).shape == (0, 4)
    far = np.array([[-1e30, 5.0, 1e30, 5.0]])
    assert draw_lines(far, 10, 20)[5].all()


def test_unusual_pictures_and_thresholds(detector, monkeypatch):
    image = ARRAYS["photo_coffee/input"]
    for height, width in ((1, 50), (33, 17), (150, 203), (5, 5)):
        found = detector(image[:height, :width])
        assert found.shape == (height, width) and set(np.unique(found)) <= {0, 255}
    assert detector(image[:150, :203]).any()
    for level in (0, 255):
        assert detector(np.full((32, 48, 3), level, dtype=np.uint8)).shape == (32, 48)
    for thresholds in ((-0.1, 1.0), (0.1, -1.0), (float("nan"), 1.0)):
        with pytest.raises(ValueError, match="thr_. must be a number of at least 0"):
            detector(image, *thresholds)
    assert not detector(image, 2.0).any()
    monkeypatch.setattr(detector.network, "forward", lambda x: torch.full((1, 9, 32, 48), -9.0))
    assert np.array_equal(detector(image[:64, :96]), ARRAYS["no_lines/map"])


def test_the_app_resizes_by_nearest_neighbour_and_shows_bold_lines_inverted():
    annotator = Annotator(describe("mlsd"), Given(ARRAYS["decode_same_size/map_v0.1_d0.1"]))
    found = annotator.make_hint(np.zeros((128, 192, 3), dtype=np.uint8), 192, 128)
    assert np.array_equal(found.map, ARRAYS["app/map"]) and np.array_equal(found.shown, ARRAYS["app/shown"])
