"""Making weights files by hand, also ones that no honest program writes."""

import io
import json
import pickle
import struct
import zipfile
from pathlib import Path

import torch

MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
FLOAT_STORAGE = b"ctorch\nFloatStorage\n"


def number(value: int) -> bytes:
    """Instruction for an integer of any size."""
    return pickle.dumps(value, 2)[2:-1]


def text(value: str) -> bytes:
    """Instruction for a string."""
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def storage(key: str = "0", count: int = 4, kind: bytes = FLOAT_STORAGE) -> bytes:
    """Instructions for a reference to a tensor storage."""
    return b"(" + text("storage") + kind + text(key) + text("cpu") + number(count) + b"tQ"


def tensor(
    shape: tuple[int, ...] = (4,),
    stride: tuple[int, ...] = (1,),
    offset: int = 0,
    held: bytes | None = None,
    hooks: bytes = b"ccollections\nOrderedDict\n)R",
) -> bytes:
    """Instructions for a float32 tensor."""
    numbers = [b"(" + b"".join(map(number, values)) + b"t" for values in (shape, stride)]
    arguments = (storage() if held is None else held) + number(offset) + b"".join(numbers) + b"\x89" + hooks
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + b"tR"


def dictionary(**entries: bytes) -> bytes:
    """Instructions for a dict of texts and given instructions."""
    return b"}(" + b"".join(text(key) + value for key, value in entries.items()) + b"u"


def program(instructions: bytes) -> bytes:
    """A whole pickle."""
    return b"\x80\x02" + instructions + b"."


def torch_zip(
    path: Path,
    pickled: bytes,
    storages: dict[str, bytes] | None = None,
    byteorder: bytes = b"little",
    extra: dict[str, bytes] | None = None,
    compression: int = zipfile.ZIP_STORED,
) -> Path:
    """A file in torch's zip format; storage "0" holds four floats unless said otherwise."""
    members = {"archive/data.pkl": pickled, "archive/byteorder": byteorder, "archive/version": b"3\n"}
    members |= {f"archive/data/{key}": held for key, held in (storages or {"0": bytes(16)}).items()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in (members | (extra or {})).items():
            archive.writestr(name, content)
    return path


def torch_legacy(
    path: Path, pickled: bytes, storages: dict[str, tuple[int, bytes]] | None = None, little_endian: bool = True
) -> Path:
    """A file in torch's older format; a storage is its declared count and its bytes."""
    storages = {"0": (4, bytes(16))} if storages is None else storages
    stream = io.BytesIO()
    for head in (MAGIC, PROTOCOL, {"protocol_version": PROTOCOL, "little_endian": little_endian}):
        stream.write(pickle.dumps(head, 2))
    stream.write(pickled + pickle.dumps(list(storages), 2))
    for count, held in storages.values():
        stream.write(struct.pack("<q", count) + held)
    path.write_bytes(stream.getvalue())
    return path


def safetensors(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    """A safetensors file with any header, given as JSON or as what becomes JSON."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def hollow(path: Path, shapes: dict[str, tuple[int, ...]], dtype: str = "F32", metadata: dict | None = None) -> Path:
    """A safetensors file of real size whose data are a hole in the file: it takes no room on disk."""
    size = {"F32": 4, "F16": 2}[dtype]
    header: dict = {"__metadata__": metadata} if metadata else {}
    position = 0
    for key, shape in shapes.items():
        end = position + size * torch.Size(shape).numel()
        header[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    safetensors(path, header)
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size + position)
    return path
