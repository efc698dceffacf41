"""Reading what `torch.save` writes, in its zip format and in the older one of consecutive pickles."""

from __future__ import annotations

import io
import mmap
import struct
import zipfile
from typing import Any

from ldm.files.errors import CheckpointError
from ldm.files.pickles import Placeholder, Storage, Unpickler
from ldm.files.tensors import LazyTensor, OpenFile, Tensors, WeightsFile

ZIP_MAGIC = b"PK\x03\x04"
LEGACY_MAGIC, LEGACY_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
MAX_NESTING = 3
_WRAPPERS = ("state_dict", "model", "module")


def read_torch_zip(file: OpenFile) -> WeightsFile:
    """The weights of a file in torch's zip format.

    Raises:
        CheckpointError: another zip archive, damaged, big-endian, or with more than weights.
    """
    members = _zip_members(file)
    pickles = [name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        held = ", ".join(repr(name[:60]) for name in list(members)[:3]) or "nothing"
        raise CheckpointError(f"a zip archive of {held}, which torch.save did not write; unpack it for weights inside")
    folder = pickles[0].removesuffix("data.pkl")
    if folder + "constants.pkl" in members:
        raise CheckpointError("a TorchScript program, not weights; save the state_dict() of the module instead")
    if folder + "byteorder" in members:
        start, size = _locate(file, members[folder + "byteorder"])
        _check_byte_order(file.read(start, min(size, 16)).decode("latin-1"))
    unpickler = Unpickler(file)
    top = unpickler.load(io.BytesIO(file.read(*_locate(file, members[pickles[0]]))))
    for key, storage in unpickler.storages.items():
        if member := members.get(f"{folder}data/{key}"):
            unpickler.starts[key], size = _locate(file, member)
            if size < storage.count * storage.dtype.itemsize:
                raise CheckpointError(f"tensor storage {key[:40]!r} is smaller than the pickle says")
    return _weights(file, "torch-zip", unpickler, top)


def read_torch_legacy(file: OpenFile) -> WeightsFile:
    """The weights of a file in torch's older format: magic number, protocol, system, object, storage keys, storages.

    Raises:
        CheckpointError: another pickle, damaged, big-endian, or with more than weights.
    """
    unpickler = Unpickler(file)
    with mmap.mmap(file.stream.fileno(), 0, access=mmap.ACCESS_READ) as stream:
        if unpickler.load(stream) != LEGACY_MAGIC:
            raise CheckpointError("a pickle that torch.save did not write; only its files and safetensors are read")
        if unpickler.load(stream) != LEGACY_PROTOCOL:
            raise CheckpointError("a torch file of an unknown protocol version")
        system = unpickler.load(stream)
        if type(system) is dict:
            _check_byte_order("little" if system.get("little_endian", True) is True else "big")
        top, keys, position = unpickler.load(stream), unpickler.load(stream), stream.tell()
    if type(keys) is not list or not all(type(key) is str for key in keys) or len(set(keys)) != len(keys):
        raise CheckpointError("the list of tensor storages is damaged")
    for key in keys:
        storage = unpickler.storages.get(key)
        if storage is None:
            raise CheckpointError(f"the list of tensor storages is damaged: nothing uses {key[:40]!r}")
        if int.from_bytes(file.read(position, 8), "little") != storage.count:
            raise CheckpointError(f"tensor storage {key[:40]!r} is cut short or has another size than the pickle says")
        unpickler.starts[key] = position + 8
        position += 8 + storage.count * storage.dtype.itemsize
        if position > file.size:
            raise CheckpointError("the file ends within its tensors; its download was cut short")
    return _weights(file, "torch-legacy", unpickler, top)


def _check_byte_order(name: str) -> None:
    if name != "little":
        raise CheckpointError(f"written with {name[:16]!r} byte order; only little-endian files are read")


def _zip_members(file: OpenFile) -> dict[str, zipfile.ZipInfo]:
    try:
        with zipfile.ZipFile(file.stream) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, RuntimeError, ValueError, LookupError, OSError, OverflowError, struct.error) as error:
        problem = "the directory at the end of the zip archive is missing or damaged; the download was cut short"
        raise CheckpointError(problem) from error
    named = {member.filename: member for member in members}
    if len(named) != len(members):
        raise CheckpointError("the zip archive has two members of one name")
    return named


