"""Weights files opened as mappings from key to lazy tensor, whatever wrote them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.files.errors import CheckpointError, about
from ldm.files.locating import WEIGHT_STEMS, choose_weights, locate
from ldm.files.pickles import Placeholder
from ldm.files.safetensors_files import MAX_HEADER, read_safetensors
from ldm.files.tensors import LazyTensor, OpenFile, WeightsFile
from ldm.files.torch_files import ZIP_MAGIC, check_repetition, read_torch_legacy, read_torch_zip

COMPONENTS = ("unet", "vae", "text_encoder", "controlnet")  # of a diffusers pipeline, those that are read
_MAX_JSON = 32 * 2**20


def open_weights(path: str | Path) -> WeightsFile:
    """Open a safetensors file, a torch file of either format, or a diffusers folder, told apart by their content.

    A folder may hold one network (`config.json` and weights, also in shards) or a pipeline (`model_index.json` and a
    folder for each component); a pipeline's keys are `<component>/<key>`, e.g. `unet/conv_in.weight`.

    Args:
        path: a file or folder, the name of packaged weights, or `hf://owner/name[/file]`.

    Raises:
        CheckpointError: it does not exist (`MissingFileError`), is damaged or something else, or holds more than tensors
            and plain values where the weights are. The message names the file and the way out.
    """
    place = locate(path)
    with about(place):
        return _open_folder(place) if place.is_dir() else _open_file(place)


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a weights file or folder under its own keys, on the CPU.

    Raises:
        CheckpointError: as `open_weights`.
    """
    with open_weights(path) as file:
        return {key: tensor.read() for key, tensor in file.items()}


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Everything in a torch file of a training run as it was saved, its tensors read, on the CPU.

    Raises:
        CheckpointError: as `open_weights`; or the file is none of torch.save, or holds more than tensors, dicts, lists, tuples and
            plain values.
    """
    with open_weights(path) as file, about(file.path):
        if file.content is None:
            raise CheckpointError(
                f"no checkpoint of a training run: it is a {file.format} one, which holds tensors alone"
            )
        size, held = file.path.stat().st_size, 0
        built: dict[int, Any] = {}  # by the id of what it was built of: a file may use one part many times

        def build(part: Any) -> Any:
            nonlocal held
            if isinstance(part, Placeholder):
                raise CheckpointError(
                    f"holds {part.name}, which is not executed; only tensors and plain values are read"
                )
            if not isinstance(part, (LazyTensor, dict, list, tuple)):
                return part
            if id(part) not in built:
                if isinstance(part, LazyTensor):
                    held += part.nbytes + part.gaps
                    check_repetition(held, size)
                    made: Any = part.read()
                elif isinstance(part, dict):
                    made = {build(key): build(value) for key, value in part.items()}
                else:
                    made = type(part)(build(item) for item in part)
                built[id(part)] = made
            return built[id(part)]

        try:
            return build(file.content)
        except RecursionError as error:
            raise CheckpointError("its values are nested too deeply") from error


def _open_file(path: Path) -> WeightsFile:
    """Read the directory of a file by the format that its first bytes show."""
    file = OpenFile(path)
    with about(path), ExitStack() as opened:
        opened.callback(file.stream.close)
        start, other = file.read(0, 9), _other_content(file)
        if start.startswith(ZIP_MAGIC):
            made = read_torch_zip(file)
        elif (start[8:] == b"{" and int.from_bytes(start[:8], "little") <= MAX_HEADER) or (
            path.suffix == ".safetensors" and other is None and start[:1] != b"\x80"
        ):
            made = read_safetensors(file)
        elif start[:1] == b"\x80" and start[1:2] <= b"\x05":
            made = read_torch_legacy(file)
        else:
            unknown = "neither a safetensors file nor one of torch.save"
            raise CheckpointError(other or f"{unknown}; it begins with {start[:4]!r} and may be damaged")
        made.opened = opened.pop_all()
        return made


def _other_content(file: OpenFile) -> str | None:
    """What a file that is no weights file is, in words, if its beginning shows it."""
    if file.size == 0:
        return "empty; the download failed"
    start = file.read(0, 1024)
    if start.startswith(b"L119547037146038801333356L"):
        return "a torch file of pickle protocol 0 or 1; load it with torch and save it again"
    if start.startswith((b"\x1f\x8b", b"7z\xbc\xaf", b"Rar!")) or start[257:262] == b"ustar":
        return "an archive (gzip, 7z, rar or tar); unpack it first"
    if not any(start):
        return "nothing but zeros at its start; the download failed or the disk was full"
    text = start.decode("utf-8", errors="replace").lstrip("\ufeff \t\r\n").lower()
    if text.startswith("version https://git-lfs"):
        return "a git-lfs pointer, not the weights themselves; run `git lfs pull`, or download the file from its page"
    if text.startswith("<") or "<html" in text:
        return "an HTML page, not weights: the download failed (a login, a licence to accept, a wrong address)"
    if sum(c == "\ufffd" or (ord(c) < 32 and c not in "\t\r\n") for c in text) <= 1:
        return f"a text file, not weights: the download failed or the name is wrong; it begins {text[:60]!r}"
    return None


def _open_folder(folder: Path) -> WeightsFile:
    """A folder of diffusers: the files of its parts as one mapping."""
    made = WeightsFile(folder, "folder", {})
    foreign: set[str] = set()
    with ExitStack() as opened:
        for part in _read_configs(folder, made.configs):
            prefix = f"{part}/" if part else ""
            for path, wanted in _weight_files(folder / part).items():
                file = opened.enter_context(_open_file(path))
                missing = next((key for key in wanted or () if key not in file), None)
                if missing is not None:
                    raise CheckpointError(f"lacks {missing!r}, which the index of its folder places there", path)
                made.data |= {prefix + key: file[key] for key in wanted or file}
                made.metadata |= file.metadata
                foreign |= set(file.foreign)
        made.foreign = tuple(sorted(foreign))
        made.opened = opened.pop_all()
        return made


def _read_configs(folder: Path, configs: dict[str, dict[str, Any]]) -> list[str]:
    """Read a folder's JSON configurations, and say which parts of it hold weights; "" stands for the folder itself."""
    if not (folder / "model_index.json").is_file():
        if (folder / "config.json").is_file():
            configs[""] = read_json(folder / "config.json")
        elif choose_weights({path.name for path in folder.iterdir()}) is None:
            raise CheckpointError("a folder without model_index.json, config.json or weights; name a file in it")
        return [""]
    configs[""] = index = read_json(folder / "model_index.json")
    # An index names the parts that belong to it; a part of an older export may still lie beside them.
    known = {name for name in COMPONENTS if type(index.get(name)) is list and index[name][:1] != [None]}
    parts = [name for name in COMPONENTS if (folder / name).is_dir() and (name in known or not known)]
    for name in (*parts, "scheduler"):
        config = folder / name / ("scheduler_config.json" if name == "scheduler" else "config.json")
        if config.is_file():
            configs[name] = read_json(config)
    if not parts:
        raise CheckpointError(f"a pipeline folder without any of {', '.join(COMPONENTS)}")
    return parts


