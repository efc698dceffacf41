"""Segmentation by UniFormer and UPerNet against the public reference: network, labels and colours."""

import logging

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from annotator import uniformer
from annotator.uniformer import PALETTE, UniformerDetector, colour
from annotator.uniformer.labels import label_map
from annotator.weights import WeightsError
from tests.annotator.cases import assert_close, case_state_dict, open_cases, open_manifest
from tests.parity import noise

ARRAYS, META = open_cases("uniformer")
CASES = META["cases"]
MANIFEST = "upernet_global_small"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Holds the file as published: weights under `state_dict`, beside what the training left."""
    folder = tmp_path_factory.mktemp("uniformer")
    state_dict = case_state_dict(MANIFEST, CASES["raw"])
    torch.save({"meta": {"CLASSES": ("wall",), "epoch": 1}, "state_dict": state_dict}, folder / f"{MANIFEST}.pth")
    return folder


@pytest.fixture(scope="module")
def detector(folder) -> UniformerDetector:
    return UniformerDetector(device="cpu", weights=folder)


def test_the_network_has_the_published_entries(detector):
    entries = {
        key: (list(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        for key, tensor in detector.network.state_dict().items()
    }
    assert entries == {key: tuple(entry) for key, entry in open_manifest(MANIFEST).items()}


def test_the_network_equals_the_reference(detector):
    x = torch.from_numpy(noise(CASES["raw"]["input_noise"], CASES["raw"]["input_shape"]))
    with torch.no_grad():
        features = detector.network.backbone(x)
        assert_close(detector.network(x), ARRAYS["raw/logits"], 2e-4)
        auxiliary = detector.network.auxiliary_head(features[2])
    for stage, feature in enumerate(features, start=1):
        assert_close(feature[:, ::16], ARRAYS[f"raw/stage{stage}_every_16th_channel"], 2e-4)
    assert_close(auxiliary[:, ::8], ARRAYS["raw/auxiliary_logits_every_8th_class"], 2e-4)


@pytest.mark.parametrize("case", [name for name in CASES if name.startswith("photo_")])
def test_photos_are_segmented_as_by_the_reference(detector, case):
    seen = []
    hook = detector.network.register_forward_hook(lambda module, inputs, output: seen.extend([*inputs, output]))
    labels = detector.labels(ARRAYS[f"{case}/input"])
    hook.remove()
    net_input, logits = seen
    assert list(net_input.shape) == ARRAYS[f"{case}/net_input_shape"].tolist()
    assert_close(net_input[:, :, ::8, ::8], ARRAYS[f"{case}/net_input_every_8th"], 1e-5)
    upsampled = F.interpolate(logits, size=net_input.shape[2:], mode="bilinear")
    assert_close(upsampled[:, :, ::32, ::32], ARRAYS[f"{case}/logits_every_32nd"], 2e-4)
    sure = ~ARRAYS[f"{case}/ambiguous"]
    assert labels.dtype == np.uint8 and sure.mean() > 0.9
    assert np.array_equal(labels[sure], ARRAYS[f"{case}/labels"][sure])
    assert np.array_equal(colour(labels)[sure], ARRAYS[f"{case}/output"][sure])


def test_colours_equal_the_reference():
    assert np.array_equal(colour(ARRAYS["palette/labels"]), ARRAYS["palette/output"])
    assert np.array_equal(PALETTE, ARRAYS["palette/ade_palette_rgb"])


@pytest.mark.parametrize(
    ("padded", "network", "picture"),
    [
        ((96, 128), (96, 128), (150, 203)),
        ((96, 128), (96, 128), (40, 31)),
        ((96, 130), (96, 130), (97, 300)),
        ((32, 128), (5, 127), (1, 1000)),
        ((96, 32), (95, 1), (700, 1)),
    ],
)
def test_labels_of_a_few_classes_at_a_time_are_those_of_all_at_once(monkeypatch, padded, network, picture):
    monkeypatch.setattr(
        "annotator.uniformer.labels.VALUES_AT_ONCE", 2 * max(padded[0] * padded[1], picture[0] * picture[1])
    )
    logits = torch.from_numpy(noise("labels", (1, 9, 24, 32)))
    whole = F.interpolate(logits, size=padded, mode="bilinear")[:, :, : network[0], : network[1]]
    want = F.interpolate(whole, size=picture, mode="bilinear")[0].argmax(dim=0)
    assert np.array_equal(label_map(logits[0], network, picture), want.numpy())


def test_unusual_pictures(detector, monkeypatch):
    assert uniformer.network_shape(100, 1000) == (205, 2048)
    monkeypatch.setattr(uniformer, "SHORTER_SIDE", 64)
    monkeypatch.setattr(uniformer, "LONGER_SIDE", 256)
    image = ARRAYS["photo_coffee/input"]
    for height, width in ((1, 200), (190, 1), (1, 1), (33, 47), (40, 130)):
        found = detector(image[:height, :width])
        assert found.shape == (height, width, 3) and found.dtype == np.uint8
        assert {tuple(pixel) for pixel in found.reshape(-1, 3)} <= {tuple(entry) for entry in PALETTE}
    for level in (0, 255):
        assert detector(np.full((32, 48), level, dtype=np.uint8)).shape == (32, 48, 3)
    assert detector(np.broadcast_to(np.uint8(7), (1, 300_000, 3))).shape == (1, 300_000, 3)
    with pytest.raises(ValueError, match="float32"):
        detector(image.astype(np.float32))
    with pytest.raises(ValueError, match="10000x10000 pixels is too large"):
        detector(np.broadcast_to(np.uint8(0), (10000, 10000, 3)))


def test_only_what_trains_may_be_missing(folder, tmp_path, caplog):
    state_dict = case_state_dict(MANIFEST, CASES["raw"])
    path = tmp_path / "other.pth"
    fewer = {key: tensor for key, tensor in state_dict.items() if not key.startswith("auxiliary_head")}
    torch.save({"state_dict": fewer}, path)
    with caplog.at_level(logging.WARNING):
        UniformerDetector(device="cpu", weights=path)
    assert "7 entries missing: 'auxiliary_head.convs" in caplog.text
    for left in ("backbone.", "auxiliary_head."):  # a file without `decode_head` would segment at random
        torch.save(
            {
                "state_dict": {key: tensor for key, tensor in fewer.items() if key.startswith(left)}
                | {"a": torch.zeros(1)}
            },
            path,
        )
        with pytest.raises(WeightsError, match=r"other\.pth does not fit UPerNet.*missing: "):
            UniformerDetector(device="cpu", weights=path)
