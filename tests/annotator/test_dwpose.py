"""DWPose: the decoding of both networks' outputs, and the detector on ONNX files whose answers are known."""

import numpy as np
import pytest
from PIL import Image

import annotator
from annotator.dwpose import DWposeDetector, decoding
from annotator.openpose import draw_pose
from annotator.weights import WeightsError

PERSON, DOG = 0, 16


def test_letterbox_keeps_the_shape_and_fills_with_grey():
    image = np.random.RandomState(0).randint(0, 256, (40, 80, 3), dtype=np.uint8)
    x, factor = decoding.letterbox(image, 64, 64)
    assert x.shape == (1, 3, 64, 64) and factor == 0.8
    assert (x[0, :, 32:] == 114).all() and np.abs(x[0, ::-1, :32].mean() - image.mean()) < 3
    same, factor = decoding.letterbox(image, 40, 80)
    assert factor == 1.0 and (same[0].transpose(1, 2, 0)[:, :, ::-1] == image).all()  # BGR


def yolox_output(boxes, side=64):
    """Boxes as centre, size, class, objectness and class score; each at an anchor of its own."""
    cells = [(y, x, s) for s in (8, 16, 32) for y in range(side // s) for x in range(side // s)]
    output = np.full((1, len(cells), 85), -3.0)
    output[..., 4:] = 0.0
    for anchor, (cx, cy, width, height, label, objectness, score) in zip((3, 4, 66, 70, 82), boxes, strict=False):
        y, x, stride = cells[anchor]
        output[0, anchor, :4] = cx / stride - x, cy / stride - y, np.log(width / stride), np.log(height / stride)
        output[0, anchor, [4, 5 + label]] = objectness, score
    return output


def test_boxes_are_people_once_each_the_surest_first():
    boxes = [
        (20, 30, 10, 20, PERSON, 0.9, 0.6),
        (21, 30, 10, 20, PERSON, 0.9, 0.9),  # the same person, surer
        (50, 40, 8, 16, PERSON, 1.0, 1.0),
        (40, 40, 30, 30, DOG, 1.0, 1.0),
        (32, 10, 10, 10, PERSON, 0.5, 0.59),  # below 0.3 together
    ]
    found = decoding.boxes_of_people(yolox_output(boxes), 64, 64, factor=0.5)
    assert np.allclose(found, [[92, 64, 108, 96], [32, 40, 52, 80]])
    assert decoding.boxes_of_people(yolox_output([]), 64, 64, 1.0).shape == (0, 4)


def test_networks_that_suppress_overlaps_themselves():
    output = np.array([[[1, 2, 3, 4, 0.5], [5, 6, 7, 8, 0.9], [0, 0, 1, 1, 0.2]]])
    assert decoding.boxes_of_people(output, 64, 64, 0.5).tolist() == [[10, 12, 14, 16], [2, 4, 6, 8]]
    assert decoding.boxes_of_people(np.zeros((1, 0, 5)), 64, 64, 0.5).shape == (0, 4)


def test_a_crop_and_its_points_are_inverse():
    image = np.zeros((200, 300, 3), dtype=np.uint8)
    image[80:83, 120:123] = 255
    box = np.array([90.0, 50.0, 150.0, 150.0])
    crop, corner, size = decoding.crop_person(image, box, 256, 192)
    assert size[1] / size[0] == pytest.approx(256 / 192) and size[1] == 125  # the box is 60x100, and 1.25 times that
    y, x = np.argwhere(crop[0, 0] > 1).mean(axis=0)
    simcc_x, simcc_y = np.zeros((1, 1, 384)), np.zeros((1, 1, 512))
    simcc_x[0, 0, round(2 * x)], simcc_y[0, 0, round(2 * y)] = 0.7, 0.4
    points, scores = decoding.points_of_person(simcc_x, simcc_y, corner, size, 256, 192)
    assert np.abs(points[0] - (121, 81)).max() < 0.5 and scores.tolist() == [0.4]
    assert crop[0, :, 0, 0] == pytest.approx(-decoding.MEAN / decoding.STD)


def test_points_become_openposes_joints_hands_and_faces():
    points = np.stack([np.arange(133.0) + 1, 2 * (np.arange(133.0) + 1)], axis=1)[None]
    scores = np.ones((1, 133))
    pose = decoding.poses(points, scores, height=1000, width=500)
    joints = np.array(pose["bodies"]["candidate"])
    # nose, neck, right arm, left arm, right leg, left leg, right eye, left eye, right ear, left ear of COCO's 17
    order = [0, None, 6, 8, 10, 5, 7, 9, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3]
    expected = [6.5 if index is None else index + 1 for index in order]  # the neck is between 5 and 6
    assert np.allclose(joints[:, 0] * 500, expected) and np.allclose(joints[:, 1] * 1000, 2 * np.array(expected))
    (person,) = pose["bodies"]["subset"]
    assert person == [*range(18), 18, 18]
    assert np.allclose(np.array(pose["faces"])[0, :, 0] * 500, np.arange(24, 92))
    assert np.allclose(np.array(pose["hands"])[:, :, 0] * 500, [np.arange(92, 113), np.arange(113, 134)])


def test_points_with_a_low_score_are_not_drawn():
    points = np.random.RandomState(0).uniform(10, 90, (2, 133, 2))
    scores = np.ones((2, 133))
    scores[1, :] = 0.2
    scores[0, 5] = 0.1  # a shoulder: without it no neck
    pose = decoding.poses(points, scores, 100, 100)
    first, second = pose["bodies"]["subset"]
    assert first[1] == -1 and first[5] == -1 and first[19] == 16 and second[:18] == [-1] * 18
    alone = decoding.poses(points[:1], scores[:1], 100, 100)
    assert (draw_pose(pose, 100, 100) == draw_pose(alone, 100, 100)).all() and draw_pose(alone, 100, 100).any()
    nobody = decoding.poses(np.zeros((0, 133, 2)), np.zeros((0, 133)), 100, 100)
    assert not draw_pose(nobody, 100, 100).any()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pytest.importorskip("onnxruntime")
    models = pytest.importorskip("tests.annotator.onnx_models")
    folder = tmp_path_factory.mktemp("dwpose")
    models.yolox(folder / "yolox_l.onnx", [(20, 32, 30, 60, PERSON, 0.9), (48, 32, 30, 60, DOG, 0.9)])
    models.brightest(folder / "dw-ll_ucoco_384.onnx", shift=-9)  # finds no hands
    return folder


IMAGE = np.zeros((128, 128, 3), dtype=np.uint8)
IMAGE[66:73, 37:44] = 255


def test_the_detector_finds_what_its_networks_say(folder):
    detector = DWposeDetector("cpu", folder)
    points, scores = detector.find_people(IMAGE)
    assert points.shape == (1, 133, 2) and np.abs(points - (40, 69)).max() < 4
    assert (scores[:, :91] > 1).all() and (scores[:, 91:] < 0).all()
    drawn = detector(IMAGE)
    y, x = np.argwhere(drawn.any(axis=2)).T
    assert drawn.shape == IMAGE.shape and 30 < x.min() < x.max() < 50 and 59 < y.min() < y.max() < 79
    assert (drawn == draw_pose(decoding.poses(points, scores, 128, 128), 128, 128)).all()
    assert (drawn == 255).all(axis=2).any() and not (detector(IMAGE, include_face=False) == 255).all(axis=2).any()
    assert not detector(IMAGE, include_body=False, include_face=False).any()
    assert set(detector.sources) == {"yolox_l.onnx", "dw-ll_ucoco_384.onnx"}


def test_other_pictures_and_calls(folder):
    loaded = annotator.load("dwpose", "cpu", folder)
    for image in (IMAGE[:, :, 0], np.dstack([IMAGE, IMAGE[:, :, 0]]), IMAGE[:1, :40], IMAGE[:47, :33]):
        assert loaded(image).shape == (*image.shape[:2], 3)
    assert loaded.make_hint(IMAGE, 64).hint.shape == (64, 64, 3)
    result = DWposeDetector.from_pretrained(str(folder)).to("cpu")(Image.fromarray(IMAGE), detect_resolution=128)
    assert isinstance(result, Image.Image) and result.size == (512, 512)
    beside = DWposeDetector("cpu", folder / "yolox_l.onnx")  # the other file lies beside it
    assert (beside(IMAGE) == loaded(IMAGE)).all()


def test_files_that_are_missing_or_of_another_kind(folder, tmp_path):
    with pytest.raises(WeightsError, match="neither a file nor a folder that holds yolox_l.onnx"):
        DWposeDetector("cpu", tmp_path)
    (tmp_path / "yolox_l.onnx").write_bytes((folder / "yolox_l.onnx").read_bytes())
    with pytest.raises(WeightsError, match="dw-ll_ucoco_384.onnx"):
        DWposeDetector("cpu", tmp_path)
    (tmp_path / "dw-ll_ucoco_384.onnx").write_bytes(b"no network")
    with pytest.raises(WeightsError, match="is no ONNX network"):
        DWposeDetector("cpu", tmp_path)
