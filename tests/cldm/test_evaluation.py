"""Scores against values worked out by hand and against scikit-image and torchmetrics; the command line."""

import json
import math

import cv2
import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import binary_f1_score, multiclass_jaccard_index

import annotator
from cldm.checkpoint.control import add_control
from cldm.config import resolve
from cldm.data.fill import generate_fill
from cldm.data.scenes import generate_scenes
from cldm.evaluate import Unavailable, clip_score, fid, held_out, load_model, main
from cldm.evaluation import (
    COMPARISONS,
    CONDITIONS,
    DRAWN,
    Fidelity,
    edge_f1,
    keypoint_distance,
    map_rmse,
    map_ssim,
    mean_iou,
)
from cldm.files import locked
from ldm.util import ConfigError

RNG = np.random.default_rng(0)


def edges(*points, size=8):
    picture = np.zeros((1, size, size, 3), np.uint8)
    for y, x in points:
        picture[0, y, x] = 255
    return picture


def maps(n=3, size=32):
    return RNG.integers(0, 256, (n, size, size, 3), dtype=np.uint8)


def test_edges_by_hand_and_by_torchmetrics():
    wanted = edges((1, 1), (1, 2), (1, 3), (1, 4))
    found = edges((1, 1), (1, 2), (5, 5))
    assert edge_f1(found, wanted)[0] == pytest.approx(2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4))
    assert edge_f1(wanted, wanted)[0] == 1 == edge_f1(edges(), edges())[0]
    assert edge_f1(edges(), wanted)[0] == 0 == edge_f1(wanted, edges())[0]
    moved = np.roll(wanted, 1, axis=1)
    assert edge_f1(moved, wanted)[0] == 0 and edge_f1(moved, wanted, tolerance=1)[0] == pytest.approx(1)
    found, wanted = maps(), maps()
    for score, f, w in zip(edge_f1(found, wanted), found, wanted, strict=True):
        masks = [torch.from_numpy(m.max(axis=2) > 127).int() for m in (f, w)]
        assert score == pytest.approx(float(binary_f1_score(*masks)), abs=1e-6)


def test_depth_and_similarity():
    wanted = maps()
    assert (map_rmse(wanted, wanted) == 0).all() and map_ssim(wanted, wanted) == pytest.approx(1)
    shifted = np.full((1, 4, 4, 3), 51, np.uint8), np.zeros((1, 4, 4, 3), np.uint8)
    assert map_rmse(*shifted)[0] == pytest.approx(0.2)
    assert map_rmse(shifted[1], shifted[0])[0] == pytest.approx(0.2)  # no overflow of uint8
    metrics = pytest.importorskip("skimage.metrics")
    smooth = np.stack([cv2.GaussianBlur(m, (0, 0), 3) for m in wanted])
    for score, f, w in zip(map_ssim(smooth, wanted), smooth, wanted, strict=True):
        expected = metrics.structural_similarity(
            f.mean(axis=2), w.mean(axis=2), data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
        )  # fmt: skip
        assert score == pytest.approx(expected, abs=0.02)  # the two treat borders differently


def test_segmentation_by_hand_and_by_torchmetrics():
    colours = np.array([[10, 20, 30], [10, 20, 31], [200, 0, 0]], np.uint8)
    wanted, found = (
        np.array([[0, 0, 1, 1]]),
        np.array([[0, 1, 1, 2]]),
    )  # IoU 1/2 and 1/3; the third label was not wanted
    assert mean_iou(colours[found][None], colours[wanted][None]) == pytest.approx((1 / 2 + 1 / 3) / 2)
    wanted, found = RNG.integers(0, 3, (2, 2, 16, 16))
    expected = multiclass_jaccard_index(torch.from_numpy(found), torch.from_numpy(wanted), 3)
    assert mean_iou(colours[found], colours[wanted]) == pytest.approx(float(expected), abs=1e-6)
    with pytest.raises(ValueError, match="stored without loss"):
        mean_iou(maps(), maps())


