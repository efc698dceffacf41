"""Writing weights files, one tensor at a time.

Everything is written under another name beside its target, or inside it where that is a folder which exists, and renamed when
it is complete and on the disk. What ends the process in order removes what was begun; a kill leaves `.NAME.xxxxxxxx.partial`,
which nothing takes for weights.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import uuid
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from tqdm import tqdm

from ldm.files.errors import CheckpointError, about
from ldm.files.locating import SUFFIXES, choose_weights, locate
from ldm.files.opening import read_json
from ldm.files.safetensors_files import MAX_HEADER, METADATA
from ldm.files.tensors import SAFETENSORS_NAMES, STORAGE_NAMES, LazyTensor, Tensors, cast

TORCH_SUFFIXES = SUFFIXES[1:]
_ALIGNMENT = 64  # bytes; where torch.save places tensors in its archives, so that they can be mapped
_SPARE = 1 << 20  # bytes of a file beyond its tensors': header or directory
_PARTIAL = ".partial"  # the end of a temporary name
_NAME_START = 40  # characters of its target's name that a temporary name begins with: the whole may be too long

Content = Mapping[str, Tensor | LazyTensor] | dict[str, Any] | str


def write_weights(
    path: str | Path,
    tensors: Mapping[str, Tensor | LazyTensor],
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype | str | None = None,
    keep: Container[str] = (),
    overwrite: bool = False,
    progress: bool = True,
) -> Path:
    """Write a weights file, holding one tensor in memory at a time.

    Args:
        path: its suffix chooses the format: `.safetensors`, or torch's zip format for `.ckpt`, `.pth`, `.pt`, `.bin`.
            Of a link, the file that it leads to is written.
        tensors: by key; lazy ones are read as they are written.
        metadata: texts to keep in a safetensors file; torch's format has no place for them.
        dtype: of floating-point tensors, e.g. `torch.float16` or "bfloat16"; as they are by default.
        keep: keys that keep their dtype.
        overwrite: replace an existing file.
        progress: show a bar on stderr.

    Raises:
        CheckpointError: the file exists, the suffix is unknown, the disk has too little space, a tensor cannot be
            stored in the format, or a value is too large for `dtype`. Nothing is left behind.
    """
    check_output(path, overwrite)
    _write(Path(path), {"": cast(tensors, dtype, keep)}, metadata or {}, overwrite, progress)
    return Path(path)


def write_folder(
    path: str | Path,
    files: Mapping[str, Content],
    dtype: torch.dtype | str | None = None,
    keep: Container[str] = (),
    overwrite: bool = False,
    progress: bool = True,
) -> Path:
    """Write a folder of weights and configurations, as diffusers has them; the rest is as of `write_weights`.

    Args:
        path: a new folder, an empty one, or (with `overwrite`) one of diffusers, in which only the files named in `files`
            are replaced: whatever else lies there stays.
        files: content by name relative to the folder: tensors for a weights file, a dict for `.json`, or a text.
    """
    check_output(path, overwrite, files=files)
    contents: dict[str, Tensors | bytes] = {}
    for name, content in files.items():
        if name.endswith(SUFFIXES) and not isinstance(content, str):
            contents[name] = cast(content, dtype, keep)
        else:
            text = content if isinstance(content, str) else json.dumps(content, indent=2) + "\n"
            contents[name] = text.encode("utf-8")
    _write(Path(path), contents, {}, overwrite, progress)
    return Path(path)


def _write(
    path: Path, contents: dict[str, Tensors | bytes], metadata: Mapping[str, str], overwrite: bool, progress: bool
) -> None:
    """Write files below `path`, or itself where the name is ""; they take their places when all are complete."""
    with about(path, "written"):
        place = _follow(path)
        files = {name: content for name, content in contents.items() if not isinstance(content, bytes)}
        for name, tensors in files.items():
            _check_storable(Path(name or path).suffix.lower(), tensors, metadata)
        total = check_room(place, files.values())
        shown = "".join(character if character.isprintable() else "?" for character in path.name)
        options = {"unit": "B", "unit_scale": True, "dynamic_ncols": True, "disable": None if progress else True}
        with _temporary(place) as temporary, tqdm(desc=shown, total=total, **options) as bar:
            for name, content in contents.items():
                (temporary / name).parent.mkdir(parents=True, exist_ok=True)
                with open(temporary / name, "xb") as file:
                    if isinstance(content, bytes):
                        file.write(content)
                    elif Path(name or path).suffix.lower() in TORCH_SUFFIXES:
                        _write_torch(file, content, bar.update)
                    else:
                        _write_safetensors(file, content, {"format": "pt", **metadata}, bar.update)
                    file.flush()
                    os.fsync(file.fileno())
            check_output(path, overwrite, None if "" in contents else contents)  # it may have appeared in the meantime
            if not place.is_dir():
                os.replace(temporary, place)
                return
            for name in contents:
                (place / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(temporary / name, place / name)


def check_room(place: Path, files: Iterable[Tensors]) -> int:
    """Raise unless the disk has room for files of these tensors in or beside `place`; returns the tensors' bytes."""
    sizes = [sum(tensor.nbytes for tensor in tensors.values()) for tensors in files]
    needed, free = sum(sizes) + _SPARE * len(sizes), shutil.disk_usage(_folder_of(place)).free
    if needed > free:
        problem = f"needs {needed / 1e6:,.1f} MB of disk, and {free / 1e6:,.1f} MB are free"
        raise CheckpointError(f"{problem}; choose another disk, or free some of this one", place)
    return sum(sizes)


