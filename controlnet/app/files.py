"""What people may choose on the page: weights, data and runs in the configured folders, by names that tell nothing of the server.

A name is the folder's own name and the path below it, `models/control_sd15_canny.pth`. Only names that a listing gives are ever opened,
so that no path which somebody makes up leads anywhere.
"""

import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from annotator.pictures import IMAGE_SUFFIXES
from annotator.weights import CKPTS
from ldm.files.locating import SUFFIXES, locate

TINY = "cldm_tiny"  # the base that comes with this library
_DEPTH = 3  # folders below a configured one that are looked into
_LISTING = "prompt.json"  # of a folder with training pairs
_NAME = re.compile(r"[A-Za-z0-9][\w. -]{0,79}")
_DRIVE = r"(?:[A-Za-z]:)?"
_PATH = re.compile(rf"(?<![\w:/.~\\-]){_DRIVE}[\\/](?:[^\s'\"\\/:,;()]+[\\/])+([^\s'\"\\/:,;()]*)")


@dataclass(frozen=True)
class Folders:
    """The folders that the page works with.

    Attributes:
        models: where weights lie; what is converted or made goes into the first.
        data: where training data and folders of pictures lie; maps of a folder go into the first.
        runs: of training, one folder for each run.
        outputs: the pictures that were made.
    """

    models: tuple[Path, ...] = (Path("models"),)
    data: tuple[Path, ...] = (Path("training"), Path("data"))
    runs: Path = Path("runs")
    outputs: Path = Path("outputs")

    def weights(self) -> dict[str, Path]:
        """Weight files, folders of diffusers and results of runs by name; the packaged base first."""
        found = {TINY: locate(TINY)}
        for root in self.models:
            found |= {_name(root, path): path for path in _weights_below(root, _DEPTH)}
        if self.runs.is_dir():
            for run in sorted(self.runs.iterdir()):
                if (run / "model.safetensors").is_file():
                    found[_name(self.runs, run)] = run / "model.safetensors"
                found |= {_name(self.runs, path): path for path in sorted((run / "exports").glob("*.safetensors"))}
        packaged = os.path.realpath(found[TINY])
        return {
            name: path
            for name, path in found.items()
            # Links may lead nowhere, or to themselves, at which `Path.resolve` would fail.
            if name == TINY or (os.path.exists(path) and os.path.realpath(path) != packaged)
        }

    def pairs(self) -> dict[str, Path]:
        """Folders with training pairs, by name."""
        return {name: path for name, path in self._data_folders() if (path / _LISTING).is_file()}

    def picture_folders(self) -> dict[str, Path]:
        """Folders that hold pictures, by name."""
        return {name: path for name, path in self._data_folders() if _holds_pictures(path)}

    def _data_folders(self) -> Iterator[tuple[str, Path]]:
        for root in self.data:
            if root.is_dir():
                yield root.name, root
                yield from ((_name(root, path), path) for path in _folders_below(root, _DEPTH - 1))

    def hide_paths(self, text: str) -> str:
        """A message without paths of the server: configured folders by their names, of other paths the last part alone."""
        known = [(root, root.name) for root in (*self.models, *self.data, self.runs, self.outputs)]
        known += [(CKPTS, "annotator/ckpts"), (Path(tempfile.gettempdir()), "a temporary folder")]
        named = {str(form): name for root, name in known for form in (root.absolute(), os.path.realpath(root))}
        for path in sorted(named, key=len, reverse=True):
            if len(Path(path).parts) > 1:
                text = text.replace(path, named[path])
        return _PATH.sub(r"…/\1", text)


def choose(listing: dict[str, Path], name: object, what: str) -> Path:
    """The path behind a name in a listing.

    Raises:
        ValueError: the listing has no such name.
    """
    if not isinstance(name, str) or name not in listing:
        raise ValueError(f"choose {what} from the list")
    return listing[name]


def new_name(text: object, what: str, suffixes: Sequence[str] = ()) -> str:
    """A name for a new file or folder that somebody typed.

    Raises:
        ValueError: it is empty, too long, or holds more than letters, digits, spaces, dots, dashes and underscores.
    """
    name = text.strip() if isinstance(text, str) else ""
    if not _NAME.fullmatch(name) or name.endswith("."):
        raise ValueError(f"{what} needs a name of letters, digits, spaces, dots, dashes and underscores (80 at most)")
    if suffixes and not name.lower().endswith(tuple(suffixes)):
        raise ValueError(f"the name of {what} must end in {' or '.join(suffixes)}")
    return name


def _name(root: Path, path: Path) -> str:
    return f"{root.absolute().name}/{path.relative_to(root).as_posix()}"


def _weights_below(folder: Path, depth: int) -> Iterator[Path]:
    """Weight files and folders of diffusers, sorted, without hidden ones."""
    if not folder.is_dir():
        return
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            if (path / "model_index.json").is_file() or (path / "config.json").is_file():
                yield path
            elif depth:
                yield from _weights_below(path, depth - 1)
        elif path.suffix.lower() in SUFFIXES:
            yield path


def _folders_below(folder: Path, depth: int) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.name.startswith("."):
            yield path
            if depth > 1 and not (path / _LISTING).is_file():
                yield from _folders_below(path, depth - 1)


def _holds_pictures(folder: Path) -> bool:
    return any(path.suffix.lower() in IMAGE_SUFFIXES for path in folder.iterdir())
