"""Starting weights that a configuration names with `ckpt_path`."""

import logging
from collections.abc import Iterable
from pathlib import Path

from torch import nn

from ldm.files import CheckpointError, open_weights
from ldm.util import ConfigError

logger = logging.getLogger(__name__)


def load_weights(
    module: nn.Module, path: str | Path, ignore_prefixes: Iterable[str] = (), prefix: str = ""
) -> list[str]:
    """Load what fits of the file's entries into `module`, and log what was missing or left over.

    A module on the meta device has no memory for values: the file is then not read.

    Args:
        path: whatever `ldm.files.open_weights` opens, under the names of this library; nothing in it is executed.
        ignore_prefixes: entries whose keys begin so are left out.
        prefix: taken off the keys that begin with it.

    Returns:
        the keys of `module` that were missing.

    Raises:
        ConfigError: the file cannot be read or has diffusers' names, an entry has another shape, or none fits.
    """
    if next(module.parameters()).is_meta:
        return []
    ignored = tuple(ignore_prefixes)
    try:
        with open_weights(path) as file:
            if any("down_blocks." in key for key in file):
                advice = (
                    "convert its pipeline with `controlnet convert PIPELINE full.safetensors --to full`, and name that"
                )
                raise CheckpointError(f"has the names of diffusers, which fit no model here; {advice}", file.path)
            weights = {
                key.removeprefix(prefix): tensor.read()
                for key, tensor in file.items()
                if not (ignored and key.startswith(ignored))
            }
    except CheckpointError as error:
        raise ConfigError(f"ckpt_path: {error}") from error
    try:
        missing, unexpected = module.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise ConfigError(f"{path} does not fit {type(module).__name__}: {error}") from error
    if len(unexpected) == len(weights):
        raise ConfigError(f"{path} holds none of the entries of {type(module).__name__}, such as {missing[0]!r}")
    level = logging.WARNING if missing else logging.INFO
    first = f" (first {missing[0]})" if missing else ""
    logger.log(level, "%s: %d entries missing%s, %d left over", path, len(missing), first, len(unexpected))
    return missing
