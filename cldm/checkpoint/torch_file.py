"""Reading what `torch.save` writes, in its zip format and in the older one of consecutive pickles."""

from __future__ import annotations

import io
import math
import struct
import zipfile
from dataclasses import dataclass
from typing import Any

from cldm.checkpoint.errors import CheckpointError
from cldm.checkpoint.storage import Entry, FileBytes
from cldm.checkpoint.unpickling import Placeholder, Storage, StoredTensor, unpickle

ZIP_MAGIC = b"PK\x03\x04"
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001
MAX_NESTING = 3
_WRAPPERS = ("state_dict", "model", "module")
_PLAIN_TYPES = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class TorchContent:
    """The weights of a torch file and what was around them."""

    entries: dict[str, Entry]
    wrapping: tuple[str, ...]
    extras: dict[str, Any]
    foreign: tuple[str, ...]


def read_torch_zip(file: FileBytes) -> TorchContent:
    """The weights of a file in torch's zip format.

    Raises:
        CheckpointError: another zip archive, damaged, big-endian, or with more than weights. Without the file's name.
    """
    members = _zip_members(file)
    pickles = [name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        names = ", ".join(repr(name[:60]) for name in list(members)[:3]) or "nothing"
        raise CheckpointError(
            f"a zip archive that torch.save did not write; it holds {names}. If the weights are inside, unpack it"
        )
    folder = pickles[0].removesuffix("data.pkl")
    if folder + "constants.pkl" in members:
        raise CheckpointError("a TorchScript program, not weights; save the state_dict() of the module instead")
    if folder + "byteorder" in members:
        start, size = _locate(file, members[folder + "byteorder"])
        _check_byte_order(file.read(start, min(size, 16)).decode("latin-1"))
    start, size = _locate(file, members[pickles[0]])
    storages: dict[str, Storage] = {}
    top, foreign = unpickle(io.BytesIO(file.read(start, size)), storages)
    tensors, wrapping, extras = _unwrap(top)
    starts: dict[str, int] = {}
    for key in {tensor.storage.key for tensor in tensors.values()}:
        member = members.get(f"{folder}data/{key}")
        if member is None:
            raise CheckpointError(f"tensor storage {key[:40]!r} is missing from the archive")
        starts[key], size = _locate(file, member)
        if size < storages[key].count * storages[key].dtype.itemsize:
            raise CheckpointError(f"tensor storage {key[:40]!r} is smaller than the pickle says")
    return TorchContent(_entries(file, tensors, starts), wrapping, extras, tuple(sorted(foreign)))


def read_torch_legacy(file: FileBytes) -> TorchContent:
    """The weights of a file in torch's older format: magic number, protocol, system, object, storage keys, storages.

    Raises:
        CheckpointError: another pickle, damaged, big-endian, or with more than weights. Without the file's name.
    """
    pickles = file.map()
    pickles.seek(0)
    magic, _ = unpickle(pickles)
    if magic != LEGACY_MAGIC:
        raise CheckpointError("a pickle that torch.save did not write; only its files and safetensors are read")
    protocol, _ = unpickle(pickles)
    if protocol != LEGACY_PROTOCOL:
        raise CheckpointError("a torch file of an unknown protocol version")
    system, _ = unpickle(pickles)
    if type(system) is dict:
        _check_byte_order("little" if system.get("little_endian", True) is True else "big")
    storages: dict[str, Storage] = {}
    top, foreign = unpickle(pickles, storages)
    tensors, wrapping, extras = _unwrap(top)
    keys, _ = unpickle(pickles)
    if type(keys) is not list:
        raise CheckpointError("the list of tensor storages is damaged")
    starts: dict[str, int] = {}
    position = pickles.tell()
    for key in keys:
        storage = storages.get(key) if type(key) is str else None
        if storage is None or key in starts:
            raise CheckpointError("the list of tensor storages is damaged")
        if int.from_bytes(file.read(position, 8), "little") != storage.count:
            raise CheckpointError(f"tensor storage {key[:40]!r} is cut short or has another size than the pickle says")
        starts[key] = position + 8
        position += 8 + storage.count * storage.dtype.itemsize
        if position > file.size:
            raise CheckpointError("the file ends within its tensors; its download was cut short")
    missing = next((t.storage.key for t in tensors.values() if t.storage.key not in starts), None)
    if missing is not None:
        raise CheckpointError(f"tensor storage {missing[:40]!r} is missing from the file")
    return TorchContent(_entries(file, tensors, starts), wrapping, extras, tuple(sorted(foreign)))


def _entries(file: FileBytes, tensors: dict[str, StoredTensor], starts: dict[str, int]) -> dict[str, Entry]:
    """Tensors at their places in the file, given where each storage starts."""
    entries = {
        key: Entry(file, starts[tensor.storage.key] + tensor.span[0], tensor.dtype, tensor.shape, tensor.stride)
        for key, tensor in tensors.items()
    }
    if sum(entry.nbytes for entry in entries.values()) > 4 * file.size + 2**20:
        raise CheckpointError("its tensors repeat the same bytes until they are many times larger than the file")
    return entries


def _check_byte_order(name: str) -> None:
    if name != "little":
        raise CheckpointError(f"written with {name[:16]!r} byte order; only little-endian files are read")


def _zip_members(file: FileBytes) -> dict[str, zipfile.ZipInfo]:
    try:
        with open(file.path, "rb") as stream, zipfile.ZipFile(stream) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, RuntimeError, ValueError, LookupError, OSError, OverflowError, struct.error) as error:
        raise CheckpointError(
            f"its zip directory, which lies at the end, is missing or damaged ({str(error)[:80]}); "
            "the download was probably cut short"
        ) from error
    named = {member.filename: member for member in members}
    if len(named) != len(members):
        raise CheckpointError("the zip archive has two members of one name")
    return named


