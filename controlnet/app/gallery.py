"""The pictures that a visitor has made: PNG files that carry their settings, in a folder that only his browser knows."""

import json
import re
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradio.processing_utils import save_file_to_cache

from cldm.results import Pictures, read_png_text

_VISITOR = re.compile(r"[0-9a-f]{32}")
_SHOWN = 60
DAMAGED = "the settings in this picture are damaged"
NOTES = "page"  # what the page adds to a picture's settings


def visitor_key(known: object) -> str:
    """The visitor's key, as his browser has kept it, or a new one."""
    return known if isinstance(known, str) and _VISITOR.fullmatch(known) else secrets.token_hex(16)


@dataclass(frozen=True)
class Gallery:
    """The pictures of one visitor, in a folder of `outputs`."""

    outputs: Path
    visitor: str

    def __post_init__(self) -> None:
        if not isinstance(self.visitor, str) or not _VISITOR.fullmatch(self.visitor):
            raise ValueError("reload the page: this browser's key is not known")

    @property
    def folder(self) -> Path:
        return self.outputs / self.visitor

    def add(self, pictures: Pictures, notes: Mapping[str, Any]) -> list[Path]:
        """Keep pictures with their settings and what the page knows beside them."""
        now = time.time()
        stem = (
            f"{time.strftime('%Y%m%d-%H%M%S', time.localtime(now))}-{int(now * 1000) % 1000:03}-{secrets.token_hex(2)}"
        )
        return pictures.save(self.folder / f"{stem}.png", notes={NOTES: dict(notes)})

    def files(self) -> list[Path]:
        """The newest pictures, the last one first."""
        if not self.folder.is_dir():
            return []
        return sorted(self.folder.glob("[!.]*.png"), reverse=True)[:_SHOWN]

    def shown(self, cache: str) -> list[str]:
        """Files for a gallery component: copies, so that the folder itself need not be reachable."""
        return [save_file_to_cache(file, cache) for file in self.files()]


def read_notes(file: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings of a picture and what the page noted beside them, nothing for pictures that were made elsewhere.

    Raises:
        ValueError: a file without settings, or with such as no page can show.
    """
    try:
        text = read_png_text(file)
        json.dumps(text, ensure_ascii=False).encode()  # the page's events are UTF-8, and half a character is none
    except (RecursionError, UnicodeEncodeError) as error:
        raise ValueError(DAMAGED) from error
    except ValueError as error:
        raise ValueError("this picture carries no settings; only PNG files written by this library do") from error
    notes = text.get(NOTES)
    return text["settings"], notes if isinstance(notes, dict) else {}
