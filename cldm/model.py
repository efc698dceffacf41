"""From a configuration and a weights file to a model."""

import logging
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from cldm.checkpoint.expected import Config
from cldm.checkpoint.names import CONTROL_PREFIX
from cldm.checkpoint.opening import ModelWeights, open_model
from cldm.checkpoint.recognising import EMA_PREFIX, POOLING, SCALE_FACTOR, SCHEDULE_KEYS
from cldm.checkpoint.schedule import completed
from cldm.config import load_config, model_section, resolve
from cldm.terminal import printable
from ldm.files import CheckpointError, LazyTensor
from ldm.files.tensors import Tensors, parse_dtype
from ldm.initial_values import deferred_initial_values
from ldm.models.diffusion.process import rounded_schedule
from ldm.modules.ema import LitEma
from ldm.util import ConfigError, instantiate_from_config

if TYPE_CHECKING:
    from cldm.cldm import ControlLDM

logger = logging.getLogger(__name__)

_READERS = 4  # threads that read a weights file; what takes time is the system's copying, outside Python's lock

# Entries that not every file of a family has: published SD files lack `logvar`, newer ones `position_ids`.
OPTIONAL = ("logvar", "cond_stage_model.transformer.text_model.embeddings.position_ids")


def get_state_dict(d: Mapping[str, Any]) -> Mapping[str, Any]:
    """What lies under `state_dict`, or the mapping itself."""
    return d.get("state_dict", d)


@torch.inference_mode(False)  # its parameters must be ordinary ones wherever it is called
def create_model(
    config_path: Config,
    weights: str | Path | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
) -> Any:
    """The model that a configuration describes, a ControlLDM for packaged ones, on the CPU unless `device` says otherwise.

    Args:
        config_path: a YAML file, the name of a packaged one (`cldm_v15`, `cldm_v21`, `cldm_tiny`), or its content.
        weights: a file or folder to fill it from, of any layout that has the whole model, or `hf://owner/name[/file]`. The
            model then takes memory only for what is read. What a file need not have (`logvar`) keeps its initial value;
            anything else missing is an error. Without `weights` all values are initial ones, large ones drawn when they are
            first read, since the published way overwrites them with `load_state_dict`.
        device: of all parameters and buffers; `meta` makes a model without memory.
        dtype: of the weights, e.g. "float16"; float32 by default. The noise schedule stays float32.

    Raises:
        ConfigError: the configuration cannot be built.
        CheckpointError: the weights cannot be read, do not fit, or say that they belong to another kind of model.
    """
    source: str | Path = "the configuration"
    config: Mapping[str, Any]
    if isinstance(config_path, Mapping):
        config = config_path
    else:
        source, config = resolve(config_path, ".yaml"), load_config(config_path)
    section = model_section(config, source)
    place = torch.device(device if device is not None else "cpu")
    if place.type == "cuda" and place.index is None:  # on fake tensors there need not be one
        place = torch.device("cuda", torch.cuda.current_device() if torch.cuda.is_available() else 0)

    def build(where: torch.device) -> Any:
        with where, deferred_initial_values():
            model = instantiate_from_config(section)
        if dtype is not None:
            for name, part in model.named_children():  # the schedule belongs to the model itself
                if name != "model_ema":
                    part.to(parse_dtype(dtype))
        return model

    model = build(place if weights is None else torch.device("meta"))
    if weights is not None:
        _load(model, weights, OPTIONAL, place, config_path)
        if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
            model = build(place)  # some values are in no file, such as those of a buffer that is not persistent
            _load(model, weights, OPTIONAL, place, config_path)
    if weights is None and place.type == "cpu":
        return model
    # After loading on the CPU too: this tells Lightning that the model is not on the meta device any more.
    return model.to(place)


def load_state_dict(ckpt_path: str | Path, location: str | torch.device = "cpu") -> dict[str, Tensor]:
    """All tensors of a weights file or folder on `location`, under the keys that a model here has; nothing is executed.

    Full checkpoints and files of unknown layout keep their keys, EMA entries included. A ControlNet without prefix gets
    its `control_model.`, and what diffusers wrote gets the names of this library. What a file lacks, or what it says that
    the configuration must say too, is logged as a warning.

    Raises:
        CheckpointError: the file is missing, broken, or holds something else than weights; or it is a difference, which
            only `load_control` can add to its base.
    """
    with open_model(ckpt_path, any_layout=True) as opened:
        tensors = _for_filling(opened, opened.report.config)
        with ThreadPoolExecutor(_READERS) as pool:
            state_dict = dict(
                zip(tensors, pool.map(lambda key: tensors[key].read().to(location), tensors), strict=True)
            )
    report = opened.report
    logger.info("read %d entries from %s (%s, %s)", len(state_dict), ckpt_path, report.layout, report.family)
    for keys, problem in ((report.missing, "are missing"), (report.mismatched, "have another shape than its family's")):
        if keys:
            logger.warning("%s: %d entries %s (%s)", report.path, len(keys), problem, abbreviate(keys))
    if report.told.get("prediction", "eps") != "eps":
        prediction = report.told["prediction"]
        logger.warning(
            "%s: its model predicts %s; configure it with `parameterization: %s`", report.path, prediction, prediction
        )
    if report.told.get(POOLING):
        logger.warning("%s: its ControlNet averages its outputs; configure it with `%s: true`", report.path, POOLING)
    return state_dict


