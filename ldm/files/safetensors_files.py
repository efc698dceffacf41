"""Reading the header of a safetensors file: a length, JSON, then the tensors' bytes without gaps."""

from __future__ import annotations

import json
import math
from functools import partial
from typing import Any

import torch

from ldm.files.errors import CheckpointError
from ldm.files.tensors import MAX_TEXT, SAFETENSORS_NAMES, LazyTensor, OpenFile, Tensors, WeightsFile, is_shape

MAX_HEADER = 100_000_000  # bytes; the format's own limit
METADATA = "__metadata__"
_DTYPES = {name: dtype for dtype, name in SAFETENSORS_NAMES.items()}


def read_safetensors(file: OpenFile) -> WeightsFile:
    """The tensors of the file in the order of its header, and the metadata.

    Raises:
        CheckpointError: anything in the header is not as the format says.
    """
    length = int.from_bytes(file.read(0, 8), "little")
    if file.size < 8 or length > MAX_HEADER or 8 + length > file.size:
        sizes = f"{length:,} bytes long in a file of {file.size:,}"
        raise CheckpointError(f"the safetensors header says it is {sizes}; it is damaged or its download was cut short")
    header = _parse(file.read(8, length))
    metadata = header.pop(METADATA, {})
    if type(metadata) is not dict or not all(type(text) is str for text in metadata.values()):
        raise CheckpointError("the safetensors metadata is not a dictionary of texts")
    tensors: Tensors = {}
    spans = []
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
    described = 8 + length + position
    if described != file.size:
        cause = "its download was cut short" if described > file.size else "something was appended to it"
        sizes = f"{described:,} bytes, but the file has {file.size:,}"
        raise CheckpointError(f"the safetensors header describes {sizes}; {cause}")
    if not tensors:
        raise CheckpointError("holds no tensors")
    return WeightsFile(file.path, "safetensors", tensors, metadata)


def _parse(header: bytes) -> dict[str, Any]:
    """The header's JSON, as long as it is a table without duplicates."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) != len(pairs):
            raise ValueError("a name occurs twice")
        return dict(pairs)

    # Brackets are cheap to write and costly to build; a table of tensors has few.
    parsed = None
    if header.count(b"[") + header.count(b"{") <= len(header) // 4 + 8:
        try:
            parsed = json.loads(header.decode("utf-8"), object_pairs_hook=unique)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"the safetensors header is not valid JSON: {str(error)[:100]}") from error
    if type(parsed) is not dict:
        raise CheckpointError("the safetensors header is not a table of tensors")
    return parsed


def _describe(key: str, description: Any) -> tuple[torch.dtype, tuple[int, ...], int, int]:
    """Dtype, shape and the range of bytes of one tensor."""
    name = repr(key[:100])
    if len(key) > MAX_TEXT:
        raise CheckpointError(f"the safetensors header has a name of {len(key):,} characters, {name}...")
    if type(description) is not dict or not {"dtype", "shape", "data_offsets"} <= description.keys():
        raise CheckpointError(f"the safetensors header has no dtype, shape and data_offsets for {name}")
    dtype, shape, offsets = description["dtype"], description["shape"], description["data_offsets"]
    if type(dtype) is not str or dtype not in _DTYPES:
        kind = dtype[:20] if type(dtype) is str else type(dtype).__name__
        raise CheckpointError(f"{name} has the unknown dtype {kind!r}; known are {', '.join(_DTYPES)}")
    if not is_shape(shape, list):
        raise CheckpointError(f"the safetensors header has an impossible shape for {name}")
    if not is_shape(offsets, list, product=False) or len(offsets) != 2:
        raise CheckpointError(f"the safetensors header has impossible offsets for {name}")
    if offsets[1] - offsets[0] != math.prod(shape) * _DTYPES[dtype].itemsize:
        raise CheckpointError(f"the safetensors header gives {name} a size that its shape contradicts")
    return _DTYPES[dtype], tuple(shape), offsets[0], offsets[1]
