"""Initial values that are drawn when something first needs them.

To draw the initial values of a Stable Diffusion takes seconds, which are lost when a checkpoint overwrites them, as the
published `model = create_model(...); model.load_state_dict(...)` does. `build_deferred` makes the same model without
them: its parameters have their memory, and are overwritten like any other. Whatever else is done with one of them first
draws the values of all that still lack them, the same as if they had been drawn at once.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils._pytree import tree_leaves

_RANDOM = {
    "uniform_",
    "normal_",
    "kaiming_uniform_",
    "kaiming_normal_",
    "xavier_uniform_",
    "xavier_normal_",
    "trunc_normal_",
}
_OVERWRITES = {"copy_", "zero_", "fill_"}
# What does not depend on the values.
_DESCRIBES = {
    *("shape", "dtype", "device", "layout", "ndim", "is_meta", "is_cuda", "is_cpu", "is_sparse", "is_quantized", "is_leaf"),
    *("grad", "grad_fn", "requires_grad", "requires_grad_", "retains_grad", "is_floating_point", "is_complex", "size", "dim"),
    *("numel", "nelement", "element_size", "itemsize", "nbytes", "stride", "is_contiguous", "is_inference"),
    *("_has_compatible_shallow_copy_type", "__len__", "_backward_hooks", "is_nested", "is_mkldnn", "is_xla", "is_mps", "is_xpu"),
}  # fmt: skip


class _ValuesNeeded(BaseException):
    """A model under construction reads values that were not drawn."""


class DeferredParameter(nn.Parameter):
    """A parameter without its initial values; it turns into an ordinary one when it gets them, or others."""

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.__name__
        if name in ("__get__", "__set__"):
            name = func.__self__.__name__ + ("=" if name == "__set__" else "")
        own = args[0] if args and isinstance(args[0], DeferredParameter) else None
        deferred = [a for a in tree_leaves((args, kwargs)) if isinstance(a, DeferredParameter)]
        building = any(a._deferral.building for a in deferred)
        with torch._C.DisableTorchFunctionSubclass():
            if name in _DESCRIBES or name.removesuffix("=") in ("requires_grad", "grad"):
                return func(*args, **kwargs)
            if own is not None and name == "data=" and args[1] is own:  # of `module.cpu()`, where it is there already
                return None
            if own is not None and name in ("to", "cpu", "float") and _changes_nothing(func, own, args[1:], kwargs):
                return own
            if own is not None and (name in _OVERWRITES or name == "data=") and len(deferred) == 1:
                _become_ordinary(own)
                return func(*args, **kwargs)
            if own is not None and building and (name == "detach" or name.endswith("_") and not name.endswith("__")):
                return own  # what follows a random filling belongs to it
        if building:
            raise _ValuesNeeded
        for parameter in deferred:
            if isinstance(parameter, DeferredParameter):  # still, after the others
                parameter._deferral.draw()
        return func(*args, **kwargs)

    # What `nn.Parameter` does for these asks for the class before it asks for the values.

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        self._deferral.draw()
        return copy.deepcopy(self, memo)

    def __reduce_ex__(self, protocol: int) -> Any:
        self._deferral.draw()
        return self.__reduce_ex__(protocol)


def _become_ordinary(parameter: DeferredParameter) -> None:
    del parameter._deferral
    parameter.__class__ = nn.Parameter


def _changes_nothing(func: Callable[..., Any], own: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    if any(isinstance(a, torch.memory_format) for a in (*args, *kwargs.values())) or kwargs.get("copy"):
        return False
    there = func(torch.empty(0, dtype=own.dtype, device=own.device), *args, **kwargs)
    return there.dtype == own.dtype and there.device == own.device


class _Deferral(TorchFunctionMode):
    """While a model is built: leaves out random filling. Afterwards: draws what was left out."""

    def __init__(self, build: Callable[[], nn.Module]) -> None:
        super().__init__()
        self._build = build
        self._state = torch.get_rng_state()
        self._places: dict[str, weakref.ref] = {}
        self.building = True

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        target = args[0] if args else kwargs.get("tensor")
        if (
            func.__name__ in _RANDOM
            and type(target) in (nn.Parameter, DeferredParameter)
            and not kwargs.get("generator")
        ):
            target.__class__ = DeferredParameter
            target._deferral = self
            return target
        return func(*args, **kwargs)

    def finish(self, model: nn.Module) -> None:
        self.building = False
        self._places = {
            name: weakref.ref(parameter)
            for name, parameter in model.named_parameters()
            if isinstance(parameter, DeferredParameter)
        }

    def draw(self) -> None:
        """Give all parameters that still lack them their initial values."""
        with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"), torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self._state)
            values = dict(self._build().named_parameters())
        for name, place in self._places.items():
            parameter = place()
            if isinstance(parameter, DeferredParameter):
                _become_ordinary(parameter)
                parameter.data = values[name].data


def build_deferred(build: Callable[[], nn.Module]) -> nn.Module:
    """The model that `build` makes on the CPU, its random initial values drawn when they are needed.

    They are those that `build()` would draw from the state that the global generator has now. That generator gets another
    seed, drawn from it, so that a next model has values of its own. A model that reads its values while it is built, or
    draws others, is built as usual.
    """
    if _get_current_dispatch_mode() is not None:  # fake tensors have no values to draw
        return build()
    deferral = _Deferral(build)
    try:
        with deferral:
            model = build()
    except _ValuesNeeded:
        model = None
    if model is None or not torch.equal(torch.get_rng_state(), deferral._state):
        torch.set_rng_state(deferral._state)
        return build()
    deferral.finish(model)
    torch.default_generator.manual_seed(int(torch.randint(2**62, ())))
    return model