def _for_filling(opened: ModelWeights, config: Config | None) -> Tensors:
    """All tensors of a file, with those of the configuration's model that a pipeline of diffusers leaves out."""
    if opened.report.layout != "diffusers-pipeline":
        return {**opened.tensors, **opened.ema}
    tensors, notes = completed(opened.tensors, opened, config)
    opened.notes.extend(notes)
    return tensors


@dataclass(frozen=True)
class LoadReport:
    """What a load did, by key.

    Attributes:
        loaded: keys that were in the file and in the model.
        kept: keys of the model that the file does not have; their values stayed.
        ignored: keys that are in the file, and were not loaded.
        notes: what else deserves notice, a line each.
    """

    loaded: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        parts = [f"{len(self.loaded)} entries loaded"]
        if self.kept:
            parts.append(f"{len(self.kept)} kept their values ({abbreviate(self.kept)})")
        if self.ignored:
            parts.append(f"{len(self.ignored)} of the file ignored ({abbreviate(self.ignored)})")
        return printable("; ".join([*parts, *self.notes]))


def abbreviate(keys: Iterable[str], most: int = 3) -> str:
    """The first few keys, and how many more there are."""
    keys = list(keys)
    return ", ".join(keys[:most]) + (f" and {len(keys) - most} more" if len(keys) > most else "")


def load_weights(model: nn.Module, path: str | Path, optional: Iterable[str] = OPTIONAL) -> LoadReport:
    """Fill `model` from a weights file or folder, tensor by tensor; parameters on the meta device get memory as they are read.

    Values are converted to the dtype that the model's entry has (fp16 files become fp32 weights).

    Args:
        optional: prefixes of keys that the file may lack; they keep their initial values.

    Raises:
        CheckpointError: entries are missing or of another shape, or the file says that it belongs to another kind of
            model. The model is unchanged then.
    """
    return _load(model, path, tuple(optional), torch.device("cpu"))


def _load(
    model: nn.Module,
    path: str | Path,
    optional: tuple[str, ...],
    device: torch.device,
    config: Config | None = None,
) -> LoadReport:
    with open_model(path, any_layout=True) as opened:
        scale, own = opened.report.told.get(SCALE_FACTOR), getattr(model, "scale_factor", None)
        if scale is not None and isinstance(own, float) and abs(own - scale) > 1e-4 * scale:
            raise CheckpointError(
                f"its VAE scales latents by {scale}, this model by {own}; set `scale_factor: {scale}` in the configuration",
                opened.path,
            )
        _check_prediction(model, opened)
        tensors = _for_filling(opened, opened.report.config if config is None else config)
        average = [key for key in model.state_dict() if key.startswith(EMA_PREFIX)]
        begins = hasattr(model, "averaged_module") and any(key not in tensors for key in average)
        report = _fill(model, tensors, opened.path, optional, device, EMA_PREFIX if begins else None)
        if begins:
            cast(Any, model).model_ema = LitEma(cast(Any, model).averaged_module()).float()
            report.notes.append("the EMA begins at the weights, as the file has none")
        report.ignored.extend(opened.left_out)
        report.notes.extend([*opened.notes, *_apply_pooling(model, opened)])
    logger.info("%s: %s", path, report)
    return report


def load_control(model: nn.Module, path: str | Path) -> LoadReport:
    """Fill the ControlNet of `model` from any file that holds one.

    It may be a full checkpoint, a ControlNet alone with or without prefix, of diffusers, or stored as the difference to
    its base, which is then added to the UNet that `model` has. The rest of the model stays as it is; what the file holds
    beside a ControlNet is ignored, and reported so. Where the file says whether its ControlNet averages its outputs (as
    shuffle does), `model.global_average_pooling` follows.

    Raises:
        ConfigError: `model` has no ControlNet.
        CheckpointError: the file holds no ControlNet that fits; the model is unchanged then.
    """
    control = getattr(model, "control_model", None)
    if control is None:
        raise ConfigError(f"{type(model).__name__} has no ControlNet to load")
    base = {key: LazyTensor.of(tensor) for key, tensor in model.state_dict().items()}
    with open_model(path, base) as opened:
        if not opened.has(CONTROL_PREFIX):
            raise CheckpointError(f"holds no ControlNet: it is a {opened.report.layout} file", opened.path)
        _check_prediction(model, opened)
        report = _fill(control, opened.part(CONTROL_PREFIX), opened.path, (), torch.device("cpu"))
        beside = [key for key in (*opened.tensors, *opened.ema) if not key.startswith(CONTROL_PREFIX)]
        report.ignored.extend([*beside, *opened.left_out])
        report.notes.extend([*opened.notes, *_apply_pooling(model, opened)])
    logger.info("%s: %s", path, report)
    return report


