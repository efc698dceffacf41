"""All conditions by name: detectors, the sizes they work at, and how a map becomes a model's hint.

ControlNet 1.0 and 1.1 treat some conditions differently: in 1.0, Canny and scribbles work on the picture at its final size and
white lines on black are shown inverted; in 1.1 Canny has a size of its own too, every map is resized linearly and shown as it is.
"""

import importlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import cv2
import numpy as np

from annotator.canny import check_thresholds
from annotator.detector import VERSIONS, Detector, Parameter, check_version
from annotator.inpaint import cut_hole, picture_with_hole, scale_with_hole, show_hole
from annotator.pictures import HWC3, Picture, as_array, check_image, resize, resize_image, without_alpha
from annotator.scribble import fake_scribble


def scale(map: np.ndarray) -> np.ndarray:
    """A uint8 map as float32 (H, W, 3) from 0 to 1."""
    return HWC3(map).astype(np.float32) / 255.0


def scale_inverted(map: np.ndarray) -> np.ndarray:
    return 1.0 - scale(map)


def scale_reversed(map: np.ndarray) -> np.ndarray:
    """With the channels from last to first."""
    return np.ascontiguousarray(scale(map)[:, :, ::-1])


def invert(map: np.ndarray) -> np.ndarray:
    return 255 - HWC3(map)


def thicken_and_invert(map: np.ndarray) -> np.ndarray:
    return 255 - cv2.dilate(HWC3(map), np.ones((3, 3), dtype=np.uint8))


Convert = Callable[[np.ndarray], np.ndarray]
ROWS = 256  # of a map that are floats at once, as those of a whole photograph take much memory


@dataclass(frozen=True)
class AnnotatorInfo:
    """What is to be known about a condition without loading it.

    Attributes:
        detector: dotted path of the class, imported when it is needed.
        weights: what must be fetched: published files, or the id of a model.
        only: the arguments that people may choose, if not all that the detector's signature gives a range.
        defaults_here: of arguments, where they are not the detector's own.
        check: raises ValueError for values that do not fit together.
        works_at: on the picture at `detect_resolution` ("detect"), at its final size ("image"), or as it was given ("input").
        detect_resolution: shorter side of what the detector is given; None unless `works_at` is "detect".
        interpolation: by which the map comes to the size of the picture.
        output: which of the detector's results is the map, where it gives several.
        takes: makes the detector's input of a user's picture.
        finish: changes the map at the size of the result.
        to_hint: a map, also one from elsewhere, to the model's hint (H, W, 3), float32.
        to_shown: a map to what people are shown.
    """

    name: str
    title: str
    detector: str
    weights: str = ""
    version: str = "1.1"
    only: tuple[str, ...] | None = None
    defaults_here: Mapping[str, Any] = field(default_factory=dict)
    check: Callable[[dict[str, Any]], object] | None = None
    works_at: str = "detect"
    detect_resolution: int | None = 512
    interpolation: int = cv2.INTER_LINEAR
    output: int | None = None
    takes: Convert = HWC3
    finish: Convert = HWC3
    to_hint: Convert = scale
    to_shown: Convert = HWC3

    def __post_init__(self) -> None:
        if self.works_at != "detect":
            object.__setattr__(self, "detect_resolution", None)

    @property
    def network(self) -> bool:
        """Whether it needs weights."""
        return bool(self.weights)

    @property
    def detector_class(self) -> type[Detector]:
        module, _, name = self.detector.rpartition(".")
        return getattr(importlib.import_module(module), name)

    @property
    def extra(self) -> str:
        """The extra of this package that the detector needs."""
        return self.detector_class.extra

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """What people may choose; imports the detector."""
        known = self.detector_class.parameters().values()
        return tuple(parameter for parameter in known if self.only is None or parameter.name in self.only)

    @property
    def offers(self) -> tuple[str, ...]:
        return tuple(parameter.name for parameter in self.parameters)

    @property
    def defaults(self) -> dict[str, Any]:
        return {parameter.name: parameter.default for parameter in self.parameters} | dict(self.defaults_here)

    def check_parameters(self, values: Mapping[str, object]) -> dict[str, Any]:
        """All parameters, `values` before defaults.

        Raises:
            ValueError: for an unknown parameter, or a value out of range.
        """
        unknown = [name for name in values if name not in self.offers]
        if unknown:
            known = ", ".join(self.offers) or "none"
            raise ValueError(f"{self.name} {self.version} has no parameter {', '.join(unknown)}; it has: {known}")
        checked = self.defaults | {p.name: p.check(values[p.name]) for p in self.parameters if p.name in values}
        if self.check:
            self.check(checked)
        return checked


