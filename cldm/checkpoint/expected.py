"""The entries that a configuration's model holds: their keys, shapes and dtypes, as lazy tensors that are not read.

For the packaged configurations they are kept in a table beside the YAML file, so that recognising or converting a file
need not build a model. A configuration that has no table, or was changed since, is built without memory. After a change of
the networks or of a packaged configuration:

    python -c "from cldm.checkpoint.expected import write_tables; write_tables()"
"""

from __future__ import annotations

import hashlib
import json
import logging
from functools import lru_cache
from pathlib import Path

import torch

from cldm.config import load_config, model_section, resolve
from ldm.files import LazyTensor
from ldm.files.tensors import DTYPES, Tensors
from ldm.util import instantiate_from_config

logger = logging.getLogger(__name__)

PACKAGED = ("cldm_v15", "cldm_v21", "cldm_tiny")
_SUFFIX = ".entries.json"


def expected_entries(config: str | Path) -> Tensors:
    """What the state dict of a configuration (its name or path) holds; read, the entries are zeros."""
    return dict(_expected_entries(resolve(config, ".yaml")))


@lru_cache(maxsize=8)
def _expected_entries(path: Path) -> Tensors:
    table = path.with_suffix(_SUFFIX)
    if table.is_file():
        content = json.loads(table.read_text(encoding="utf-8"))
        if content["configuration"] == _digest(path):
            return {key: zeros(tuple(shape), DTYPES[dtype]) for key, shape, dtype in content["entries"]}
        logger.info("%s is not that of %s any more: the model is built to find its entries", table, path)
    return build_entries(path)


def build_entries(config: str | Path) -> Tensors:
    """The same from the model itself, which is made without memory."""
    with torch.device("meta"):
        model = instantiate_from_config(model_section(load_config(config), config))
    return {key: zeros(tuple(value.shape), value.dtype) for key, value in model.state_dict().items()}


def zeros(shape: tuple[int, ...], dtype: torch.dtype) -> LazyTensor:
    """Zeros, made when they are read."""
    return LazyTensor(shape, dtype, lambda: torch.zeros(shape, dtype=dtype))


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_text(encoding="utf-8").encode()).hexdigest()  # whatever the line endings are


def write_tables() -> None:
    """Write the tables of the packaged configurations anew."""
    for name in PACKAGED:
        path = resolve(name, ".yaml")
        entries = [[key, list(t.shape), str(t.dtype).removeprefix("torch.")] for key, t in build_entries(path).items()]
        lines = ",\n".join(json.dumps(entry) for entry in entries)
        text = f'{{"configuration": "{_digest(path)}",\n"entries": [\n{lines}\n]}}\n'
        path.with_suffix(_SUFFIX).write_text(text, encoding="utf-8")
