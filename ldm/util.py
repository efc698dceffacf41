"""Building objects from configurations, and small helpers that every module may use."""

import importlib
import inspect
import logging
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin

import torch

T = TypeVar("T")
_FRAMEWORKS = ("torch", "pytorch_lightning", "lightning", "lightning_fabric")
logger = logging.getLogger(__name__)


class ConfigError(ValueError):
    """A configuration that cannot be built; the message names the target and what is wrong with it."""


class MissingEntryError(ConfigError, KeyError):
    """A batch lacks an entry that the configuration names."""

    __str__ = Exception.__str__  # a KeyError's puts its message in quotes


def exists(x: Any) -> bool:
    """Whether `x` is anything but None."""
    return x is not None


def default(value: T | None, fallback: T | Callable[[], T]) -> T:
    """`value`, or the fallback (called first, if it is a function) where the value is None."""
    if value is not None:
        return value
    chosen: Any = fallback
    return chosen() if inspect.isfunction(chosen) else chosen


def count_params(model: torch.nn.Module, verbose: bool = False) -> int:
    """Number of parameters of `model`; `verbose` also logs it."""
    total = sum(p.numel() for p in model.parameters())
    if verbose:
        logger.info("%s has %.2f million parameters", type(model).__name__, total / 1e6)
    return total


def get_obj_from_str(string: str, reload: bool = False) -> Any:
    """The object at a dotted path such as `ldm.models.autoencoder.AutoencoderKL`.

    Raises:
        ConfigError: the module or the name in it does not exist.
    """
    module_name, _, name = string.rpartition(".") if isinstance(string, str) else ("", "", "")
    if not module_name or module_name.startswith("."):
        raise ConfigError(f"target {string!r} is not a dotted path; write package.module.Name")
    try:
        module = importlib.import_module(module_name)
        if reload:
            module = importlib.reload(module)
    except ModuleNotFoundError as error:
        # Only a part of the path itself is the user's mistake; a dependency that fails to import inside it is not.
        if error.name and (module_name == error.name or module_name.startswith(error.name + ".")):
            way_out = "" if "." in error.name else "; for one of your own, name its folder in PYTHONPATH"
            raise ConfigError(f"target {string!r}: there is no module {error.name!r}{way_out}") from error
        raise
    if not hasattr(module, name):
        raise ConfigError(f"target {string!r}: module {module_name!r} has no {name!r}")
    return getattr(module, name)


def instantiate_from_config(config: Mapping[str, Any] | str, kind: type = torch.nn.Module) -> Any:
    """Build the object that a mapping with `target` (dotted path) and optional `params` (keyword arguments) names.

    The strings `__is_first_stage__` and `__is_unconditional__` stand for "nothing to build" and give None.

    Args:
        kind: the target must be a class of this kind, which is checked before it is called: a configuration from anywhere
            shall not call functions such as `os.system`. (The module that a target names is imported.)

    Raises:
        ConfigError: no `target`, an unknown one, one of another kind, or a parameter that it does not take.
    """
    if config in ("__is_first_stage__", "__is_unconditional__"):
        return None
    if not isinstance(config, Mapping) or "target" not in config:
        raise ConfigError(f"expected a mapping with the key `target`, found {config!r}")
    target = get_obj_from_str(config["target"])
    if not (inspect.isclass(target) and issubclass(target, kind)):
        what = f"a {target.__name__}" if inspect.isclass(target) else "no class"
        raise ConfigError(
            f"target {config['target']!r} is {what}, and a {kind.__module__.partition('.')[0]}.{kind.__name__} belongs there; "
            "it was not called"
        )
    params = config.get("params") or {}
    if not (isinstance(params, Mapping) and all(isinstance(name, str) for name in params)):
        raise ConfigError(f"params of {config['target']} must be a mapping from names, found {params!r}")
    return construct(target, config["target"], params)