class Hint:
    """A condition, ready for a model.

    Attributes:
        map: (H, W, 3), uint8 (inpainting: 4 channels): the detector's map at the size of the result.
        picture: (H, W, 3), uint8: the picture that the hint belongs to, at this size.
    """

    def __init__(self, info: AnnotatorInfo, map: np.ndarray, picture: np.ndarray) -> None:
        self.info, self.map, self.picture = info, map, picture

    @cached_property
    def hint(self) -> np.ndarray:
        """(H, W, 3), float32, 0..1 (and -1 in the hole of an inpainting hint): what the ControlNet takes."""
        return self.info.to_hint(self.map)

    @cached_property
    def shown(self) -> np.ndarray:
        """(H, W, 3), uint8: what people are shown."""
        return self.info.to_shown(self.map)

    @cached_property
    def source(self) -> np.ndarray:
        """The hint as an image file of a training set holds it: (H, W, 3), uint8, `hint` times 255; ValueError if it has a hole."""
        parts = []
        for top in range(0, len(self.map), ROWS):
            hint = self.info.to_hint(self.map[top : top + ROWS])
            if hint.min() < 0:
                raise ValueError(
                    "the hole of the hint is -1, which no picture file can hold; keep its map, which is RGBA"
                )
            parts.append(np.rint(hint * 255.0).astype(np.uint8))
        return np.concatenate(parts)

    def __repr__(self) -> str:
        return f"Hint({self.info.name} {self.info.version}, {self.map.shape[0]}x{self.map.shape[1]})"


class Request(NamedTuple):
    """What a detector is to be called with: what it sees, the picture at the size of the result, and all arguments."""

    view: np.ndarray
    picture: np.ndarray
    parameters: dict[str, Any]


class Annotator:
    """A loaded condition: what is known about it, its detector, and the way from a picture to a hint."""

    def __init__(self, info: AnnotatorInfo, detector: Detector) -> None:
        self.info, self.detector = info, detector

    def __call__(self, image: Picture, **parameters: object) -> np.ndarray:
        """The detector's uint8 map of a picture, at the size of the picture, as the detector gives it."""
        result = self.detector.detect(as_array(image), **self.info.check_parameters(parameters))
        return result if self.info.output is None else result[self.info.output]

    def make_hint(self, image: Picture, resolution: int | None = 512, detect_resolution: int | None = None,
                  picture: Picture | None = None, mask: Picture | None = None, **parameters: object) -> Hint:  # fmt: skip
        """A picture's condition, with the same steps as in the reference's apps.

        Args:
            image: an array (H, W), (H, W, 3) or RGBA, uint8; a PIL picture; or a path.
            resolution: shorter side of the result (see `annotator.util.resize_image`); None keeps the size of `image`.
            detect_resolution: shorter side of what the detector sees, where it has a size of its own.
            picture: `image` at the size of the result, where the caller has resized it; then `resolution` has no say.
            mask: for inpainting, white where to paint, of any size.
            parameters: the detector's, see `info.parameters`.

        Raises:
            ValueError: for what is no picture, and parameters out of range.
        """
        request = self.request(image, resolution, detect_resolution, picture, mask, **parameters)
        return self.finish(request, self.detector.detect(request.view, **request.parameters))

    def request(self, image: Picture, resolution: int | None = 512, detect_resolution: int | None = None,
                picture: Picture | None = None, mask: Picture | None = None, **parameters: object) -> Request:  # fmt: skip
        """The first half of `make_hint`, until the detector is called."""
        info, given = self.info, as_array(image)
        if detect_resolution is None:
            detect_resolution = info.detect_resolution
        elif info.works_at != "detect":
            raise ValueError(f"{info.name} {info.version} works on the picture itself and takes no detect_resolution")
        if mask is not None:
            if info.takes is not picture_with_hole:
                raise ValueError(f"{info.name} takes no mask")
            given = cut_hole(given, as_array(mask))
        given = info.takes(given)
        if picture is not None:
            final = info.takes(as_array(picture))
        else:
            final = given if resolution is None else resize_image(given, resolution)
        checked = info.check_parameters(parameters)
        if "h" in info.detector_class.arguments():  # it makes its result at any size
            checked |= {"h": final.shape[0], "w": final.shape[1]}
        if detect_resolution is not None:
            return Request(resize_image(given, detect_resolution), final, checked)
        return Request(final if info.works_at == "image" else given, final, checked)

    def finish(self, request: Request, found: Any) -> Hint:
        """The second half of `make_hint`, from what the detector has found."""
        map, size = found if self.info.output is None else found[self.info.output], request.picture.shape[:2]
        if map.shape[:2] != size:
            map = resize(map, size, self.info.interpolation)
        return Hint(self.info, self.info.finish(map), request.picture[:, :, :3])


