"""Segment Anything: masks of a tiny random network, as the library's pipeline gives them."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import annotator
from annotator.sam import SamDetector
from annotator.sam.published import ENCODERS, hub_names
from annotator.weights import WeightsError
from tests.annotator import tiny_models
from tests.annotator.cases import DATA

transformers = tiny_models.transformers
MANIFEST = json.loads((DATA / "sam_vit_b_01ec64.json").read_text())  # shapes of the published file's entries
IMAGE = np.kron(np.random.RandomState(0).randint(0, 256, (8, 13, 3)), np.ones((9, 9, 1))).astype(
    np.uint8
)  # (72, 117, 3)
ALL = {"points": 4, "pred_iou_thresh": 0.0, "stability_score_thresh": 0.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_models.sam(tmp_path_factory.mktemp("sam") / "sam-vit-base")


def test_masks_are_those_of_the_pipeline(folder):
    pipeline = transformers.pipeline("mask-generation", model=str(folder), device="cpu")
    masks = pipeline(Image.fromarray(IMAGE), points_per_crop=4, pred_iou_thresh=0.0, stability_score_thresh=0.0)[
        "masks"
    ]
    assert len(masks) >= 1
    detector = SamDetector("cpu", folder)
    found = detector(IMAGE, **ALL)
    assert (found.any(axis=2) == np.any([np.asarray(mask) for mask in masks], axis=0)).all() and found.any()
    assert not detector(IMAGE, points=4, pred_iou_thresh=1.0, stability_score_thresh=1.0).any()
    outputs = detector.run(torch.stack([detector.prepare(IMAGE), detector.prepare(IMAGE[::-1])]), **ALL)
    assert (detector.finish(outputs[0], IMAGE, **ALL) == found).all()


def test_other_pictures_and_calls(folder):
    loaded = annotator.load("segment_anything", "cpu", folder)
    for image in (IMAGE[:, :, 0], IMAGE[:1, :40], IMAGE[:47, :33]):
        assert loaded(image, **ALL).shape == (*image.shape[:2], 3)
    made = SamDetector.from_pretrained(str(folder))
    assert made(Image.fromarray(IMAGE), detect_resolution=64, image_resolution=64, **ALL).size == (128, 64)
    with pytest.raises(ValueError, match="points must be a whole number from 1 to 128"):
        loaded(IMAGE, points=0)


def test_published_names_are_all_of_the_networks():
    renamed = hub_names({key: torch.empty(shape, device="meta") for key, shape in MANIFEST.items()})
    with torch.device("meta"):
        network = transformers.SamModel(transformers.SamConfig())  # vit_b
    assert {key: tensor.shape for key, tensor in renamed.items()} == {
        key: tensor.shape for key, tensor in network.state_dict().items()
    }


def test_a_published_file_gives_the_same_masks(folder, tmp_path, monkeypatch):
    hub = load_file(folder / "model.safetensors")
    published = {}
    for key in MANIFEST:
        name = next(iter(hub_names({key: torch.zeros(1)})))
        if name in hub:
            published[key] = hub[name]
    expected = SamDetector("cpu", folder)
    monkeypatch.setitem(ENCODERS, 16, (1, 2, [0]))
    tiny = SimpleNamespace(  # the library, but for the sizes of its networks
        SamConfig=lambda vision_config: expected.network.config,
        SamVisionConfig=dict,
        SamImageProcessor=lambda: expected.processor,
        SamModel=transformers.SamModel,
        pipeline=transformers.pipeline,
    )
    monkeypatch.setattr(SamDetector, "transformers", tiny)
    (tmp_path / "checkpoints").mkdir()
    torch.save(published, tmp_path / "checkpoints" / "sam_vit_h_4b8939.pth")
    made = SamDetector.from_pretrained(tmp_path, subfolder="checkpoints")  # as controlnet_aux's README
    assert (made.detect(IMAGE, **ALL) == expected.detect(IMAGE, **ALL)).all()
    assert (SamDetector("cpu", tmp_path / "checkpoints")(IMAGE, **ALL) == expected(IMAGE, **ALL)).all()
    torch.save({"weight": torch.zeros(3)}, tmp_path / "mobile_sam.pt")
    with pytest.raises(
        WeightsError, match="mobile_sam.pt holds no model that SamDetector can use: .* vit_b, vit_l and vit_h"
    ):
        SamDetector("cpu", tmp_path / "mobile_sam.pt")
