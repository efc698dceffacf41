"""Is this data what training needs? Data sets as a whole before the first step, single samples during the run, and batches.

problems = check_dataset(dataset)              # every item, in parallel
dataset = checked(dataset, "leave_out")        # the same, and do without what is broken
dataset = ReplaceBroken(dataset)               # what breaks later is replaced, and counted
"""

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from cldm.data.folders import unfinished
from cldm.data.pairs import AnyItems, DataError, Items
from ldm.modules.encoders.tokenizer import MAX_CHARACTERS

logger = logging.getLogger(__name__)

ON_BROKEN = ("stop", "leave_out")
_SHOWN = 5  # problems that a message names
_IN_A_ROW = 20  # broken items after which it is no longer a matter of single files
# Pictures are about in [-1, 1]; a value beyond this was counted from 0 to 255.
_LARGEST = 2.0


@dataclass(frozen=True)
class Problem:
    """What is wrong with an item; index -1 concerns the data set as a whole."""

    index: int
    name: str
    message: str

    def __str__(self) -> str:
        return self.message if self.name in self.message else f"{self.name}: {self.message}"


def check_dataset(dataset: Items, workers: int | None = None, progress: bool = True) -> list[Problem]:
    """Load every item and look at it; returns what is wrong, by index.

    Args:
        dataset: items `{"jpg", "txt", "hint"}` by index, e.g. a PairDataset.
        workers: threads; as many as there are processors, by default.
        progress: show a progress bar.
    """
    problems = [Problem(-1, "", complaint) for complaint in getattr(dataset, "complaints", ())]
    root = getattr(dataset, "root", None)
    if root is not None and (text := unfinished(Path(root), len(dataset))):
        problems.append(Problem(-1, "", text))

    def check(index: int) -> Problem | None:
        try:
            check_item(dataset[index])
        except (DataError, OSError) as error:
            return Problem(index, name_of(dataset, index), " ".join(str(error).split()))
        return None

    # Threads: decoding runs outside Python's lock. In portions, so that an interruption does not wait for all of them.
    portion = 256
    with (
        tqdm(total=len(dataset), desc="checking data", unit="pair", disable=None if progress else True) as bar,
        ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool,
    ):
        for start in range(0, len(dataset), portion):
            for found in pool.map(check, range(start, min(start + portion, len(dataset)))):
                bar.update()
                if found is not None:
                    problems.append(found)
    return problems


def checked(
    dataset: AnyItems, broken: str = "stop", workers: int | None = None, progress: bool = True
) -> "AnyItems | Selected":
    """The data set, if nothing is wrong with it, or what is left of it.

    Args:
        broken: what to do about problems: `stop` raises an error that names them, `leave_out` does without.
        workers, progress: see `check_dataset`.

    Raises:
        DataError: something is wrong (`stop`), or with everything (`leave_out`).
    """
    if broken not in ON_BROKEN:
        raise DataError(f"broken must be one of {', '.join(ON_BROKEN)}, found {broken!r}")
    problems = check_dataset(dataset, workers, progress)
    if not problems:
        return dataset
    if broken == "stop":
        raise DataError(f"{abbreviate(problems)}. Mend this, or do without with broken=leave_out")
    logger.warning("Left out: %s", abbreviate(problems))
    left_out = {problem.index for problem in problems}
    kept = [index for index in range(len(dataset)) if index not in left_out]
    if not kept:
        raise DataError(f"nothing is left of the data set: {abbreviate(problems)}")
    return dataset if len(kept) == len(dataset) else Selected(dataset, kept)


def abbreviate(problems: Sequence[Problem]) -> str:
    """The first few in one line, and how many more there are."""
    more = f"; and {len(problems) - _SHOWN:,} more" if len(problems) > _SHOWN else ""
    return "; ".join(str(problem) for problem in problems[:_SHOWN]) + more


