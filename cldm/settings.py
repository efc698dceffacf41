"""Settings of the training scripts: explained by `--help`, checked, and noted in the folder of a run so that it goes on as it began."""

import json
from collections.abc import Collection, Iterable
from dataclasses import asdict, field, fields
from pathlib import Path
from typing import Any

from cldm.files import write_whole
from ldm.util import ConfigError


def setting(default: Any, explanation: str) -> Any:
    """A dataclass field with a default and what `--help` says about it."""
    return field(default=default, metadata={"help": explanation})


def explain(kind: type) -> str:
    """The settings of a dataclass whose fields are made by `setting`, one `key=default` a line, with what each means."""
    known = [(f"{f.name}={'' if f.default is None else f.default}", f.metadata["help"]) for f in fields(kind)]
    width = max(len(start) for start, _ in known)
    return "\n".join(f"  {start:<{width}}  {text}" for start, text in known)


def check_counts(settings: Any, names: Iterable[str]) -> None:
    """Raise ConfigError unless each of these settings is at least 1."""
    for name in names:
        if getattr(settings, name) < 1:
            raise ConfigError(f"{name} must be at least 1, found {getattr(settings, name)}")


def noted_settings(note: Path) -> dict[str, Any] | None:
    """What `write_settings` wrote; None if nothing was written yet.

    Raises:
        ConfigError: the file holds something else.
    """
    if not note.exists():
        return None
    try:
        noted = json.loads(note.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError):
        noted = None
    if not isinstance(noted, dict):
        raise ConfigError(f"{note} should hold a run's settings and is not a JSON object; choose another folder")
    return noted


def is_continued(note: Path, settings: Any, may_change: Collection[str]) -> bool:
    """Whether the file `note` says that a run with these settings was begun in its folder.

    A setting that the note does not name has its default: it may be newer than the note.

    Args:
        note: as `write_settings` writes it.
        settings: a dataclass instance.
        may_change: settings that may differ when a run goes on.

    Raises:
        ConfigError: the run there has different settings, or the note is broken.
    """
    noted = noted_settings(note)
    if noted is None:
        return False
    found = asdict(type(settings)()) | noted
    changed = [key for key, value in asdict(settings).items() if key not in may_change and found[key] != value]
    if changed:
        raise ConfigError(
            f"{note.parent} holds a run with different settings ({', '.join(changed)}); choose another folder"
        )
    return True


def write_settings(note: Path, settings: Any) -> None:
    """Note a run's settings for `noted_settings`."""
    write_whole(note, json.dumps(asdict(settings), indent=2).encode())