def test_poses_by_hand():
    person = np.array([[0.0, 0.0], [3.0, 4.0], [np.nan, np.nan]])  # as large as 5 pixels
    near = person + [0.5, 0.0]
    assert keypoint_distance([person], [person]) == 0
    assert keypoint_distance([near], [person]) == pytest.approx(0.1)
    lacking = np.array([[np.nan, np.nan], [3.0, 4.0], [1.0, 1.0]])
    assert keypoint_distance([lacking], [person]) == pytest.approx(0.5)
    assert keypoint_distance([], [person]) == 1 == keypoint_distance([person + 100], [person])
    assert keypoint_distance([near, person + 50], [person + 50, person]) == pytest.approx(
        0.05
    )  # each found one serves once
    assert keypoint_distance([near], [person, person]) == pytest.approx(0.55)
    assert math.isnan(keypoint_distance([person], []))


@pytest.mark.parametrize("compare", [edge_f1, map_ssim, map_rmse, mean_iou])
def test_maps_that_do_not_belong_together(compare):
    with pytest.raises(ValueError, match="of one shape"):
        compare(maps(2), maps(3))
    with pytest.raises(ValueError, match="of one shape"):
        compare(maps().astype(np.float32), maps().astype(np.float32))


def test_every_condition_is_an_annotator_and_has_its_best_value():
    assert set(CONDITIONS) - set(DRAWN) <= set(annotator.list_annotators())
    label_maps = np.zeros((2, 16, 16, 3), np.uint8)
    label_maps[:, 4:8, 4:8] = 200
    for comparison in COMPARISONS.values():
        assert np.mean(comparison.compare(label_maps, label_maps)) == pytest.approx(comparison.best)
    with pytest.raises(ConfigError, match="no score for the condition 'tile'"):
        Fidelity("tile", maps())


def photos(n=3, size=64):
    """Pictures with shapes, so that they have edges."""
    pictures = np.full((n, size, size, 3), 40, np.uint8)
    for i, picture in enumerate(pictures):
        cv2.circle(picture, (20 + 8 * i, 24), 10 + 2 * i, (200, 120, 60), -1)
        cv2.rectangle(picture, (8, 40), (20 + 8 * i, 56), (90, 220, 30), -1)
    return pictures


def test_a_detector_of_our_own_finds_what_it_found_before():
    pictures = photos()
    canny = annotator.load("canny")
    hints = np.stack([canny.make_hint(p, resolution=None, low_threshold=50).source for p in pictures])
    score = Fidelity("canny", hints, low_threshold=50)
    assert score(pictures) == {"fidelity/canny_f1": 1.0}
    assert score(np.roll(pictures, 1, axis=0))["fidelity/canny_f1"] < 0.6
    assert score(np.full_like(pictures, 128)) == {"fidelity/canny_f1": 0.0}
    with pytest.raises(ValueError, match="no parameter"):
        Fidelity("canny", hints, sigma=3)(pictures)


def test_poses_are_looked_for_in_targets_and_pictures(monkeypatch):
    class Detector:
        def __call__(self, picture, return_is_index):
            x = float(picture[0, 0, 0]) / picture.shape[1]
            return {"bodies": {"candidate": [[x, 0.25], [x, 0.75]], "subset": [[0, 1, *[-1] * 16, 9.0, 2]]}}

    monkeypatch.setattr(annotator, "load", lambda *a, **k: type("Annotator", (), {"detector": Detector()}))
    targets = np.zeros((2, 64, 64, 3), np.uint8)
    pictures = targets.copy()
    pictures[1, 0, 0, 0] = 16
    assert Fidelity("openpose", targets, targets)(pictures) == {
        "fidelity/openpose_keypoint_distance": pytest.approx(0.25)
    }
    with pytest.raises(ValueError, match="targets|target pictures"):
        Fidelity("openpose", targets)


