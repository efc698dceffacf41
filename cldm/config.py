"""Configurations: finding the packaged YAML files, reading them, and `key=value` overrides of a script's settings."""

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from ldm.util import ConfigError

S = TypeVar("S")


class MissingConfigError(ConfigError, FileNotFoundError):
    """There is no such configuration."""


# In a wheel the YAML files and the tiny base's weights lie inside this package; in a checkout, in `models` and `configs` beside it.
_PACKAGED = Path(__file__).parent / "resources"
_CHECKOUT = Path(__file__).parent.parent

# The YAML files of ControlNet 1.1, those of its first depth and tile models too: all are SD 1.5's configuration; that of shuffle
# averages the control's outputs.
CONTROLNET_1_1 = {
    *(f"control_v11p_sd15_{name}" for name in "canny depth inpaint lineart mlsd normalbae openpose scribble seg softedge".split()),
    "control_v11f1p_sd15_depth", "control_v11f1e_sd15_tile", "control_v11u_sd15_tile", "control_v11e_sd15_ip2p",
    "control_v11p_sd15s2_lineart_anime", "control_v11e_sd15_shuffle",
}  # fmt: skip


def search_folders() -> list[Path]:
    """Where a file is looked for that is not found under the name as given."""
    roots = [root for root in (_PACKAGED, _CHECKOUT) if (root / "models" / "cldm_v15.yaml").is_file()]
    return [folder for root in roots for folder in (root / "models", root, root / "configs")]


def resolve(name: str | Path, suffix: str = "") -> Path:
    """The file that `name` means: as given, else among the packaged models and configurations, with `suffix` added if need be.

    Raises:
        ConfigError: there is none; the message names the folders and what they hold.
    """
    candidates = [Path(name), Path(f"{name}{suffix}")]
    for folder in [Path(), *search_folders()]:
        for candidate in candidates:
            if (folder / candidate).is_file():
                return folder / candidate
    if Path(name).stem in CONTROLNET_1_1 and (suffix or Path(name).suffix) == ".yaml":
        return resolve("cldm_v15", ".yaml")
    known = sorted(path.stem for folder in search_folders() for path in folder.glob(f"*{suffix}") if suffix)
    hint = f"; packaged are {', '.join(known)}" if known else ""
    raise MissingConfigError(f"there is no file {str(name)!r}{hint}")


def load_config(path: str | Path) -> DictConfig:
    """The YAML file `path`, or the packaged one of that name (`cldm_tiny`, and those of ControlNet 1.1).

    Raises:
        ConfigError: no such file, or not a YAML mapping.
    """
    found = resolve(path, ".yaml")
    try:
        config = OmegaConf.load(found)
        if isinstance(config, DictConfig):
            OmegaConf.resolve(config)  # a reference to nothing is found here, and not when it is read
    except (YAMLError, OmegaConfBaseException, ValueError, RecursionError) as error:
        raise ConfigError(f"{found} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(config, DictConfig):
        raise ConfigError(f"{found} must hold a mapping, found {type(config).__name__}")
    if found.stem == "cldm_v15" and Path(path).stem == "control_v11e_sd15_shuffle":
        config.model.params.global_average_pooling = True
    return config


def model_section(config: Mapping[str, Any], source: str | Path = "the configuration") -> Mapping[str, Any]:
    """The part with `target` and `params` that names the model: `config.model`, or the mapping itself."""
    section = config.get("model", config)
    if not isinstance(section, Mapping) or "target" not in section:
        raise ConfigError(f"{source} must hold `model:` with `target` and `params`")
    return section


_KINDS: dict[Any, str] = {
    int: "a whole number",
    int | None: "a whole number",
    float: "a number",
    bool: "true or false",
}


def override(settings: S, arguments: Sequence[str]) -> S:
    """A dataclass of settings with `key=value` arguments applied, each checked against the field's type.

    A text is taken as it stands; other values are read as YAML reads them.

    Raises:
        ConfigError: an argument that is not `key=value`, an unknown key (the known ones are listed), or a value of another type.
    """
    if not is_dataclass(settings):
        raise TypeError("settings must be a dataclass instance")
    known = [f.name for f in fields(settings)]
    types = get_type_hints(type(settings))
    arguments = _joined(arguments)
    texts: dict[str, Any] = {}
    merged = OmegaConf.structured(settings)
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals:
            raise ConfigError(f"{argument!r} is not of the form key=value; the keys are {', '.join(known)}")
        if key not in known:
            nearest = get_close_matches(key, known, 1)
            meant = f"; did you mean {nearest[0]}? The settings are " if nearest else "; the settings are "
            raise ConfigError(f"unknown setting {key!r}{meant}{', '.join(known)}")
        # As of a shell's variable that is not set; an empty path would be the present folder.
        if not value and getattr(settings, key):
            raise ConfigError(f"{key} is empty; give a value, or leave {key}= out for the default")
        if types[key] is str:  # YAML would make a number of 007, and cut "a #2" short
            texts[key] = value
        else:
            try:
                merged.merge_with_dotlist([argument])
            except (OmegaConfBaseException, YAMLError) as error:
                kind = _KINDS.get(types[key], "a value of its type")
                raise ConfigError(f"{key} must be {kind}, found {value!r}") from error
    return replace(OmegaConf.to_object(merged), **texts)  # type: ignore[type-var, return-value]


def _joined(arguments: Sequence[str]) -> list[str]:
    """Arguments with what a shell has split at spaces around `=` put together again: `steps = 30` is `steps=30`."""
    joined: list[str] = []
    for argument in arguments:
        before = joined[-1] if joined else ""
        at_equals = before and "=" not in before and argument.startswith("=")  # steps =30
        behind_it = before.endswith("=") and "=" not in argument  # steps= 30
        if at_equals or behind_it:
            joined[-1] += argument
        else:
            joined.append(argument)
    return joined
