"""Training pairs from photographs: which part of each is used, at what size, under which prompt and name.

What the condition is, is the caller's matter. The data folder is the one that
`cldm.data.pairs` reads. Whatever is random depends on the seed and the pair's name alone, so that a set can be made in any
order, and go on after an interruption.
"""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np

from annotator.folder import seed_of
from annotator.pictures import changed_at
from cldm.data.folders import write_listing
from cldm.data.pairs import LISTING, DataError, parse_object, read_rgb, resolved
from cldm.pictures import save_png

Size = tuple[int, int]  # height, width

STEP = 64
LARGEST_SIDE = 4096
# Buckets: sides differ at most by this factor, areas from the wanted one by this share.
BUCKET_RATIO = 4.0
BUCKET_AREA = 0.1
# Random crops have at least this share of the largest crop's sides (and no fewer pixels than are wanted, if there are).
SMALLEST_CROP = 0.3

FILE_KEYS = ("file", "image", "file_name", "path")
TEXT_KEYS = ("prompt", "text", "caption")


def parse_size(text: str) -> Size:
    """Height and width in "512" (a square), or in "768x512", which is width x height.

    Raises:
        DataError: another text, or sides that are not multiples of 64.
    """
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isascii() and part.isdigit() for part in parts):
        raise DataError(f"a size is a number of pixels or WIDTHxHEIGHT, found {text!r}")
    width, height = int(parts[0]), int(parts[-1])
    for side in (width, height):
        if not STEP <= side <= LARGEST_SIDE or side % STEP:
            raise DataError(f"sides must be multiples of {STEP} from {STEP} to {LARGEST_SIDE}, found {side}")
    return height, width


def bucket_sizes(area: int) -> list[Size]:
    """Sizes of about `area` pixels whose sides are multiples of 64: for each width the best height, and the other way round."""
    sizes = set()
    for side in range(STEP, LARGEST_SIDE + 1, STEP):
        other = max(round(area / side / STEP), 1) * STEP
        if max(side, other) <= BUCKET_RATIO * min(side, other) and abs(side * other / area - 1) <= BUCKET_AREA:
            sizes |= {(side, other), (other, side)}
    return sorted(sizes)


@dataclass(frozen=True)
class Framing:
    """How photographs are brought to the size of training.

    Attributes:
        height, width: of the result, multiples of 64; with buckets, their product is the area.
        buckets: each photograph gets the size, among those of this area, that is nearest to its shape.
        random: parts of random sizes at random places, rather than the largest part in the middle.
        seed: of what is random.
    """

    height: int
    width: int
    buckets: bool = False
    random: bool = False
    seed: int = 0

    def size_of(self, height: int, width: int) -> Size:
        """Height and width of what a photograph of this size becomes."""
        if not self.buckets:
            return self.height, self.width
        return min(
            bucket_sizes(self.height * self.width), key=lambda size: abs(np.log(size[1] / size[0] * height / width))
        )

    def part_of(self, height: int, width: int, name: str) -> tuple[slice, slice]:
        """Rows and columns of a photograph of this size that pair `name` shows; their ratio is that of `size_of`."""
        goal_height, goal_width = self.size_of(height, width)
        scale = min(height / goal_height, width / goal_width)  # photograph's pixels for one of the result
        across, down = 0.5, 0.5  # where the part lies in the room that there is, 0 to 1
        if self.random:
            rng = np.random.default_rng(self.seed_of(name))
            across, down = rng.random(2)
            scale *= rng.uniform(min(max(SMALLEST_CROP, 1 / scale), 1.0), 1.0)
        part_height = min(max(round(goal_height * scale), 1), height)
        part_width = min(max(round(goal_width * scale), 1), width)
        top, left = round(down * (height - part_height)), round(across * (width - part_width))
        return slice(top, top + part_height), slice(left, left + part_width)

    def seed_of(self, name: str) -> int:
        """A seed for whatever is random in a pair, 0 to 2**32 - 1."""
        return seed_of(self.seed, name)


@dataclass(frozen=True)
class PhotoPair:
    """A pair to be made.

    Attributes:
        picture: the photograph's file.
        name: of the pair's files below `source/` and `target/`, with sub-folders, without `.png`.
        prompt: as it goes into the listing.
    """

    picture: Path
    name: str
    prompt: str

    @property
    def source(self) -> str:
        return f"source/{self.name}.png"

    @property
    def target(self) -> str:
        return f"target/{self.name}.png"

    def is_made(self, folder: Path) -> bool:
        """Whether both files are there."""
        return (folder / self.source).is_file() and (folder / self.target).is_file()

    def is_current(self, folder: Path) -> bool:
        """Whether both files are there, and not older than the photograph."""
        return self.is_made(folder) and (folder / self.target).stat().st_mtime_ns >= changed_at(self.picture)


def plan_pairs(
    folder: Path, prompts: dict[Path, str], everything: Iterable[Path], crops: int | None
) -> list[PhotoPair]:
    """The pairs of the photographs that have a prompt, in the order of their names, those of one photograph side by side.

    Args:
        folder: the photographs'; names are relative to it.
        prompts: by photograph.
        everything: all photographs, so that a missing prompt changes no other's name.
        crops: pairs of each photograph, numbered from 0; None for one without a number.
    """
    names = _names(folder, list(everything))
    numbers = [""] if crops is None else [f"-{k}" for k in range(crops)]
    return [PhotoPair(path, names[path] + k, prompts[path]) for path in sorted(prompts) for k in numbers]


