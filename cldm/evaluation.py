"""How well pictures follow their hints: made for held-out hints and prompts, and compared with what was asked for.

For a condition of `annotator/`, its own detector is run on the generated picture, and what it finds is compared with the hint
("Canny F1", "depth RMSE", ...: as in ControlNet++, Li et al. 2024, section 4.1). Pairs that were drawn are compared with what was
drawn: circles to fill, and scenes of shapes. A score is a function of the pictures, so that training, scripts and notebooks share it.

Shapes: N pictures, H W pixels.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import cv2
import numpy as np
import torch
from tqdm import tqdm

from cldm.cldm import ControlLDM
from cldm.data.fill import FillSample
from cldm.data.pairs import Pair, read_rgb
from cldm.data.scenes import Scene, read_scenes
from cldm.data.score import fill_geometry, parse_prompt, score_fill, score_scenes
from cldm.pictures import grid, save_png, to_uint8
from cldm.pipeline import ControlPipeline
from ldm.util import ConfigError, log_txt_as_img

# Pictures uint8 (N, H, W, 3) -> scores by the names under which they are logged.
Score = Callable[[np.ndarray], dict[str, float]]


# -- making pictures ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sampling:
    """How pictures are made for a score; picture i starts from the same noise every time, however many are made at once.

    Attributes:
        steps: of DDIM.
        seed: of the first picture; the next has the next number.
        batch_size: pictures made at once.
    """

    steps: int = 20
    guidance_scale: float = 3.0
    seed: int = 0
    batch_size: int = 16


def generate(
    model: ControlLDM, hints: np.ndarray, prompts: Sequence[str], sampling: Sampling, progress: bool = False
) -> np.ndarray:
    """Pictures uint8 (N, H, W, 3) for hints uint8 (N, H, W, 3); leaves the global random state as it was."""
    pipeline = ControlPipeline(model, warn_untrained=False)  # before training there is nothing to follow yet
    pictures = []
    with tqdm(total=len(hints), desc="sampling", unit="picture", disable=None if progress else True) as bar:
        for start in range(0, len(hints), sampling.batch_size):
            numbers = range(start, min(start + sampling.batch_size, len(hints)))
            made = pipeline(
                hints[start : start + len(numbers)],
                list(prompts[start : start + len(numbers)]),
                steps=sampling.steps,
                guidance_scale=sampling.guidance_scale,
                seed=[sampling.seed + i for i in numbers],
                prompt_weights=False,  # prompts are data here: brackets in them mean nothing
            )
            pictures.append(made)
            bar.update(len(made))
    return np.concatenate(pictures)


# -- comparing maps ---------------------------------------------------------------------------------------
# Each takes what was found in the pictures and what was wanted, uint8 (N, H, W, 3), and gives one number for each picture.


def edge_f1(found: np.ndarray, wanted: np.ndarray, tolerance: int = 0) -> np.ndarray:
    """F1 of edge pixels (brighter than 127), (N,): 1 is perfect; two maps without edges count as equal.

    Args:
        tolerance: pixels by which an edge may be misplaced (in rows and columns) and still counts.
    """
    _check_alike(found, wanted)
    return np.array([_f1(_edges(f), _edges(w), tolerance) for f, w in zip(found, wanted, strict=True)])


def _edges(map: np.ndarray) -> np.ndarray:
    return map.max(axis=2) > 127


def _f1(found: np.ndarray, wanted: np.ndarray, tolerance: int) -> float:
    if not found.any() and not wanted.any():
        return 1.0
    right = (found & _grown(wanted, tolerance)).sum() / max(found.sum(), 1)  # precision
    recalled = (wanted & _grown(found, tolerance)).sum() / max(wanted.sum(), 1)
    return float(2 * right * recalled / max(right + recalled, 1e-12))


def _grown(mask: np.ndarray, radius: int) -> np.ndarray:
    kernel = np.ones((2 * radius + 1, 2 * radius + 1), np.uint8)
    return cv2.dilate(mask.astype(np.uint8), kernel).astype(bool)


def map_ssim(found: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Structural similarity of grey maps, (N,): 1 is perfect (Wang et al. 2004, Gaussian window of sigma 1.5)."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    _check_alike(found, wanted)
    found_grey, wanted_grey = (torch.from_numpy(maps.mean(axis=3))[:, None] for maps in (found, wanted))  # (N, 1, H, W)
    similarity = structural_similarity_index_measure(found_grey, wanted_grey, data_range=255.0, reduction="none")
    assert isinstance(similarity, torch.Tensor)  # it is a tuple where the whole map is asked for
    return similarity.numpy()


def map_rmse(found: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Root of the mean squared difference of maps in [0, 1], (N,): 0 is perfect."""
    _check_alike(found, wanted)
    difference = (found.astype(np.float64) - wanted) / 255.0
    return np.sqrt((difference**2).mean(axis=(1, 2, 3)))


