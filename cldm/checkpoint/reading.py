"""Weights files opened as mappings from key to tensor, whatever wrote them; each tensor is read when asked for."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cldm.checkpoint.errors import CheckpointError, system_errors
from cldm.checkpoint.safetensors_file import looks_like_safetensors, read_safetensors
from cldm.checkpoint.storage import Entry, FileBytes
from cldm.checkpoint.torch_file import ZIP_MAGIC, TorchContent, read_torch_legacy, read_torch_zip

COMPONENTS = ("unet", "vae", "text_encoder", "controlnet")
_CONFIG_FOLDERS = (*COMPONENTS, "scheduler")
WEIGHT_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
_WEIGHT_NAME = re.compile(  # with a variant such as `.fp16`: of one file, or of the index of several
    rf"(?:{'|'.join(WEIGHT_STEMS)})(\.\w+)?\.(?:safetensors|bin)(?:\.index(\.\w+)?\.json)?"
)
_MAX_JSON = 32 * 2**20


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of an entry."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


@dataclass(eq=False)
class Checkpoint(Mapping[str, Tensor]):
    """An open weights file or folder: keys in the file's order, and tensors that are read when asked for.

    Nothing in the file is executed, and reading allocates no more than the tensor asked for. Use it as a context
    manager, or call `close`; tensors outlive it.

    Attributes:
        path: the file or folder.
        format: "safetensors", "torch-zip", "torch-legacy", or "folder" (of diffusers).
        metadata: texts that a safetensors file carries.
        wrapping: the keys under which the tensors lay, e.g. `("state_dict",)`, also "model" or "module"; not part of
            the keys here.
        extras: other values beside the tensors, such as `global_step`; a `Placeholder` for what is not plain.
        configs: a folder's JSON configurations by component; "" for the folder's own.
        foreign: names in the pickle that would have been imported by another reader, and were not.
    """

    path: Path
    format: str
    _entries: dict[str, Entry]
    metadata: dict[str, str] = field(default_factory=dict)
    wrapping: tuple[str, ...] = ()
    extras: dict[str, Any] = field(default_factory=dict)
    configs: dict[str, dict[str, Any]] = field(default_factory=dict)
    foreign: tuple[str, ...] = ()

    def __getitem__(self, key: str) -> Tensor:
        """The tensor, contiguous, in memory of its own on the CPU."""
        return self._entries[key].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: object) -> bool:
        return key in self._entries

    def entry(self, key: str) -> Entry:
        """Where the tensor lies in its file."""
        return self._entries[key]

    def info(self, key: str) -> TensorInfo:
        """Shape and dtype, without reading the tensor."""
        entry = self._entries[key]
        return TensorInfo(entry.shape, entry.dtype)

    def read_into(self, key: str, out: Tensor) -> None:
        """Fill `out` with the tensor, converting where dtype or device differ.

        With equal dtype and contiguous CPU memory the bytes go straight from the file into `out`.

        Raises:
            CheckpointError: `out` has another shape, or the file cannot be read.
        """
        entry = self._entries[key]
        if tuple(out.shape) != entry.shape:
            raise CheckpointError(
                f"{self.path}: entry {key!r} has shape {list(entry.shape)}, its place has {list(out.shape)}"
            )
        entry.read_into(out)

    def map(self, key: str) -> Tensor:
        """The tensor as a view of the file in memory: free to make, read from disk when first touched.

        Writing to it changes a private copy, not the file. Strides are those of the file. The file must not be
        shortened or written in place while the tensor lives, which would end the process (replacing it by a new file is
        harmless); where that may happen, as with a file that training overwrites, use `self[key]`.
        """
        return self._entries[key].map()

    def close(self) -> None:
        """Close the files; reading afterwards is an error, tensors already made stay."""
        for file in {id(entry.file): entry.file for entry in self._entries.values()}.values():
            file.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.path)!r}, {self.format}, {len(self)} tensors)"


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a safetensors file, a torch file of either format, or a diffusers folder, told apart by their content.

    A folder may hold one network (`config.json` and weights, also sharded) or a pipeline (`model_index.json` and a
    folder a component); a pipeline's keys are `<component>/<key>`, e.g. `unet/conv_in.weight`.

    Raises:
        CheckpointError: it does not exist, is damaged or something else, or holds more than tensors and plain values
            where the weights are. The message names the file and the way out.
    """
    path = Path(path)
    with system_errors(path, "cannot be read"):
        return _open_folder(path) if path.is_dir() else _open_file(path)


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a weights file or folder, in memory of their own on the CPU.

    Raises:
        CheckpointError: as `open_checkpoint`.
    """
    with open_checkpoint(path) as checkpoint:
        return dict(checkpoint)


def _open_file(path: Path) -> Checkpoint:
    file = None
    try:
        file = FileBytes(path)
        return _recognise(file)
    except CheckpointError as error:
        if file is not None:
            file.close()
        text = str(error)
        raise CheckpointError(text if text.startswith(str(path)) else f"{path}: {text}") from error.__cause__
    except BaseException:
        if file is not None:
            file.close()
        raise


def _recognise(file: FileBytes) -> Checkpoint:
    """Read the directory of the file by the format that its first bytes show."""
    start = file.read(0, 2)
    if file.read(0, 4) == ZIP_MAGIC:
        return _from_torch(file, "torch-zip", read_torch_zip(file))
    if len(start) == 2 and start[0] == 0x80 and start[1] <= 5 and not looks_like_safetensors(file):
        return _from_torch(file, "torch-legacy", read_torch_legacy(file))
    if looks_like_safetensors(file) or (file.path.suffix == ".safetensors" and _other_content(file) is None):
        entries, metadata = read_safetensors(file)
        if not entries:
            raise CheckpointError("holds no tensors")
        return Checkpoint(file.path, "safetensors", entries, metadata=metadata)
    raise CheckpointError(_other_content(file) or "neither a safetensors file nor one of torch.save; it may be damaged")


def _from_torch(file: FileBytes, format: str, content: TorchContent) -> Checkpoint:
    return Checkpoint(
        file.path, format, content.entries, wrapping=content.wrapping, extras=content.extras, foreign=content.foreign
    )


_OTHER_FORMATS = {
    b"\x1f\x8b": "compressed with gzip; unpack it first",
    b"7z\xbc\xaf": "a 7z archive; unpack it first",
    b"Rar!": "a RAR archive; unpack it first",
    b"L119547037146038801333356L": "a torch file of pickle protocol 0 or 1; load it with torch and save it again",
    b"PK": "an empty or split zip archive, not a weights file",
    b"GGUF": "a GGUF file, whose quantised weights are not supported",
    b"\x89HDF": "an HDF5 file (Keras); only safetensors and torch files are read",
    b"\x89PNG": "a PNG image, not a weights file",
    b"\xff\xd8\xff": "a JPEG image, not a weights file",
    b"\x93NUMPY": "a NumPy array; only safetensors and torch files are read",
}


def _other_content(file: FileBytes) -> str | None:
    """What a file that is no weights file is, in words, if its beginning shows it."""
    if file.size == 0:
        return "empty; the download failed"
    start = file.read(0, 1024)
    for magic, meaning in _OTHER_FORMATS.items():
        if start.startswith(magic):
            return meaning
    if start[257:262] == b"ustar":
        return "a tar archive; unpack it first"
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


def _open_folder(folder: Path) -> Checkpoint:
    if (folder / "model_index.json").is_file():
        parts = [name for name in COMPONENTS if (folder / name).is_dir()]
        if not parts:
            raise CheckpointError(f"{folder}: a pipeline folder without any of {', '.join(COMPONENTS)}")
        configs = {"": read_json(folder / "model_index.json")}
        for name in _CONFIG_FOLDERS:
            config = folder / name / ("scheduler_config.json" if name == "scheduler" else "config.json")
            if config.is_file():
                configs[name] = read_json(config)
    elif (folder / "config.json").is_file() or _weight_files(folder) is not None:
        parts = [""]
        configs = {"": read_json(folder / "config.json")} if (folder / "config.json").is_file() else {}
    else:
        raise CheckpointError(f"{folder}: a folder without model_index.json, config.json or weights; name a file in it")
    opened: list[Checkpoint] = []
    entries: dict[str, Entry] = {}
    metadata: dict[str, str] = {}
    try:
        for part in parts:
            files = _weight_files(folder / part)
            if files is None:
                raise CheckpointError(f"{folder / part}: no weights here; expected e.g. {WEIGHT_STEMS[0]}.safetensors")
            for path, wanted in files.items():
                checkpoint = _open_file(path)
                opened.append(checkpoint)
                missing = None if wanted is None else next((key for key in wanted if key not in checkpoint), None)
                if missing is not None:
                    raise CheckpointError(f"{path}: lacks {missing!r}, which the index of its folder places there")
                prefix = f"{part}/" if part else ""
                entries.update({prefix + key: checkpoint.entry(key) for key in wanted or checkpoint})
                metadata.update(checkpoint.metadata)
    except CheckpointError:
        for checkpoint in opened:
            checkpoint.close()
        raise
    foreign = tuple(sorted({name for checkpoint in opened for name in checkpoint.foreign}))
    return Checkpoint(folder, "folder", entries, metadata=metadata, configs=configs, foreign=foreign)


def _weight_files(folder: Path) -> dict[Path, list[str] | None] | None:
    """Files of a network's weights and, where an index says, the keys in each; safetensors, full precision first."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    variants = {match[1] or match[2] or "" for name in names if (match := _WEIGHT_NAME.fullmatch(name))}
    for variant in sorted(variants, key=lambda variant: (variant != "", variant != ".fp16", variant)):
        for suffix in (".safetensors", ".bin"):
            for stem in WEIGHT_STEMS:
                single = folder / f"{stem}{variant}{suffix}"
                if single.is_file():
                    return {single: None}
                index = folder / f"{stem}{suffix}.index{variant}.json"
                if index.is_file():
                    return _shards(index)
    return None


def _shards(index: Path) -> dict[Path, list[str] | None]:
    weight_map = read_json(index).get("weight_map")
    if type(weight_map) is not dict or not weight_map:
        raise CheckpointError(f"{index}: has no weight_map")
    shards: dict[Path, list[str] | None] = {}
    for key, name in weight_map.items():
        if type(name) is not str or not name or name in (".", "..") or set(name) & set("/\\:\0"):
            raise CheckpointError(f"{index}: places {key[:100]!r} in {str(name)[:100]!r}, which is not a file name")
        shards.setdefault(index.parent / name, []).append(key)
    return shards


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: it cannot be read, is too large for a configuration, or holds something else.
    """
    with system_errors(path, "cannot be read"):
        if path.stat().st_size > _MAX_JSON:
            raise CheckpointError(f"{path}: too large for a configuration")
        text = path.read_bytes()
    try:
        parsed = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # ValueError also for a number of thousands of digits
        raise CheckpointError(f"{path}: not valid JSON: {str(error)[:100]}") from error
    if type(parsed) is not dict:
        raise CheckpointError(f"{path}: not a JSON object")
    return parsed