def construct(target: Callable[..., T], name: str, params: Mapping[str, Any]) -> T:
    """`target(**params)`.

    Args:
        name: what messages call the target.

    Raises:
        ConfigError: it does not take them; the message names the parameter.
    """
    _check_parameters(target, name, params)
    try:
        return target(**params)
    except ValueError as error:
        if type(error) is not ValueError:  # it is one of the library's own
            raise
        raise ConfigError(f"{name}: {error}") from error
    except (TypeError, RuntimeError, ZeroDivisionError) as error:
        if isinstance(error, RuntimeError) and "dimension" not in str(error):  # such as too little memory
            raise
        # Which of its base classes' parameters a constructor fills in itself cannot be seen from outside.
        if re.search(r"__init__\(\) (missing \d+ required|got an unexpected keyword)", str(error)):
            raise ConfigError(f"{name}: {error}") from error
        # Only now: what could be built with a number of another type stays as it is.
        kinds = _accepted_parameters(target)[0]
        for key, value in params.items():
            if not _fits(value, kinds.get(key)):
                kind = inspect.formatannotation(kinds[key]).replace("collections.abc.", "")
                raise ConfigError(f"{name}: {key} must be {kind}, found {value!r}") from error
        suspects = ", ".join(f"{key}={value!r}" for key, value in params.items() if _below_one(value))
        if suspects:
            raise ConfigError(f"{name} cannot be made with {suspects}: {error}") from error
        raise


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value from a configuration can be of an annotated kind. Of numbers and lists of them alone this is told; others fit."""
    parts = get_args(kind)
    if get_origin(kind) in (Union, UnionType):
        return any(_fits(value, part) for part in parts)
    if get_origin(kind) is Sequence:
        return (
            isinstance(value, Iterable)
            and not isinstance(value, (str, Mapping))
            and all(_fits(v, parts[0]) for v in value)
        )
    numbers: dict[Any, type] = {int: Integral, float: Real, NoneType: NoneType}
    return isinstance(value, numbers.get(kind, object)) and not (kind in (int, float) and isinstance(value, bool))


def _below_one(value: Any) -> bool:
    """Whether a value from a configuration is no size: a whole number below one, an empty list, or a list with such a number."""
    if isinstance(value, Collection) and not isinstance(value, str):
        return not value or any(map(_below_one, value))
    return isinstance(value, Integral) and not isinstance(value, bool) and value < 1


def _check_parameters(target: Any, name: str, params: Mapping[str, Any]) -> None:
    """Raise ConfigError if `target` cannot be called with these keyword arguments, following **kwargs up the bases."""
    accepted, required, open_ended = _accepted_parameters(target)
    unknown = sorted(set(params) - set(accepted))
    if unknown and not open_ended:
        raise ConfigError(f"{name} does not take {', '.join(unknown)}; it takes {', '.join(sorted(accepted))}")
    missing = sorted(required - set(params))
    if missing:
        raise ConfigError(f"{name} needs the parameters {', '.join(missing)}, which are missing")


def _accepted_parameters(target: Any) -> tuple[dict[str, Any], set[str], bool]:
    """Keyword names that `target` takes, with their annotations, those without a default, and whether it takes any other name too.

    A constructor with **kwargs usually hands them to the next one in the method resolution order, so that one's names count
    too. Where the next one is torch's, the constructor itself must have a use for any name.
    """
    constructors: Sequence[Any] = [target]
    if inspect.isclass(target):
        constructors = [
            vars(cls)["__init__"] for cls in target.__mro__ if cls is not object and "__init__" in vars(cls)
        ]
    accepted: dict[str, Any] = {}
    required: set[str] = set()
    for number, constructor in enumerate(constructors):
        if number and (getattr(constructor, "__module__", "") or "").split(".")[0] in _FRAMEWORKS:
            break
        try:
            parameters = inspect.signature(constructor).parameters.values()
        except (TypeError, ValueError):  # a builtin without a signature
            break
        named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name != "self"]
        if number == 0:
            required = {p.name for p in named if p.default is p.empty}
        accepted = {p.name: p.annotation for p in named} | accepted
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            return accepted, required, False
    return accepted, required, True


def images_to_nchw(images: torch.Tensor) -> torch.Tensor:
    """Pictures as data sets give them, (B, H, W, C) or grey (B, H, W) -> contiguous float32 (B, C, H, W)."""
    if images.dim() not in (3, 4):
        raise ValueError(f"expected pictures of shape (B, H, W, C) or (B, H, W), found {tuple(images.shape)}")
    if images.dim() == 3:
        images = images[..., None]
    return images.permute(0, 3, 1, 2).float().contiguous()


def log_txt_as_img(wh: tuple[int, int], xc: Sequence[str], size: int = 10) -> torch.Tensor:
    """Prompts drawn as black text on white pictures.

    Args:
        wh: width and height in pixels.
        xc: one text an image; wrapped to the width.
        size: font size in pixels.

    Returns:
        float32 (len(xc), 3, height, width) in [-1, 1].
    """
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

    width, height = wh
    font = ImageFont.load_default(size)
    pictures = []
    for text in xc:
        picture = Image.new("RGB", (width, height), "white")
        ImageDraw.Draw(picture).text((1, 1), _wrap(str(text), font.getlength, width - 2), fill="black", font=font)
        pictures.append(np.asarray(picture, dtype=np.float32) / 127.5 - 1.0)
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()  # (B, 3, H, W)


def _wrap(text: str, length: Callable[[str], float], width: int) -> str:
    """`text` with line breaks so that no line is longer than `width` by the measure `length`, but for single long words."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if length(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return "\n".join(lines)
