"""The pairs of a run: those that it trains on, in the order of its steps, and those that are held out to look at."""

import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
from torch.utils.data import DataLoader, Dataset, default_collate

from cldm.data.checking import ReplaceBroken, Selected, checked, name_of
from cldm.data.pairs import DataError, Items, SizedItems
from cldm.data.shards import ShardStream, decode, read_samples
from cldm.files import locked, write_whole
from cldm.training.batches import RunBatches
from cldm.training.engine import make_loader
from ldm.util import ConfigError

logger = logging.getLogger(__name__)

HELD_OUT = 64  # by default, and at most a tenth


class Named(Dataset):
    """A data set whose items say under `name` what messages call them."""

    def __init__(self, dataset: Items) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.dataset[index], "name": name_of(self.dataset, index)}


class FirstSamples(Dataset):
    """The first samples of shards that can be used."""

    def __init__(self, shards: Sequence[str], count: int = HELD_OUT) -> None:
        self.items: list[dict[str, Any]] = []
        for sample in read_samples(shards):
            try:
                self.items.append(decode(sample))
            except DataError:
                continue
            if len(self.items) == count:
                break
        if not self.items:
            raise DataError(f"there is no usable sample in {', '.join(shards[:3])}")

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.items[index]

    def sizes(self) -> list[tuple[int, int]]:
        return [(len(item["jpg"]), len(item["jpg"][0])) for item in self.items]


@dataclass
class TrainingData:
    """Pairs by index: the first ones are trained on, the last ones held out.

    Attributes:
        pairs: all that can be used.
        held_out: how many are held out.
        shards: trained on instead, as a stream; `pairs` are then their first ones, to look at.
    """

    pairs: SizedItems
    held_out: int
    shards: Sequence[str] = ()

    @classmethod
    def from_shards(cls, shards: Sequence[str]) -> "TrainingData":
        """Data that are streamed from WebDataset shards; none are held out."""
        return cls(FirstSamples(shards), 0, tuple(shards))

    @property
    def trained(self) -> int:
        """Number of pairs that are trained on."""
        return len(self.pairs) - self.held_out

    def shown(self) -> Selected:
        """The pairs to look at: those held out that have the size of the first of them or, with none held out, trained ones."""
        first = self.trained if self.held_out else 0
        sizes = self.pairs.sizes()
        return Selected(self.pairs, [i for i in range(first, len(sizes)) if sizes[i] == sizes[first]])

    def loader(
        self, trainer: pl.Trainer, batch_size: int, start: int, total: int, seed: int, workers: int
    ) -> DataLoader:
        """The run's micro-batches `start` to `total`, for this process."""
        pin_memory = trainer.strategy.root_device.type == "cuda"
        if self.shards:
            stream = ShardStream(self.shards, batch_size, seed, trainer.global_rank, trainer.world_size, start)
            return make_loader(stream, None, workers, pin_memory)
        sizes = self.pairs.sizes()[: self.trained]
        batches = RunBatches(sizes, batch_size, total, seed, trainer.global_rank, trainer.world_size, start)
        data = ReplaceBroken(Selected(self.pairs, range(self.trained)), sizes)
        return make_loader(Named(data), batches, workers, pin_memory)

    def batch(self, count: int) -> dict[str, Any]:
        """The first few of the pairs to look at, as a batch."""
        shown = self.shown()
        return default_collate([shown[i] for i in range(min(count, len(shown)))])


def hold_out(count: int, wanted: int | None) -> int:
    """How many of `count` pairs are held out: as many as wanted; by default 64, and at most a tenth of a small set.

    Raises:
        ConfigError: none would be left to train on.
    """
    if wanted is None:
        return min(HELD_OUT, count // 10)
    if wanted >= count:
        raise ConfigError(
            f"held_out={wanted} leaves none of the {count} pairs to train on; leave held_out away, or set it lower"
        )
    return wanted


def check_once(
    dataset: SizedItems, broken: str, note: Path, held_out: int | None = None, begun: bool = False
) -> SizedItems:
    """The data set without what is broken; what was found is noted, so that a run that goes on need not look at all again.

    Args:
        broken: "stop" at broken pairs, or "leave_out".
        note: the file to note it in. Of several processes one looks, while the others wait.
        held_out: how many pairs are to be held out; see `hold_out`.
        begun: the run has trained on what was noted: warn if these are other pairs.

    Raises:
        DataError: pairs are broken, and `broken` is "stop".
    """
    names = [os.path.normpath(name_of(dataset, i)) for i in range(len(dataset))]
    with locked(note):
        before, left_out = _noted(note)
        # Names are those of pairs with a caption; one without is a problem at each start, unless it may be left out.
        all_captioned = broken == "leave_out" or not getattr(dataset, "complaints", ())
        if before == names and all_captioned:
            known = _without(dataset, set(left_out)) if left_out else dataset
            if _is_sound(known, held_out):
                return known
        elif before is not None and begun:
            logger.warning(
                "the pairs are not those that this run has trained on until now (%s); which are held out may have changed",
                _difference(before, names),
            )
        usable = checked(dataset, broken)
        kept = set(range(len(dataset)))
        if usable is not dataset and isinstance(usable, Selected):
            kept = set(usable.indices)
        left_out = [i for i in range(len(dataset)) if i not in kept]
        write_whole(note, json.dumps({"names": names, "left_out": left_out}).encode())
        return usable


def note_shards(shards: Sequence[str], note: Path, begun: bool) -> None:
    """Note the names of a run's shards; warn if a run that has begun had others, since their order decides what a step reads."""
    names = [os.path.normpath(shard) for shard in shards]
    with locked(note):
        before, _ = _noted(note)
        if before == names:
            return
        if before is not None and begun:
            logger.warning(
                "the shards are not those that this run has trained on until now (%s); it goes on in another order, in which "
                "some samples may come again and others later",
                _difference(before, names),
            )
        write_whole(note, json.dumps({"names": names, "left_out": []}).encode())


def _difference(before: Sequence[str], names: Sequence[str]) -> str:
    added, removed = len(set(names) - set(before)), len(set(before) - set(names))
    return f"{added} added, {removed} removed" if added or removed else "in another order"


def _noted(note: Path) -> tuple[list[str] | None, list[int]]:
    """Names of the pairs when they were checked, and which were left out; (None, []) if that is not noted."""
    try:
        known = json.loads(note.read_text(encoding="utf-8"))
        return list(map(os.path.normpath, known["names"])), list(known["left_out"])
    except (OSError, ValueError, KeyError, TypeError):
        return None, []


def _is_sound(dataset: SizedItems, held_out: int | None) -> bool:
    """Whether pairs that were sound once still seem so: all by their headers, those to look at by all of their pictures.

    What else has broken is replaced while training.
    """
    try:
        shown = TrainingData(dataset, hold_out(len(dataset), held_out)).shown()
        for index in range(min(len(shown), HELD_OUT)):
            shown[index]
    except (DataError, OSError):
        return False
    return True


def _without(dataset: Items, left_out: set[int]) -> Selected:
    return Selected(dataset, [i for i in range(len(dataset)) if i not in left_out])


def pictures_of(dataset: Items, count: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Hints and targets of the first few pairs as uint8 (N, H, W, 3), and their prompts."""
    items: list[Mapping[str, Any]] = [dataset[i] for i in range(min(count, len(dataset)))]
    hints = np.stack([np.rint(np.asarray(item["hint"]) * 255).astype(np.uint8) for item in items])
    targets = np.stack([np.rint(np.asarray(item["jpg"]) * 127.5 + 127.5).astype(np.uint8) for item in items])
    return hints, targets, [item["txt"] for item in items]