def mean_iou(found: np.ndarray, wanted: np.ndarray) -> float:
    """Intersection over union of label colours: over all pictures together, averaged over the labels that were wanted.

    Raises:
        ValueError: more than 1000 colours, as in label maps that were stored as JPEG.
    """
    _check_alike(found, wanted)
    found, wanted = (maps.astype(np.int64) @ np.array([65536, 256, 1]) for maps in (found, wanted))  # (N, H, W)
    labels = np.unique(wanted)
    if len(labels) > 1000:
        raise ValueError(f"the label maps have {len(labels)} colours; they must be stored without loss, as PNG")
    overlaps = [
        ((found == label) & (wanted == label)).sum() / ((found == label) | (wanted == label)).sum() for label in labels
    ]
    return float(np.mean(overlaps))


def keypoint_distance(found: Sequence[np.ndarray], wanted: Sequence[np.ndarray]) -> float:
    """Mean distance of the joints of one picture's people from where they were wanted, as a share of the person's size: 0 is perfect.

    Each wanted person is compared with the found one that is nearest, each of which serves once. A joint that was not found,
    or lies further away than the person is large, counts as 1. NaN where nobody was wanted.

    Args:
        found, wanted: people, each (joints, 2) x and y in pixels, NaN for a joint that is not there.
    """
    wanted = [person for person in wanted if np.isfinite(person).all(axis=1).any()]
    if not wanted:
        return float("nan")
    distances = np.array([[_person_distance(f, w) for f in found] for w in wanted]).reshape(len(wanted), len(found))
    total = 0.0
    free_wanted, free_found = set(range(len(wanted))), set(range(len(found)))
    while free_wanted and free_found:
        w, f = min(((w, f) for w in free_wanted for f in free_found), key=lambda pair: distances[pair])
        total += distances[w, f]
        free_wanted.remove(w)
        free_found.remove(f)
    return (total + len(free_wanted)) / len(wanted)


def _person_distance(found: np.ndarray, wanted: np.ndarray) -> float:
    there = np.isfinite(wanted).all(axis=1)
    size = max(float(np.linalg.norm(np.ptp(wanted[there], axis=0))), 1.0)
    distances = np.linalg.norm(found[there] - wanted[there], axis=1) / size
    return float(np.nan_to_num(distances, nan=1.0).clip(max=1.0).mean())


def _check_alike(found: np.ndarray, wanted: np.ndarray) -> None:
    if found.shape != wanted.shape or found.ndim != 4 or found.dtype != np.uint8 or wanted.dtype != np.uint8:
        raise ValueError(
            f"expected two uint8 arrays (N, H, W, 3) of one shape, found {found.dtype} {found.shape} and {wanted.dtype} {wanted.shape}"
        )