def test_quality_needs_weights_that_are_at_hand_and_downloads_nothing(tmp_path, monkeypatch):
    class Features(torch.nn.Module):
        num_features = 3

        def forward(self, pictures):
            return pictures.double().mean(dim=(2, 3))

    real, made = maps(40, 8), maps(40, 8) // 2
    a, b = (pictures.astype(float).mean(axis=(1, 2)) for pictures in (real, made))
    product = np.linalg.eigvals(np.cov(a.T) @ np.cov(b.T))
    expected = (
        ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a.T) + np.cov(b.T)) - 2 * np.sqrt(product).real.sum()
    )
    assert fid(made, real, Features()) == pytest.approx(expected, rel=1e-3)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(Unavailable, match="FID needs"):
        fid(made, real)
    with pytest.raises(Unavailable, match="CLIP score needs"):
        clip_score(made, ["a"] * 40)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    add_control(resolve("cldm_tiny.safetensors"), folder / "full.safetensors", "cldm_tiny", progress=False)
    generate_fill(folder / "data", 5, 64, seed=1, palette="clear", progress=False)
    generate_scenes(folder / "scenes", 5, 64, seed=1, hint="depth", progress=False)
    return folder


def test_scenes_that_were_drawn_are_recognised(work, capsys):
    command = [str(work / "full.safetensors"), str(work / "scenes"), "--condition", "scenes", "--pairs", "3", "--steps", "2",
               "--device", "cpu", "--out", str(work / "out_scenes")]  # fmt: skip
    assert main(command) == 0
    result = json.loads((work / "out_scenes" / "evaluation.json").read_text())
    assert result["of_targets"]["scenes/iou"] > 0.9 and result["of_targets"]["scenes/colours"] == 1
    assert result["of_other_hints"]["scenes/iou"] < 0.6 and set(result["scores"]) == {"scenes/iou", "scenes/colours"}
    (work / "scenes" / "scenes.json").unlink()
    assert main([*command, "--force"]) == 2
    assert "are not what --condition scenes scores" in capsys.readouterr().err


def test_one_kind_of_drawing_is_not_scored_as_another(work, tmp_path, capsys):
    for folder, condition in (("scenes", "fill"), ("data", "scenes")):
        command = [str(work / "full.safetensors"), str(work / folder), "--condition", condition, "--out", str(tmp_path)]
        assert main(command) == 2
        assert f"are not what --condition {condition} scores" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"no score for the condition 'scenes'; there are: canny"):
        Fidelity("scenes", maps())


def test_a_checkpoint_and_a_folder(work, capsys):
    command = [
        str(work / "full.safetensors"),
        str(work / "data"),
        "--condition",
        "fill",
        "--pairs",
        "3",
        "--steps",
        "2",
    ]
    command += ["--guidance-scale", "3", "--device", "cpu", "--out", str(work / "out")]
    assert main(command) == 0
    result = json.loads((work / "out" / "evaluation.json").read_text())
    assert result["pairs"] == [2, 4] and set(result["scores"]) == {"fill/iou", "fill/colours"}
    assert result["of_targets"]["fill/iou"] > 0.95 and result["of_targets"]["fill/colours"] == 1
    assert "left out" in str(result["quality"]["CLIP score"]) or result["quality"]["CLIP score"] > 0
    picture = cv2.imread(str(work / "out" / "evaluation.png"))
    assert picture is not None and picture.shape[1] > 3 * 128
    assert "fill/iou" in capsys.readouterr().out
    assert main(command) == 2
    assert "--force" in capsys.readouterr().err
    canny = [*command[:3], "canny", *command[4:], "--force", "--batch-size", "2", "--parameter", "low_threshold=40"]
    assert main(canny) == 0
    assert set(json.loads((work / "out" / "evaluation.json").read_text())["scores"]) == {"fidelity/canny_f1"}


