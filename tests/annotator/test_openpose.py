"""OpenPose against the public reference, both versions: networks, made-up scenes, drawings; and its own blur."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from annotator.openpose import BodyPoseModel, FacePoseModel, HandPoseModel, OpenposeDetector, Poses, draw_pose
from annotator.openpose.drawing import draw_body_1_0, draw_body_1_1, draw_faces, draw_hands_1_0, draw_hands_1_1
from annotator.openpose.peaks import find_body_peaks, find_face_peaks, find_hand_peaks, gaussian_filter
from annotator.openpose.resizing import enlarge, enlarge_one_by_one, resize, scale
from annotator.weights import WeightsError
from tests.annotator.cases import assert_close, assert_map, case_state_dict, open_cases, open_manifest
from tests.parity import noise

V10, META = open_cases("openpose")
V11, META_11 = open_cases("openpose_v11")
ARRAYS = {"1.0": V10, "1.1": V11}
RAW = META["cases"]["raw_body"]
FILES = {"body_pose_model": BodyPoseModel, "hand_pose_model": HandPoseModel, "facenet": FacePoseModel}
SCENES_10 = ("two_people", "crossing", "split")
SCENES_11 = ("two_people", "odd_size")
DRAWINGS = ("draw_128x128", "draw_96x171")
VERSIONS = pytest.mark.parametrize("version", ["1.0", "1.1"])


@pytest.fixture(scope="module")
def weights() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        for name in FILES:
            torch.save(case_state_dict(name, RAW), Path(folder) / f"{name}.pth")
        yield Path(folder)


@pytest.fixture(scope="module")
def detectors(weights) -> dict[str, OpenposeDetector]:
    return {version: OpenposeDetector("cpu", weights, version) for version in ("1.0", "1.1")}


def record(monkeypatch, network: torch.nn.Module, result) -> list[np.ndarray]:
    """Let `network` return `result(x)`; what it was given, as uint8, appears in the list."""
    seen = []

    def forward(x: torch.Tensor):
        seen.append(((x + 0.5) * 256).byte().numpy())
        return result(x)

    monkeypatch.setattr(network, "forward", forward)
    return seen


def play(monkeypatch, detector: OpenposeDetector, scene: str) -> list[np.ndarray]:
    """Let the networks return the made-up outputs of a scene; gives what the body's network sees."""
    fields, heatmaps = (torch.from_numpy(ARRAYS[detector.version][f"{scene}/{name}"]) for name in ("L1", "L2"))
    play_parts(monkeypatch, detector)
    return record(monkeypatch, detector.network, lambda x: (fields, heatmaps))


