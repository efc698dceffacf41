"""Published weight files of the detectors: finding, fetching, reading and loading them.

Nothing is executed: files are read as safetensors, or by torch's restricted unpickler.
"""

import logging
import os
import pickle
import urllib.error
import urllib.request
import zipfile
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

logger = logging.getLogger(__name__)

REPOSITORY = "lllyasviel/Annotators"
FOLDER_VARIABLE = "ANNOTATOR_CKPTS"
CKPTS = Path(__file__).parent / "ckpts"


class WeightsError(ValueError):
    """A weight file is missing, unreadable, or belongs to another network."""


def _search_folders() -> list[Path]:
    named = os.environ.get(FOLDER_VARIABLE)
    return [CKPTS] + ([Path(named).expanduser()] if named else [])


def find_weights(
    filename: str | Sequence[str],
    weights: str | os.PathLike | None = None,
    repository: str = REPOSITORY,
    folder: str = "",
) -> Path:
    """Where the published file lies on this machine, fetched once from Hugging Face if it is nowhere.

    Args:
        filename: the published name; with several, the first one found serves, and the first is fetched.
        weights: a file (of any name), or a folder that holds `filename`; then nowhere else is looked.
        repository: Hugging Face repository of the published file.
        folder: folder of the file in that repository.

    Without `weights`: `annotator/ckpts/`, then the folder named by the variable ANNOTATOR_CKPTS, then the download.

    Raises:
        WeightsError: naming the file, its address and the folders looked in.
    """
    names = [filename] if isinstance(filename, str) else list(filename)
    if weights is not None and Path(weights).expanduser().is_file():
        return Path(weights).expanduser()
    folders = _search_folders() if weights is None else [Path(weights).expanduser()]
    for place in folders:
        for name in names:
            if (place / name).is_file():
                return place / name
    remote = f"{folder}/{names[0]}" if folder else names[0]
    address = f"https://huggingface.co/{repository}/resolve/main/{remote}"
    if weights is not None:
        raise WeightsError(
            f"no weights at {weights}: neither a file nor a folder that holds {' or '.join(names)} "
            f"(published at {address})"
        )
    looked_in = ", ".join(str(place) for place in folders)
    advice = f"put it into one of the folders, or name a folder with {FOLDER_VARIABLE} or weights="
    try:
        return _fetch(repository, remote)
    except Exception as err:  # the client raises errors of several libraries, all with the same meaning here
        reason = (str(err).strip().splitlines() or [type(err).__name__])[0]
        raise WeightsError(
            f"cannot get the weights {names[0]}: not in {looked_in}; fetching {address} failed ({reason}); {advice}"
        ) from err


def _fetch(repository: str, remote: str) -> Path:
    """A file from the client's cache, or downloaded into it."""
    from huggingface_hub import constants, hf_hub_download, hf_hub_url, try_to_load_from_cache

    cached = try_to_load_from_cache(repository, remote)
    if isinstance(cached, str):
        return Path(cached)
    address = hf_hub_url(repository, remote)
    if not constants.HF_HUB_OFFLINE:
        _check_reachable(address)
    logger.info("fetching %s", address)
    return Path(hf_hub_download(repo_id=repository, filename=remote))


def _check_reachable(address: str) -> None:
    """Raise OSError if there is no way to the server: the client would try again for half a minute before it says so."""
    try:
        urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=10).close()
    except urllib.error.HTTPError:
        pass  # there is a server; what it does not like is for the client to say


def read_state_dict(path: str | os.PathLike, wrapper: str | None = None) -> dict[str, Tensor]:
    """Tensors of a weight file on the CPU, by name.

    Args:
        path: a `.safetensors` file or one written by `torch.save`.
        wrapper: entry under which the weights lie in the published file; taken if it is there.

    A `module.` before every key, which data-parallel training leaves, is dropped; so are entries that are not tensors by name.

    Raises:
        WeightsError: naming the file.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            content = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, KeyError, ValueError, TypeError, AttributeError, IndexError,
            pickle.UnpicklingError, zipfile.BadZipFile, SafetensorError) as err:  # fmt: skip
        reason = (str(err).strip().splitlines() or [type(err).__name__])[0]
        if isinstance(err, (pickle.UnpicklingError, KeyError)):  # whose texts are about pickles, or are mere numbers
            reason = "it is not a weight file, or holds more than tensors and plain containers"
        raise WeightsError(f"cannot read weights from {path}: {reason}") from err
    if wrapper and isinstance(content, dict) and isinstance(content.get(wrapper), dict):
        content = content[wrapper]
    if not isinstance(content, dict):
        raise WeightsError(f"{path} holds a {type(content).__name__}, not a state dict")
    tensors = {key: entry for key, entry in content.items() if isinstance(entry, Tensor) and isinstance(key, str)}
    if not tensors:
        raise WeightsError(f"{path} holds no tensors at its top level; its entries are {_some(content)}")
    if all(key.startswith("module.") for key in tensors):
        tensors = {key.removeprefix("module."): tensor for key, tensor in tensors.items()}
    return tensors


def load_weights(
    network: nn.Module, state_dict: dict[str, Tensor], path: str | os.PathLike, strict: bool = True
) -> None:
    """Copy `state_dict` into `network`.

    Args:
        path: where it was read, for messages.
        strict: missing or unexpected entries are an error; else they are logged, unless nothing at all fits.

    Raises:
        WeightsError: naming the file and some of the entries that do not fit.
    """
    wanted = {key: tensor.shape for key, tensor in network.state_dict().items()}
    missing = [key for key in wanted if key not in state_dict]
    unexpected = [key for key in state_dict if key not in wanted]
    other_shape = [
        f"{key} (file {tuple(tensor.shape)}, network {tuple(wanted[key])})"
        for key, tensor in state_dict.items()
        if key in wanted and tensor.shape != wanted[key]
    ]
    found = [("missing", missing), ("unexpected", unexpected), ("of another shape", other_shape)]
    complaint = "; ".join(f"{len(keys)} entries {kind}: {_some(keys)}" for kind, keys in found if keys)
    if other_shape or (strict and complaint) or len(missing) == len(wanted):
        raise WeightsError(f"{path} does not fit {type(network).__name__}: {complaint}")
    if complaint:
        logger.warning("%s and %s differ: %s", path, type(network).__name__, complaint)
    network.load_state_dict(state_dict, strict=False)


def _some(keys: Sequence[str] | dict, count: int = 3) -> str:
    shown = [str(key) for key in list(keys)[:count]]
    return ", ".join(shown) + (", ..." if len(keys) > count else "")
