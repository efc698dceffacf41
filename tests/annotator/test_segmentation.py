"""Segmentation by models of transformers: every task on tiny random networks, against the library's own steps."""

import numpy as np
import pytest
import torch
from PIL import Image

import annotator
from annotator.oneformer import OneformerADE20kDetector, OneformerCOCODetector
from annotator.segmentation import SegmentationDetector
from annotator.segmentation.colours import ADE20K, COCO, colour_labels, stack_masks
from annotator.weights import WeightsError
from tests.annotator import tiny_models

transformers = tiny_models.transformers
IMAGE = np.kron(np.random.RandomState(0).randint(0, 256, (8, 13, 3)), np.ones((9, 9, 1))).astype(
    np.uint8
)  # (72, 117, 3)
SIZE = IMAGE.shape[:2]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    names = ("segformer", "mask2former", "oneformer")
    return {name: getattr(tiny_models, name)(root / name) for name in names}


@pytest.fixture(scope="module")
def oneformer(folders):
    return SegmentationDetector("cpu", folders["oneformer"])


def library_outputs(folder, network_class: str):
    network = getattr(transformers, network_class).from_pretrained(folder).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    with torch.no_grad():
        return processor, network(**processor(IMAGE, return_tensors="pt"))


def test_semantic_models_give_the_palette_of_their_classes(folders):
    processor, outputs = library_outputs(folders["segformer"], "SegformerForSemanticSegmentation")
    labels = processor.post_process_semantic_segmentation(outputs, target_sizes=[SIZE])[0].numpy()
    assert len(np.unique(labels)) > 3
    detector = SegmentationDetector("cpu", folders["segformer"])
    assert (detector(IMAGE) == ADE20K[labels]).all()
    with pytest.raises(ValueError, match="the model segformer gives no panoptic segmentation"):
        detector(IMAGE, task="panoptic")
    pictures = [IMAGE, IMAGE[::-1].copy()]
    outputs = detector.run(torch.stack([detector.prepare(picture) for picture in pictures]))
    for output, picture in zip(outputs, pictures, strict=True):
        assert (detector.finish(output, picture) == detector(picture)).mean() > 0.99


def test_universal_models_do_every_task(folders):
    processor, outputs = library_outputs(folders["mask2former"], "Mask2FormerForUniversalSegmentation")
    detector = SegmentationDetector("cpu", folders["mask2former"])
    labels = processor.post_process_semantic_segmentation(outputs, target_sizes=[SIZE])[0].numpy()
    assert (detector(IMAGE) == COCO[labels]).all()
    found = processor.post_process_instance_segmentation(outputs, target_sizes=[SIZE], threshold=0.0)[0]
    objects = detector(IMAGE, task="instance", threshold=0.0)
    colours = {tuple(colour) for colour in objects.reshape(-1, 3).tolist()} - {(0, 0, 0)}
    assert (
        len(colours) == len([one for one in found["segments_info"] if (found["segmentation"] == one["id"]).any()]) > 3
    )
    assert (objects.any(axis=2) == (found["segmentation"] >= 0).numpy()).all()
    assert not detector(IMAGE, task="instance", threshold=1.0).any()
    assert detector(IMAGE, task="panoptic").shape == IMAGE.shape


def test_oneformer_is_told_its_task_and_needs_no_other_repository(oneformer, folders):
    labels = {task: oneformer.inputs_for([IMAGE], task)["task_inputs"] for task in ("semantic", "instance")}
    letters = [*"thetaskissemantic"]  # of the tiny tokenizer; the last letter of a word has an entry of its own
    assert (labels["semantic"] != 0).sum() == len(letters) + 2 and (labels["semantic"] != labels["instance"]).any()
    network, inputs = oneformer.network, oneformer.inputs_for([IMAGE], "semantic")
    with torch.no_grad():
        outputs = network(**inputs)
    expected = oneformer.processor.post_process_semantic_segmentation(outputs, target_sizes=[SIZE])[0].numpy()
    assert (oneformer(IMAGE) == ADE20K[expected]).all()
    for task in ("instance", "panoptic"):
        assert oneformer(IMAGE, task=task, threshold=0.0).shape == IMAGE.shape
    assert (OneformerADE20kDetector("cpu", folders["oneformer"])(IMAGE) == ADE20K[expected]).all()


def test_controlnet_1_1_makes_and_calls_its_detectors(folders, tmp_path, monkeypatch):
    (tmp_path / "oneformer_coco_swin_large").symlink_to(tiny_models.oneformer(tmp_path / "coco", classes=133))
    (tmp_path / "oneformer_ade20k_swin_large").symlink_to(folders["oneformer"])
    monkeypatch.setenv("ANNOTATOR_CKPTS", str(tmp_path))
    for kind, palette in ((OneformerCOCODetector, COCO), (OneformerADE20kDetector, ADE20K)):
        found = kind()(IMAGE)
        assert found.shape == IMAGE.shape and found.dtype == np.uint8
        assert {tuple(colour) for colour in found.reshape(-1, 3).tolist()} <= {
            tuple(colour) for colour in palette.tolist()
        }
    assert annotator.load("oneformer_coco", "cpu").make_hint(IMAGE, 64).hint.shape == (64, 128, 3)


def test_other_pictures_and_calls(folders):
    loaded = annotator.load("segmentation", "cpu", folders["segformer"])
    for image in (IMAGE[:, :, 0], np.dstack([IMAGE, IMAGE[:, :, 0]]), IMAGE[:1, :40], IMAGE[:47, :33]):
        assert loaded(image).shape == (*image.shape[:2], 3)
    made = SegmentationDetector.from_pretrained(str(folders["segformer"]))
    assert made(Image.fromarray(IMAGE), detect_resolution=64, image_resolution=64).size == (128, 64)
    with pytest.raises(ValueError, match="task must be one of semantic, instance, panoptic, got 'all'"):
        loaded(IMAGE, task="all")


def test_what_is_no_segmentation_model_is_refused(tmp_path):
    folder = tiny_models.depth_anything(tmp_path / "depth")
    with pytest.raises(
        WeightsError, match="holds no model that SegmentationDetector can use: depth_anything is no segmentation"
    ):
        SegmentationDetector("cpu", folder)


def test_a_network_without_its_head_is_refused(tmp_path):
    folder = tiny_models.segformer(tmp_path / "whole")
    transformers.SegformerModel.from_pretrained(folder).save_pretrained(folder)  # as nvidia/mit-b0 is published
    with pytest.raises(WeightsError, match="have no decode_head, which SegformerForSemanticSegmentation needs"):
        SegmentationDetector("cpu", folder)


def test_labels_of_masks():
    masks = [np.zeros((4, 6), bool) for _ in range(2)]
    masks[0][1:3, 1:3] = True
    masks[1][:, :4] = True
    assert stack_masks(masks, (4, 6)).tolist() == [
        [0, 0, 0, 0, -1, -1], [0, 1, 1, 0, -1, -1], [0, 1, 1, 0, -1, -1], [0, 0, 0, 0, -1, -1]
    ]  # fmt: skip
    assert (stack_masks([], (2, 3)) == -1).all()
    assert not colour_labels(np.full((2, 3), -1), ADE20K).any()
