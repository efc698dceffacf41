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


def first_broken_module(model: nn.Module, run: Callable[[], object]) -> str:
    """The name of the first module inside `model` whose output is not finite while `run` calls it, and the kind of that module."""
    found: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: object, output: object) -> None:
            if not found and isinstance(output, Tensor) and not is_finite(output):
                found.append(f"{name or 'the whole'} ({type(module).__name__})")

        return hook

    hooks = [module.register_forward_hook(watch(name)) for name, module in model.named_modules()]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else "no single module"


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

    x that is not finite itself passes through. `what` names the work in the warning.
    """
    weights = next(model.parameters(), None)
    dtype = weights.dtype if weights is not None else x.dtype
    out = function(x.to(dtype))
    if out.requires_grad or (out.dtype not in HALF and dtype not in HALF) or is_finite(out) or not is_finite(x):
        return out.to(x.dtype)
    began = first_broken_module(model, lambda: function(x.to(dtype)))
    logger.warning(
        "%s in %s is not finite from %s on; it is repeated in float32",
        what,
        str(out.dtype).removeprefix("torch."),
        began,
    )
    with in_float32(model, x.device):
        return function(x.float()).to(x.dtype)