def play_parts(monkeypatch, detector: OpenposeDetector) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The same for hands and faces, whose outputs are the same in all scenes."""
    hands = {int(n.rpartition("_")[2]): torch.from_numpy(V10[n]) for n in V10.files if n.startswith("hand_net_outputs")}
    face = torch.from_numpy(V11["net_outputs/face_48"])
    seen_hands = record(monkeypatch, detector.hand_network, lambda x: hands[x.shape[3] // 8])
    return seen_hands, record(monkeypatch, detector.face_network, lambda x: [face])


def test_state_dicts_have_the_published_layouts(detectors):
    detector = detectors["1.0"]
    networks = detector.network, detector.hand_network, detector.face_network
    for network, name in zip(networks, ("body_pose_model.module", "hand_pose_model.module", "facenet"), strict=True):
        layout = {key: list(tensor.shape) for key, tensor in network.state_dict().items()}
        assert layout == {key: shape for key, (shape, _) in open_manifest(name).items()}


def test_the_networks_equal_the_reference(detectors):
    detector = detectors["1.1"]
    parts = {"raw_body": META, "raw_hand": META, "raw_face": META_11}
    x = {
        name: torch.from_numpy(noise(case["input_noise"], case["input_shape"]) * np.float32(case["input_scale"]))
        for name, case in ((name, meta["cases"][name]) for name, meta in parts.items())
    }
    with torch.no_grad():
        fields, heatmaps = detector.network(x["raw_body"])
        assert_close(fields, V10["raw_body/L1"], 1e-4)
        assert_close(heatmaps, V10["raw_body/L2"], 1e-4)
        assert_close(detector.hand_network(x["raw_hand"]), V10["raw_hand/output"], 1e-4)
        stages = detector.face_network(x["raw_face"])
    assert len(stages) == 6
    assert_close(stages[0], V11["raw_face/stage1"], 1e-4)
    assert_close(stages[5], V11["raw_face/stage6"], 1e-4)


def test_a_photo_goes_through_as_in_the_reference(detectors):
    detector = detectors["1.0"]
    seen = []
    hook = detector.network.register_forward_hook(lambda module, inputs, output: seen.append((*inputs, *output)))
    canvas, pose = detector(V10["photo_astronaut/input"])
    hook.remove()
    x, fields, heatmaps = seen[0]
    assert np.array_equal((x + 0.5) * 256, V10["photo_astronaut/net_input_u8"])
    assert_close(fields, V10["photo_astronaut/L1"], 1e-4)
    assert_close(heatmaps, V10["photo_astronaut/L2"], 1e-4)
    candidate, subset = np.array(pose["candidate"]), np.array(pose["subset"])
    assert_close(candidate, V10["photo_astronaut/candidate"], 1e-4)
    assert_close(subset, V10["photo_astronaut/subset"], 1e-4)
    for got, want, exact in ((candidate, "candidate", [0, 1, 3]), (subset, "subset", [*range(18), 19])):
        assert np.array_equal(got[:, exact], V10[f"photo_astronaut/{want}"][:, exact])
    assert_map(canvas, V10["photo_astronaut/canvas"])


@pytest.mark.parametrize("scene", SCENES_10)
def test_scenes_of_1_0_equal_the_reference(detectors, monkeypatch, scene):
    detector = detectors["1.0"]
    seen = play(monkeypatch, detector, scene)
    image = V10[f"{scene}/input"]
    canvas, pose = detector(image)
    assert np.array_equal(seen[0], V10[f"{scene}/net_input_u8"])
    assert_close(np.array(pose["candidate"]), V10[f"{scene}/candidate"], 1e-6)
    assert_close(np.array(pose["subset"]), V10[f"{scene}/subset"], 1e-6)
    assert np.array_equal(canvas, V10[f"{scene}/canvas"])
    assert np.array_equal(detector(image, hand=True)[0], V10[f"{scene}/canvas_hand"])
    poses = detector.find_poses(image, hands=True)
    assert np.array_equal(poses.hand_boxes, V10[f"{scene}/hand_boxes"])
    assert np.array_equal(poses.hands, V10[f"{scene}/hand_peaks"])
    assert poses.faces == poses.face_boxes == []


@pytest.mark.parametrize("scene", SCENES_11)
def test_scenes_of_1_1_equal_the_reference(detectors, monkeypatch, scene):
    detector = detectors["1.1"]
    seen = play(monkeypatch, detector, scene)
    image = V11[f"{scene}/input"]
    assert np.array_equal(detector(image), V11[f"{scene}/canvas"])
    assert np.array_equal(seen[0], V11[f"{scene}/net_input_u8"])
    assert np.array_equal(detector(image, True), V11[f"{scene}/canvas_hand_and_face"])
    poses = detector.find_poses(image, hands=True, faces=True)
    assert_close(poses.candidates, V11[f"{scene}/candidate"], 1e-6)
    assert_close(poses.people, V11[f"{scene}/subset"], 1e-6)
    assert np.array_equal(poses.hand_boxes, V11[f"{scene}/hand_boxes"])
    assert np.array_equal(poses.face_boxes, V11[f"{scene}/face_boxes"])
    relative = detector(image, hand_and_face=True, return_is_index=True)
    assert np.array_equal(relative["bodies"]["candidate"], V11[f"{scene}/candidate_relative"])
    assert np.array_equal(relative["bodies"]["subset"], poses.people)
    assert np.array_equal(relative["hands"], V11[f"{scene}/hands"])
    assert np.array_equal(relative["faces"], V11[f"{scene}/faces"])


@VERSIONS
def test_hands_and_faces_alone_equal_the_reference(detectors, monkeypatch, version):
    detector = detectors[version]
    seen_hands, seen_faces = play_parts(monkeypatch, detector)
    v10 = detector.version == "1.0"
    arrays, case = ARRAYS[detector.version], "hand_alone" if v10 else "hand_face_alone"
    hand = detector.find_hand(arrays[f"{case}/input_bgr"])
    assert np.array_equal(hand, arrays[f"{case}/{'peaks' if v10 else 'hand_peaks'}"])
    for x, side in zip(seen_hands, (184, 368, 552, 736), strict=True):
        want = arrays[f"{case}/{'' if v10 else 'hand_'}net_input_u8_{side}_every_8th"]
        assert np.array_equal(x[:, :, ::8, ::8], want)
    if not v10:
        found = []
        peaks = lambda maps: found.append(maps) or find_face_peaks(maps)  # noqa: E731
        monkeypatch.setattr("annotator.openpose.find_face_peaks", peaks)
        assert np.array_equal(detector.find_face(arrays[f"{case}/input_bgr"]), arrays[f"{case}/face_peaks"])
        assert_close(found[0][::5], arrays[f"{case}/face_heatmaps_every_5th"], 1e-6)
        assert np.array_equal(seen_faces[0][:, :, ::4, ::4], arrays[f"{case}/face_net_input_u8_every_4th"])


@pytest.mark.parametrize(("version", "finder"), [("1.0", "find_hand"), ("1.1", "find_face")])
def test_hands_and_faces_are_the_same_inside_autocast(detectors, monkeypatch, version, finder):
    monkeypatch.setattr("annotator.openpose.HAND_SCALES", (0.5,))  # the smallest of four, for speed
    image = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    find = getattr(detectors[version], finder)
    want = find(image)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert np.array_equal(find(image), want)


@pytest.mark.parametrize("case", DRAWINGS)
def test_drawings_equal_the_reference(case):
    array = {name.split("/")[1]: V10[name] for name in V10.files if name.startswith(f"{case}/")}
    canvas = draw_body_1_0(np.zeros_like(array["canvas"]), array["candidate"], array["subset"])
    assert np.array_equal(canvas, array["canvas"])
    assert np.array_equal(draw_hands_1_0(np.zeros_like(canvas), array["hand_peaks"]), array["canvas_hand"])

    array = {name.split("/")[1]: V11[name] for name in V11.files if name.startswith(f"{case}/")}
    black = np.zeros_like(array["canvas"])
    body = draw_body_1_1(black.copy(), array["candidate"], array["subset"])
    assert np.array_equal(body, array["canvas_body"])
    assert np.array_equal(draw_hands_1_1(black.copy(), array["hands"]), array["canvas_hand"])
    assert np.array_equal(draw_faces(black.copy(), array["faces"]), array["canvas_face"])
    bodies = {"candidate": array["candidate"].tolist(), "subset": array["subset"].tolist()}
    pose = {"bodies": bodies, "hands": array["hands"].tolist(), "faces": array["faces"].tolist()}
    assert np.array_equal(draw_pose(pose, *black.shape[:2]), array["canvas"])
    body, hand, face = (array[f"canvas_{part}"] for part in ("body", "hand", "face"))
    assert np.array_equal(draw_pose(pose, *black.shape[:2], draw_hand=False, draw_face=False), body)
    assert np.array_equal(draw_pose(pose, *black.shape[:2], draw_body=False, draw_face=False), hand)
    assert np.array_equal(draw_pose(pose, *black.shape[:2], draw_body=False, draw_hand=False), face)


def test_the_resizing_of_1_1_equals_the_reference():
    maps, image = V11["smart_resize/input_maps"], V11["smart_resize/input_image"]
    assert_close(scale(maps, 8, "1.1")[::3, ::3], V11["smart_resize/k8"], 0)
    assert_close(resize(maps, 17, 50, "1.1"), V11["smart_resize/to_17x50"], 0)
    assert_close(scale(image, 0.7, "1.1"), V11["smart_resize/image_k_0.7"], 0)
    assert_close(resize(image, 96, 90, "1.1"), V11["smart_resize/image_to_96x90"], 0)


@VERSIONS
@pytest.mark.parametrize("width", [320, 324, 333])
def test_maps_one_by_one_equal_all_at_once(version, width):
    maps = np.random.RandomState(0).rand(23, 29, 19).astype(np.float32)
    sizes = (184, 230), 256, width, version
    one_by_one = [plane.copy() for plane in enlarge_one_by_one(maps, 18, *sizes)]
    assert_close(np.stack(one_by_one, axis=2), enlarge(maps, *sizes)[:, :, :18], 0)


def plain_peaks(heatmap: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Peaks by the definition."""
    blurred = gaussian_filter(heatmap)
    around = np.pad(blurred, 1)
    neighbours = np.max([around[:-2, 1:-1], around[2:, 1:-1], around[1:-1, :-2], around[1:-1, 2:]], axis=0)
    return np.nonzero((blurred >= neighbours) & (blurred > 0.1))


