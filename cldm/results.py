"""What the pipeline gives: pictures with the settings that make them again, which PNG files carry as text."""

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin

from cldm.files import write_whole

PNG_KEY = "controlnet"  # of the text in a PNG file

# Settings with one value for each picture.
_OF_EACH_PICTURE = ("prompt", "negative_prompt", "seed")


class Pictures(np.ndarray):
    """uint8 pictures (N, H, W, 3), RGB: an array like any other, with the settings that made them.

    What is computed from it (parts, sums) has no settings.

    Attributes:
        settings: arguments of the pipeline's call that make all of them again, but for those in `inputs`; None in a part.
        inputs: what else was given, such as hints, by the argument's name: a fingerprint of its values.
    """

    settings: dict[str, Any] | None
    inputs: dict[str, Any]

    def __new__(cls, pictures: np.ndarray, settings: Mapping[str, Any] | None, inputs: Mapping[str, Any]) -> "Pictures":
        made = np.asarray(pictures).view(cls)
        made.settings = None if settings is None else dict(settings)
        made.inputs = dict(inputs)
        return made

    def __array_finalize__(self, source: np.ndarray | None) -> None:
        self.settings = None
        self.inputs = {}

    def __reduce__(self) -> tuple[Any, ...]:
        # An array's own pickle would lose the settings.
        return type(self), (np.asarray(self), self.settings, self.inputs)

    def settings_of(self, index: int) -> dict[str, Any]:
        """The settings that make picture number `index` alone again."""
        if self.settings is None:
            raise ValueError(
                "these pictures are a part or a copy, which has no settings; ask the pipeline's own result"
            )
        index = range(len(self))[index]  # an IndexError where there is no such picture

        def own(values: list[Any]) -> Any:
            return values[0] if len(values) == 1 else values[index]  # one serves all

        return {k: own(v) if k in _OF_EACH_PICTURE and isinstance(v, list) else v for k, v in self.settings.items()}

    def to_pil(self) -> list[Image.Image]:
        """PIL pictures."""
        return [Image.fromarray(np.asarray(picture)) for picture in self]

    def save(self, path: str | Path, notes: Mapping[str, Any] | None = None) -> list[Path]:
        """Write PNG files that carry their settings, each whole or not at all; folders are made.

        Args:
            path: of the file. Several pictures get `_<seed>` after the name; without the suffix .png, a folder of `<seed>.png`.
            notes: what else the files should tell, such as the weights' names.

        Returns:
            the files, one a picture.

        Raises:
            ValueError: another suffix, or a part that has no settings.
        """
        path = Path(path)
        settings = [self.settings_of(i) for i in range(len(self))]
        if path.suffix.lower() not in ("", ".png"):
            raise ValueError(f"pictures are saved as PNG files, found the suffix {path.suffix!r} in {path}")
        names = [str(one["seed"]) for one in settings]
        names = names if len(set(names)) == len(names) else [f"{name}_{i}" for i, name in enumerate(names)]
        if not path.suffix:
            files = [path / f"{name}.png" for name in names]
        else:
            files = [path] if len(self) == 1 else [path.with_name(f"{path.stem}_{name}.png") for name in names]
        for file, picture, one in zip(files, self, settings, strict=True):
            write_settings_png(file, np.asarray(picture), {**(notes or {}), "settings": one, "inputs": self.inputs})
        return files


def write_settings_png(path: Path, picture: np.ndarray, text: Mapping[str, Any]) -> None:
    """Write a uint8 picture (H, W, 3) as PNG with a JSON text, whole or not at all."""
    info = PngImagePlugin.PngInfo()
    info.add_itxt(PNG_KEY, json.dumps(text, ensure_ascii=False), zip=False)
    data = io.BytesIO()
    Image.fromarray(picture).save(data, "PNG", pnginfo=info, compress_level=3)
    write_whole(path, data.getvalue())


def read_png_text(path: str | Path) -> dict[str, Any]:
    """What `save` noted in a PNG file: `settings`, `inputs` and the notes.

    Raises:
        ValueError: no such file, no picture, or one without that text.
    """
    try:
        with Image.open(path) as picture:
            picture.load()  # text may follow the pixels
            text = picture.info.get(PNG_KEY)
        found = json.loads(text) if isinstance(text, str) else None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read as a picture with settings: {error}") from error
    if not isinstance(found, dict) or not isinstance(found.get("settings"), dict):
        raise ValueError(f"{path} carries no settings; only PNG files written by this library's pipeline do")
    return found


def read_settings(path: str | Path) -> dict[str, Any]:
    """The pipeline's arguments that made the picture in a PNG file: `pipeline(hint, **read_settings(path))` makes it again."""
    return read_png_text(path)["settings"]