def _locate(file: FileBytes, member: zipfile.ZipInfo) -> tuple[int, int]:
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


def _unwrap(top: Any) -> tuple[dict[str, StoredTensor], tuple[str, ...], dict[str, Any]]:
    """The innermost dictionary of tensors, the keys that lead there, and the plain values passed on the way."""
    level, wrapping, extras = top, [], {}
    while True:
        if type(level) is not dict:
            where = f"under {wrapping[-1]!r} " if wrapping else ""
            raise CheckpointError(f"its object {where}is not a dictionary of tensors but {_refusal(level)}")
        inner = _wrapper(level)
        if inner is None:
            break
        if len(wrapping) == MAX_NESTING:
            raise CheckpointError(f"its weights are nested more than {MAX_NESTING} dictionaries deep")
        extras.update(_plain_values(level, without=inner))
        wrapping.append(inner)
        level = level[inner]
    tensors = {}
    for key, value in level.items():
        if isinstance(value, StoredTensor):
            if type(key) is not str:
                raise CheckpointError("a tensor among its weights has a name that is not text")
            tensors[key] = value
        elif (foreign := _first(value, Placeholder, Storage)) is not None:
            raise CheckpointError(f"entry {str(key)[:100]!r} among its weights is {_refusal(foreign)}")
        elif _first(value, StoredTensor) is not None:
            raise CheckpointError(
                f"entry {str(key)[:100]!r} among its weights holds tensors of its own; save the state dict alone"
            )
    if not tensors:
        names = ", ".join(repr(str(key)[:40]) for key in list(level)[:5]) or "nothing"
        raise CheckpointError(f"holds no tensors where weights are expected, but {names}")
    extras.update({key: value for key, value in _plain_values(level).items() if key not in tensors})
    return tensors, tuple(wrapping), extras


def _wrapper(level: dict) -> str | None:
    """The key under which the weights lie, if they are not right here."""
    if "state_dict" in level:
        return "state_dict"
    beside = [math.prod(value.shape) for value in level.values() if isinstance(value, StoredTensor)]
    inner = [key for key in _WRAPPERS if type(level.get(key)) is dict]
    if beside:  # a step or a decay beside the weights is one number
        inner = [key for key in inner if max(beside) <= 1 and _first(level[key], StoredTensor) is not None]
    return next(iter(inner), None)


def _plain_values(level: dict, without: str | None = None) -> dict[str, Any]:
    """Scalars and texts as they are, all else as placeholders."""
    return {
        key: value if isinstance(value, (*_PLAIN_TYPES, Placeholder)) else Placeholder(type(value).__name__)
        for key, value in level.items()
        if type(key) is str and key != without
    }


def _first(value: Any, *kinds: type) -> Any:
    """Something within `value` that is of one of the kinds, or None."""
    pending, seen = [value], set()
    while pending:
        item = pending.pop()
        if isinstance(item, kinds):
            return item
        if type(item) in (dict, list, tuple) and id(item) not in seen:
            seen.add(id(item))
            pending.extend([*item.keys(), *item.values()] if type(item) is dict else item)
    return None


def _refusal(value: Any) -> str:
    """What a value that should have been weights is, and what to do."""
    if not isinstance(value, Placeholder):
        return f"a {type(value).__name__.lower()}"
    for sign, kind in (("sparse", "a sparse tensor"), ("_qtensor", "a quantised tensor")):
        if sign in value.name:
            return f"{kind} ({value.name}), which is not supported; save it dense and in floating point"
    return (
        f"{value.name}, which is not executed: a weights file may hold only tensors and plain values. If it comes "
        "from a pickled module, save its state_dict() instead; if you did not expect this name, do not trust the file"
    )