def check_output(
    path: str | Path,
    overwrite: bool = False,
    files: Iterable[str] | None = None,
    inputs: Iterable[str | Path] = (),
) -> None:
    """Raise unless an output may be written, so that long work need not begin in vain.

    Args:
        path: of a file, or of a folder where `files` names what is to be written there (it may be empty).
        overwrite: whether something that exists may be replaced.
        inputs: what is read to make the output. It is never replaced, `overwrite` or not.
    """
    path = Path(path)
    with about(path, "written"):
        place, folder = _follow(path), files is not None
        exists = place.exists()
        if not place.parent.is_dir():
            raise CheckpointError(f"its folder {str(path.parent)!r} does not exist; create it first")
        if not folder and path.suffix.lower() not in SUFFIXES:
            raise CheckpointError(f"end its name in one of {', '.join(SUFFIXES)}, which chooses the format")
        if not exists:
            return
        for source in map(_follow, map(locate, inputs)):
            # A folder may hold links to the files and folders that it stands for, as the hub's cache does.
            parts = (source, *source.glob("*"), *source.glob("*/*"))
            same = any(part.exists() and os.path.samefile(part, place) for part in parts)  # also under another name
            if same or source in place.parents or any(place in _follow(part).parents for part in parts):
                raise CheckpointError("is also the input, or part of it; choose another name")
        if place.is_dir() != folder:
            raise CheckpointError("is a file; name a folder" if folder else "is a folder; name a file")
        if files is not None:
            if all(part.name.endswith(_PARTIAL) for part in place.iterdir()):
                return
            _check_folder(place, set(files))
        if not overwrite:
            raise CheckpointError("exists already; choose another name, or overwrite it with --force")


def _check_folder(folder: Path, files: set[str]) -> None:
    """Raise unless a folder is one of diffusers, without other weights that would be read instead of those in `files`."""
    sign = next((folder / name for name in ("model_index.json", "config.json") if (folder / name).is_file()), None)
    try:
        known = sign is not None and isinstance(read_json(sign).get("_class_name"), str)
    except CheckpointError:
        known = False
    if not known:
        raise CheckpointError("is a folder with something else in it; name a new one")
    for name in files:  # a link in the place of a file is replaced, and what it leads to stays
        if not _follow((folder / name).parent).is_relative_to(folder):
            raise CheckpointError(f"has a link that leads out of it in the place of {name!r}; name a new one")
    for parent in {(folder / name).parent for name in files if name.endswith(SUFFIXES)}:
        for other in parent.iterdir() if parent.is_dir() else ():
            name = other.relative_to(folder).as_posix()
            if name not in files and choose_weights([other.name]):
                raise CheckpointError(f"also holds {name!r}, which might be read instead; name a new one")


def _follow(path: Path) -> Path:
    """Where a path leads: what a link points to is replaced, and the link stays."""
    return Path(os.path.realpath(path))


def _check_storable(suffix: str, tensors: Tensors, metadata: Mapping[str, str]) -> None:
    """Raise unless the format that a suffix stands for can hold all tensors, names and texts."""
    if not tensors:
        raise CheckpointError("there is nothing to write")
    torch_file = suffix in TORCH_SUFFIXES
    names = STORAGE_NAMES if torch_file else SAFETENSORS_NAMES
    for key, tensor in tensors.items():
        if tensor.dtype not in names or (key == METADATA and not torch_file):
            advice = "; write .safetensors" if torch_file else ""
            raise CheckpointError(f"{key!r} of {tensor.dtype} cannot be stored in a {suffix} file{advice}")
    for text in (*tensors, *metadata, *metadata.values()):
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise CheckpointError(f"{text[:100]!r} is not valid text and cannot be written") from error


