"""Writing weights files: one tensor at a time, and all or nothing.

A file is written under another name beside its target and renamed when it is complete and on the disk. What interrupts
the writing removes it; what kills the process leaves it under a name that nobody takes for weights.
"""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import shutil
import signal
import threading
import uuid
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO

import torch
from torch import Tensor
from tqdm import tqdm

from cldm.checkpoint.errors import CheckpointError, system_errors
from cldm.checkpoint.layout import SCHEDULE_KEYS
from cldm.checkpoint.lazy import LazyTensor, lazy_entries
from cldm.checkpoint.reading import COMPONENTS, WEIGHT_STEMS, TensorInfo, read_json
from cldm.checkpoint.safetensors_file import DTYPES, MAX_HEADER, METADATA
from cldm.checkpoint.storage import FileBytes, contiguous_stride
from cldm.terminal import printable

SAFETENSORS_SUFFIX = ".safetensors"
TORCH_SUFFIXES = (".ckpt", ".pth", ".pt", ".bin")
FLOAT_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_DTYPE_ALIASES = {"fp32": "float32", "fp16": "float16", "half": "float16", "bf16": "bfloat16"}
_SAFETENSORS_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_STORAGE_NAMES = {
    **{torch.float64: "DoubleStorage", torch.float32: "FloatStorage", torch.float16: "HalfStorage"},
    **{torch.bfloat16: "BFloat16Storage", torch.int64: "LongStorage", torch.int32: "IntStorage"},
    **{torch.int16: "ShortStorage", torch.int8: "CharStorage", torch.uint8: "ByteStorage", torch.bool: "BoolStorage"},
    **{torch.complex64: "ComplexFloatStorage", torch.complex128: "ComplexDoubleStorage"},
}
_ALIGNMENT = 64  # bytes; where torch.save places tensors in its archives, so that they can be mapped
_SPARE = 1 << 20  # bytes beyond the tensors' own: headers and directories
_CHUNK = 1 << 20  # bytes handed to the file at once; few enough to stay in the processor's cache between read and write
_SEND = 32 << 20  # bytes after which they are sent on to the disk
# Where the system cannot copy between these two files, it is done here: other disks, file systems, or kernels.
_NOT_COPIED = {errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF, errno.EPERM, errno.ETXTBSY}
_NAME_START = 40  # characters of its target's name that a temporary name begins with
_FOLDER_SIGNS = ("model_index.json", "config.json")
_PIPELINE_FOLDERS = (*COMPONENTS, "scheduler", "tokenizer", "safety_checker", "feature_extractor", "image_encoder")
_COMPONENT_FILES = (*WEIGHT_STEMS, "merges.txt")  # beginnings of names; and whatever is JSON