def test_peaks_are_those_of_a_double_precision_blur_of_everything():
    """Smooth and rough maps, plateaus, borders, tiny sides: the quick search may neither lose nor invent a peak."""
    random = np.random.RandomState(0)
    maps = [random.rand(height, width) * scale for height, width, scale in
            ((1, 1, 1), (1, 70, 1), (40, 3, 1), (90, 130, 0.4), (90, 130, 1e4), (200, 200, 1))]  # fmt: skip
    maps += [
        np.full((30, 40), 0.5),
        np.full((30, 40), 0.09),
        np.full((30, 40), 0.1),
        np.zeros((5, 5)),
        -np.ones((5, 5)),
    ]
    spot = np.zeros((300, 200))
    spot[[0, 20, 24, 150, 299, 299], [0, 199, 50, 100, 0, 199]] = 60  # reflected spots tie with their mirror images
    block = np.zeros((120, 120))
    block[30:90, 40:100] = 0.3
    maps += [spot, block, np.floor(gaussian_filter(spot) * 20) / 20]
    for heatmap in maps:
        heatmap = heatmap.astype(np.float32)
        ys, xs = plain_peaks(heatmap)
        (found,) = find_body_peaks([heatmap])
        assert np.array_equal(found[:, :2], np.stack([xs, ys], axis=1))
        assert np.array_equal(found[:, 2], heatmap[ys, xs]) and np.array_equal(found[:, 3], np.arange(len(ys)))