class Selected(Dataset):
    """Some items of a data set by their indices, with all that it tells of them (`name`, `sizes`, `prompts`, `fingerprint`)."""

    def __init__(self, dataset: Items, indices: Iterable[int]) -> None:
        self.dataset: Any = dataset  # it may tell more than Items must
        self.indices = list(indices)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.dataset[self.indices[index]]

    def hint_item(self, index: int) -> dict[str, Any]:
        return hint_item_of(self.dataset, self.indices[index])

    def fingerprint(self, index: int) -> str | None:
        told = getattr(self.dataset, "fingerprint", None)
        return told(self.indices[index]) if told is not None else None

    def name(self, index: int) -> str:
        return name_of(self.dataset, self.indices[index])

    def sizes(self) -> list[tuple[int, int]]:
        whole = getattr(self.dataset, "sizes_of", None)
        if whole is not None:  # headers of the selected files alone: others may be broken
            return whole(self.indices)
        sizes = self.dataset.sizes()
        return [sizes[i] for i in self.indices]

    def sizes_of(self, indices: Iterable[int]) -> list[tuple[int, int]]:
        return Selected(self.dataset, [self.indices[i] for i in indices]).sizes()

    def prompts(self) -> list[str]:
        prompts = self.dataset.prompts()
        return [prompts[i] for i in self.indices]

    @property
    def pairs(self) -> list[Any]:
        return [self.dataset.pairs[i] for i in self.indices]


class ReplaceBroken(Dataset):
    """A data set in which an item that cannot be read is replaced by the next one of its size that can.

    Which one that is depends on nothing but what is broken. A warning names each broken item once.

    Args:
        dataset: the one behind; what else it tells (`name`, `sizes`, ...) is told here too.
        sizes: (height, width) by index, if they differ; an item is replaced only by one of its size.
    """

    def __init__(self, dataset: Items, sizes: Sequence[tuple[int, int]] | None = None) -> None:
        self.dataset = dataset
        self._sizes = None if sizes is None or len(set(sizes)) <= 1 else list(sizes)
        # In memory that processes of a DataLoader share.
        self._times = torch.zeros(len(dataset), dtype=torch.int32).share_memory_()

    @property
    def replaced(self) -> int:
        """How many times an item was replaced, in all processes that load data."""
        return int(self._times.sum())

    def broken(self) -> list[str]:
        """Names of the items that were replaced."""
        return [name_of(self.dataset, i) for i in self._times.nonzero().flatten().tolist()]

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            return self.dataset[index]
        except (DataError, OSError) as error:
            first = error
        if not self._times[index]:
            logger.warning("%s cannot be used and is replaced: %s", name_of(self.dataset, index), first)
        self._times[index] += 1
        count = len(self.dataset)
        others = ((index + step) % count for step in range(1, count))
        if self._sizes is not None:
            others = (other for other in others if self._sizes[other] == self._sizes[index])
        for other, _ in zip(others, range(_IN_A_ROW), strict=False):
            try:
                return self.dataset[other]
            except (DataError, OSError):
                continue
        raise DataError(
            f"{name_of(self.dataset, index)} and the next {_IN_A_ROW} items cannot be used: {first}"
        ) from first

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "dataset":
            raise AttributeError(name)
        return getattr(self.dataset, name)


def name_of(dataset: Items, index: int) -> str:
    """What messages call an item."""
    named = getattr(dataset, "name", None)
    return named(index) if named is not None else f"item {index}"


def hint_item_of(dataset: Items, index: int) -> dict[str, Any]:
    """An item without its target, which is not read if the data set knows how."""
    short = getattr(dataset, "hint_item", None)
    if short is not None:
        return short(index)
    item = dict(dataset[index])
    del item["jpg"]
    return item


# -- single items and batches ------------------------------------------------------------------------------------


