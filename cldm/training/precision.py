"""What a training step computes in, and what it keeps: frozen weights in half precision, recomputation, TF32, channels-last."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from ldm.modules.attention import BasicTransformerBlock
from ldm.util import ConfigError

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Lightning's names of precisions that autocast: weights stay float32, most of the computing is in half precision.
_AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}

RECOMPUTE = ("none", "trained", "all")


def forward_context(precision: str, device: torch.device | str) -> AbstractContextManager[None]:
    """The context in which Lightning runs a forward pass of this precision (`32-true`, `bf16-mixed`, ...) on a device."""
    if precision in _AUTOCAST:
        return torch.autocast(torch.device(device).type, dtype=_AUTOCAST[precision])
    return nullcontext()


def cast_frozen(model: nn.Module, dtype: torch.dtype | str) -> int:
    """Convert the parameters that are not trained (`requires_grad=False`) to `dtype`, in place.

    Trained parameters and all buffers keep their dtype: the noise schedule stays float32. A parameter that is unlocked later
    must first be float32 again: call `cast_frozen(model, "fp32")` before.

    Args:
        dtype: a torch dtype, or one of PRECISIONS.

    Returns:
        the bytes that the parameters now take less (negative: more).

    Raises:
        ConfigError: an unknown name.
    """
    if isinstance(dtype, str):
        if dtype not in PRECISIONS:
            raise ConfigError(
                f"the precision of frozen weights must be one of {', '.join(PRECISIONS)}, found {dtype!r}"
            )
        dtype = PRECISIONS[dtype]
    saved = 0
    for parameter in model.parameters():
        if not parameter.requires_grad and parameter.is_floating_point() and parameter.dtype != dtype:
            before = parameter.element_size()
            parameter.data = parameter.data.to(dtype)
            saved += (before - parameter.element_size()) * parameter.numel()
    return saved


def set_recompute(model: nn.Module, blocks: bool | str) -> None:
    """Choose which blocks of the networks compute their activations again in the backward pass instead of keeping them.

    Args:
        model: a ControlLDM, or any module with residual and transformer blocks.
        blocks: `all` (or True): every block; `none` (or False); `trained`: only blocks with trained weights. A locked block
            keeps less than a trained one (no inputs of its convolutions and linear layers), and the second run through the
            locked decoder is saved.

    Raises:
        ConfigError: something else.
    """
    choice = {True: "all", False: "none"}.get(blocks, blocks) if isinstance(blocks, bool) else blocks
    if choice not in RECOMPUTE:
        raise ConfigError(f"recompute must be one of {', '.join(RECOMPUTE)}, found {blocks!r}")
    for module in _recomputing(model):
        on = choice == "all" or choice == "trained" and any(p.requires_grad for p in module.parameters())
        # BasicTransformerBlock's switch is named `checkpoint`, as published.
        setattr(module, "checkpoint" if isinstance(module, BasicTransformerBlock) else "use_checkpoint", on)


def _recomputing(model: nn.Module) -> Iterator[nn.Module]:
    """The blocks, and the networks that show their setting under the same name."""
    for module in model.modules():
        if isinstance(module, BasicTransformerBlock) or isinstance(getattr(module, "use_checkpoint", None), bool):
            yield module


def allow_tf32(on: bool = True) -> None:
    """Let CUDA multiply float32 matrices in TF32, with 10 bits of mantissa, which is faster.

    A setting of the whole process. It changes nothing on a CPU, nor for half precision.
    """
    torch.set_float32_matmul_precision("high" if on else "highest")
    torch.backends.cudnn.allow_tf32 = on


def use_channels_last(model: nn.Module) -> None:
    """Lay the convolutions' weights out with the channels last, in place; feature maps follow them.

    Meant for half precision on CUDA, whose convolutions want this layout.
    """
    model.to(memory_format=torch.channels_last)
