"""Folders with captions: `source/NAME.png` is the hint of `target/NAME.jpg`, and its prompt is in `target/NAME.txt` or in a listing.

The listing is `captions.jsonl` (or `metadata.jsonl`) in the data folder or in `target/`: JSON objects, one a line, with a file and
a text, as `cldm.data.photos` reads them; files are named relative to where the listing is. Hidden files and folders, such as
`.ipynb_checkpoints`, are no data.
"""

from collections import defaultdict
from pathlib import Path

from PIL import Image

from cldm.data.pairs import DataError, Pair
from cldm.data.photos import read_prompts

LISTINGS = ("captions.jsonl", "metadata.jsonl")


def has_captions(root: Path) -> bool:
    """Whether the folder is of this layout."""
    return (root / "source").is_dir() and (root / "target").is_dir()


def read_captions(root: Path) -> tuple[list[Pair], list[str]]:
    """The pairs in the order of their names, and a line about each picture that lacks its partner or its prompt.

    Raises:
        DataError: there are no pairs, or the listing cannot be read.
    """
    sources, targets = (find_pictures(root / part) for part in ("source", "target"))
    complaints = []
    for part, found in (("source", sources), ("target", targets)):
        for name in [name for name, files in found.items() if len(files) > 1]:
            complaints.append(
                f"{root / part} has several pictures called {name}: {', '.join(f.name for f in found[name])}"
            )
            del found[name]
    complaints += [
        f"{targets[name][0]} has no picture of its name in {root / 'source'}" for name in targets.keys() - sources
    ]
    complaints += [
        f"{sources[name][0]} has no picture of its name in {root / 'target'}" for name in sources.keys() - targets
    ]
    names = sorted(sources.keys() & targets)
    if not names:
        raise DataError(f"{root / 'source'} and {root / 'target'} have no pictures of equal names")
    listing = next((f / name for f in (root, root / "target") for name in LISTINGS if (f / name).is_file()), None)
    pictures = [targets[name][0] for name in names]
    try:
        prompts, without = read_prompts(listing.parent if listing else root / "target", pictures, listing)
    except DataError as error:
        if listing is not None:
            raise
        raise DataError(
            f"none of the {len(names)} pictures in {root / 'target'} has a prompt: put a .txt file beside each, or a "
            f"captions.jsonl into {root}"
        ) from error
    pairs = [Pair(sources[n][0], targets[n][0], prompts[targets[n][0]]) for n in names if targets[n][0] in prompts]
    return pairs, sorted(complaints) + without


def find_pictures(folder: Path) -> dict[str, list[Path]]:
    """Picture files by relative name without suffix; hidden ones left out."""
    found: dict[str, list[Path]] = defaultdict(list)
    suffixes = _suffixes()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.suffix.lower() in suffixes and not any(part.startswith(".") for part in name.parts) and path.is_file():
            found[name.with_suffix("").as_posix()].append(path)
    return found


def _suffixes() -> frozenset[str]:
    """Of the formats that Pillow reads now: a plug-in such as pillow-heif may add one at any time."""
    return frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN)
