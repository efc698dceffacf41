"""Image pairs on disk: a folder with `prompt.json`, one JSON object a line with `source`, `target` and `prompt`.

Folders with captions (`cldm.data.captions`) are read too. What is wrong with a folder's pictures is found by `cldm.data.checking`.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeVar

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from annotator.pictures import HWC3, read_image

KEYS = ("source", "target", "prompt")
LISTING = "prompt.json"
NOTES = (
    "fill.json",
    "scenes.json",
    "photos.json",
)  # by which `cldm.data.folders` knows the folders that were made here


class DataError(ValueError):
    """A data folder that cannot be trained on; the message names the file or the line."""


@dataclass(frozen=True)
class Pair:
    """One line of `prompt.json`; paths are whole."""

    source: Path
    target: Path
    prompt: str


def read_pairs(root: str | Path, prompts: str = LISTING) -> list[Pair]:
    """The pairs that `root/prompt.json` lists or, without it, those of a folder with captions.

    Raises:
        DataError: no such folder or file, no pairs, or a line that is not an object with the three texts.
    """
    pairs, complaints = find_pairs(root, prompts)
    if complaints:
        raise DataError(complaints[0] + (f"; and {len(complaints) - 1} more" if len(complaints) > 1 else ""))
    return pairs


def find_pairs(root: str | Path, prompts: str = LISTING) -> tuple[list[Pair], list[str]]:
    """The pairs of a data folder that can be told, and a line about each that cannot.

    Raises:
        DataError: no such folder, or no pairs in it.
    """
    root = Path(root)
    if root.is_file():
        raise DataError(f"{root} is a file; name the data folder that it lies in")
    if not root.is_dir():
        raise DataError(f"there is no data folder {str(root)!r}; `controlnet data --out {root}` makes a Fill set there")
    path = root / prompts
    if not path.is_file():
        if any((root / note).is_file() for note in NOTES):
            raise DataError(
                f"{path} is missing: the making of this data set was interrupted; start the command that made it again, "
                "and it goes on"
            )
        from cldm.data.captions import has_captions, read_captions  # it reads pictures with what is defined here

        if has_captions(root):
            return read_captions(root)
        raise DataError(
            f"{path} is missing: it must hold one JSON object a line with {', '.join(KEYS)}. (Or there are folders source/ "
            "and target/ with captions.)"
        )
    pairs, complaints = [], []
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error}") from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                pairs.append(_parse(line, f"{path}, line {number}", root))
            except DataError as error:
                complaints.append(str(error))
    if not pairs:
        raise DataError(complaints[0] if complaints else f"{path} lists no pairs")
    return pairs, complaints


def _parse(line: str, where: str, root: Path) -> Pair:
    entry = parse_object(line, where)
    for key in KEYS:
        if not isinstance(entry.get(key), str):
            found = "nothing" if key not in entry else type(entry[key]).__name__
            raise DataError(f"{where} needs a text under {key!r}, found {found}")
    for key in ("source", "target"):
        if not resolved(root / entry[key], where).is_relative_to(root.resolve()):
            raise DataError(f"{where}: {key} {entry[key]!r} lies outside the data folder")
    return Pair(root / entry["source"], root / entry["target"], entry["prompt"])


def parse_object(line: str, where: str) -> dict[str, Any]:
    """The JSON object in a line of a listing; `where` names the line.

    Raises:
        DataError: it is something else.
    """
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:  # also of numbers and nesting beyond all bounds
        found = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise DataError(f"{where} is not valid JSON: {found}; there must be one object a line") from error
    if not isinstance(entry, dict):
        raise DataError(f"{where} must be an object, found {type(entry).__name__}")
    return entry


def resolved(path: Path, where: str) -> Path:
    """The path without links and dots; DataError names the line where a file system knows no such name."""
    try:
        return path.resolve()
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f"{where} names no file: {error}") from error


def read_rgb(path: Path | BinaryIO) -> np.ndarray:
    """A picture, a file or its bytes, as uint8 RGB (H, W, 3): turned as its EXIF says, 16 bits cut to 8, transparency laid on white.

    Raises:
        DataError: missing, or it does not decode.
    """
    try:
        return HWC3(read_image(path))
    except ValueError as error:
        raise DataError(str(error)) from error


def _called(picture: Path | BinaryIO) -> str:
    return str(picture) if isinstance(picture, (str, Path)) else "it"


def stored_size(path: Path | BinaryIO) -> tuple[int, int]:
    """Height and width from the file's header.

    Raises:
        DataError: missing, or no picture.
    """
    try:
        with Image.open(path) as picture:
            width, height = picture.size
            turned = picture.getexif().get(0x0112, 1) >= 5
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{_called(path)} does not decode as a picture: {error}") from error
    return (width, height) if turned else (height, width)


class Items(Protocol):
    """Any data set by index: items are `{"jpg", "txt", "hint"}`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> dict[str, Any]: ...


