"""Random initial values that are drawn when something first reads them.

To draw those of Stable Diffusion takes seconds, in vain where a checkpoint then overwrites them, as in the published
`model = create_model(path)`, `model.load_state_dict(...)`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

# Smaller parameters get their values at once, from the global generator, as without this: so all of the tiny model.
SMALLEST = 2**21
_RANDOM = frozenset("uniform_ normal_ kaiming_uniform_ kaiming_normal_ xavier_uniform_ xavier_normal_".split())
_SET_DATA = Tensor.data.__set__  # type: ignore[attr-defined]
_OVERWRITES = frozenset({Tensor.copy_, Tensor.zero_, Tensor.fill_, _SET_DATA})
_MOVES = frozenset({Tensor.cpu, Tensor.to, Tensor.float, _SET_DATA})  # as of `model.cpu()`
# What tells nothing of the values; whatever is in none of these sets draws them.
_METHODS = "size dim numel nelement stride element_size is_contiguous is_floating_point is_complex requires_grad_ __len__ __hash__"
_ATTRIBUTES = (
    "shape dtype device layout ndim nbytes itemsize is_leaf grad grad_fn requires_grad is_meta is_cpu is_cuda is_sparse"
)
_DESCRIBES = frozenset(
    [getattr(Tensor, name) for name in _METHODS.split()]
    + [getattr(Tensor, name).__get__ for name in _ATTRIBUTES.split()]
    + [getattr(Tensor, name).__set__ for name in ("requires_grad", "grad")]
    + [torch._has_compatible_shallow_copy_type]
)


class DeferredParameter(nn.Parameter):
    """A parameter that has its memory and not yet its initial values; it becomes an ordinary one with these, or with others.

    Attributes:
        fill: called with it, gives it its values.
    """

    fill: Callable[[nn.Parameter], Any]

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func in _MOVES and _stays(func, args, kwargs):
                return args[0]
            if func in _DESCRIBES:
                return func(*args, **kwargs)
            overwritten = args[:1] if func in _OVERWRITES else ()
            settle(tree_leaves((args[len(overwritten) :], kwargs)))
            result = func(*args, **kwargs)
            settle(overwritten, overwritten=True)
            return result

    # What torch does for these asks for the class before it asks for the values.

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        settle([self])
        return self.__deepcopy__(memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        settle([self])
        return self.__reduce_ex__(protocol)


_one_at_a_time = threading.RLock()  # several threads may load, or sample with, one model


def settle(parameters: Iterable[Any], overwritten: bool = False) -> None:
    """Make ordinary parameters of those that are deferred: with their initial values, or with those that overwrote them."""
    for parameter in parameters:
        if isinstance(parameter, DeferredParameter):
            with _one_at_a_time, torch._C.DisableTorchFunctionSubclass():
                if isinstance(parameter, DeferredParameter):
                    if not overwritten:
                        with torch.inference_mode(False), torch.no_grad():
                            parameter.fill(parameter)
                    del parameter.fill
                    parameter.__class__ = nn.Parameter  # type: ignore[assignment]


def _stays(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a move, conversion or assignment leaves the first argument as it is."""
    tensor, *rest = args
    if not isinstance(tensor, DeferredParameter):
        return False
    if func == _SET_DATA:
        return rest[0] is tensor
    if kwargs.get("memory_format", torch.preserve_format) != torch.preserve_format:
        return False
    like = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return func(like, *rest, **kwargs) is like


class deferred_initial_values(TorchFunctionMode):  # noqa: N801 - used as `with deferred_initial_values():`
    """Inside it large parameters on the CPU that are filled at random become a `DeferredParameter`.

    Each then has a seed of its own, drawn from the global generator: the same seed there gives the same values, whichever of
    them are read, and in whatever order.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func.__name__ not in _RANDOM or kwargs.get("generator") is not None:
            return func(*args, **kwargs)
        parameter, *rest = (kwargs.pop("tensor"), *args) if "tensor" in kwargs else args
        if type(parameter) not in (nn.Parameter, DeferredParameter) or parameter.device.type != "cpu":
            return func(parameter, *rest, **kwargs)
        if parameter.numel() < SMALLEST:
            return func(parameter, *rest, **kwargs)
        seed = int(torch.randint(2**62, ()))
        parameter.__class__ = DeferredParameter
        parameter.fill = lambda it: func(it, *rest, **{**kwargs, "generator": torch.Generator().manual_seed(seed)})
        return parameter
