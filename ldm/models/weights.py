"""Starting weights that a configuration names with `ckpt_path`."""

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.util import ConfigError

logger = logging.getLogger(__name__)


def read_weights(path: str | Path) -> Mapping[str, Tensor]:
    """The tensors of a safetensors file, or of a torch file without executing anything that it holds.

    Raises:
        ConfigError: the file is missing, or holds no tensors by name, or more than tensors and plain containers.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"ckpt_path {str(path)!r} does not exist")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        entries = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # both libraries raise many types for a broken file
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"{path} could not be read as weights: {reason}") from error
    if isinstance(entries, Mapping):
        entries = entries.get("state_dict", entries)
    if not isinstance(entries, Mapping):
        raise ConfigError(f"{path} holds a {type(entries).__name__}, not tensors by name")
    return entries


def load_weights(module: nn.Module, path: str | Path, ignore_prefixes: Iterable[str] = (), prefix: str = "") -> None:
    """Load what fits of the file's entries into `module`, and log what was missing or left over.

    Args:
        ignore_prefixes: entries whose keys begin so are left out.
        prefix: taken off the keys that begin with it.

    Raises:
        ConfigError: the file cannot be read, an entry has another shape, or none fits.
    """
    ignored = tuple(ignore_prefixes)
    weights = {
        k.removeprefix(prefix): v for k, v in read_weights(path).items() if not (ignored and k.startswith(ignored))
    }
    try:
        missing, unexpected = module.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise ConfigError(f"{path} does not fit {type(module).__name__}: {error}") from error
    if len(missing) == len(module.state_dict()):
        raise ConfigError(f"{path} holds none of the entries of {type(module).__name__}, such as {missing[0]!r}")
    logger.info("%s: %d entries missing, %d left over", path, len(missing), len(unexpected))
