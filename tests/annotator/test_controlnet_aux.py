"""Code in the style of controlnet_aux and its README; where that library is installed, its results on the same weights.

pip install --no-deps --target FOLDER controlnet_aux; PYTHONPATH=FOLDER pytest tests/annotator/test_controlnet_aux.py
"""

import importlib
import random
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from annotator.canny import CannyDetector
from annotator.hed import HEDdetector
from annotator.lineart import LineartDetector
from annotator.midas import MidasDetector
from annotator.openpose import OpenposeDetector
from annotator.pictures import HWC3, resize_image
from annotator.pidinet import PidiNetDetector
from annotator.scribble import fake_scribble
from annotator.shuffle import ContentShuffleDetector
from annotator.weights import WeightsError
from tests.annotator.cases import case_state_dict, open_cases

PHOTO = open_cases("canny")[0]["astronaut/input"]
# Class: where it is here, its published files with the manifest and the case that fills it, their wrapper, and keywords to try.
DETECTORS = {
    "HEDdetector": ("hed", {"ControlNetHED.pth": ("ControlNetHED", "hed", "astronaut_256x256", "gain")}, None,
                    [{}, {"safe": True}, {"scribble": True}, {"scribble": True, "safe": True}]),
    "PidiNetDetector": ("pidinet", {"table5_pidinet.pth": ("table5_pidinet", "pidinet", "photo_coffee", "gain")}, "state_dict",
                        [{}, {"safe": True}, {"scribble": True}, {"apply_filter": True}]),
    "MLSDdetector": ("mlsd", {"mlsd_large_512_fp32.pth": ("mlsd_large_512_fp32", "mlsd", "raw", "gain")}, None,
                     [{}, {"thr_v": 0.3, "thr_d": 2.0}]),
    "LineartDetector": ("lineart", {"sk_model.pth": ("sk_model", "lineart", "photo_coffee", "gain"),
                                    "sk_model2.pth": ("sk_model", "lineart", "photo_coffee", "gain_coarse")}, None,
                        [{}, {"coarse": True}]),
    "LineartAnimeDetector": ("lineart_anime", {"netG.pth": ("netG", "lineart_anime", "raw", "gain")}, None, [{}]),
    "MidasDetector": ("midas", {"dpt_hybrid-midas-501f0c75.pt": ("dpt_hybrid-midas-501f0c75", "midas", "raw", "gain")}, None,
                      [{}, {"depth_and_normal": True, "bg_th": 0.3, "a": 4.0}]),
    "NormalBaeDetector": ("normalbae", {"scannet.pt": ("scannet", "normalbae", "raw", "gain")}, "model", [{}]),
    "OpenposeDetector": ("openpose", {f"{name}.pth": (name, "openpose", "raw_body", "gain")
                                      for name in ("body_pose_model", "hand_pose_model", "facenet")}, None,
                         [{}, {"hand_and_face": True}, {"include_hand": True, "include_body": False}]),
}  # fmt: skip


def publish(name: str, folder: Path) -> Path:
    """The detector's weight files, made up, as they are published."""
    _, files, wrapper, _ = DETECTORS[name]
    for file, (manifest, cases, case, gain) in files.items():
        meta = open_cases(cases)[1]["cases"][case]
        state_dict = case_state_dict(manifest, meta | {"gain": meta[gain]})
        torch.save({wrapper: state_dict} if wrapper else state_dict, folder / file)
    return folder


def ours(name: str) -> type:
    return getattr(importlib.import_module(f"annotator.{DETECTORS[name][0]}"), name)


def arrays(found) -> list[np.ndarray]:
    return [np.asarray(one) for one in (found if isinstance(found, tuple) else (found,))]


@pytest.mark.parametrize("name", list(DETECTORS))
def test_maps_equal_those_of_controlnet_aux(name, tmp_path):
    library = pytest.importorskip("controlnet_aux")
    folder = publish(name, tmp_path)
    here, there = (kind.from_pretrained(str(folder)) for kind in (ours(name), getattr(library, name)))
    here.to("cpu")
    picture = Image.fromarray(PHOTO)
    for options in DETECTORS[name][3]:
        for sizes in (
            {"detect_resolution": 128, "image_resolution": 192},
            {"detect_resolution": 192, "image_resolution": 128},
        ):
            got, want = here(picture, **sizes, **options), there(picture, **sizes, **options)
            assert isinstance(got, tuple) == isinstance(want, tuple)
            assert all(isinstance(one, Image.Image) for one in (got if isinstance(got, tuple) else (got,)))
            for a, b in zip(arrays(got), arrays(want), strict=True):
                assert a.shape == b.shape and (np.abs(a.astype(int) - b.astype(int)) > 1).mean() <= 0.005, options
        array = here(PHOTO, **sizes, **options, output_type="np")
        assert all(isinstance(one, np.ndarray) for one in (array if isinstance(array, tuple) else (array,)))


