"""Image pairs on disk: a folder with `prompt.json`, one JSON object a line with `source`, `target` and `prompt`.

Everything that can be known before training is found by `PairDataset.sizes`: missing files, broken lines, sizes that do not fit.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from annotator.pictures import HWC3, read_image

KEYS = ("source", "target", "prompt")


class DataError(ValueError):
    """A data folder that cannot be trained on; the message names the file or the line."""


@dataclass(frozen=True)
class Pair:
    """One line of `prompt.json`; paths are whole."""

    source: Path
    target: Path
    prompt: str


def read_pairs(root: str | Path, prompts: str = "prompt.json") -> list[Pair]:
    """The pairs that `root/prompt.json` lists.

    Raises:
        DataError: no such folder or file, no pairs, or a line that is not an object with the three texts.
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(
            f"there is no data folder {str(root)!r}; `python tutorial_dataset.py --out {root}` makes a Fill set there"
        )
    path = root / prompts
    if not path.is_file():
        raise DataError(f"{path} is missing: it must hold one JSON object a line with {', '.join(KEYS)}")
    pairs = []
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error}") from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            pairs.append(_parse(line, f"{path}, line {number}", root))
    if not pairs:
        raise DataError(f"{path} lists no pairs")
    return pairs


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


def read_rgb(path: Path) -> np.ndarray:
    """A picture as uint8 RGB (H, W, 3): turned as its EXIF says, 16 bits cut to 8, transparency laid on white.

    Raises:
        DataError: missing, or it does not decode.
    """
    try:
        return HWC3(read_image(path))
    except ValueError as error:
        raise DataError(str(error)) from error


def _stored_size(path: Path) -> tuple[int, int]:
    """Height and width from the file's header."""
    try:
        with Image.open(path) as picture:
            width, height = picture.size
            turned = picture.getexif().get(0x0112, 1) >= 5
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} does not decode as a picture: {error}") from error
    return (width, height) if turned else (height, width)


class PairDataset(Dataset):
    """Items `{"jpg": target in [-1, 1], "txt": prompt, "hint": source in [0, 1]}`, pictures float32 (H, W, 3) RGB.

    Args:
        root: the data folder.

    Raises:
        DataError: see `read_pairs`.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
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

    def sizes(self) -> list[tuple[int, int]]:
        """Height and width of every item, by index, from the headers of the files.

        Raises:
            DataError: a file that is missing or whose header is broken, or a pair whose sizes do not fit.
        """
        sizes = []
        for pair in self.pairs:
            size = _stored_size(pair.target)
            _check_sizes(pair, _stored_size(pair.source), size)
            sizes.append(size)
        return sizes


def _check_sizes(pair: Pair, source: tuple[int, int], target: tuple[int, int]) -> None:
    if tuple(source) != tuple(target):
        raise DataError(
            f"{pair.source} is {source[1]}x{source[0]}, its target {pair.target} is {target[1]}x{target[0]}; they must be equal"
        )
    if target[0] % 64 or target[1] % 64 or 0 in target:
        raise DataError(f"{pair.target} is {target[1]}x{target[0]}; sides must be multiples of 64")
