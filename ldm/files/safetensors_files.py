"""Reading the header of a safetensors file: a length, JSON, then the tensors' bytes without gaps."""

from __future__ import annotations

import json
import math
from functools import partial
from typing import Any

import torch

from ldm.files.errors import CheckpointError
from ldm.files.tensors import SAFETENSORS_NAMES, LazyTensor, OpenFile, Tensors

MAX_HEADER = 100_000_000  # bytes; the format's own limit
METADATA = "__metadata__"
_DTYPES = {name: dtype for dtype, name in SAFETENSORS_NAMES.items()}


def looks_like_safetensors(file: OpenFile) -> bool:
    """Whether the file begins as every safetensors file does: eight bytes of length and an opening brace."""
    start = file.read(0, 9)
    return len(start) == 9 and start[8:] == b"{" and int.from_bytes(start[:8], "little") <= MAX_HEADER


def read_safetensors(file: OpenFile) -> tuple[Tensors, dict[str, str]]:
    """The tensors of the file in the order of its header, and the metadata.

    Raises:
        CheckpointError: anything in the header is not as the format says.
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
    tensors, spans = {}, []
    for key, description in header.items():
        dtype, shape, begin, end = _describe(key, description)
        tensors[key] = LazyTensor(shape, dtype, partial(file.read_tensor, 8 + length + begin, dtype, shape))
        spans.append((begin, end, key))
    position = 0
    for begin, end, key in sorted(spans):
        if begin != position:
            problem = "overlaps another" if begin < position else "leaves a gap before it"
            raise CheckpointError(f"the safetensors header is wrong: {key[:100]!r} {problem}")
        position = end
    if 8 + length + position != file.size:
        raise CheckpointError(
            f"the safetensors header describes {8 + length + position:,} bytes, but the file has {file.size:,}; "
            + ("its download was cut short" if 8 + length + position > file.size else "something was appended to it")
        )
    return tensors, metadata


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
    """Dtype, shape and the range of bytes of one tensor."""
    name = repr(key[:100])
    if type(description) is not dict or not {"dtype", "shape", "data_offsets"} <= description.keys():
        raise CheckpointError(f"the safetensors header has no dtype, shape and data_offsets for {name}")
    dtype, shape, offsets = description["dtype"], description["shape"], description["data_offsets"]
    if type(dtype) is not str or dtype not in _DTYPES:
        kind = dtype[:20] if type(dtype) is str else type(dtype).__name__
        raise CheckpointError(f"{name} has the unknown dtype {kind!r}; known are {', '.join(_DTYPES)}")
    for numbers, fits, what in (
        (shape, lambda count: count <= 64, "an impossible shape"),
        (offsets, lambda count: count == 2, "impossible offsets"),
    ):
        sizes = type(numbers) is list and fits(len(numbers)) and all(type(n) is int and 0 <= n < 2**62 for n in numbers)
        if not sizes:
            raise CheckpointError(f"the safetensors header has {what} for {name}")
    begin, end = offsets
    if math.prod(max(n, 1) for n in shape) >= 2**62 or end - begin != math.prod(shape) * _DTYPES[dtype].itemsize:
        raise CheckpointError(f"the safetensors header gives {name} a size that its shape contradicts")
    return _DTYPES[dtype], tuple(shape), begin, end
