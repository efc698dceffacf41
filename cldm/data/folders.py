"""Data folders that a generator makes: a note says what is in them and how many, and the listing is written whole."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from cldm.data.pairs import LISTING, NOTES, DataError
from cldm.files import write_whole

_COUNT = "pairs"  # in a note: how many there are when the making is done


def claim_folder(folder: Path, note: str, settings: Mapping[str, object]) -> None:
    """Make the folder and note in it what it holds, or check that it holds just this.

    Args:
        note: name of the file with the settings.
        settings: of JSON's types.

    Raises:
        DataError: it holds something else.
    """
    path = folder / note
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{folder} is a file; choose another place for the data folder")
    others = folder.is_dir() and any(file != path and not file.is_dir() for file in folder.rglob("*"))
    if path.is_file() and others:
        known = _read_note(path)
        found = {key: value for key, value in known.items() if key != _COUNT}
        if found == settings:
            return
        changed = ", ".join(key for key in settings if found.get(key) != settings[key]) or "what it notes"
        raise DataError(f"{folder} was made with other settings ({changed}; see {path}); choose another folder")
    if others:
        raise DataError(f"{folder} is not empty and was not made by this command; choose another folder")
    _write_note(path, settings)


def note_count(folder: Path, note: str, count: int) -> None:
    """Note how many pairs a folder that was claimed will have; with fewer in its listing, its making was interrupted."""
    path = folder / note
    known = _read_note(path)
    if known.get(_COUNT) != count:
        _write_note(path, {**known, _COUNT: count})


def unfinished(folder: Path, listed: int) -> str:
    """What is wrong with a folder whose listing names `listed` pairs where its note says there are more, and the way out; else ""."""
    for note in NOTES:
        count = _read_note(folder / note).get(_COUNT)
        if isinstance(count, int) and count > listed:
            return (
                f"{folder} holds {listed:,} of {count:,} pairs: its making was interrupted; "
                f"start the command that made it again, and it goes on"
            )
    return ""


def _read_note(path: Path) -> dict[str, object]:
    """What a note says; nothing, if it is missing or broken."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError, UnicodeDecodeError):
        return {}
    return found if isinstance(found, dict) else {}


def _write_note(path: Path, content: Mapping[str, object]) -> None:
    write_whole(path, (json.dumps(content, indent=1) + "\n").encode())


def write_listing(folder: Path, entries: Iterable[Mapping[str, str]]) -> Path:
    """Write `prompt.json`, one JSON object a line, whole or not at all; returns its path."""
    listing = folder / LISTING
    write_whole(listing, "".join(json.dumps(dict(entry)) + "\n" for entry in entries).encode())
    return listing
