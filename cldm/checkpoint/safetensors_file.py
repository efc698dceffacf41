"""Reading the header of a safetensors file: a length, JSON, then the tensors' bytes without gaps."""

from __future__ import annotations

import json
import math
from typing import Any

import torch

from cldm.checkpoint.errors import CheckpointError
from cldm.checkpoint.storage import Entry, FileBytes, contiguous_stride

MAX_HEADER = 100_000_000  # bytes; the format's own limit
METADATA = "__metadata__"

_DTYPE_NAMES = {
    **{"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"},
    **{"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "C64": "complex64", "BOOL": "bool"},
    **{"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8"},
    **{"U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8"},
}
DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, attribute) for name, attribute in _DTYPE_NAMES.items() if hasattr(torch, attribute)
}


def looks_like_safetensors(file: FileBytes) -> bool:
    """Whether the file begins as every safetensors file does: eight bytes of length and an opening brace."""
    start = file.read(0, 9)
    return len(start) == 9 and start[8:] == b"{" and int.from_bytes(start[:8], "little") <= MAX_HEADER


def read_safetensors(file: FileBytes) -> tuple[dict[str, Entry], dict[str, str]]:
    """The tensors of the file in the order of its header, and the metadata.

    Raises:
        CheckpointError: anything in the header is not as the format says. Without the file's name.
    """
    length = int.from_bytes(file.read(0, 8), "little")
    if file.size < 8 or length > MAX_HEADER or 8 + length > file.size:
        raise CheckpointError(
            f"the safetensors header says it is {length:,} bytes long in a file of {file.size:,}; "
            "the file is damaged or its download was cut short"
        )
    header = _parse(file.read(8, length))
    metadata = header.pop(METADATA, {})
    if type(metadata) is not dict or not all(type(text) is str for text in metadata.values()):
        raise CheckpointError("the safetensors metadata is not a dictionary of texts")
    data_start = 8 + length
    spans = []
    entries = {}
    for key, description in header.items():
        dtype, shape, begin, end = _describe(key, description)
        entries[key] = Entry(file, data_start + begin, dtype, shape, contiguous_stride(shape))
        spans.append((begin, end, key))
    position = 0
    for begin, end, key in sorted(spans):
        if begin != position:
            problem = "overlaps another" if begin < position else "leaves a gap before it"
            raise CheckpointError(f"the safetensors header is wrong: {_short(key)} {problem}")
        position = end
    if data_start + position != file.size:
        raise CheckpointError(
            f"the safetensors header describes {data_start + position:,} bytes, but the file has {file.size:,}; "
            + ("its download was cut short" if data_start + position > file.size else "something was appended to it")
        )
    return entries, metadata


def _parse(header: bytes) -> dict[str, Any]:
    if header.count(b"[") + header.count(b"{") > len(header) // 4 + 8:  # cheap to write, costly to build
        raise CheckpointError("the safetensors header is not a table of tensors")
    try:
        parsed = json.loads(header.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"the safetensors header is not valid JSON: {str(error)[:100]}") from error
    if type(parsed) is not dict:
        raise CheckpointError("the safetensors header is not a table of tensors")
    return parsed


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a name occurs twice")
    return made


def _describe(key: str, description: Any) -> tuple[torch.dtype, tuple[int, ...], int, int]:
    """Dtype, shape and the range of bytes of one entry."""
    if type(description) is not dict or not {"dtype", "shape", "data_offsets"} <= description.keys():
        raise CheckpointError(f"the safetensors header has no dtype, shape and data_offsets for {_short(key)}")
    dtype, shape, offsets = description["dtype"], description["shape"], description["data_offsets"]
    if type(dtype) is not str or dtype not in DTYPES:
        raise CheckpointError(f"{_short(key)} has the unknown dtype {str(dtype)[:20]!r}; known are {', '.join(DTYPES)}")
    if type(shape) is not list or len(shape) > 64 or not all(type(n) is int and 0 <= n < 2**62 for n in shape):
        raise CheckpointError(f"the safetensors header has an impossible shape for {_short(key)}")
    if type(offsets) is not list or len(offsets) != 2 or not all(type(n) is int and 0 <= n < 2**62 for n in offsets):
        raise CheckpointError(f"the safetensors header has impossible offsets for {_short(key)}")
    begin, end = offsets
    if math.prod(max(n, 1) for n in shape) >= 2**62 or end - begin != math.prod(shape) * DTYPES[dtype].itemsize:
        raise CheckpointError(f"the safetensors header gives {_short(key)} a size that its shape contradicts")
    return DTYPES[dtype], tuple(shape), begin, end


def _short(key: str) -> str:
    return repr(key if len(key) <= 100 else key[:97] + "...")