# -- scores of conditions -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """How a condition's maps are compared.

    Attributes:
        name: of the score.
        compare: (found, wanted) -> one number for each picture, or one for all.
        best: its value for equal maps.
    """

    name: str
    compare: Callable[[np.ndarray, np.ndarray], np.ndarray | float]
    best: float


_F1, _SSIM = Comparison("f1", edge_f1, 1.0), Comparison("ssim", map_ssim, 1.0)
_RMSE, _MIOU = Comparison("rmse", map_rmse, 0.0), Comparison("miou", mean_iou, 1.0)
POSE_SCORE = "keypoint_distance"
COMPARISONS: Mapping[str, Comparison] = {
    "canny": _F1,
    "mlsd": _F1,
    "hed": _SSIM,
    "pidinet": _SSIM,
    "fake_scribble": _SSIM,
    "fake_scribble_pidinet": _SSIM,
    "lineart": _SSIM,
    "lineart_anime": _SSIM,
    "depth": _RMSE,
    "normal": _RMSE,
    "normalbae": _RMSE,
    "seg": _MIOU,
}
DETECTED = (*COMPARISONS, "openpose")


def check_condition(condition: str) -> None:
    """Raise ConfigError if there is no score for the condition."""
    if condition not in DETECTED:
        nearest = get_close_matches(condition, DETECTED, 1)
        meant = f"did you mean {nearest[0]}? There are" if nearest else "there are"
        raise ConfigError(f"there is no score for the condition {condition!r}; {meant}: {', '.join(DETECTED)}")


class Fidelity:
    """A score: a condition's detector is run on pictures, and what it finds is compared with the hints.

    Args:
        condition: one of `DETECTED`.
        hints: uint8 (N, H, W, 3), as the data folder holds them.
        targets: the pictures that the hints were made from, uint8 (N, H, W, 3); poses are looked for there too, as a drawn
            skeleton does not tell its joints.
        device: where the detector computes; the best one of this machine if not given.
        weights: the detector's file or folder, see `annotator.load`.
        version: of the condition, "1.0" or "1.1"; the first that has it if not given.
        parameters: the detector's, as they were when the hints were made.

    Raises:
        ConfigError: there is no score for the condition.
        ValueError: the detector's weights are missing (the message names the file), or parameters do not fit.
    """

    def __init__(
        self,
        condition: str,
        hints: np.ndarray,
        targets: np.ndarray | None = None,
        device: Any = None,
        weights: str | os.PathLike | None = None,
        version: str | None = None,
        **parameters: Any,
    ) -> None:
        from annotator import describe, load

        check_condition(condition)
        posed = targets if condition == "openpose" else ()  # what poses are looked for in
        if posed is None:
            raise ValueError("poses are compared with those in the target pictures, which are missing")
        if condition == "openpose":
            version = "1.1"  # which gives joints, too
        self.condition = condition
        self.hints = hints
        self.parameters = parameters
        describe(condition, version).check_parameters(parameters)
        self.annotator = load(condition, device=device, weights=weights, version=version)
        self.name = POSE_SCORE if condition == "openpose" else COMPARISONS[condition].name
        self._people = [self.people(picture) for picture in posed]

    def __call__(self, pictures: np.ndarray) -> dict[str, float]:
        """`fidelity/<condition>_<score>` of pictures uint8 (N, H, W, 3), one for each hint."""
        return {f"fidelity/{self.condition}_{self.name}": self.score(pictures)}

    def score(self, pictures: np.ndarray) -> float:
        """Mean over the pictures; of segmentation, over the labels."""
        if self.condition == "openpose":
            pairs = zip(pictures, self._people, strict=True)
            distances = np.array([keypoint_distance(self.people(picture), wanted) for picture, wanted in pairs])
            return float(np.nanmean(distances)) if np.isfinite(distances).any() else float("nan")
        return float(np.mean(COMPARISONS[self.condition].compare(self.found(pictures), self.hints)))

    def found(self, pictures: np.ndarray) -> np.ndarray:
        """What the detector finds, as a data folder would hold it, uint8 (N, H, W, 3)."""
        return np.stack(
            [self.annotator.make_hint(picture, resolution=None, **self.parameters).source for picture in pictures]
        )

    def people(self, picture: np.ndarray) -> list[np.ndarray]:
        """The people in a picture, each (18, 2) x and y in pixels, NaN for a joint that is not seen."""
        bodies = self.annotator.detector(picture, return_is_index=True)["bodies"]
        height, width = picture.shape[:2]
        places = np.array(bodies["candidate"], dtype=float).reshape(-1, 2) * (width, height)
        places = np.concatenate([places, [[np.nan, np.nan]]])  # what the index -1 means
        return [places[np.array(person[:18], dtype=int)] for person in bodies["subset"]]


# -- pairs that were drawn ------------------------------------------------------------------------------------------


def fill_samples(pairs: Sequence[Pair]) -> list[FillSample] | None:
    """What was drawn in pairs of a Fill set, from their files alone; None if any of them is not a Fill pair."""
    samples = []
    for pair in pairs:
        source, target = read_rgb(pair.source), read_rgb(pair.target)
        try:
            circle, ground = parse_prompt(pair.prompt)
            centre, radius = fill_geometry(source)
        except ValueError:
            return None
        samples.append(FillSample(source, target, pair.prompt, centre, radius, circle, ground))
    return samples


def fill_score(samples: Sequence[FillSample]) -> Score:
    """The score of circles to fill: `fill/iou`, and `fill/colours`, the share of pictures in which both colours are right."""

    def score(pictures: np.ndarray) -> dict[str, float]:
        found = score_fill(pictures, samples[: len(pictures)])
        return {"fill/iou": found.iou, "fill/colours": found.colours}

    return score


def scenes_score(scenes: Sequence[Scene]) -> Score:
    """The score of scenes: `scenes/iou`, and `scenes/colours`, the share of pictures in which all colours are right."""

    def score(pictures: np.ndarray) -> dict[str, float]:
        found = score_scenes(pictures, scenes[: len(pictures)])
        return {"scenes/iou": found.iou, "scenes/colours": found.colours}

    return score


def _fill_score_of(pairs: Sequence[Pair]) -> Score | None:
    samples = fill_samples(pairs)
    return fill_score(samples) if samples else None


def _scenes_score_of(pairs: Sequence[Pair]) -> Score | None:
    scenes = read_scenes([pair.target for pair in pairs])
    return scenes_score(scenes) if scenes else None


# The scores of pairs that `tutorial_dataset.py` has drawn; None for other pairs. Their files say what was drawn. Scenes come first, as a
# circle alone on a plain ground has the prompt of a circle to fill.
DRAWN: Mapping[str, Callable[[Sequence[Pair]], Score | None]] = {"scenes": _scenes_score_of, "fill": _fill_score_of}
CONDITIONS = (*DRAWN, *DETECTED)


def drawn_score(pairs: Sequence[Pair]) -> Score | None:
    """The score of pairs that were drawn, or of the first of them; None for other pairs."""
    return next((score for score_of in DRAWN.values() if (score := score_of(pairs))), None)


# -- pictures of a comparison -----------------------------------------------------------------------------------


def comparison(
    hints: np.ndarray, targets: np.ndarray, prompts: Sequence[str], versions: Sequence[np.ndarray], scale: int = 1
) -> np.ndarray:
    """One picture, a column a sample: prompt, hint, target, and what each version of the model made of it."""
    height, width = hints.shape[1:3]
    big = (width * scale, height * scale)
    captions = to_uint8(log_txt_as_img(big, prompts, size=max(height * scale // 9, 10)))

    def enlarged(pictures: np.ndarray) -> np.ndarray:
        return pictures.repeat(scale, axis=1).repeat(scale, axis=2)

    return grid([list(captions), *(list(enlarged(row)) for row in (hints, targets, *versions))])


def save_comparison(
    path: str | os.PathLike,
    hints: np.ndarray,
    targets: np.ndarray,
    prompts: Sequence[str],
    versions: Sequence[np.ndarray],
) -> None:
    """`comparison` as PNG, small pictures enlarged to about 128 pixels."""
    save_png(path, comparison(hints, targets, prompts, versions, scale=max(128 // hints.shape[1], 1)))