def add_control(model: "ControlLDM", path: str | Path, **changes: Any) -> int:
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
    added: Any = model.control_networks()[number]
    first, pooling = model.control_model, model.global_average_pooling
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


def _check_prediction(model: nn.Module, opened: ModelWeights) -> None:
    """Raise if a file says that its UNet predicts something else than the model is configured for."""
    told, own = opened.report.told.get("prediction"), getattr(model, "parameterization", None)
    if told is not None and own is not None and told != own:
        raise CheckpointError(
            f"belongs to a model that predicts {told}, and this one is configured to predict {own}: set "
            f"`parameterization: {told}` in its configuration, or choose another file",
            opened.path,
        )


def _apply_pooling(model: nn.Module, opened: ModelWeights) -> list[str]:
    """Let the model average its ControlNet's outputs as a file's ControlNet needs it, if the file says so; and say so."""
    told = opened.report.told.get(POOLING)
    if told is None or not opened.has(CONTROL_PREFIX) or getattr(model, POOLING, told) == told:
        return []
    setattr(model, POOLING, told)
    return [f"{POOLING} is set to {told}, as the file says"]


def _fill(
    model: nn.Module,
    tensors: Tensors,
    path: Path,
    optional: tuple[str, ...],
    device: torch.device,
    left_out: str | None = None,
) -> LoadReport:
    """Fill a module but for keys that begin with `left_out`; what lies on the meta device gets memory on `device`."""
    places = {
        k: t for k, t in model.state_dict(keep_vars=True).items() if left_out is None or not k.startswith(left_out)
    }
    missing = [key for key in places if key not in tensors]
    wrong = [key for key in places if key in tensors and tensors[key].shape != tuple(places[key].shape)]
    needed = [key for key in missing if not key.startswith(optional) or places[key].is_meta]
    if needed or wrong:
        raise CheckpointError(_misfit(model, tensors, places, needed, wrong), path)
    report = LoadReport([k for k in places if k in tensors], missing, [k for k in tensors if k not in places])
    schedule = {key: tensors[key].read() for key in SCHEDULE_KEYS & tensors.keys()}
    own_schedule = rounded_schedule(schedule, places)

    keys_of: dict[int, list[str]] = {}  # by tensor: tied weights are one parameter under several keys
    for key in report.loaded:
        if key not in own_schedule:
            keys_of.setdefault(id(places[key]), []).append(key)

    def read(keys: list[str]) -> None:
        place, value = places[keys[-1]], tensors[keys[-1]].read()
        if not place.is_meta:
            with torch.no_grad():
                place.copy_(value)
            return
        made = value.to(device, place.dtype)
        if isinstance(place, nn.Parameter):
            made = nn.Parameter(made, requires_grad=place.requires_grad)
        for key in keys:
            parent, _, name = key.rpartition(".")
            owner: Any = model.get_submodule(parent)
            (owner._parameters if name in owner._parameters else owner._buffers)[name] = made

    with ThreadPoolExecutor(_READERS) as pool:
        list(pool.map(read, keys_of.values()))
    return report


def _misfit(
    model: nn.Module, tensors: Tensors, places: Mapping[str, Tensor], missing: list[str], wrong: list[str]
) -> str:
    """What was found, what was expected, and which keys."""
    lines = [f"does not fit {type(model).__name__}:"]
    if wrong:
        key = wrong[0]
        lines.append(
            f"{len(wrong)} entries have another shape, e.g. {key} is {list(tensors[key].shape)} "
            f"where {list(places[key].shape)} was expected;"
        )
    if missing:
        lines.append(f"{len(missing)} entries are missing ({abbreviate(missing)});")
    without_control = any(key.startswith(CONTROL_PREFIX) for key in missing)
    if without_control and all(key.startswith(CONTROL_PREFIX) or key in SCHEDULE_KEYS for key in missing):
        lines.append("it holds no ControlNet: add one with controlnet add-control")
    else:
        lines.append(
            f"it holds {len(tensors)} entries ({abbreviate(tensors, 2)}): choose the configuration that belongs to it"
        )
    return printable(" ".join(lines))
