"""Helpers of the diffusion networks: layers by dimension, the timestep embedding, recomputation, schedule look-ups."""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

# Schedule and noise have homes of their own; these names are public here for the code that looks for them in this module.
from ldm.models.diffusion.noise import noise_like
from ldm.models.diffusion.schedule import (
    extract_into_tensor,
    make_beta_schedule,
    make_ddim_sampling_parameters,
    make_ddim_timesteps,
)

__all__ = [
    "GroupNorm32",
    "avg_pool_nd",
    "checkpoint",
    "conv_nd",
    "extract_into_tensor",
    "linear",
    "make_beta_schedule",
    "make_ddim_sampling_parameters",
    "make_ddim_timesteps",
    "mean_flat",
    "noise_like",
    "normalization",
    "repeat_rows",
    "scale_module",
    "timestep_embedding",
    "weight_of",
    "zero_module",
]

_HALF = ({torch.bfloat16}, {torch.float16})

_CONVOLUTIONS: dict[int, type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_AVERAGE_POOLS: dict[int, type[nn.Module]] = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}


def conv_nd(dims: int, *args: Any, **kwargs: Any) -> nn.Module:
    """A convolution over `dims` (1, 2 or 3) axes."""
    return _by_dimension(_CONVOLUTIONS, dims)(*args, **kwargs)


def avg_pool_nd(dims: int, *args: Any, **kwargs: Any) -> nn.Module:
    """Average pooling over `dims` (1, 2 or 3) axes."""
    return _by_dimension(_AVERAGE_POOLS, dims)(*args, **kwargs)


def _by_dimension(table: dict[int, type[nn.Module]], dims: int) -> type[nn.Module]:
    if dims not in table:
        raise ValueError(f"dims must be 1, 2 or 3, found {dims!r}")
    return table[dims]


def linear(*args: Any, **kwargs: Any) -> nn.Linear:
    """A linear layer."""
    return nn.Linear(*args, **kwargs)


class GroupNorm32(nn.GroupNorm):
    """Group normalisation whose statistics are computed in float32 whatever the input's type."""

    def forward(self, x: Tensor) -> Tensor:  # (B, C, ...) -> (B, C, ...)
        if x.dtype == self.weight.dtype:
            return super().forward(x)  # torch accumulates half types in float32 itself
        return nn.functional.group_norm(
            x.float(), self.num_groups, self.weight.float(), self.bias.float(), self.eps
        ).to(x.dtype)


def normalization(channels: int) -> GroupNorm32:
    """Group normalisation of 32 groups."""
    if channels % 32:
        raise ValueError(f"group normalisation has 32 groups: {channels} channels are not a multiple of 32")
    return GroupNorm32(32, channels)


def zero_module(module: nn.Module) -> nn.Module:
    """`module` with all parameters set to zero (in place)."""
    for p in module.parameters():
        nn.init.zeros_(p)
    return module


def scale_module(module: nn.Module, scale: float) -> nn.Module:
    """`module` with all parameters multiplied by `scale` (in place)."""
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(scale)
    return module


def mean_flat(tensor: Tensor) -> Tensor:  # (B, ...) -> (B,)
    """Mean over all axes but the first."""
    return tensor.flatten(1).mean(1)


def weight_of(layer: nn.Module) -> Tensor:
    """The weight of a layer that has one."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight


def repeat_rows(x: Tensor, rows: int) -> Tensor:
    """x (B, ...) repeated along its first axis to `rows`, a multiple of B; x itself where it has as many or more."""
    return x if len(x) >= rows else x.repeat(rows // len(x), *((1,) * (x.dim() - 1)))


def timestep_embedding(timesteps: Tensor, dim: int, max_period: float = 10000, repeat_only: bool = False) -> Tensor:
    """Sinusoidal embedding of timesteps (Vaswani et al. 2017, section 3.5; cosines first).

    Args:
        timesteps: (B,), integer or fractional.
        dim: width of the embedding; an odd one ends in a zero.
        max_period: the longest wavelength is 2 pi times this.
        repeat_only: repeat the number itself `dim` times instead.

    Returns:
        float32 (B, dim).
    """
    if repeat_only:
        return timesteps.float()[:, None].expand(-1, dim)
    half = dim // 2
    frequencies = torch.exp(
        -math.log(max_period) / half * torch.arange(half, dtype=torch.float32, device=timesteps.device)
    )
    angles = timesteps.float()[:, None] * frequencies  # (B, dim // 2)
    embedding = torch.cat([angles.cos(), angles.sin()], dim=1)
    return nn.functional.pad(embedding, (0, dim % 2))  # (B, dim)


def checkpoint(func: Callable[..., Any], inputs: Sequence[Any], params: Iterable[Tensor], flag: bool) -> Any:
    """`func(*inputs)`, which keeps no activations but computes them again in the backward pass where `flag` is set.

    `params` is accepted for compatibility: autograd finds the parameters that `func` uses by itself.
    """
    if flag and torch.is_grad_enabled():
        return torch.utils.checkpoint.checkpoint(func, *inputs, use_reentrant=False)
    return func(*inputs)


def in_own_precision(forward: Callable[..., Any]) -> Callable[..., Any]:
    """For the `forward` of a network: one whose weights are all in half precision computes in it, also inside autocast.

    Autocast would convert the input of every norm to float32 and back, which costs time and, in training, memory.
    """

    @functools.wraps(forward)
    def wrapped(self: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_autocast_enabled(x.device.type) or {p.dtype for p in self.parameters()} not in _HALF:
            return forward(self, x, *args, **kwargs)
        with torch.autocast(x.device.type, enabled=False):
            return forward(self, x, *args, **kwargs)

    return wrapped
