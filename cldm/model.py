"""From a configuration and a weights file to a model."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cldm.checkpoint.errors import CheckpointError
from cldm.checkpoint.reading import Checkpoint, TensorInfo, open_checkpoint
from cldm.config import load_config, model_section, resolve
from ldm.util import ConfigError, instantiate_from_config

logger = logging.getLogger(__name__)

# Entries that not every file of a family has: published SD files lack `logvar`, newer ones `position_ids`.
OPTIONAL = ("logvar", "cond_stage_model.transformer.text_model.embeddings.position_ids")


def get_state_dict(d: Mapping[str, Any]) -> Mapping[str, Any]:
    """What lies under `state_dict`, or the mapping itself."""
    return d.get("state_dict", d)


def load_state_dict(ckpt_path: str | Path, location: str | torch.device = "cpu") -> dict[str, Tensor]:
    """All tensors of a weights file on `location`, whatever format it has; nothing in it is executed.

    Raises:
        CheckpointError: the file is missing, broken, or holds something else than weights.
    """
    with open_checkpoint(ckpt_path) as checkpoint:
        state_dict = {key: checkpoint[key].to(location) for key in checkpoint}
    logger.info("read %d entries from %s", len(state_dict), ckpt_path)
    return state_dict


def create_model(
    config_path: str | Path | Mapping[str, Any],
    weights: str | Path | None = None,
    device: str | torch.device | None = None,
) -> nn.Module:
    """The model that a configuration describes, on the CPU unless `device` says otherwise.

    Args:
        config_path: a YAML file, the name of a packaged one (`cldm_v15`, `cldm_v21`, `cldm_tiny`), or its content.
        weights: a file to fill it from. The model then takes memory only for what is read, so this is the quick way. What the
            file need not have (REFERENCE: `logvar`) keeps its initial value; anything else missing is an error.
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
    return model.to(device if device is not None else "cpu")  # also tells Lightning that it is not on the meta device any more


@lru_cache(maxsize=8)
def _expected_entries(path: Path) -> dict[str, TensorInfo]:
    with torch.device("meta"):
        model = instantiate_from_config(model_section(load_config(path), path))
    return {key: TensorInfo(tuple(value.shape), value.dtype) for key, value in model.state_dict().items()}


def expected_entries(config_name: str | Path) -> dict[str, TensorInfo]:
    """Keys, shapes and types of the state dict that a configuration's model has; no memory is taken for it."""
    return dict(_expected_entries(resolve(config_name, ".yaml")))


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
    """Fill `model` from a weights file, tensor by tensor; parameters on the meta device get memory as they are read.

    Values are converted to the type that the model's entry has (fp16 files become fp32 weights).

    Args:
        optional: prefixes of keys that the file may lack; they keep their initial values.

    Raises:
        CheckpointError: entries are missing or of another shape. The model is unchanged then.
    """
    with open_checkpoint(path) as checkpoint:
        return _fill(model, checkpoint, tuple(optional))


def _fill(model: nn.Module, checkpoint: Checkpoint, optional: tuple[str, ...]) -> LoadReport:
    places = dict(model.state_dict(keep_vars=True))
    missing = [key for key in places if key not in checkpoint]
    wrong = [key for key in places if key in checkpoint and checkpoint.info(key).shape != tuple(places[key].shape)]
    needed = [key for key in missing if not key.startswith(optional)]
    if needed or wrong:
        raise CheckpointError(_misfit(model, checkpoint, places, needed, wrong))
    on_meta = [key for key, place in places.items() if place.is_meta]
    report = LoadReport([k for k in places if k in checkpoint], missing, [k for k in checkpoint if k not in places])
    with torch.no_grad():
        for key in report.loaded:
            if places[key].is_meta:
                _give_memory(model, key, checkpoint[key].to(places[key].dtype))
            else:
                checkpoint.read_into(key, places[key])
    stranded = [key for key in on_meta if key in missing]
    if stranded:
        raise CheckpointError(
            f"{checkpoint.path}: {abbreviate(stranded)} have no initial values in a model made without memory"
        )
    logger.info("%s: %s", checkpoint.path, report)
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
    model: nn.Module, checkpoint: Checkpoint, places: Mapping[str, Tensor], missing: list[str], wrong: list[str]
) -> str:
    """What was found, what was expected, and which keys."""
    lines = [f"{checkpoint.path} does not fit {type(model).__name__}:"]
    if wrong:
        key = wrong[0]
        lines.append(
            f"{len(wrong)} entries have another shape, e.g. {key} is {list(checkpoint.info(key).shape)} "
            f"where {list(places[key].shape)} was expected;"
        )
    if missing:
        lines.append(f"{len(missing)} entries are missing ({abbreviate(missing)});")
    if missing and all(key.startswith("control_model.") for key in missing):
        lines.append("it holds no ControlNet: add one with tool_add_control.py")
    else:
        lines.append(
            f"it holds {len(checkpoint)} entries ({abbreviate(checkpoint, 2)}): choose the configuration that belongs to it"
        )
    return " ".join(lines)


def load_control(model: nn.Module, path: str | Path) -> LoadReport:
    """Fill the ControlNet of `model` from any file that holds one: full, or control only with or without prefix.

    Raises:
        CheckpointError: the file holds no ControlNet that fits; the model is unchanged then.
    """
    control = getattr(model, "control_model", None)
    if control is None:
        raise ConfigError(f"{type(model).__name__} has no ControlNet to load")
    with open_checkpoint(path) as checkpoint:
        prefix = "control_model." if any(key.startswith("control_model.") for key in checkpoint) else ""
        view = _Prefixed(checkpoint, prefix)
        if "input_hint_block.0.weight" not in view:
            raise CheckpointError(f"{path} holds no ControlNet ({len(checkpoint)} entries: {abbreviate(checkpoint)})")
        return _fill(control, view, ())


class _Prefixed:
    """A checkpoint's entries below a prefix, under their keys without it."""

    def __init__(self, checkpoint: Checkpoint, prefix: str) -> None:
        self._checkpoint, self._prefix = checkpoint, prefix
        self.path = checkpoint.path

    def __contains__(self, key: str) -> bool:
        return self._prefix + key in self._checkpoint

    def __iter__(self):
        return (key.removeprefix(self._prefix) for key in self._checkpoint if key.startswith(self._prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __getitem__(self, key: str) -> Tensor:
        return self._checkpoint[self._prefix + key]

    def info(self, key: str) -> TensorInfo:
        return self._checkpoint.info(self._prefix + key)

    def read_into(self, key: str, out: Tensor) -> None:
        self._checkpoint.read_into(self._prefix + key, out)