def _locate(file: OpenFile, member: zipfile.ZipInfo) -> tuple[int, int]:
    """First byte and size of a member's data."""
    name = repr(member.filename[-60:])
    if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1 or member.file_size != member.compress_size:
        raise CheckpointError(f"zip member {name} is compressed or encrypted, as torch.save never does; repack it")
    header = file.read(member.header_offset, 30) if member.header_offset >= 0 else b""
    if len(header) != 30 or not header.startswith(ZIP_MAGIC):
        raise CheckpointError(f"zip member {name} is not where the directory says")
    start = member.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
    if start + member.file_size > file.size:
        raise CheckpointError(f"zip member {name} is larger than the file; the file is damaged")
    return start, member.file_size


def _weights(file: OpenFile, format: str, unpickler: Unpickler, top: Any) -> WeightsFile:
    """The innermost dictionary of tensors, and what lies around it."""
    level, extras = top, dict[str, Any]()
    wrapping: list[str] = []
    while True:
        if type(level) is not dict:
            where = f" under {wrapping[-1]!r}" if wrapping else ""
            raise CheckpointError(f"holds {_described(level)}{where}, where a dictionary of tensors is expected")
        inner = _wrapper(level)
        for key, value in level.items():
            if type(key) is str and not isinstance(value, LazyTensor) and key != inner:
                extras[key] = value
        if inner is None:
            break
        if len(wrapping) == MAX_NESTING:
            raise CheckpointError(f"its weights are nested more than {MAX_NESTING} dictionaries deep")
        wrapping.append(inner)
        level = level[inner]
    tensors: Tensors = {}
    seen: set[int] = set()  # over all entries, which may share one long list
    for key, value in level.items():
        if isinstance(value, LazyTensor):
            if type(key) is not str:
                raise CheckpointError("a tensor among its weights has a name that is no text of ordinary length")
            tensors[key] = value
        elif (found := _first(value, (Placeholder, Storage, LazyTensor), seen)) is not None:
            raise CheckpointError(f"entry {str(key)[:100]!r} among its weights holds {_described(found)}")
    if not tensors:
        names = ", ".join(repr(str(key)[:40]) for key in list(level)[:5]) or "nothing"
        raise CheckpointError(f"holds no tensors where weights are expected, but {names}")
    missing = next((key for key in unpickler.storages if key not in unpickler.starts), None)
    if missing is not None:
        raise CheckpointError(f"tensor storage {missing[:40]!r} is missing from the file")
    check_repetition(sum(tensor.nbytes + tensor.gaps for tensor in tensors.values()), file.size)
    return WeightsFile(
        file.path,
        format,
        tensors,
        wrapping=tuple(wrapping),
        extras=extras,
        foreign=tuple(sorted(unpickler.foreign)),
        content=top,
    )


def check_repetition(held: int, size: int) -> None:
    """Refuse a file of `size` bytes of which far more would be read: its tensors show the same bytes over and over."""
    if held > 4 * size + 2**20:
        problem = "its tensors repeat the same bytes until they are many times larger than the file"
        raise CheckpointError(f"{problem}; save a clone() of each")


def _wrapper(level: dict) -> str | None:
    """The key under which the weights lie, if they are not right here."""
    if "state_dict" in level:
        return "state_dict"
    beside = [value.numel for value in level.values() if isinstance(value, LazyTensor)]
    inner = [key for key in _WRAPPERS if type(level.get(key)) is dict]
    if beside:  # a step or a decay beside the weights is one number
        inner = [key for key in inner if max(beside) <= 1 and _first(level[key], (LazyTensor,), set()) is not None]
    return next(iter(inner), None)


def _first(value: Any, kinds: tuple[type, ...], seen: set[int]) -> Any:
    """Something within `value` that is of one of the kinds, or None; containers in `seen` are passed over, and added."""
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, kinds):
            return item
        if type(item) in (dict, list, tuple) and id(item) not in seen:
            seen.add(id(item))
            pending.extend([*item.keys(), *item.values()] if type(item) is dict else item)
    return None


def _described(value: Any) -> str:
    """What a value that should have been weights is, and what to do."""
    if isinstance(value, LazyTensor):
        return "tensors of its own; save the state dict alone"
    if not isinstance(value, Placeholder):
        return f"a {type(value).__name__.lower()}"
    for sign, kind in (("sparse", "a sparse tensor"), ("_qtensor", "a quantised tensor")):
        if sign in value.name:
            return f"{kind} ({value.name}), which is not supported; save it dense and in floating point"
    return (
        f"{value.name}, which is not executed: a weights file may hold only tensors and plain values. If it comes "
        "from a pickled module, save its state_dict() instead; if you did not expect this name, do not trust the file"
    )