def test_the_blur_is_scipys_to_the_last_bit():
    ndimage = pytest.importorskip("scipy.ndimage")
    for shape in ((1, 1), (5, 300), (123, 97)):
        x = np.random.RandomState(1).rand(*shape)
        assert np.array_equal(gaussian_filter(x), ndimage.gaussian_filter(x, sigma=3))


def test_a_hands_point_is_the_maximum_of_the_heaviest_part():
    heavy, high = np.zeros((60, 60)), np.zeros((60, 60))
    heavy[5:25, 30:50], high[40:50, 8:18] = 0.5, 1.0
    heavy[12, 33] = heavy[14, 31] = 0.6  # of equals the first by row
    assert find_hand_peaks([heavy + high, np.zeros((60, 60))]).tolist() == [[33, 12], [0, 0]]


def test_a_hands_points_do_not_depend_on_what_lies_below_the_threshold():
    random = np.random.RandomState(2)
    for y, x in ((0, 0), (79, 99), (3, 60), (40, 50)):
        spots = np.zeros((80, 100))
        spots[y, x], spots[70, 20] = 300, 40
        spots = gaussian_filter(spots) + random.rand(80, 100) * 0.03
        above = (gaussian_filter(spots) > 0.05).astype(np.uint8)
        _, labels = cv2.connectedComponents(above)
        heaviest = 1 + np.argmax([spots[labels == k].sum() for k in range(1, labels.max() + 1)])
        best = np.unravel_index(np.where(labels == heaviest, spots, 0).argmax(), spots.shape)
        assert find_hand_peaks([spots]).tolist() == [[best[1], best[0]]]


def test_weights_of_hands_and_faces_are_needed_only_when_asked_for(weights, tmp_path, monkeypatch):
    body = tmp_path / "body_pose_model.pth"
    body.symlink_to(weights / body.name)
    for given in (tmp_path, body):
        for version in ("1.0", "1.1"):
            detector = OpenposeDetector("cpu", given, version)
            play_body = torch.from_numpy(V10["split/L1"]), torch.from_numpy(V10["split/L2"])
            monkeypatch.setattr(detector.network, "forward", lambda x, result=play_body: result)
            detector(V10["split/input"])
            with pytest.raises(WeightsError, match="hand_pose_model.pth"):
                detector(V10["split/input"], True)
    with pytest.raises(WeightsError, match="body_pose_model.pth"):
        OpenposeDetector("cpu", tmp_path / "nowhere")
    (tmp_path / "hand_pose_model.pth").symlink_to(weights / "hand_pose_model.pth")
    assert isinstance(OpenposeDetector("cpu", body).hand_network, HandPoseModel)