def both_versions(info: AnnotatorInfo, **older: Any) -> list[AnnotatorInfo]:
    """A condition's records in 1.0, where `older` is different, and in 1.1."""
    return [replace(info, version="1.0", **older), info]


NEAREST = cv2.INTER_NEAREST
HED = AnnotatorInfo("hed", "soft edges (HED)", "annotator.hed.HEDdetector", "ControlNetHED.pth")
OLD_OR_NEW = "ControlNetHED.pth or network-bsds500.pth"
PIDINET = AnnotatorInfo("pidinet", "soft edges (PiDiNet)", "annotator.pidinet.PidiNetDetector", "table5_pidinet.pth")
MIDAS = AnnotatorInfo("depth", "depth (MiDaS)", "annotator.midas.MidasDetector", "dpt_hybrid-midas-501f0c75.pt",
                      only=(), detect_resolution=384)  # fmt: skip

# Each record: name, title, class, weights, and what is not the usual. Detectors that ControlNet did not have follow 1.1.
CONDITIONS = [
    *both_versions(AnnotatorInfo("canny", "Canny edges", "annotator.canny.CannyDetector", check=check_thresholds),
                   works_at="image", to_shown=invert),
    *both_versions(AnnotatorInfo("mlsd", "straight lines (M-LSD)", "annotator.mlsd.MLSDdetector", "mlsd_large_512_fp32.pth"),
                   interpolation=NEAREST, to_shown=thicken_and_invert),
    *both_versions(HED, weights=OLD_OR_NEW, only=()),
    *both_versions(AnnotatorInfo("scribble", "a user's scribble, dark on light", "annotator.scribble.ScribbleDetector",
                                 works_at="image"), to_shown=invert),
    *both_versions(AnnotatorInfo("scribble_interactive", "a drawn mask, light on dark", "annotator.scribble.InteractiveScribbleDetector",
                                 works_at="image", takes=without_alpha), to_shown=invert),
    *both_versions(replace(HED, name="fake_scribble", title="scribble made from HED edges", only=(), finish=fake_scribble),
                   weights=OLD_OR_NEW, to_shown=invert),
    replace(PIDINET, name="fake_scribble_pidinet", title="scribble made from PiDiNet edges", only=(), finish=fake_scribble),
    *both_versions(AnnotatorInfo("openpose", "human pose (OpenPose)", "annotator.openpose.OpenposeDetector",
                                 "body_pose_model.pth, hand_pose_model.pth, 1.1: facenet.pth", only=("hand_and_face",)),
                   only=("hand",), interpolation=NEAREST, output=0),
    *both_versions(AnnotatorInfo("seg", "semantic segmentation (UniFormer)", "annotator.uniformer.UniformerDetector",
                                 "upernet_global_small.pth"), interpolation=NEAREST),
    *both_versions(MIDAS, output=0),
    replace(MIDAS, name="normal", version="1.0", title="normals from depth (MiDaS)", only=None, defaults_here={"bg_th": 0.4},
            output=1, to_hint=scale_reversed),
    AnnotatorInfo("normalbae", "normals (NormalBae)", "annotator.normalbae.NormalBaeDetector", "scannet.pt"),
    AnnotatorInfo("lineart", "line art", "annotator.lineart.LineartDetector", "sk_model.pth, coarse: sk_model2.pth",
                  to_hint=scale_inverted),
    AnnotatorInfo("lineart_anime", "anime line art", "annotator.lineart_anime.LineartAnimeDetector", "netG.pth", to_hint=scale_inverted),
    PIDINET,
    AnnotatorInfo("shuffle", "shuffled content", "annotator.shuffle.ContentShuffleDetector", works_at="input"),
    AnnotatorInfo("tile", "the picture itself, resized linearly", "annotator.pixels.TileDetector", works_at="input"),
    AnnotatorInfo("ip2p", "the picture itself, for instructions", "annotator.pixels.TileDetector", works_at="image"),
    AnnotatorInfo("inpaint", "the picture with a hole", "annotator.inpaint.InpaintDetector", works_at="image", takes=picture_with_hole,
                  finish=check_image, to_hint=scale_with_hole, to_shown=show_hole),
    # Conditions that neither version of ControlNet came with.
    AnnotatorInfo("depth_anything", "depth (Depth Anything V2 or another)", "annotator.depth_anything.DepthAnythingDetector",
                  "depth-anything/Depth-Anything-V2-Small-hf"),
    AnnotatorInfo("depth_zoe", "depth (ZoeDepth)", "annotator.zoe.ZoeDetector", "ZoeD_M12_N.pt or Intel/zoedepth-nyu",
                  detect_resolution=384),
    AnnotatorInfo("normal_from_depth", "normals from depth (Depth Anything)", "annotator.depth_anything.DepthNormalDetector",
                  "depth-anything/Depth-Anything-V2-Small-hf"),
    AnnotatorInfo("oneformer_ade20k", "classes of ADE20K (OneFormer)", "annotator.oneformer.OneformerADE20kDetector",
                  "shi-labs/oneformer_ade20k_swin_large", only=()),
    AnnotatorInfo("oneformer_coco", "classes of COCO (OneFormer)", "annotator.oneformer.OneformerCOCODetector",
                  "shi-labs/oneformer_coco_swin_large", only=()),
    AnnotatorInfo("segmentation", "classes, objects (OneFormer, others)", "annotator.segmentation.SegmentationDetector",
                  "shi-labs/oneformer_coco_swin_large", interpolation=NEAREST),
    AnnotatorInfo("segment_anything", "masks (Segment Anything)", "annotator.sam.SamDetector", "facebook/sam-vit-base",
                  interpolation=NEAREST),
    AnnotatorInfo("dwpose", "human pose (DWPose)", "annotator.dwpose.DWposeDetector", "yolox_l.onnx, dw-ll_ucoco_384.onnx"),
    AnnotatorInfo("mediapipe_face", "faces (MediaPipe)", "annotator.mediapipe_face.MediapipeFaceDetector", "face_landmarker.task"),
    AnnotatorInfo("teed", "soft edges (TEED)", "annotator.teed.TEEDdetector", "5_model.pth"),
    AnnotatorInfo("invert", "light for dark", "annotator.pixels.InvertDetector", works_at="image"),
    AnnotatorInfo("threshold", "black and white", "annotator.pixels.ThresholdDetector", works_at="image"),
    AnnotatorInfo("blur", "the picture out of focus", "annotator.pixels.BlurDetector", works_at="image"),
    AnnotatorInfo("grey", "the picture without colours", "annotator.pixels.GreyDetector", works_at="image"),
    AnnotatorInfo("colour", "a coarse grid of colours", "annotator.pixels.ColourDetector", works_at="image"),
    AnnotatorInfo("tile_gaussian", "the picture without fine detail", "annotator.pixels.GaussianTileDetector", works_at="image"),
]  # fmt: skip
REGISTRY = {(info.name, info.version): info for info in CONDITIONS}


