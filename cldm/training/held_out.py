"""The held-out pairs of a run: sampled before, while and after it trains, scored, and shown in one picture."""

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from cldm.cldm import ControlLDM
from cldm.data.pairs import Pair
from cldm.evaluation import Fidelity, Sampling, Score, drawn_score, generate, save_comparison
from cldm.pictures import as_rgb
from cldm.training.cache import encoders
from cldm.training.data import HELD_OUT, TrainingData, pictures_of
from cldm.training.gain import ControlGain
from cldm.training.instrument import Instrument
from cldm.training.pictures import HeldOutPictures
from cldm.training.precision import forward_context
from ldm.util import ConfigError

logger = logging.getLogger(__name__)

SHOWN = 8  # columns of a comparison


@dataclass
class HeldOut:
    """Pairs to look at, and how.

    Args:
        data: the run's pairs.
        sampling: how pictures are made of the hints.
        precision: of the training, as Lightning names it.
        weights: the file that the model was filled from; from it come its encoders where training has freed them.
        condition: what the hints are, so that its detector can score pictures; "" for circles to fill and scenes, which are
            recognised, or for no score.

    Raises:
        ConfigError: there is no score for the condition, or its detector cannot be had here, such as without its weights.
    """

    data: TrainingData
    sampling: Sampling
    precision: str
    weights: Path
    condition: str = ""

    def __post_init__(self) -> None:
        shown = self.data.shown()
        # What was drawn is scored all: of a few the score is chance. Pictures of other kinds cost more to make.
        pairs = [p for p in getattr(shown, "pairs", []) if isinstance(p, Pair)][:HELD_OUT]
        self._drawn = drawn_score(pairs) if pairs and not self.condition else None
        self.hints, self.targets, self.prompts = pictures_of(shown, len(pairs) if self._drawn else SHOWN)
        self.score_of(0, torch.device("cpu"))  # what it lacks is found now, and not after the training

    def told(self) -> str:
        """A text that differs where pictures of the hints cannot be compared: of other pairs, or made in another way."""
        digest = hashlib.sha256(json.dumps([self.hints.shape, self.prompts]).encode())
        digest.update(self.hints.tobytes())
        digest.update(self.targets.tobytes())
        return f"{digest.hexdigest()} steps {self.sampling.steps} guidance_scale {self.sampling.guidance_scale}"

    def score_of(self, count: int, device: torch.device) -> Score | None:
        """Scores pictures of the first `count` hints."""
        if self._drawn:
            return self._drawn
        if self.condition:
            try:
                return Fidelity(self.condition, as_rgb(self.hints[:count]), self.targets[:count], device=device)
            except (ValueError, ImportError) as error:  # weights or a package that is missing: the user's to mend
                raise ConfigError(f"condition={self.condition}: {error}") from error
        return None

    def sample(self, model: ControlLDM, when: str) -> tuple[np.ndarray, dict[str, float]]:
        """Pictures of all hints, uint8 (N, H, W, 3), and their scores, which are logged with the words `when`."""
        modes = [(module, module.training) for module in model.modules()]
        try:
            model.eval()
            with torch.no_grad(), forward_context(self.precision, model.device), encoders(model, self.weights):
                pictures = generate(model, self.hints, self.prompts, self.sampling)
        finally:
            for module, training in modes:
                module.training = training
        score = self.score_of(len(self.hints), model.device)
        scores = score(pictures) if score else {}
        if scores:
            logger.info("%s: %s", when, describe(scores, len(pictures)))
        return pictures, scores

    def instruments(self, folder: Path, every: int, count: int, device: torch.device) -> list[Instrument]:
        """What looks at these pairs while training: the control gain, and pictures of the first `count` hints."""
        gain = ControlGain(self.data.batch(SHOWN))
        count = min(count, len(self.hints))
        if not count:
            return [gain]
        pictures = HeldOutPictures(
            self.hints[:count],
            self.targets[:count],
            self.prompts[:count],
            every,
            self.sampling,
            self.score_of(count, device),
            folder / "pictures",
            encoders=partial(encoders, weights=self.weights),
        )
        return [gain, pictures]

    def save(self, path: Path, versions: Sequence[np.ndarray]) -> None:
        """A picture with a column for each of the first hints: prompt, hint, target, and what each version made of it."""
        save_comparison(
            path, self.hints[:SHOWN], self.targets[:SHOWN], self.prompts[:SHOWN], [v[:SHOWN] for v in versions]
        )


def describe(scores: dict[str, float], count: int) -> str:
    """Scores in words, for the console."""
    for drawn, which in (("fill", "both"), ("scenes", "all")):
        if f"{drawn}/iou" in scores:
            iou, colours = scores[f"{drawn}/iou"], scores[f"{drawn}/colours"]
            return f"mean IoU {iou:.3f}, {which} colours right in {colours:.0%} of {count} pictures"
    return ", ".join(f"{name} {value:.3f}" for name, value in scores.items()) + f" of {count} pictures"