def test_the_code_of_its_readme_runs(tmp_path):
    for name in ("HEDdetector", "PidiNetDetector", "LineartDetector"):
        publish(name, tmp_path)
    img = Image.fromarray(PHOTO).convert("RGB").resize((192, 128))

    # load checkpoints
    hed = HEDdetector.from_pretrained(str(tmp_path))
    pidi = PidiNetDetector.from_pretrained(str(tmp_path), filename="table5_pidinet.pth").to("cpu")
    lineart = LineartDetector.from_pretrained(str(tmp_path), coarse_filename="sk_model2.pth")
    # instantiate
    canny = CannyDetector()
    content = ContentShuffleDetector()
    # process
    small = {"detect_resolution": 128, "image_resolution": 128}
    for found in (hed(img, **small), hed(img, scribble=True, safe=True, **small), pidi(img, safe=True, **small),
                  lineart(img, coarse=True, **small), canny(img, **small), content(img, **small)):  # fmt: skip
        assert isinstance(found, Image.Image) and found.size == (192, 128) and found.mode == "RGB"
    assert canny(img).size == content(img).size == (768, 512)  # 512 is what all begin with


def test_its_conventions_and_the_references_side_by_side(tmp_path):
    publish("HEDdetector", tmp_path)
    reference, library = HEDdetector("cpu", tmp_path), HEDdetector.from_pretrained(tmp_path)
    plain = reference(PHOTO)
    assert isinstance(plain, np.ndarray) and plain.shape == PHOTO.shape[:2]
    assert np.array_equal(reference(PHOTO, True), reference(PHOTO, safe=True))  # the second argument is the reference's
    # A picture, or a keyword that only the library has, is answered in its way; so is everything by `from_pretrained`.
    view = resize_image(PHOTO, 128)
    want = cv2.resize(HWC3(reference(view)), (192, 192), interpolation=cv2.INTER_LINEAR)
    sizes = {"detect_resolution": 128, "image_resolution": 192}
    for detector in (reference, library):
        assert np.array_equal(np.asarray(detector(Image.fromarray(PHOTO), **sizes)), want)
        assert np.array_equal(np.asarray(detector(PHOTO, **sizes)), want)
        assert np.array_equal(detector(input_image=PHOTO, **sizes, output_type="np"), want)
        assert np.array_equal(detector(PHOTO, **sizes, output_type="np", scribble=True), fake_scribble(want))
    assert np.array_equal(CannyDetector()(PHOTO, **sizes).shape, (192, 192, 3))  # as arrays are answered there
    assert isinstance(CannyDetector()(PHOTO, **sizes, output_type="pil"), Image.Image)
    assert isinstance(library(PHOTO, return_pil=False), np.ndarray)  # the older name of output_type
    grey = Image.fromarray(PHOTO[:, :, 0])
    assert library(grey, **sizes).size == (192, 192)


def test_the_shuffle_draws_the_same_numbers():
    library = pytest.importorskip("controlnet_aux")
    sizes = {"detect_resolution": 128, "image_resolution": 192}
    found = []
    for detector in (ContentShuffleDetector(), library.ContentShuffleDetector()):
        np.random.seed(3)
        random.seed(3)
        found.append(np.asarray(detector(Image.fromarray(PHOTO), f=64, **sizes)).astype(int))
    assert np.abs(found[0] - found[1]).max() == 0


def test_mistakes_are_named(tmp_path):
    with pytest.raises(WeightsError, match="ControlNetHED.pth"):
        HEDdetector.from_pretrained(str(tmp_path))
    for cached in (None, str(tmp_path)):
        with pytest.raises(WeightsError, match="cannot get ControlNetHED.pth from nobody/nothing"):
            HEDdetector.from_pretrained("nobody/nothing", cache_dir=cached, local_files_only=True)
    with pytest.raises(ValueError, match="model_type must be dpt_hybrid"):
        MidasDetector.from_pretrained(str(tmp_path), model_type="dpt_large")
    with pytest.raises(WeightsError, match="body_pose_model.pth"):
        OpenposeDetector.from_pretrained(str(tmp_path))
    with pytest.raises(WeightsError, match="sub/ControlNetHED.pth"):
        HEDdetector.from_pretrained(str(tmp_path), subfolder="sub")
    canny = CannyDetector()
    with pytest.raises(ValueError, match="output_type must be pil or np, got 'latent'"):
        canny(Image.fromarray(PHOTO), output_type="latent")
    with pytest.raises(
        TypeError, match="CannyDetector takes no low; it takes low_threshold, high_threshold, .*image_resol"
    ):
        canny(PHOTO, low=3)
    with pytest.raises(TypeError, match="each once"):
        canny(PHOTO, 3, low_threshold=4)
    with pytest.raises(ValueError, match="NoneType"):
        canny()
