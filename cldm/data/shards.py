"""WebDataset shards, streamed: tar files of samples `KEY.jpg` (target), `KEY.source.png` (hint) and `KEY.txt` (prompt).

Read through the library `webdataset` (the extra `shards`), so that shards may also lie behind URLs or commands, `pipe:...`.

What batch b holds depends on the shards, the seed, the batch size and the rank alone. To that end each worker process reads the
whole stream of its rank, and decodes every so-manieth batch of it: decoding is what takes time. To go on at batch b the stream is
read again without decoding, at the speed of the disk, from the beginning of the epoch in which batch b lies.
"""

import io
import itertools
import json
import logging
import random
import re
import tarfile
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, default_collate, get_worker_info
from tqdm import tqdm

from cldm.data.checking import Problem, check_item
from cldm.data.pairs import DataError, read_rgb, stored_size
from ldm.util import ConfigError

logger = logging.getLogger(__name__)

# Names within a sample. A picture's may have a suffix of its own format after it: `source.png`.
HINTS = ("source", "hint", "control", "conditioning")
TARGETS = ("target", "jpg", "jpeg", "png", "webp", "image")
TEXT_KEYS = ("prompt", "text", "caption")  # in `KEY.json`
SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")  # of a shard; `tarfile` reads them all
_META = r"__[^/]*__($|/)"  # files about an archive itself
_MAX_EMPTY_EPOCHS = 20  # in a row, in which one of several processes may get broken shards alone
_AHEAD = 50  # batches that are looked through for a replacement of a broken sample

Sample = dict[str, Any]
Size = tuple[int, int]  # height, width
Batch = tuple[Size, list[Sample]]  # not decoded


def find_shards(data: str | Path) -> list[str]:
    """The shards that a setting names; none, if it names no shards.

    Args:
        data: a folder with `.tar` files (or compressed ones, `.tar.gz`) and without `prompt.json`, one such file, or what
            `webdataset` takes, such as `shards/{0000..0099}.tar` or `pipe:...`.

    Raises:
        ConfigError: it names shards, and `webdataset` is not installed.
    """
    text = str(data)
    folder = Path(text)
    if folder.is_dir():
        listed = (folder / "prompt.json").is_file()
        found = [] if listed else sorted(str(path) for path in folder.glob("[!.]*") if path.name.endswith(SUFFIXES))
    elif text.endswith(SUFFIXES) or text.startswith("pipe:"):
        found = list(_webdataset().shardlists.expand_urls(text))
        missing = [url for url in found if ":" not in url and not Path(url).is_file()]
        if missing:
            raise DataError(
                f"there is no shard {missing[0]}"
                + (f", nor {len(missing) - 1} more" if missing[1:] else "")
                + "; the name of a folder stands for all shards in it"
            )
    else:
        return []
    if found:
        _webdataset()
    return found


def _webdataset() -> Any:
    try:
        import webdataset
    except ImportError as error:
        raise ConfigError(
            "shards are read with webdataset, which is not installed: pip install 'controlnet[shards]'"
        ) from error
    return webdataset