def check_item(item: Any) -> None:
    """See that an item is `{"jpg": (H, W, 3) in [-1, 1], "txt": str, "hint": (H, W, C) in [0, 1]}`, sides multiples of 64.

    Raises:
        DataError: it is not; the message says how to change it.
    """
    if not isinstance(item, Mapping):
        raise DataError(f"an item must be a dict with jpg, txt and hint, found {type(item).__name__}")
    for key in ("jpg", "txt", "hint"):
        if key not in item:
            raise DataError(f"an item needs {key!r}; it has {', '.join(map(repr, item))}")
    if not isinstance(item["txt"], str):
        raise DataError(f"the prompt under 'txt' must be a text, found {type(item['txt']).__name__}")
    if len(item["txt"]) > MAX_CHARACTERS:
        raise DataError(f"the prompt has {len(item['txt']):,} characters; at most {MAX_CHARACTERS:,} are read")
    pictures = {key: torch.as_tensor(item[key]) for key in ("jpg", "hint")}
    for key, picture in pictures.items():
        if picture.dim() != 3:
            raise DataError(f"{key!r} must have the shape (H, W, C), found {tuple(picture.shape)}")
        _check_pictures(key, picture, values=True, axes=3)
    sizes = {key: tuple(picture.shape[:2]) for key, picture in pictures.items()}
    if sizes["jpg"] != sizes["hint"]:
        raise DataError(f"target and hint must have equal sizes, found {sizes['jpg']} and {sizes['hint']}")
    if any(side % 64 or not side for side in sizes["jpg"]):
        raise DataError(f"height and width must be multiples of 64, found {sizes['jpg'][0]} and {sizes['jpg'][1]}")


def check_batch(
    batch: Mapping[str, Any], first_stage_key: str = "jpg", control_key: str = "hint", values: bool | None = None
) -> None:
    """Find pictures of another type, range or layout than training needs, which would else train in silence or fail deep inside.

    Args:
        batch: targets (B, H, W, C) in [-1, 1] and hints (B, H, W, C) in [0, 1], float; entries that it lacks are not looked at.
        first_stage_key, control_key: their names in the batch.
        values: look at the range of values too; by default only where pictures are on the CPU, where it costs nothing to wait for.

    Raises:
        DataError: names the entry, what it holds and what to change.
    """
    for key in (first_stage_key, control_key):
        pictures = batch.get(key)
        if not isinstance(pictures, Tensor):
            continue
        if pictures.dim() not in (3, 4):
            raise DataError(
                f"{key!r} must have the shape (B, H, W, C), or (B, H, W) if grey, found {tuple(pictures.shape)}"
            )
        look = pictures.device.type == "cpu" if values is None else values
        _check_pictures(key, pictures, look, "[-1, 1]" if key == first_stage_key else "[0, 1]")


def _check_pictures(key: str, pictures: Tensor, values: bool, interval: str | None = None, axes: int = 4) -> None:
    """Pictures (B, H, W, C), or one if `axes` is 3: their type, layout and, if asked for, values."""
    interval = interval or ("[-1, 1]" if key == "jpg" else "[0, 1]")
    recipe = "x / 127.5 - 1" if interval == "[-1, 1]" else "x / 255"
    if not pictures.is_floating_point():
        raise DataError(
            f"{key!r} holds {str(pictures.dtype).removeprefix('torch.')} where float32 in {interval} is needed: convert with {recipe}"
        )
    if pictures.dim() == axes and pictures.shape[-3] <= 4 < pictures.shape[-1]:
        raise DataError(f"{key!r} has its channels first, {tuple(pictures.shape)}; put them last, (H, W, C)")
    if not values or not pictures.numel() or getattr(pictures, "fake_mode", None) is not None:  # which has no values
        return
    low, high = (float(value) for value in torch.aminmax(pictures.detach()))
    if not (low > -float("inf") and high < float("inf")):  # also of NaN
        raise DataError(f"{key!r} holds values that are not finite")
    if max(-low, high) > _LARGEST:
        raise DataError(
            f"{key!r} holds values from {low:g} to {high:g} where {interval} is needed: convert with {recipe}"
        )
