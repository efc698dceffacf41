"""Half precision without black pictures: finding the module where NaN or infinity begins, and computing in float32 instead."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

HALF = (torch.float16, torch.bfloat16)


def is_finite(x: Tensor) -> bool:
    """Whether x holds neither NaN nor infinity; true of a fake tensor, which holds nothing."""
    return getattr(x, "fake_mode", None) is not None or bool(torch.isfinite(x).all())


def half_precision(model: nn.Module, device: torch.device) -> str | None:
    """The type of half precision in which `model` works, if it does: that of autocast, else of any weights."""
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    else:
        dtype = next((p.dtype for p in model.parameters() if p.dtype in HALF), torch.float32)
    return str(dtype).removeprefix("torch.") if dtype in HALF else None


class _Found(Exception):
    """The broken module, which ends the search for it."""


def first_broken_module(model: nn.Module, run: Callable[[], object]) -> str:
    """The name of the first module inside `model` whose output is not finite while `run` calls it, and the kind of that module.

    `run` is left there. Where an input of that module is not finite already, as after attention, which is no module, it says so.
    """

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[object, ...], output: object) -> None:
            if isinstance(output, Tensor) and not is_finite(output):
                given = all(is_finite(x) for x in inputs if isinstance(x, Tensor))
                raise _Found(f"{'' if given else 'the input of '}{name or 'the whole'} ({type(module).__name__})")

        return hook

    hooks = [module.register_forward_hook(watch(name)) for name, module in model.named_modules()]
    stance = getattr(torch.compiler, "set_stance", None)  # compiled networks do not look at new hooks
    try:
        with stance("force_eager") if stance else nullcontext():
            run()
    except _Found as found:
        return str(found)
    finally:
        for hook in hooks:
            hook.remove()
    return "no single module"


@contextmanager
def in_float32(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Inside it the model's weights are float32 and autocast is off; afterwards the weights are what they were, bit for bit."""
    entries = [entry for entry in (*model.parameters(), *model.buffers()) if entry.dtype in HALF]
    types = [entry.dtype for entry in entries]
    autocast = torch.autocast(device.type, enabled=False) if torch.is_autocast_enabled(device.type) else nullcontext()
    try:
        for entry in entries:
            entry.data = entry.data.float()
        with autocast:
            yield
    finally:
        for entry, dtype in zip(entries, types, strict=True):
            entry.data = entry.data.to(dtype)


def guarded(model: nn.Module, function: Callable[[Tensor], Tensor], x: Tensor, what: str) -> Tensor:
    """function(x), which runs `model`; if half precision makes it NaN or infinite, again in float32, with a warning.

    The result has the type of x, unless x is whole numbers, such as tokens. x that is not finite itself passes through. `what`
    names the work in the warning.
    """
    weights = next(model.parameters(), None)
    dtype = weights.dtype if weights is not None else x.dtype
    given = x.to(dtype) if x.is_floating_point() else x
    out = function(given)
    wanted = x.dtype if x.is_floating_point() else out.dtype
    if out.requires_grad or (out.dtype not in HALF and dtype not in HALF) or is_finite(out) or not is_finite(x):
        return out.to(wanted)
    began = first_broken_module(model, lambda: function(given))
    logger.warning(
        "%s in %s is not finite from %s on; it is repeated in float32",
        what,
        str(out.dtype).removeprefix("torch."),
        began,
    )
    with in_float32(model, x.device):
        return function(x.float() if x.is_floating_point() else x).to(wanted)