def _folder_of(place: Path) -> Path:
    """The folder in which something is written: one that exists may be on a disk of its own, with permissions of its own."""
    return place if place.is_dir() else place.parent


@contextmanager
def _temporary(place: Path) -> Iterator[Path]:
    """A free name beside `place`, or in it; what still has it at the end is removed."""
    temporary = _folder_of(place) / f".{place.name[:_NAME_START]}.{uuid.uuid4().hex[:8]}{_PARTIAL}"
    try:
        yield temporary
    finally:
        _remove(temporary)


def remove_unfinished_weights(folder: str | Path, names: str = "*") -> None:
    """Remove what killed processes have left of outputs with such names in a folder into which nobody is writing now.

    Args:
        names: a pattern, as of `glob`.
    """
    for left in Path(folder).glob(f".{names}.{'[0-9a-f]' * 8}{_PARTIAL}"):
        _remove(left)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _write_tensor(file: IO[bytes], key: str, tensor: LazyTensor, advance: Callable[[int], Any]) -> None:
    value = tensor.read()
    if tuple(value.shape) != tensor.shape or value.dtype != tensor.dtype:
        raise CheckpointError(f"{key!r} was announced as {tensor}, and is {value.dtype} {list(value.shape)}")
    flat = value.detach().cpu().contiguous().view(-1)
    file.write(flat.view(torch.uint8).numpy().data)
    advance(tensor.nbytes)


def _write_safetensors(
    file: IO[bytes], tensors: Tensors, metadata: dict[str, str], advance: Callable[[int], Any]
) -> None:
    """Length, JSON header, tensors; wide dtypes first, so that every tensor is aligned for its own."""
    tensors = dict(sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize))
    header: dict[str, Any] = {METADATA: metadata}
    position = 0
    for key, tensor in tensors.items():
        span = [position, position + tensor.nbytes]
        header[key] = {"dtype": SAFETENSORS_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": span}
        position = span[1]
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER:
        raise CheckpointError("the metadata is too long for a safetensors file")
    file.write(len(text).to_bytes(8, "little") + text)
    for key, tensor in tensors.items():
        _write_tensor(file, key, tensor, advance)


class _StorageId(tuple):
    """What stands for a tensor's storage in the pickle of a torch file."""


class _Pickler(pickle.Pickler):
    """Pickles lazy tensors as torch pickles its own."""

    count = 0

    def persistent_id(self, obj: Any) -> Any:
        return tuple(obj) if isinstance(obj, _StorageId) else None

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, LazyTensor):
            return NotImplemented
        storage = _StorageId(("storage", getattr(torch, STORAGE_NAMES[obj.dtype]), str(self.count), "cpu", obj.numel))
        self.count += 1
        stride = torch.empty(obj.shape, device="meta").stride()
        return torch._utils._rebuild_tensor_v2, (storage, 0, obj.shape, stride, False, OrderedDict())


def _write_torch(file: IO[bytes], tensors: Tensors, advance: Callable[[int], Any]) -> None:
    """The zip archive of `torch.save`: a pickle that rebuilds a dict of tensors, and one stored member for each."""
    pickled = io.BytesIO()
    # Copies, since a pickle would store what stands under two keys once, and every key has a member of its own.
    _Pickler(pickled, protocol=2).dump({key: replace(tensor) for key, tensor in tensors.items()})
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:

        def member(name: str) -> IO[bytes]:
            info = zipfile.ZipInfo(f"archive/{name}")
            # Before the data stand a head of 30 bytes, the name, 20 bytes for long sizes, and the padding with its own head.
            padding = -(file.tell() + 30 + len(info.filename) + 20 + 4) % _ALIGNMENT
            info.extra = b"FB" + padding.to_bytes(2, "little") + bytes(padding)
            return archive.open(info, "w", force_zip64=True)

        for name, content in {"data.pkl": pickled.getvalue(), "byteorder": b"little", "version": b"3\n"}.items():
            with member(name) as stream:
                stream.write(content)
        for number, (key, tensor) in enumerate(tensors.items()):
            with member(f"data/{number}") as stream:
                _write_tensor(stream, key, tensor, advance)