def test_a_control_alone_on_its_base(work):
    from cldm.checkpoint import convert
    from cldm.model import create_model

    convert(work / "full.safetensors", work / "control.safetensors", "control")
    whole = create_model("cldm_tiny", weights=work / "full.safetensors").state_dict()
    model = load_model(str(work / "control.safetensors"), str(resolve("cldm_tiny.safetensors")), "")
    assert all(torch.equal(value, whole[key]) for key, value in model.state_dict().items())
    with pytest.raises(ConfigError, match="--base"):
        load_model(str(work / "control.safetensors"), "", "")


@pytest.mark.parametrize(
    "more, message",
    [
        (["--condition", "hed"], "ControlNetHED.pth"),
        (["--condition", "fill", "--pairs", "0"], "--pairs must be at least 1"),
        (["--condition", "fill", "--steps", "2000"], "--steps must be 1 to 1000"),
        (["--condition", "fill", "--batch-size", "0"], "--batch-size must be at least 1"),
        (["--condition", "canny", "--parameter", "sigma"], "name=value"),
        (["--condition", "canny", "--parameter", "sigma=3"], "no parameter"),
        (["--condition", "fill", "--device", "warp"], "no device warp"),
        (["--condition", "fill", "--seed", "-5"], "-5"),
        (["--condition", "fill", "--guidance-scale", "nan"], "guidance_scale must be a number"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(work, capsys, monkeypatch, more, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    weights = ["--annotator-weights", str(work)] if "hed" in more else []
    out = ["--out", str(work / "wrong")]
    assert main([str(work / "full.safetensors"), str(work / "data"), *more, *weights, *out]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error and not (work / "wrong").exists()


def test_what_cannot_be_written_is_found_before_the_work(work, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("cldm.evaluate.generate", None)  # the work
    command = [str(work / "full.safetensors"), str(work / "data"), "--condition", "fill", "--device", "cpu", "--out"]
    (tmp_path / "file").touch()
    assert main([*command, str(tmp_path / "file")]) == 2
    assert str(tmp_path / "file") in capsys.readouterr().err
    with locked(tmp_path / "out" / "evaluation.json"):
        assert main([*command, str(tmp_path / "out")]) == 2
    assert "in use by another process" in capsys.readouterr().err


def test_too_little_memory_is_one_line_that_says_what_helps(work, tmp_path, capsys, monkeypatch):
    def full(*args, **options):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.\nTried")

    monkeypatch.setattr("cldm.evaluate.generate", full)
    command = [str(work / "full.safetensors"), str(work / "data"), "--condition", "fill", "--device", "cpu"]
    assert main([*command, "--out", str(tmp_path)]) == 2
    assert "not enough memory; a smaller --batch-size may help (CUDA out of memory.)" in capsys.readouterr().err


def test_weights_that_are_not_finite_are_named_in_one_line(work, tmp_path, capsys, monkeypatch):
    def broken(*args):
        model = load_model(*args)
        model.model.diffusion_model.out[2].bias.data.fill_(float("nan"))
        return model

    monkeypatch.setattr("cldm.evaluate.load_model", broken)
    command = [str(work / "full.safetensors"), str(work / "data"), *"--condition fill --device cpu --steps 1".split()]
    assert main([*command, "--pairs", "1", "--out", str(tmp_path)]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("python -m cldm.evaluate: sampling gives NaN") and "diffusion_model.out.2" in line


def test_shards_are_not_taken_for_a_folder_that_lacks_its_listing(tmp_path):
    (tmp_path / "0.tar").touch()
    for shards in (tmp_path, tmp_path / "0.tar"):
        with pytest.raises(ConfigError, match="holds shards, which are streamed; scores need a folder of pairs"):
            held_out(str(shards), 1)


def test_of_one_pair_there_are_no_other_hints(work, tmp_path, capsys):
    command = [str(work / "full.safetensors"), str(work / "data"), *"--condition fill --device cpu --steps 1".split()]
    assert main([*command, "--pairs", "1", "--out", str(tmp_path)]) == 0
    written = capsys.readouterr().out
    assert "fill/iou" in written and "other hints" not in written
    assert json.loads((tmp_path / "evaluation.json").read_text())["of_other_hints"] is None