def list_annotators(version: str | None = None) -> list[str]:
    """Names of all conditions, or of those that a version of ControlNet has, in alphabetical order."""
    if version is not None:
        check_version(version)
    return sorted({name for name, known in REGISTRY if version in (None, known)})


def describe(name: str, version: str | None = None) -> AnnotatorInfo:
    """Facts about a condition, in the version that `use_version` chose (1.0 if none) where it has that, else in the other.

    Raises:
        ValueError: if there is no such condition, with those there are.
    """
    known = [candidate for candidate in VERSIONS if (name, candidate) in REGISTRY]
    if not known:
        raise ValueError(f"no annotator {name!r}; there are: {', '.join(list_annotators())}")
    wanted = check_version(version)
    if version is not None and wanted not in known:
        raise ValueError(f"{name} exists in version {' and '.join(known)}, not in {version!r}")
    return REGISTRY[name, wanted if wanted in known else known[0]]


def load(
    name: str, device: Any = None, weights: str | os.PathLike | None = None, version: str | None = None
) -> Annotator:
    """The condition `name` (see `list_annotators`), its detector imported and its weights loaded.

    Args:
        device: where to compute; the best one of this machine if not given.
        weights: a weight file or a folder; see `annotator.weights.find_weights`.
        version: "1.0" or "1.1"; see `describe`.

    Raises:
        ValueError: if there is no such condition.
        annotator.weights.WeightsError: if its weights cannot be found or read.
    """
    info = describe(name, version)
    return Annotator(info, info.detector_class(device=device, weights=weights, version=info.version))