def _weight_files(folder: Path) -> Mapping[Path, list[str] | None]:
    """The files of a network's weights and, where an index says, the keys in each."""
    chosen = choose_weights({path.name for path in folder.iterdir()})
    if chosen is None:
        raise CheckpointError(f"no weights here; expected e.g. {WEIGHT_STEMS[0]}.safetensors", folder)
    if not chosen.endswith(".json"):
        return {folder / chosen: None}
    index = folder / chosen
    weight_map = read_json(index).get("weight_map")
    if type(weight_map) is not dict or not weight_map:
        raise CheckpointError("has no weight_map", index)
    shards: dict[Path, list[str]] = {}
    for key, name in weight_map.items():
        if type(name) is not str or not name or name in (".", "..") or set(name) & set("/\\:\0"):
            raise CheckpointError(f"places {key[:100]!r} in {str(name)[:100]!r}, which is not a file name", index)
        shards.setdefault(folder / name, []).append(key)
    return shards


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: it cannot be read, is too large for a configuration, or holds something else.
    """
    file = OpenFile(path)
    with about(path), file.stream:
        if file.size > _MAX_JSON:
            raise CheckpointError("too large for a configuration")
        try:
            parsed = json.loads(file.read(0, file.size).decode("utf-8"))
        except (ValueError, RecursionError) as error:  # ValueError also for a number of thousands of digits
            raise CheckpointError(f"not valid JSON: {str(error)[:100]}") from error
        if type(parsed) is not dict:
            raise CheckpointError("not a JSON object")
        return parsed