class SizedItems(Items, Protocol):
    """A data set that knows the sizes of its pictures without reading them."""

    def sizes(self) -> list[tuple[int, int]]:
        """(height, width) of each item."""
        ...


AnyItems = TypeVar("AnyItems", bound=Items)


class PairDataset(Dataset):
    """Items `{"jpg": target in [-1, 1], "txt": prompt, "hint": source in [0, 1]}`, pictures float32 (H, W, 3) RGB.

    Args:
        root: the data folder.
        leave_out: do without pairs that its listing or its captions do not tell rightly; `complaints` names them.

    Raises:
        DataError: see `read_pairs`.
    """

    def __init__(self, root: str | Path, leave_out: bool = False) -> None:
        self.root = Path(root)
        self.complaints: list[str] = []
        if leave_out:
            self.pairs, self.complaints = find_pairs(root)
        else:
            self.pairs = read_pairs(root)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        pair = self.pairs[index]
        source, target = read_rgb(pair.source), read_rgb(pair.target)
        _check_sizes(pair, source.shape[:2], target.shape[:2])
        return {
            "jpg": target.astype(np.float32) / 127.5 - 1.0,
            "txt": pair.prompt,
            "hint": source.astype(np.float32) / 255.0,
        }

    def hint_item(self, index: int) -> dict[str, Any]:
        """The item without its target, which is not read: for training from cached latents."""
        if self._changes_items():
            item = dict(self[index])
            del item["jpg"]
            return item
        pair = self.pairs[index]
        return {"txt": pair.prompt, "hint": read_rgb(pair.source).astype(np.float32) / 255.0}

    def fingerprint(self, index: int) -> str | None:
        """A text that changes whenever the target's file does: name, size and time of change.

        None in a subclass with its own `__getitem__`, whose targets may depend on more.

        Raises:
            DataError: the file is missing.
        """
        if self._changes_items():
            return None
        path = self.pairs[index].target
        try:
            status = path.stat()
        except OSError as error:
            raise DataError(f"{path} is missing") from error
        # A listing may name a whole path in a folder that was named by a relative one.
        name = (
            path.relative_to(self.root)
            if path.is_relative_to(self.root)
            else path.resolve().relative_to(self.root.resolve())
        )
        return f"{name} {status.st_size} {status.st_mtime_ns}"

    def _changes_items(self) -> bool:
        return type(self).__getitem__ is not PairDataset.__getitem__

    def name(self, index: int) -> str:
        """What messages call an item: the file of its target."""
        return str(self.pairs[index].target)

    def prompts(self) -> list[str]:
        """The prompt of every item, by index."""
        return [pair.prompt for pair in self.pairs]

    def sizes(self) -> list[tuple[int, int]]:
        """Height and width of every item, by index, from the headers of the files.

        Raises:
            DataError: a file that is missing or whose header is broken, or a pair whose sizes do not fit.
        """
        return self.sizes_of(range(len(self.pairs)))

    def sizes_of(self, indices: Iterable[int]) -> list[tuple[int, int]]:
        """The same of some items."""
        sizes = []
        for pair in (self.pairs[index] for index in indices):
            size = stored_size(pair.target)
            _check_sizes(pair, stored_size(pair.source), size)
            sizes.append(size)
        return sizes


def _check_sizes(pair: Pair, source: tuple[int, int], target: tuple[int, int]) -> None:
    if tuple(source) != tuple(target):
        raise DataError(
            f"{pair.source} is {source[1]}x{source[0]}, its target {pair.target} is {target[1]}x{target[0]}; they must be equal"
        )
    if target[0] % 64 or target[1] % 64 or 0 in target:
        raise DataError(f"{pair.target} is {target[1]}x{target[0]}; sides must be multiples of 64")
