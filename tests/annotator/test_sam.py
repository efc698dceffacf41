"""Segment Anything: masks of a tiny random network, as the library's pipeline gives them."""

import numpy as np
import pytest
import torch
from PIL import Image

import annotator
from annotator.sam import SamDetector
from tests.annotator import tiny_models

transformers = tiny_models.transformers
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
