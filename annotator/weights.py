"""Published weight files of the detectors: finding, fetching, reading and loading them.

Nothing is executed: files are read as safetensors, or by torch's restricted unpickler where that one is safe.
"""

import hashlib
import logging
import os
import pickle
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from annotator.detector import first_line
from annotator.util import annotator_ckpts_path

logger = logging.getLogger(__name__)

REPOSITORY = "lllyasviel/Annotators"
OLDER_REPOSITORY, OLDER_FOLDER, NOT_IN_OLDER = "lllyasviel/ControlNet", "annotator/ckpts", "facenet.pth"
FOLDER_VARIABLE = "ANNOTATOR_CKPTS"
CKPTS = Path(annotator_ckpts_path)
# torch.load(weights_only=True) runs code of a file before 2.6 (CVE-2025-32434), and corrupts memory before 2.10
# (CVE-2026-24747).
SAFE_UNPICKLER = (2, 10)
MODEL_FILES = (".json", ".txt", ".safetensors", ".bin")  # of a model of transformers
WRAPPERS = ("state_dict", "model")  # entries of published files under which the weights lie


class WeightsError(ValueError):
    """A weight file is missing, unreadable, or belongs to another network."""


@dataclass(frozen=True)
class Hub:
    """A repository of the Hugging Face hub as the place of weights."""

    repository: str  # owner/name
    cache_dir: str | None = None  # of the hub's client; its usual one if not given
    local_files_only: bool = False  # fetch nothing


def search_folders() -> list[Path]:
    """Where weights are looked for if none are named: `annotator/ckpts/`, then what the variable ANNOTATOR_CKPTS names."""
    named = os.environ.get(FOLDER_VARIABLE)
    return [CKPTS] + ([Path(named).expanduser()] if named else [])


def find_local(filenames: Sequence[str], weights: str | os.PathLike | None) -> Path | None:
    """One of the files, or `weights` if it is a file, where it is on this machine; see `find_weights`."""
    places = search_folders() if weights is None else [Path(weights).expanduser()]
    if weights is not None and places[0].is_file():
        return places[0]
    files = [place / name for place in places for name in filenames]
    candidates = (candidate for file in files for candidate in (file, file.with_suffix(".safetensors")))
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def find_weights(
    filenames: Sequence[str], weights: str | os.PathLike | Hub | None = None, repository: str = REPOSITORY
) -> Path:
    """Where the published file lies on this machine, fetched once if it is nowhere; WeightsError if it cannot be had.

    Args:
        filenames: published names, any of which serves, also with the suffix `.safetensors`; the first one is fetched.
        weights: a file (of any name), a folder that holds one of the files, or a repository; then nowhere else is looked.
            If not given: see `search_folders`, then the download.
        repository: Hugging Face repository of the published file, or the file's own address elsewhere.
    """
    first = filenames[0]
    if isinstance(weights, Hub):
        try:
            return _fetch(weights, first)
        except Exception as err:  # the client raises errors of several libraries, all with the same meaning here
            reason = f"which is no folder here either: {first_line(err)}"
            raise WeightsError(f"cannot get {first} from {weights.repository}, {reason}") from err
    if found := find_local(filenames, weights):
        return found
    address = repository if "://" in repository else f"https://huggingface.co/{repository}/resolve/main/{first}"
    if weights is not None:
        raise WeightsError(
            f"no weights at {weights}: neither a file nor a folder that holds {' or '.join(filenames)} "
            f"(published at {address})"
        )
    try:
        return _fetch(Hub(repository), first)
    except Exception as err:
        raise WeightsError(
            f"cannot get the weights {first}: not in {', '.join(map(str, search_folders()))}; fetching {address} failed "
            f"({first_line(err)}); put the file into {search_folders()[-1]}, or name its folder with the environment variable "
            f"{FOLDER_VARIABLE} or as weights"
        ) from err


