"""Data folders that a generator makes: a note says what is in them and how many, and the listing is written whole."""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from cldm.data.pairs import LISTING, NOTES, DataError
from cldm.files import whole_file, write_whole
from cldm.pictures import save_png

_COUNT = "pairs"  # in a note: how many there are when the making is done


@contextmanager
def claimed_folder(folder: Path, note: str, settings: Mapping[str, Any]) -> Iterator[None]:
    """Within it a data folder is made: `claim_folder`, whose note goes again if nothing was made in the end."""
    claimed = claim_folder(folder, note, settings)
    try:
        yield
    finally:
        made, path = _holds_files(folder, note), folder / note
        if claimed and not made:
            path.unlink(missing_ok=True)
        elif made and not path.exists():  # the run that wrote it made nothing, and took it away
            write_whole(path, _as_text(settings))


def claim_folder(folder: Path, note: str, settings: Mapping[str, Any]) -> bool:
    """Make the folder and note in it what it holds, or check that it holds just this; whether the note is new.

    Of several processes that begin at once, one writes the note, and the others find it.

    Args:
        note: name of the file with the settings.
        settings: of JSON's types.

    Raises:
        DataError: it holds something else.
    """
    path, text = folder / note, _as_text(settings)
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{folder} is a file; choose another place for the data folder")
    holds_files = _holds_files(folder, note)
    if holds_files and not path.is_file():
        raise DataError(f"{folder} is not empty and was not made by this command; choose another folder")
    try:
        with whole_file(path, replace=False) as file:
            file.write(text)
        return True
    except FileExistsError:
        known = read_note(path)
    if not known and not holds_files:  # it is broken, and of nothing
        write_whole(path, text)
        return True
    found = {key: value for key, value in known.items() if key != _COUNT}
    if found != settings:
        changed = ", ".join(key for key in settings if found.get(key) != settings[key]) or "what it notes"
        reason, way_out = f"made with other settings ({changed}; see {path})", "choose another folder"
        if not holds_files:
            raise DataError(f"{folder} is just being {reason}; {way_out}, or delete that file if no other run is on")
        raise DataError(f"{folder} was {reason}; {way_out}")
    return False


def _holds_files(folder: Path, note: str) -> bool:
    """Whether there is more than the note; hidden files are a file manager's, or were being written by a process that was killed."""
    return any(
        file != folder / note and not file.name.startswith(".") and not file.is_dir() for file in folder.rglob("*")
    )


def note_count(folder: Path, note: str, count: int) -> None:
    """Note how many pairs a folder that was claimed will have; with fewer in its listing, its making was interrupted."""
    path = folder / note
    known = read_note(path)
    if known and known.get(_COUNT) != count:  # without a note, `claimed_folder` writes it whole in the end
        write_whole(path, _as_text({**known, _COUNT: count}))


def unfinished(folder: Path, listed: int) -> str:
    """What is wrong with a folder whose listing names `listed` pairs where its note says there are more, and the way out; else ""."""
    for note in NOTES:
        count = read_note(folder / note).get(_COUNT)
        if isinstance(count, int) and count > listed:
            return (
                f"{folder} holds {listed:,} of {count:,} pairs: its making was interrupted; "
                f"start the command that made it again, and it goes on"
            )
    return ""


def read_note(path: Path) -> dict[str, Any]:
    """What a note says; nothing, if it is missing or broken."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError, UnicodeDecodeError):
        return {}
    return found if isinstance(found, dict) else {}


def _as_text(content: Mapping[str, object]) -> bytes:
    return (json.dumps(content, indent=1) + "\n").encode()


def write_listing(folder: Path, entries: Iterable[Mapping[str, str]]) -> Path:
    """Write `prompt.json`, one JSON object a line, whole or not at all; returns its path."""
    listing = folder / LISTING
    write_whole(listing, "".join(json.dumps(dict(entry)) + "\n" for entry in entries).encode())
    return listing


def draw_folder(
    folder: Path,
    note: str,
    settings: Mapping[str, Any],
    count: int,
    draw: Callable[[int], tuple[np.ndarray, np.ndarray]],
    prompt: Callable[[int], str],
    workers: int | None = None,
    progress: bool = True,
) -> Path:
    """Draw a set of pairs: `source/N.png`, `target/N.png` and `prompt.json`, as Fill50K is laid out.

    Can be interrupted: pictures that are there are kept, and `prompt.json` is written last. A folder that holds a set of other settings
    is refused; a larger `count` goes on.

    Args:
        folder: made if need be.
        note: name of the file with the settings.
        settings: what the pairs depend on: `size` (pixels a side, a multiple of 64), `seed` (not negative), and others.
        count: number of pairs.
        draw: source and target of a pair by its number, uint8 (size, size, 3) each.
        prompt: of a pair by its number.
        workers: threads; as many as there are processors, by default.
        progress: show a progress bar.

    Returns:
        the path of `prompt.json`.

    Raises:
        DataError: settings out of range, or a folder that holds something else.
    """
    size, seed = int(settings["size"]), int(settings["seed"])
    if count < 1:
        raise DataError(f"count must be at least 1, found {count}")
    if size < 64 or size % 64:
        raise DataError(f"size must be a multiple of 64, found {size}")
    if seed < 0:
        raise DataError(f"seed must not be negative, found {seed}")
    if workers is not None and workers < 1:
        raise DataError(f"workers must be at least 1, found {workers}")

    def write(index: int) -> None:
        source, target = draw(index)
        save_png(folder / f"source/{index}.png", source)
        save_png(folder / f"target/{index}.png", target)  # last: where it is, the pair is whole

    def is_made(index: int) -> bool:
        return all((folder / part / f"{index}.png").is_file() for part in ("source", "target"))

    # Threads, not processes: drawing and encoding run outside Python's lock, and processes would each import torch first.
    with claimed_folder(folder, note, settings), ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        note_count(folder, note, count)
        for part in ("source", "target"):
            (folder / part).mkdir(exist_ok=True)
        todo = [i for i in range(count) if not is_made(i)]
        options: dict[str, Any] = {"unit": "pair", "desc": str(folder), "disable": None if progress else True}
        with tqdm(total=count, initial=count - len(todo), **options) as bar:
            # In portions, so that an interruption does not wait for all that was queued.
            for start in range(0, len(todo), 1000):
                for done in as_completed([pool.submit(write, index) for index in todo[start : start + 1000]]):
                    done.result()
                    bar.update()
        return write_listing(
            folder,
            ({"source": f"source/{i}.png", "target": f"target/{i}.png", "prompt": prompt(i)} for i in range(count)),
        )