class ShardStream(IterableDataset):
    """Batches from shards without end, epoch after epoch, each shuffled anew. For a DataLoader with `batch_size=None`.

    Items are whole batches `{"jpg": (B, H, W, 3), "txt": [B texts], "hint": (B, H, W, 3)}`, of pictures of one size. A sample that
    cannot be used is replaced by one of its size that comes after it.

    Args:
        shards: their paths or URLs; see `find_shards`. Each rank reads every `world_size`-th of them; with fewer shards than
            ranks, all of them and every `world_size`-th sample.
        batch_size: samples in a batch.
        seed: of the order.
        rank, world_size: which of how many processes that train this is.
        start_batch: number of the first batch to give; those before it are passed over.
        shuffle: samples that are held (undecoded) to draw the next one from; the order of shards is always shuffled.

    Raises:
        DataError: in iterating: shards that hold no samples, or too many broken ones in a row.
    """

    def __init__(
        self,
        shards: Sequence[str],
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        start_batch: int = 0,
        shuffle: int = 256,
    ) -> None:
        if not shards:
            raise DataError("there are no shards to read")
        self.shards = list(shards)
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.start_batch = start_batch
        self.shuffle = shuffle
        self._times = torch.zeros(1, dtype=torch.int64).share_memory_()

    @property
    def replaced(self) -> int:
        """How many samples were replaced or passed over because they are broken, in all processes that load data."""
        return int(self._times)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info is not None else (0, 1)
        batches = self._batches(counts=worker == 0)
        ahead: deque[Batch] = deque()
        for number in itertools.count():
            size, samples = ahead.popleft() if ahead else next(batches)
            if number < self.start_batch or (number - self.start_batch) % workers != worker:
                continue
            yield default_collate(self._decode(size, samples, batches, ahead))

    def _decode(
        self, size: Size, samples: list[Sample], batches: Iterator[Batch], ahead: deque[Batch]
    ) -> list[dict[str, Any]]:
        """The items of a batch; broken ones replaced by what comes after it, which keeps its place."""
        items = self._decode_usable(samples)
        spare = list(items)
        for place in range(_AHEAD):
            if len(items) == len(samples):
                return items
            if place == len(ahead):
                ahead.append(next(batches))
            later_size, later = ahead[place]
            if later_size == size:
                spare = self._decode_usable(later, quietly=True)
                items += spare[: len(samples) - len(items)]
            elif not items and len(usable := self._decode_usable(later, quietly=True)) == len(samples):
                spare = usable  # of another size: the last resort
        if not spare:
            raise DataError(f"{name_of(samples[0])}, and nothing in {_AHEAD} batches after it, can be used")
        items = items or spare
        return [items[i % len(items)] for i in range(len(samples))]

    def _decode_usable(self, samples: list[Sample], quietly: bool = False) -> list[dict[str, Any]]:
        items = []
        for sample in samples:
            try:
                items.append(decode(sample))
            except DataError as error:
                if not quietly:
                    logger.warning("%s cannot be used and is replaced: %s", name_of(sample), error)
                    self._times += 1
        return items

    def _batches(self, counts: bool) -> Iterator[Batch]:
        """Every batch of this rank from the first one on; the same in each worker."""
        begun: dict[Size, list[Sample]] = defaultdict(list)
        empty = 0  # epochs in a row
        for epoch in itertools.count():
            usable = False
            for sample in self._samples(epoch):
                try:
                    size = size_of(sample)
                except DataError as error:
                    if counts:
                        self._times += 1
                        logger.warning("%s cannot be used and is passed over: %s", name_of(sample), error)
                    continue
                usable = True
                begun[size].append(sample)
                if len(begun[size]) == self.batch_size:
                    yield size, begun.pop(size)
            empty = 0 if usable else empty + 1
            if empty == (1 if self.world_size == 1 else _MAX_EMPTY_EPOCHS):  # another epoch deals out the shards anew
                raise DataError(f"no sample in the {len(self.shards)} shards ({self.shards[0]}, ...) can be used")

    def _samples(self, epoch: int) -> Iterator[Sample]:
        """Undecoded samples of this rank in the order of an epoch."""
        order = random.Random(f"{self.seed} {epoch}")
        shards = self.shards.copy()
        order.shuffle(shards)
        by_shard = len(shards) >= self.world_size
        samples = read_samples(shards[self.rank :: self.world_size] if by_shard else shards)
        if not by_shard:
            samples = itertools.islice(samples, self.rank, None, self.world_size)
        stage = _webdataset().shuffle(
            self.shuffle, initial=self.shuffle, rng=random.Random(f"{self.seed} {epoch} {self.rank}")
        )
        return stage(samples) if self.shuffle > 1 else samples


def _log(shard: str, message: str) -> None:
    logger.warning("%s: %s", shard, message)


def read_samples(shards: Sequence[str], complain: Callable[[str, str], None] = _log) -> Iterator[Sample]:
    """Undecoded samples of shards, one after the other; hidden files are passed over.

    Args:
        complain: told the shard and what is wrong with it where it cannot be read to its end; the other shards are read on.
    """
    _webdataset()
    from webdataset.tariterators import group_by_keys

    reading = ""

    def files() -> Iterator[dict[str, Any]]:
        nonlocal reading
        for reading in shards:
            try:
                yield from _files_of(reading)
            except Exception as error:  # of a command, a server, a decompression: other shards may be sound
                complain(reading, f"the shard cannot be read to its end: {error or type(error).__name__}")
            yield {}  # the end of a shard, at which its last sample ends

    def doubled(error: Exception) -> bool:
        complain(reading, str(error.args[0]) if error.args else type(error).__name__)
        return True

    return iter(group_by_keys(files(), handler=doubled))


