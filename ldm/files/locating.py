"""Where the weights lie that a path names: a file or folder, packaged weights, or a repository on the Hugging Face hub."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from ldm.files.errors import CheckpointError

HUB = "hf://"
SUFFIXES = (".safetensors", ".ckpt", ".pth", ".pt", ".bin")
WEIGHT_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
# With a variant such as `.fp16`; of one file, or of the index of several.
_WEIGHT_NAME = re.compile(rf"({'|'.join(WEIGHT_STEMS)})(\.\w+)?\.(safetensors|bin)(\.index(\.\w+)?\.json)?")
# Packaged weights lie with the configurations that they belong to: in a checkout in `models`, in a wheel within `cldm`.
_ROOT = Path(__file__).parents[2]
_PACKAGED = (_ROOT / "models", _ROOT / "cldm" / "resources" / "models")


def locate(path: str | Path) -> Path:
    """The file or folder that a weights path means: as given, packaged weights by name, or `hf://owner/name[/file]`.

    Raises:
        CheckpointError: a file of the hub cannot be had. (A local one that does not exist is found out when it is opened.)
    """
    if str(path).startswith((HUB, "hf:/")):  # a Path has one slash less
        return _fetch(str(path))
    given = Path(path)
    try:
        if given.exists() or len(given.parts) != 1:
            return given
        names = (given.name, f"{given.name}.safetensors")
        return next((file for folder in _PACKAGED for name in names if (file := folder / name).is_file()), given)
    except (OSError, ValueError):  # a name that the system refuses, as it will when the file is opened
        return given


def choose_weights(names: Iterable[str]) -> str | None:
    """Of a folder's files, the one that holds its weights or their index; safetensors, full precision first."""

    def rank(name: re.Match[str]) -> tuple:
        variant = name[2] or name[5] or ""
        precision = (variant != "", variant != ".fp16", variant)
        return (*precision, name[3] != "safetensors", WEIGHT_STEMS.index(name[1]), name[4] is not None)

    best = min(filter(None, map(_WEIGHT_NAME.fullmatch, names)), key=rank, default=None)
    return None if best is None else best[0]


def _fetch(address: str) -> Path:
    """A file or folder of the hub, in the cache of `huggingface_hub`; what is there already is not fetched again."""
    match = re.fullmatch(r"hf:/{1,2}([\w.-]+/[\w.-]+?)(?:@((?:refs/pr/)?[\w.-]+))?(?:/([^@]+?))?/?", address)
    if match is None:
        raise CheckpointError("write hf://owner/name or hf://owner/name/file, with @revision after the name", address)
    repository, revision, inside = match[1], match[2], match[3] or ""
    import huggingface_hub as hub  # slow to import, and needed for such addresses alone
    from huggingface_hub import utils as errors

    try:
        if not inside.endswith(SUFFIXES):
            return _fetch_folder(hub, repository, revision, inside)
        try:
            return Path(hub.hf_hub_download(repository, inside, revision=revision, local_files_only=True))
        except errors.LocalEntryNotFoundError:
            return Path(hub.hf_hub_download(repository, inside, revision=revision))
    except Exception as error:  # the library and what it calls raise many types
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
            reason = "the hub cannot be reached, and it is not in the cache"
        elif isinstance(error, errors.RepositoryNotFoundError):
            reason = f"the hub has no repository {repository!r}, or it needs a login (`hf auth login`)"
        elif isinstance(error, errors.EntryNotFoundError):
            reason = f"{repository!r} has no {inside!r}" if inside else f"{repository!r} holds no folder of diffusers"
        elif not isinstance(error, errors.HfHubHTTPError | errors.HFValidationError):
            reason = f"the hub cannot be reached ({reason})"
        advice = "Check the name, or download it elsewhere and give the path of the file"
        raise CheckpointError(f"cannot be fetched: {reason}. {advice}", address) from error


def _fetch_folder(hub: Any, repository: str, revision: str | None, inside: str) -> Path:
    """A diffusers folder: its configurations, and of each part the one set of weights that would be read."""
    try:
        names = hub.HfApi().list_repo_files(repository, revision=revision)
    except Exception as unreachable:
        try:  # no patterns: newer versions refuse a snapshot of which only some files were fetched
            cached = hub.snapshot_download(repository, revision=revision, local_files_only=True, allow_patterns=[])
        except Exception:
            raise unreachable from None
        if not Path(cached, inside).is_dir():
            raise unreachable
        return Path(cached, inside)
    folders: dict[str, set[str]] = {}
    for folder, name in map(posixpath.split, names):
        folders.setdefault(folder, set()).add(name)
    wanted = []
    for folder, held in folders.items():
        chosen = choose_weights(held) or ""
        stem, kind = chosen.split(".")[0], ".safetensors" if ".safetensors" in chosen else ".bin"
        shards = f"{stem}*-of-*{kind}" if chosen.endswith(".json") else chosen
        wanted += [posixpath.join(folder, name) for name in held if name.endswith(".json") or fnmatch(name, shards)]
    wanted = [name for name in wanted if name.startswith(f"{inside}/" if inside else "")]
    if not wanted:
        raise hub.utils.EntryNotFoundError(inside)
    return Path(hub.snapshot_download(repository, revision=revision, allow_patterns=wanted)) / inside
