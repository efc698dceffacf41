"""Data folders that a generator makes: a note says what is in them, and the listing is written whole."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from cldm.data.pairs import DataError
from cldm.files import write_whole

LISTING = "prompt.json"


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
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError):
            found = None
        if found == settings:
            return
        known = found if isinstance(found, dict) else {}
        changed = ", ".join(key for key in settings if known.get(key) != settings[key]) or "what it notes"
        raise DataError(f"{folder} was made with other settings ({changed}; see {path}); choose another folder")
    if others:
        raise DataError(f"{folder} is not empty and was not made by this command; choose another folder")
    write_whole(path, (json.dumps(settings, indent=1) + "\n").encode())


def write_listing(folder: Path, entries: Iterable[Mapping[str, str]]) -> Path:
    """Write `prompt.json`, one JSON object a line, whole or not at all; returns its path."""
    listing = folder / LISTING
    write_whole(listing, "".join(json.dumps(dict(entry)) + "\n" for entry in entries).encode())
    return listing