def test_arguments_of_the_other_version_are_refused(detectors, weights):
    with pytest.raises(ValueError, match="version must be one of '1.0', '1.1', got '2'"):
        OpenposeDetector("cpu", weights, version="2")
    with pytest.raises(ValueError, match="need version 1.1"):
        detectors["1.0"](V10["split/input"], hand_and_face=True)


@VERSIONS
def test_unusual_pictures(detectors, monkeypatch, version):
    """Real networks where they are quick, then made-up outputs for sizes the networks would take minutes for."""
    detector = detectors[version]
    random = np.random.RandomState(0)
    for image in (np.zeros((64, 48, 3), np.uint8), np.full((33, 17), 255, np.uint8), random.randint(0, 256, (9, 5, 4))):
        found = detector(image.astype(np.uint8))
        canvas = found[0] if detector.version == "1.0" else found
        assert canvas.shape == (*image.shape[:2], 3) and canvas.dtype == np.uint8
    seen = record(
        monkeypatch,
        detector.network,
        lambda x: tuple(torch.rand(1, n, x.shape[2] // 8, x.shape[3] // 8) / 8 for n in (38, 19)),
    )
    play_parts(monkeypatch, detector)
    for height, width in ((1, 700), (700, 1), (1, 1), (2, 5000)):
        found = detector(np.full((height, width, 3), 127, np.uint8), True)
        canvas = found[0] if detector.version == "1.0" else found
        assert canvas.shape == (height, width, 3)
        assert seen[-1].shape[2] * seen[-1].shape[3] <= 1.2 * 2**20
    with pytest.raises(ValueError, match="too large"):
        detector(np.zeros((5000, 5000, 3), np.uint8))


@VERSIONS
def test_memory_layout_and_precision_change_nothing(detectors, monkeypatch, version):
    detector = detectors[version]
    play(monkeypatch, detector, "two_people")
    image = ARRAYS[version]["two_people/input"]
    image.flags.writeable = False
    want = detector(image, hand=True)
    single = detector.network.forward
    monkeypatch.setattr(detector.network, "forward", lambda x: tuple(maps.double() for maps in single(x)))
    for same in (np.asfortranarray(image), np.ascontiguousarray(image.transpose(2, 0, 1)).transpose(1, 2, 0)):
        got = detector(same, hand=True)
        assert np.array_equal(got[0] if version == "1.0" else got, want[0] if version == "1.0" else want)


def test_no_people_is_a_black_picture_and_empty_lists():
    poses = Poses(np.zeros((0, 4)), np.zeros((0, 20)))
    pose = poses.relative(20, 30)
    assert pose == {"bodies": {"candidate": [], "subset": []}, "hands": [], "faces": []}
    assert not draw_pose(pose, 20, 30).any() and draw_pose(pose, 20, 30).shape == (20, 30, 3)


def test_points_are_cut_to_pixels_in_double_precision_and_by_controlnet_aux_in_single(detectors, monkeypatch):
    # 5 / 192 and 7 / 192 are rounded down to a float32.
    found = Poses(np.zeros((0, 4)), np.zeros((1, 20)) - 1, face_boxes=[(0, 0, 192)], faces=[np.array([[5, 7]])])
    size = (192, 192)
    assert draw_faces(np.zeros((*size, 3), np.uint8), found.relative(*size)["faces"]).nonzero()[0].mean() == 6
    detector = detectors["1.1"]
    monkeypatch.setattr(detector, "find_poses", lambda image: found)
    monkeypatch.setattr(detector, "_add_parts", lambda *arguments: found)
    y, x, _ = detector.aux_map(np.zeros((*size, 3), np.uint8), size, hand_and_face=True).nonzero()
    assert (x.mean(), y.mean()) == (5, 7)


def test_networks_can_be_loaded_before_threads_ask_for_them(weights):
    for version, loaded in (("1.0", {"hand_network"}), ("1.1", {"hand_network", "face_network"})):
        detector = OpenposeDetector("cpu", weights, version)
        detector.load(hand=False)
        assert not loaded & set(vars(detector))
        detector.load(hand=True)
        assert loaded == {"hand_network", "face_network"} & set(vars(detector))