def _fetch(hub: Hub, filename: str) -> Path:
    """A file from the cache of the hub's client (or of torch, for an address elsewhere), or downloaded into it."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache

    if "://" in hub.repository:
        stored = Path(torch.hub.get_dir()) / "checkpoints" / filename
        if not stored.is_file():
            logger.info("fetching %s", hub.repository)
            stored.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(hub.repository, str(stored))
        return stored
    if hub.repository == OLDER_REPOSITORY and filename == NOT_IN_OLDER:
        hub = replace(hub, repository=REPOSITORY)
    elif hub.repository == OLDER_REPOSITORY and "/" not in filename:
        filename = f"{OLDER_FOLDER}/{filename}"
    cached = try_to_load_from_cache(hub.repository, filename, hub.cache_dir)
    if isinstance(cached, str):
        return Path(cached)
    if not hub.local_files_only:
        address = hf_hub_url(hub.repository, filename)
        # This question fails at once where there is no way to the server; the download would try again for half a minute.
        get_hf_file_metadata(address, timeout=10)
        logger.info("fetching %s", address)
    return Path(
        hf_hub_download(hub.repository, filename, cache_dir=hub.cache_dir, local_files_only=hub.local_files_only)
    )


def fingerprint(path: Path) -> str:
    """The first 16 digits of the SHA-256 of a file, or of a model's files in a folder: which weights they are."""
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file() and (file == path or file.suffix in MODEL_FILES):
            with open(file, "rb") as opened:
                while block := opened.read(2**20):
                    digest.update(block)
    return digest.hexdigest()[:16]


def read_state_dict(path: str | os.PathLike) -> dict[str, Tensor]:
    """Tensors of a weight file, a `.safetensors` file or one written by `torch.save`, on the CPU, by name.

    Those under an entry `state_dict` or `model` are taken, as some of the published files have it. A `module.` before every key,
    which data-parallel training leaves, is dropped; so are entries that are not tensors by name. WeightsError names a file that
    cannot be read, or not safely.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            content: Any = load_file(path)
        else:
            refuse_unsafe_pickle(path)
            content = torch.load(path, map_location="cpu", weights_only=True)
    except WeightsError:
        raise
    except Exception as err:  # of torch, zipfile, pickle or safetensors, all about what the file holds
        reason = first_line(err)
        if isinstance(err, (pickle.UnpicklingError, KeyError)):  # whose texts are about pickles, or are mere numbers
            reason = "it is not a weight file, or holds more than tensors and plain containers"
        raise WeightsError(f"cannot read weights from {path}: {reason}") from err
    if not isinstance(content, dict):
        raise WeightsError(f"{path} holds a {type(content).__name__}, not a state dict")
    content = next((content[name] for name in WRAPPERS if isinstance(content.get(name), dict)), content)
    tensors = {key: entry for key, entry in content.items() if isinstance(entry, Tensor) and isinstance(key, str)}
    if not tensors:
        raise WeightsError(f"{path} holds no tensors at its top level; its entries are {_some(list(content))}")
    if all(key.startswith("module.") for key in tensors):
        tensors = {key.removeprefix("module."): tensor for key, tensor in tensors.items()}
    return tensors


def refuse_unsafe_pickle(path: Path) -> None:
    """WeightsError if this version of torch cannot read a pickle safely."""
    if tuple(map(int, torch.__version__.split(".")[:2])) < SAFE_UNPICKLER:
        safe = ".".join(map(str, SAFE_UNPICKLER))
        raise WeightsError(
            f"{path} is a pickle, which torch {torch.__version__} cannot read safely (CVE-2025-32434, CVE-2026-24747); "
            f"install torch {safe} or later, or give the weights as {path.stem}.safetensors"
        )


def load_weights(
    network: nn.Module, state_dict: dict[str, Tensor], path: str | os.PathLike, optional: str | None = None
) -> None:
    """Copy `state_dict`, which was read from `path`, into `network`; WeightsError, with some of the entries, if it does not fit.

    Entries that begin with `optional` may be missing, and further ones may be there; both are logged.
    """
    try:
        missing, unexpected = network.load_state_dict(state_dict, strict=False)
    except RuntimeError as err:  # of torch, a line for each entry of another shape
        shapes = "; ".join(line.strip() for line in str(err).splitlines()[1:4])
        raise WeightsError(f"{path} does not fit {type(network).__name__}: {shapes}") from err
    needed = [key for key in missing if optional is None or not key.startswith(optional)]
    found = (("missing", needed or missing), ("unexpected", unexpected))
    complaint = "; ".join(f"{len(keys)} entries {kind}: {_some(keys)}" for kind, keys in found if keys)
    if needed or (unexpected and optional is None):
        raise WeightsError(f"{path} does not fit {type(network).__name__}: {complaint}")
    if complaint:
        logger.warning("%s and %s differ: %s", path, type(network).__name__, complaint)


def _some(keys: Sequence[object]) -> str:
    return ", ".join(repr(key)[:200] for key in keys[:3]) + (", ..." if len(keys) > 3 else "")