def write_checkpoint(
    path: str | Path,
    entries: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype | str | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> Path:
    """Write a weights file, holding one tensor in memory at a time.

    Args:
        path: its suffix chooses the format: `.safetensors`, or torch's zip format for `.ckpt`, `.pth`, `.pt`, `.bin`.
            Of a link, the file that it leads to is written, and the link stays.
        entries: tensors by key; an open checkpoint or `LazyEntries` is read as it is written.
        metadata: texts to keep in a safetensors file; torch's format has no place for them.
        dtype: of floating-point entries, e.g. `torch.float16` or "bfloat16"; as they are by default. The noise
            schedule's entries keep theirs, since half precision would change the sampling steps.
        overwrite: replace an existing file.
        progress: show a bar on stderr.

    Raises:
        CheckpointError: the file exists, the suffix is unknown, the disk has too little space, a tensor cannot be
            stored in the format, or a value is too large for `dtype`. Nothing is left behind.
    """
    write_all([Output(Path(path), entries, dict(metadata or {}))], dtype, overwrite, progress)
    return Path(path)


def write_folder(
    path: str | Path,
    files: Mapping[str, Mapping[str, Tensor] | dict[str, Any] | str],
    dtype: torch.dtype | str | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> Path:
    """Write a folder of weights and configurations, complete or not at all.

    Args:
        path: the folder, which must not exist, be empty, or (with `overwrite`) be one of diffusers with nothing else in
            it. Of a link, the folder that it leads to is written, and the link stays.
        files: content by name relative to the folder: tensors for a weights file, a dict for `.json`, or a text.
        dtype, overwrite, progress: as of `write_checkpoint`.

    Raises:
        CheckpointError: as `write_checkpoint`.
    """
    write_all([Output(Path(path), files, folder=True)], dtype, overwrite, progress)
    return Path(path)


@dataclass(frozen=True)
class Output:
    """What is to be written at a path.

    Attributes:
        path: its suffix chooses the format of a file.
        content: tensors by key; of a folder, as `write_folder` takes them, by file name.
        metadata: texts to keep in a safetensors file.
        folder: whether it is a folder.
    """

    path: Path
    content: Mapping[str, Any]
    metadata: Mapping[str, str] = field(default_factory=dict)
    folder: bool = False

    def files(self, dtype: torch.dtype | None) -> dict[str, str | list[_Plan]]:
        """Texts and plans by name below the path; of a file, its own plan under the name ""."""
        if not self.folder:
            return {"": _plan(self.path, self.content, dtype)}
        return {
            name: _plan(self.path / name, content, dtype) if is_weights_file(name) else _text(content)
            for name, content in self.content.items()
        }


def write_all(
    outputs: Iterable[Output], dtype: torch.dtype | str | None = None, overwrite: bool = False, progress: bool = True
) -> None:
    """Write several files and folders: none takes its place before all are complete.

    Args:
        outputs: what to write where.
        dtype, overwrite, progress: as of `write_checkpoint`.

    Raises:
        CheckpointError: as `write_checkpoint`. Nothing is left behind.
    """
    dtype = parse_dtype(dtype)
    planned = [(output, output.files(dtype)) for output in outputs]
    for output, files in planned:
        _check_metadata(output)
        for name, content in files.items():
            if not isinstance(content, str):
                _writer(output.path / name)
        check_target(output.path, overwrite, output.folder)
    _check_space({output.path: _needed(files.values()) for output, files in planned})
    with interruptible(), ExitStack() as places:
        for output, files in planned:
            temporary = places.enter_context(_replacing(output.path, overwrite))
            total = sum(_size(content) for content in files.values())
            with _bar(output.path.name, total, progress) as bar:
                for name, content in files.items():
                    (temporary / name).parent.mkdir(parents=True, exist_ok=True)
                    with _create(temporary / name) as file:
                        if isinstance(content, str):
                            file.write(content.encode("utf-8"))
                            bar.update(len(content))
                        else:
                            metadata = {"format": "pt", **output.metadata}
                            _writer(output.path / name)(file, content, metadata, bar.update)
                        _flush(file)


def parse_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A floating-point dtype by its name, `float32`, `float16` (`fp16`, `half`) or `bfloat16` (`bf16`)."""
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    name = _DTYPE_ALIASES.get(dtype, dtype)
    if name not in FLOAT_DTYPES:
        raise CheckpointError(f"unknown dtype {dtype!r}; known are {', '.join([*FLOAT_DTYPES, *_DTYPE_ALIASES])}")
    return FLOAT_DTYPES[name]


def is_weights_file(path: str | Path) -> bool:
    """Whether a path's suffix is that of a weights file, rather than of a folder."""
    return Path(path).suffix.lower() in (SAFETENSORS_SUFFIX, *TORCH_SUFFIXES)


@contextmanager
def interruptible() -> Iterator[None]:
    """Turn the signals that would end the process at once into an exception, so that what is half done is cleared away.

    Signals for which the program has a handler of its own keep it. Outside the main thread nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    names = [name for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    replaced = [s for s in (getattr(signal, name) for name in names) if signal.getsignal(s) is signal.SIG_DFL]

    def stop(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    for number in replaced:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in replaced:
            signal.signal(number, signal.SIG_DFL)


@dataclass(frozen=True)
class _Plan:
    """An entry to be written: its description in the file, and what it is made of."""

    key: str
    info: TensorInfo
    entry: LazyTensor

    def write(self, file: BinaryIO, advance: Callable[[int], Any]) -> None:
        done = 0
        if self.entry.stored is None or self.entry.info != self.info:
            chunks = self._read()
        else:
            if isinstance(file, _CopyingWriter):
                done = file.copy_from(self.entry.stored.file, self.entry.stored.start, self.info.nbytes, advance)
            chunks = self._copied(done)
        for chunk in chunks:
            advance(file.write(chunk))

    def _copied(self, begin: int) -> Iterator[memoryview]:
        """The bytes from `begin` as they lie in another file, a chunk at a time."""
        stored, buffer = self.entry.stored, memoryview(bytearray(min(_CHUNK, self.info.nbytes)))
        for done in range(begin, self.info.nbytes, _CHUNK):
            chunk = buffer[: min(_CHUNK, self.info.nbytes - done)]
            stored.file.read_into(stored.start + done, chunk)
            yield chunk

    def _read(self) -> Iterator[memoryview]:
        """The bytes of the tensor in the dtype of the file, a chunk at a time."""
        tensor = self.entry.read()
        if tuple(tensor.shape) != self.info.shape:
            raise CheckpointError(f"{self.key!r} was announced as {self.info.shape}, and is {tuple(tensor.shape)}")
        stored = tensor.detach().to(device="cpu", dtype=self.info.dtype).contiguous()
        if stored.dtype != tensor.dtype and not torch.isfinite(stored).all() and torch.isfinite(tensor).all():
            raise CheckpointError(f"{self.key!r} has values too large for {self.info.dtype}; use bfloat16 or float32")
        if stored.numel():
            data = memoryview(stored.view(-1).view(torch.uint8).numpy())
            yield from (data[start : start + _CHUNK] for start in range(0, len(data), _CHUNK))


def _plan(path: Path, entries: Mapping[str, Tensor], dtype: torch.dtype | None) -> list[_Plan]:
    if not entries:
        raise CheckpointError(f"{path}: there is nothing to write")

    def plan(key: str, entry: LazyTensor) -> _Plan:
        _check_text(path, key)
        info = entry.info
        if dtype is not None and info.dtype.is_floating_point and key not in SCHEDULE_KEYS:
            info = TensorInfo(info.shape, dtype)
        return _Plan(key, info, entry)

    return [plan(key, entry) for key, entry in lazy_entries(entries).items()]


def _check_metadata(output: Output) -> None:
    for text in (text for pair in output.metadata.items() for text in pair):
        _check_text(output.path, text)


def _check_text(path: Path, text: str) -> None:
    """Raise unless a name or a metadata text can be written as UTF-8, as the formats need it."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise CheckpointError(f"{path}: {text[:100]!r} is not valid text and cannot be written") from error


def _size(content: str | list[_Plan]) -> int:
    return len(content) if isinstance(content, str) else sum(plan.info.nbytes for plan in content)


def _needed(files: Iterable[str | list[_Plan]]) -> int:
    return sum(_size(content) + _SPARE for content in files)


def _bar(name: str, total: int, progress: bool) -> tqdm:
    return tqdm(
        desc=printable(name),
        total=total,
        unit="B",
        unit_scale=True,
        unit_divisor=1000,
        disable=not progress,
        dynamic_ncols=True,
    )


def _text(content: Any) -> str:
    return content if isinstance(content, str) else json.dumps(content, indent=2) + "\n"


# The target: checked before anything is made, and replaced in one step.


def check_target(path: Path, overwrite: bool, folder: bool) -> None:
    """Raise unless a file (or a folder) may be written at `path`, so that long work need not begin in vain."""
    with system_errors(path, "cannot be written"):
        _check_target(path, _resolved(path), overwrite, folder)


def _check_target(path: Path, place: Path, overwrite: bool, folder: bool) -> None:
    if not place.parent.is_dir():
        raise CheckpointError(f"{path}: its folder {str(path.parent)!r} does not exist; create it first")
    if not place.exists():
        return
    if folder and not place.is_dir():
        raise CheckpointError(f"{path}: is a file; name a folder")
    if not folder and place.is_dir():
        raise CheckpointError(f"{path}: is a folder; name a file")
    if folder and place in (Path.cwd(), *Path.cwd().parents):
        raise CheckpointError(f"{path}: is the current folder or one above it; name a new one")
    if folder and not any(place.iterdir()):
        return
    if folder and not _is_ours(place):
        raise CheckpointError(f"{path}: is a folder with something else in it; name a new one")
    if not overwrite:
        raise CheckpointError(f"{path}: exists already; choose another name, or overwrite it with --force")


def _is_ours(folder: Path) -> bool:
    """Whether a folder is a network or a pipeline of diffusers and nothing else, so that replacing it loses nothing else."""
    sign = next((name for name in _FOLDER_SIGNS if (folder / name).is_file()), None)
    try:
        if sign is None or not isinstance(read_json(folder / sign).get("_class_name"), str):
            return False
    except CheckpointError:
        return False
    return all(
        entry.name in _PIPELINE_FOLDERS and all(map(_is_component_file, entry.iterdir()))
        if entry.is_dir()
        else _is_component_file(entry)
        for entry in folder.iterdir()
    )


def _is_component_file(path: Path) -> bool:
    return path.is_file() and (path.suffix == ".json" or path.name.startswith(_COMPONENT_FILES))


def _resolved(path: Path) -> Path:
    """Where a path leads: what a link points to is replaced, and the link stays."""
    return Path(os.path.realpath(path))


def _check_space(needed: Mapping[Path, int]) -> None:
    """Raise unless each disk has room for all that is to be written to it."""
    disks: dict[int, int] = {}
    for path, size in needed.items():
        with system_errors(path, "cannot be written"):
            folder = _resolved(path).parent
            disk = folder.stat().st_dev
            free = shutil.disk_usage(folder).free
        disks[disk] = disks.get(disk, 0) + size
        if disks[disk] > free:
            raise CheckpointError(
                f"{path}: needs {disks[disk] / 1e9:.2f} GB of disk, and {free / 1e9:.2f} GB are free; "
                "choose another disk, or half precision with --dtype float16"
            )


@contextmanager
def _replacing(path: Path, overwrite: bool) -> Iterator[Path]:
    """A free name beside `path`; what was made there takes `path`'s place at the end, and is removed on any failure."""
    place = _resolved(path)
    # The name is cut, so that the longest name that a file may have can be written too.
    temporary = place.with_name(f".{place.name[:_NAME_START]}.{uuid.uuid4().hex[:8]}.partial")
    try:
        with system_errors(path, "cannot be written"):
            yield temporary
            if place.exists() and not overwrite and not place.is_dir():  # it may have appeared in the meantime
                raise CheckpointError(f"{path}: was created by someone else while this was being written")
            if place.is_dir():
                _exchange(temporary, place)
            else:
                os.replace(temporary, place)
            _flush_folder(place.parent)
    finally:
        _remove(temporary)


def _exchange(new: Path, folder: Path) -> None:
    """Put a new folder in the place of another; an interruption on the way leaves one of the two there."""
    previous = new.with_suffix(".previous")
    try:
        folder.rename(previous)
        new.rename(folder)
    finally:
        if folder.exists():
            _remove(previous)
        else:
            previous.rename(folder)


def _remove(path: Path) -> None:
    """Remove a file or a folder, as far as the system lets us."""
    with suppress(OSError):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


class _EagerFile(io.FileIO):
    """A new file whose bytes set out for the disk while more are written, so that the last flush has little to wait for."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "xb")
        self._sent = 0

    def write(self, data: Any) -> int:
        written = super().write(data)
        self.send()
        return written

    def send(self) -> None:
        """Let what was written so far begin its way to the disk."""
        end = self.tell()
        if end - self._sent >= _SEND and hasattr(os, "posix_fadvise"):
            # Bytes that are not on the disk yet cannot be dropped; being told to, Linux begins to write them and goes on.
            os.posix_fadvise(self.fileno(), self._sent, end - self._sent, os.POSIX_FADV_DONTNEED)
            self._sent = end


class _CopyingWriter(io.BufferedWriter):
    """A buffered new file into which bytes of other files are copied without passing through this process."""

    def __init__(self, path: Path) -> None:
        super().__init__(_EagerFile(path), _CHUNK)

    def copy_from(self, source: FileBytes, start: int, count: int, advance: Callable[[int], Any]) -> int:
        """Copy bytes from `start`, as many of `count` as the system can, and say how many these were."""
        done = 0
        if not hasattr(os, "copy_file_range"):
            return done
        self.flush()
        try:
            while done < count:
                step = os.copy_file_range(source.fileno(), self.fileno(), min(_SEND, count - done), start + done)
                if not step:
                    break
                done += step
                advance(step)
                self.raw.send()
        except OSError as error:
            if error.errno not in _NOT_COPIED:
                raise
        self.seek(0, io.SEEK_END)  # the buffer does not know of what went past it
        return done


def _create(path: Path) -> BinaryIO:
    return _CopyingWriter(path)


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    """Put the rename itself on the disk, where the system can."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:  # a system that does not open folders
        return
    try:
        os.fsync(handle)
    except OSError:  # a file system that does not flush them
        pass
    finally:
        os.close(handle)


# The formats. A writer takes the file, the plans, the metadata, and what to call with the number of bytes written.

_Writer = Callable[[BinaryIO, list[_Plan], dict[str, str], Callable[[int], Any]], None]


def _write_safetensors(
    file: BinaryIO, plans: list[_Plan], metadata: dict[str, str], advance: Callable[[int], Any]
) -> None:
    """Length, JSON header, tensors; wide dtypes first, so that every tensor is aligned for its own."""
    plans = sorted(plans, key=lambda plan: -plan.info.dtype.itemsize)
    header: dict[str, Any] = {METADATA: {"format": "pt", **metadata}}
    position = 0
    for plan in plans:
        name = _SAFETENSORS_NAMES.get(plan.info.dtype)
        if name is None or plan.key == METADATA:
            raise CheckpointError(f"entry {plan.key!r} of {plan.info.dtype} cannot be stored in a safetensors file")
        span = [position, position + plan.info.nbytes]
        header[plan.key] = {"dtype": name, "shape": list(plan.info.shape), "data_offsets": span}
        position = span[1]
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER:
        raise CheckpointError("the metadata is too long for a safetensors file")
    file.write(len(text).to_bytes(8, "little") + text)
    for plan in plans:
        plan.write(file, advance)


class _StorageMark:
    """Stands for a tensor's storage while the pickle is made."""

    def __init__(self, number: int, plan: _Plan) -> None:
        kind = getattr(torch, _STORAGE_NAMES[plan.info.dtype])
        self.identity = ("storage", kind, str(number), "cpu", plan.info.numel)


class _TensorMark:
    """Stands for a tensor; its pickle is what torch's own tensors write of themselves."""

    def __init__(self, number: int, plan: _Plan) -> None:
        shape = plan.info.shape
        self.arguments = (_StorageMark(number, plan), 0, shape, contiguous_stride(shape), False, OrderedDict())

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return torch._utils._rebuild_tensor_v2, self.arguments


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        return obj.identity if isinstance(obj, _StorageMark) else None


def _write_torch(file: BinaryIO, plans: list[_Plan], _metadata: dict[str, str], advance: Callable[[int], Any]) -> None:
    """The zip archive of `torch.save`: a pickle that rebuilds a dict of tensors, and one stored member for each."""
    unknown = next((plan for plan in plans if plan.info.dtype not in _STORAGE_NAMES), None)
    if unknown is not None:
        raise CheckpointError(f"entry {unknown.key!r} of {unknown.info.dtype} cannot be stored so; write .safetensors")
    pickled = io.BytesIO()
    _Pickler(pickled, protocol=2).dump({plan.key: _TensorMark(i, plan) for i, plan in enumerate(plans)})
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:

        def member(name: str, size: int) -> BinaryIO:
            info = zipfile.ZipInfo(f"archive/{name}")
            info.file_size = size
            start = file.tell() + 30 + len(info.filename) + 4  # the fixed part, the name, this field's own head
            if size * 1.05 > zipfile.ZIP64_LIMIT:
                start += 20  # the field of long sizes, which is added to it
            padding = -start % _ALIGNMENT
            info.extra = b"FB" + padding.to_bytes(2, "little") + bytes(padding)
            return archive.open(info, "w")

        small = {"data.pkl": pickled.getvalue(), "byteorder": b"little", "version": b"3\n"}
        for name, content in small.items():
            with member(name, len(content)) as stream:
                stream.write(content)
        for number, plan in enumerate(plans):
            with member(f"data/{number}", plan.info.nbytes) as stream:
                plan.write(stream, advance)


_WRITERS: dict[str, _Writer] = {
    SAFETENSORS_SUFFIX: _write_safetensors,
    **dict.fromkeys(TORCH_SUFFIXES, _write_torch),
}


def _writer(path: Path) -> _Writer:
    writer = _WRITERS.get(path.suffix.lower())
    if writer is None:
        raise CheckpointError(f"{path}: end its name in one of {', '.join(_WRITERS)}, which chooses the format")
    return writer
