"""From a configuration and a weights file to a model."""

import logging
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cldm.checkpoint.converting import open_weights
from cldm.checkpoint.errors import CheckpointError
from cldm.checkpoint.layout import CONTROL_PREFIX, Report, identify
from cldm.checkpoint.lazy import LazyEntries, lazy_entries
from cldm.checkpoint.opening import open_model
from cldm.config import load_config, model_section, resolve
from ldm.util import ConfigError, instantiate_from_config

logger = logging.getLogger(__name__)

_READERS = 4  # threads that read a weights file; what takes time is the system's copying, outside Python's lock

# Entries that not every file of a family has: published SD files lack `logvar`, newer ones `position_ids`.
OPTIONAL = ("logvar", "cond_stage_model.transformer.text_model.embeddings.position_ids")


def get_state_dict(d: Mapping[str, Any]) -> Mapping[str, Any]:
    """What lies under `state_dict`, or the mapping itself."""
    return d.get("state_dict", d)


def load_state_dict(ckpt_path: str | Path, location: str | torch.device = "cpu") -> dict[str, Tensor]:
    """All tensors of a weights file or folder on `location`, under the keys that a model here has; nothing is executed.

    A file with such keys, or with keys of no known layout, comes as it is. A ControlNet without prefix gets its
    `control_model.`, and what diffusers wrote gets the names of this library. What a file lacks is logged as a warning.

    Raises:
        CheckpointError: the file is missing, broken, or holds something else than weights; or it is a difference, which
            only `load_control` can add to its base.
    """
    with open_weights(ckpt_path) as (entries, checkpoint):
        with ThreadPoolExecutor(_READERS) as pool:
            state_dict = dict(zip(entries, pool.map(lambda key: entries[key].to(location), entries), strict=True))
        report = identify(checkpoint)
    logger.info("read %d entries from %s (%s, %s)", len(state_dict), ckpt_path, report.layout, report.family)
    _warn_if_partial(report)
    return state_dict


def _warn_if_partial(report: Report) -> None:
    if report.missing:
        logger.warning(
            "%s is an incomplete %s file of family %s: %d entries are missing (%s)",
            report.path, report.layout, report.family, len(report.missing), abbreviate(report.missing),
        )  # fmt: skip
    if report.mismatched:
        logger.warning("%s: %d entries are not of the shape that its family has (%s)",
                       report.path, len(report.mismatched), abbreviate(report.mismatched))  # fmt: skip


def create_model(
    config_path: str | Path | Mapping[str, Any],
    weights: str | Path | None = None,
    device: str | torch.device | None = None,
) -> nn.Module:
    """The model that a configuration describes, on the CPU unless `device` says otherwise.

    Args:
        config_path: a YAML file, the name of a packaged one (`cldm_v15`, `cldm_v21`, `cldm_tiny`), or its content.
        weights: a file or folder to fill it from, of any layout that has the whole model. The model then takes memory only
            for what is read, so this is the quick way. What a file need not have (`logvar`) keeps its initial value;
            anything else missing is an error.
        device: of the parameters; `meta` makes a model without memory.

    Raises:
        ConfigError: the configuration cannot be built.
        CheckpointError: the weights cannot be read or do not fit.
    """
    if isinstance(config_path, Mapping):
        source, config = "the configuration", config_path
    else:
        source, config = resolve(config_path, ".yaml"), load_config(config_path)
    section = model_section(config, source)
    if weights is None:
        with torch.device(device if device is not None else "cpu"):
            return instantiate_from_config(section)
    with torch.device("meta"):
        model = instantiate_from_config(section)
    load_weights(model, weights)
    # On the CPU too: this tells Lightning that the model is not on the meta device any more.
    return model.to(device if device is not None else "cpu")


@dataclass(frozen=True)
class LoadReport:
    """What a load did, by key."""

    loaded: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)  # the model's own value stayed
    ignored: list[str] = field(default_factory=list)  # in the file, and nowhere in the model

    def __str__(self) -> str:
        parts = [f"{len(self.loaded)} entries loaded"]
        if self.kept:
            parts.append(f"{len(self.kept)} kept their initial values ({abbreviate(self.kept)})")
        if self.ignored:
            parts.append(f"{len(self.ignored)} of the file ignored ({abbreviate(self.ignored)})")
        return "; ".join(parts)


def abbreviate(keys: Iterable[str], most: int = 3) -> str:
    """The first few keys, and how many more there are."""
    keys = list(keys)
    return ", ".join(keys[:most]) + (f" and {len(keys) - most} more" if len(keys) > most else "")


def load_weights(model: nn.Module, path: str | Path, optional: Iterable[str] = OPTIONAL) -> LoadReport:
    """Fill `model` from a weights file or folder, tensor by tensor; parameters on the meta device get memory as they are read.

    Values are converted to the type that the model's entry has (fp16 files become fp32 weights).

    Args:
        optional: prefixes of keys that the file may lack; they keep their initial values.

    Raises:
        CheckpointError: entries are missing or of another shape. The model is unchanged then.
    """
    with open_weights(path) as (entries, _):
        return _fill(model, entries, tuple(optional))