def _names(folder: Path, photos: Sequence[Path]) -> dict[Path, str]:
    """Relative names without suffix, but with it where two would else be equal, also for those who ignore case."""

    def bare(path: Path) -> Path:
        return path.relative_to(folder).with_suffix("")

    count = Counter(str(bare(path)).lower() for path in photos)
    suffixes = {path.suffix.lower() for path in photos}
    names = {}
    for path in photos:
        # "a.jpg.png" beside "a.jpg" and "a.webp" would be "a.jpg" too.
        keep = count[str(bare(path)).lower()] > 1 or bare(path).suffix.lower() in suffixes
        names[path] = (path.relative_to(folder) if keep else bare(path)).as_posix()
    return names


def read_prompts(
    folder: Path, photos: Sequence[Path], listing: Path | None = None, prompt: str | None = None
) -> tuple[dict[Path, str], list[str]]:
    """The prompt of each photograph that has one, and a line of complaint about each that has none.

    Args:
        folder: the photographs'; `listing` names files relative to it.
        listing: JSON objects, one a line, with a file under one of FILE_KEYS and a text under one of TEXT_KEYS. If neither
            this nor `prompt` is given, prompts are in `a.txt` (or `a.jpg.txt`) beside `a.jpg`.
        prompt: one for all.

    Raises:
        DataError: a listing that cannot be read, or no prompts at all.
    """
    if prompt is not None:
        return dict.fromkeys(photos, prompt), []
    prompts: dict[Path, str] = {}
    complaints = []
    if listing is not None:
        by_file = _read_listing(listing, folder)
        known = {path.resolve() for path in photos}
        complaints += [
            f"{where}: there is no picture {file}" for file, (where, _) in by_file.items() if file not in known
        ]
    for path in photos:
        if listing is not None:
            found = by_file.get(path.resolve())
            where, text = (f"{found[0]} has an empty text", found[1]) if found else (f"{listing} does not name it", "")
        else:
            where, text = _read_beside(path)
        if text:
            prompts[path] = text
        else:
            complaints.append(f"{path} has no prompt: {where}")
    if not prompts:
        raise DataError(
            f"none of the {len(photos)} pictures in {folder} has a prompt: put a .txt file beside each, or name a JSONL file "
            f"with --captions, or give all the same one with --prompt"
        )
    return prompts, complaints


def _read_beside(path: Path) -> tuple[str, str]:
    """What is wrong with the prompt in the text file beside a photograph, and the prompt, "" if there is none."""
    for beside in (path.with_name(path.name + ".txt"), path.with_suffix(".txt")):
        if beside.is_file():
            try:
                return f"{beside.name} is empty", " ".join(beside.read_text(encoding="utf-8-sig").split())
            except UnicodeDecodeError as error:
                return f"{beside.name} is not UTF-8 text ({error})", ""
    return f"there is no {path.with_suffix('.txt').name} beside it", ""


def _read_listing(listing: Path, folder: Path) -> dict[Path, tuple[str, str]]:
    """(where it stands, prompt) by resolved file."""
    try:
        lines = listing.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{listing} is not UTF-8 text: {error}") from error
    except OSError as error:
        raise DataError(f"{listing} cannot be read: {error.strerror}") from error
    found: dict[Path, tuple[str, str]] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{listing}, line {number}"
        entry = parse_object(line, where)
        file, text = (
            next((entry[key] for key in keys if isinstance(entry.get(key), str)), None)
            for keys in (FILE_KEYS, TEXT_KEYS)
        )
        if file is None or text is None:
            raise DataError(
                f"{where} needs a text under one of {', '.join(FILE_KEYS)} and one of {', '.join(TEXT_KEYS)}"
            )
        path = resolved(folder / file, where)
        if path in found:
            raise DataError(f"{where} names {file} again, after {found[path][0]}")
        found[path] = where, " ".join(text.split())
    return found


def cut_part(pair: PhotoPair, framing: Framing) -> tuple[np.ndarray, np.ndarray]:
    """The part of the photograph that a pair shows, and the same at the size of training; both uint8 (., ., 3) RGB.

    Raises:
        DataError: a photograph that cannot be read.
    """
    photo = _read_photo(pair.picture, pair.picture.stat().st_mtime_ns)
    own_height, own_width = photo.shape[:2]
    height, width = framing.size_of(own_height, own_width)
    part = photo[framing.part_of(own_height, own_width, pair.name)]
    shrinks = part.shape[0] > height
    return part, cv2.resize(part, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LANCZOS4)


def write_pair(folder: Path, pair: PhotoPair, source: np.ndarray, target: np.ndarray) -> None:
    """Write a pair's two files; neither is ever seen half-written.

    Raises:
        ValueError: a condition that is not uint8 of the target's shape.
    """
    if source.shape != target.shape or source.dtype != np.uint8:
        raise ValueError(f"the condition is {source.dtype} {source.shape}, expected uint8 {target.shape}")
    (folder / pair.target).unlink(missing_ok=True)  # of another state of the photograph: never beside the new source
    save_png(folder / pair.source, source)
    save_png(folder / pair.target, target)


@lru_cache(maxsize=2)  # the pairs of one photograph are made one after the other
def _read_photo(path: Path, changed: int) -> np.ndarray:
    """A photograph in its present state: `changed`, the time of its last change, keeps a former state from being taken for it."""
    photo = read_rgb(path)
    photo.flags.writeable = False
    return photo


def list_pairs(folder: Path, pairs: Iterable[PhotoPair]) -> int:
    """Let `prompt.json` name those pairs that are made, if it is there or has something to name; returns their number."""
    made = [pair for pair in pairs if pair.is_made(folder)]
    if made or (folder / LISTING).exists():
        write_listing(folder, ({"source": p.source, "target": p.target, "prompt": p.prompt} for p in made))
    return len(made)


def settings_of(framing: Framing, condition: dict[str, object]) -> dict[str, object]:
    """What a data folder's pairs have in common, as its note says it; JSON's types."""
    return json.loads(json.dumps({**condition, **asdict(framing)}))
