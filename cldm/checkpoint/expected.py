"""What a configuration says of its model: parameters, and its entries with shapes and dtypes.

Those of the packaged configurations are kept in tables beside the YAML files, so that recognising or converting a file need
not build a model; others are built without memory. After a change: `python -m tests.checkpoint.test_expected`.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from cldm.config import load_config, model_section, resolve
from ldm.files import CheckpointError, LazyTensor
from ldm.files.tensors import DTYPES, Tensors
from ldm.util import ConfigError, instantiate_from_config

logger = logging.getLogger(__name__)

TABLE_SUFFIX = ".entries.json"


Config = str | Path | Mapping[str, Any]  # a configuration's name, its file, or its content


def model_params(config: Config) -> Mapping[str, Any]:
    """The parameters of the model that a configuration names.

    Raises:
        ConfigError: there is no such configuration, or it is none of a model.
    """
    params = _section(config).get("params") or {}
    if not isinstance(params, Mapping):
        name = "the configuration" if isinstance(config, Mapping) else config
        raise ConfigError(f"{name}: `params` of its model must be a mapping")
    return params


def _section(config: Config) -> Mapping[str, Any]:
    return model_section(config) if isinstance(config, Mapping) else model_section(load_config(config), config)


def expected_entries(config: Config) -> Tensors:
    """What the state dict of a configuration holds; read, the entries are zeros."""
    if isinstance(config, Mapping):
        return build_entries(config)
    path = resolve(config, ".yaml")
    return dict(_expected_entries(path, digest_of(path)))


@lru_cache(maxsize=8)
def _expected_entries(path: Path, digest: str) -> Tensors:
    table = path.with_suffix(TABLE_SUFFIX)
    with suppress(OSError, ValueError, LookupError, TypeError):  # there is none, or it is of something else
        content = json.loads(table.read_text(encoding="utf-8"))
        if content["configuration"] == digest:
            return {key: zeros(tuple(shape), DTYPES[dtype]) for key, shape, dtype in content["entries"]}
        logger.info("%s is not that of %s any more: the model is built to find its entries", table, path)
    return build_entries(path)


def build_entries(config: Config) -> Tensors:
    """The same from the model itself, which is made without memory."""
    with torch.device("meta"):
        model = instantiate_from_config(_section(config))
    return {key: zeros(tuple(value.shape), value.dtype) for key, value in model.state_dict().items()}


def check_fits(tensors: Tensors, config: str | Path, path: Path) -> None:
    """Raise if a tensor of the file `path` has another shape than in the configuration's model."""
    expected = expected_entries(config)
    for key, tensor in tensors.items():
        if key in expected and tensor.shape != expected[key].shape:
            shapes = f"{list(tensor.shape)}, expected {list(expected[key].shape)}"
            advice = "another --config may be the right one"
            raise CheckpointError(f"does not fit {config}: {key!r} has shape {shapes}; {advice}", path)


def zeros(shape: tuple[int, ...], dtype: torch.dtype) -> LazyTensor:
    """Zeros, made when they are read."""
    return LazyTensor(shape, dtype, lambda: torch.zeros(shape, dtype=dtype, device="cpu"))


def digest_of(path: Path) -> str:
    """Which configuration a table belongs to."""
    return hashlib.sha256(path.read_bytes().replace(b"\r\n", b"\n")).hexdigest()  # whatever the line endings are