def _fill(model: nn.Module, entries: LazyEntries, optional: tuple[str, ...]) -> LoadReport:
    places = dict(model.state_dict(keep_vars=True))
    missing = [key for key in places if key not in entries]
    wrong = [key for key in places if key in entries and entries.info(key).shape != tuple(places[key].shape)]
    needed = [key for key in missing if not key.startswith(optional)]
    if needed or wrong:
        raise CheckpointError(_misfit(model, entries, places, needed, wrong))
    stranded = [key for key in missing if places[key].is_meta]
    if stranded:
        raise CheckpointError(
            f"{entries.path}: {abbreviate(stranded)} are missing, and have no initial values in a model made without memory"
        )
    report = LoadReport([k for k in places if k in entries], missing, [k for k in entries if k not in places])

    def read(key: str) -> Tensor | None:
        if places[key].is_meta:
            return entries[key].to(places[key].dtype)
        with torch.no_grad():
            entries.read_into(key, places[key])
        return None

    with ThreadPoolExecutor(_READERS) as pool:
        for key, value in zip(report.loaded, pool.map(read, report.loaded), strict=True):
            if value is not None:
                _give_memory(model, key, value)
    logger.info("%s: %s", entries.path, report)
    return report


def _give_memory(model: nn.Module, key: str, value: Tensor) -> None:
    """Put a tensor in the place of an entry that lies on the meta device."""
    owner_name, _, name = key.rpartition(".")
    owner = model.get_submodule(owner_name)
    if name in owner._parameters:
        owner._parameters[name] = nn.Parameter(value, requires_grad=owner._parameters[name].requires_grad)
    else:
        owner._buffers[name] = value


def _misfit(
    model: nn.Module, entries: LazyEntries, places: Mapping[str, Tensor], missing: list[str], wrong: list[str]
) -> str:
    """What was found, what was expected, and which keys."""
    lines = [f"{entries.path} does not fit {type(model).__name__}:"]
    if wrong:
        key = wrong[0]
        lines.append(
            f"{len(wrong)} entries have another shape, e.g. {key} is {list(entries.info(key).shape)} "
            f"where {list(places[key].shape)} was expected;"
        )
    if missing:
        lines.append(f"{len(missing)} entries are missing ({abbreviate(missing)});")
    if missing and all(key.startswith("control_model.") for key in missing):
        lines.append("it holds no ControlNet: add one with tool_add_control.py")
    else:
        lines.append(
            f"it holds {len(entries)} entries ({abbreviate(entries, 2)}): choose the configuration that belongs to it"
        )
    return " ".join(lines)


def load_control(model: nn.Module, path: str | Path) -> LoadReport:
    """Fill the ControlNet of `model` from any file that holds one.

    It may be a full checkpoint, a ControlNet alone with or without prefix, of diffusers, or stored as the difference to
    its base, which is then added to the UNet that `model` has. The rest of the model stays as it is; what the file holds
    beside a ControlNet is ignored, and reported so.

    Raises:
        ConfigError: `model` has no ControlNet.
        CheckpointError: the file holds no ControlNet that fits; the model is unchanged then.
    """
    control = getattr(model, "control_model", None)
    if control is None:
        raise ConfigError(f"{type(model).__name__} has no ControlNet to load")
    with open_model(path, lazy_entries(model.state_dict())) as opened:
        if not opened.has(CONTROL_PREFIX):
            raise CheckpointError(f"{path} holds no ControlNet: it is a {opened.report.layout} file")
        report = _fill(control, opened.state_dict(CONTROL_PREFIX), ())
        beside = [key for key in opened.entries if not key.startswith(CONTROL_PREFIX)]
    return replace(report, ignored=[*report.ignored, *beside])


def add_control(model: nn.Module, path: str | Path, **changes: Any) -> int:
    """Add the ControlNet of a file, of any layout, beside those that `model` has; the base is shared.

    Args:
        model: a ControlLDM with its weights.
        **changes: see `ControlLDM.add_control`; where the file tells whether its outputs are averaged, that is followed.

    Returns:
        its number, for `cldm.guidance.Control(hint, network=number)`.

    Raises:
        CheckpointError, ConfigError: as `load_control`; the model is as before then.
    """
    number = model.add_control(**changes)
    first, pooling, added = model.control_model, model.global_average_pooling, model.control_networks()[number]
    try:  # as the model's only one, since that is what files hold
        model.control_model, model.global_average_pooling = added, added.global_average_pooling
        load_control(model, path)
        added.global_average_pooling = model.global_average_pooling
    except BaseException:
        del model.more_control_models[number - 1]
        raise
    finally:
        model.control_model, model.global_average_pooling = first, pooling
    return number