def _files_of(shard: str) -> Iterator[dict[str, Any]]:
    """The files of a shard, as `webdataset` groups them to samples.

    Raises:
        DataError: the archive breaks off between two files, which `tarfile` alone would take for its end.
        Exception: of `webdataset`, `tarfile` or a decompression, where it breaks off elsewhere.
    """
    with tarfile.open(fileobj=_webdataset().gopen(shard), mode="r|*") as opened:
        archive: Any = opened
        for member in archive:
            archive.members = []  # it would keep a note of every file
            hidden = any(part.startswith(".") for part in member.name.split("/") if part != ".")
            if not member.isreg() or hidden or re.match(_META, member.name):
                continue
            file = archive.extractfile(member)
            if file is not None:
                yield {"fname": member.name, "data": file.read(), "__url__": shard}
        if archive.fileobj.tell() <= archive.offset:  # behind the last file a block of zeros is read
            raise DataError("the mark of its end is missing, and perhaps files before it")


def name_of(sample: Sample) -> str:
    """What messages call a sample."""
    return f"{sample['__key__']} in {sample['__url__']}"


def decode(sample: Sample) -> dict[str, Any]:
    """The item of an undecoded sample, as a PairDataset gives it.

    Raises:
        DataError: a part is missing or does not decode, or sizes do not fit.
    """
    target, source = (
        read_rgb(io.BytesIO(_part(sample, names, what))) for names, what in ((TARGETS, "target"), (HINTS, "hint"))
    )
    item = {
        "jpg": target.astype(np.float32) / 127.5 - 1.0,
        "txt": _prompt(sample),
        "hint": source.astype(np.float32) / 255.0,
    }
    check_item(item)
    return item


def size_of(sample: Sample) -> Size:
    """Height and width of a sample's target, from its header.

    Raises:
        DataError: it has none, or sides that are not multiples of 64.
    """
    height, width = stored_size(io.BytesIO(_part(sample, TARGETS, "target")))
    if height % 64 or width % 64:
        raise DataError(f"the target is {width}x{height}; sides must be multiples of 64")
    return height, width


def _part(sample: Sample, names: Sequence[str], what: str) -> bytes:
    for key, value in sample.items():
        if key.split(".")[0] in names and isinstance(value, bytes):
            return value
    parts = [key for key in sample if not key.startswith("__")]
    more = f" and {len(parts) - 5} more" if len(parts) > 5 else ""
    raise DataError(
        f"there is no {what}: a part named {' or '.join(names)} is needed, found {', '.join(parts[:5])}{more}. (A sample's name "
        "ends at its first dot, and its parts follow each other in the shard, as `tar --sort=name` puts them)"
    )


def _prompt(sample: Sample) -> str:
    try:
        if "txt" in sample:
            return sample["txt"].decode("utf-8-sig").strip()
        entry = json.loads(sample["json"]) if "json" in sample else {}
    except ValueError as error:
        raise DataError(f"the prompt cannot be read: {error}") from error
    text = next((entry[key] for key in TEXT_KEYS if isinstance(entry, dict) and isinstance(entry.get(key), str)), None)
    if text is None:
        raise DataError(
            f"there is no prompt: a part txt is needed, or a json with a text under {' or '.join(TEXT_KEYS)}"
        )
    return text


def check_shards(shards: Sequence[str], workers: int | None = None, progress: bool = True) -> tuple[int, list[Problem]]:
    """Decode every sample once; returns their number and what is wrong, by place in the stream, or of a shard as a whole."""

    def check(numbered: tuple[int, Sample]) -> Problem | None:
        number, sample = numbered
        try:
            decode(sample)
        except DataError as error:
            return Problem(number, name_of(sample), " ".join(str(error).split()))
        return None

    count, problems = 0, []
    empty = set(shards)

    def complain(shard: str, message: str) -> None:
        empty.discard(shard)
        problems.append(Problem(-1, shard, message))

    numbered = enumerate(read_samples(shards, complain))
    with (
        tqdm(desc="checking shards", unit="sample", disable=None if progress else True) as bar,
        ThreadPoolExecutor(workers) as pool,
    ):
        while portion := list(itertools.islice(numbered, 64)):  # what is held in memory
            empty -= {sample["__url__"] for _, sample in portion}
            for found in pool.map(check, portion):
                bar.update()
                count += 1
                if found is not None:
                    problems.append(found)
    return count, problems + [Problem(-1, shard, "there is no sample in it") for shard in shards if shard in empty]
