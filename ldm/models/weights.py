"""Starting weights that a configuration names with `ckpt_path`."""

import logging
from collections.abc import Iterable
from pathlib import Path

from torch import nn

from ldm.files import CheckpointError, open_weights
from ldm.util import ConfigError

logger = logging.getLogger(__name__)


def load_weights(module: nn.Module, path: str | Path, ignore_prefixes: Iterable[str] = (), prefix: str = "") -> None:
    """Load what fits of the file's entries into `module`, and log what was missing or left over.

    Args:
        path: whatever `ldm.files.open_weights` opens; nothing in it is executed.
        ignore_prefixes: entries whose keys begin so are left out.
        prefix: taken off the keys that begin with it.

    Raises:
        ConfigError: the file cannot be read, an entry has another shape, or none fits.
    """
    ignored = tuple(ignore_prefixes)
    try:
        with open_weights(path) as file:
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
    if len(missing) == len(module.state_dict()):
        raise ConfigError(f"{path} holds none of the entries of {type(module).__name__}, such as {missing[0]!r}")
    logger.info("%s: %d entries missing, %d left over", path, len(missing), len(unexpected))
