"""Weights files of the tiny family, filled with random values, in the layouts that people have."""

from pathlib import Path

import torch
from torch import Tensor

from cldm.checkpoint.expected import expected_entries, model_params
from cldm.checkpoint.schedule import schedule_tensors
from ldm.files import LazyTensor, write_weights

CONFIG = "cldm_tiny"
CONTROL, UNET, VAE, TEXT = "control_model.", "model.diffusion_model.", "first_stage_model.", "cond_stage_model."


def tiny_full(seed: int = 0) -> dict[str, Tensor]:
    """A full state dict: random weights, and the schedule that belongs to the configuration."""
    expected = expected_entries(CONFIG)
    schedule = {
        **schedule_tensors(model_params(CONFIG)),
        "logvar": LazyTensor.of(torch.zeros(expected["logvar"].shape)),
    }
    generator = torch.Generator().manual_seed(seed)

    def entry(key: str, info: LazyTensor) -> Tensor:
        if key in schedule:
            return schedule[key].read()
        if not info.dtype.is_floating_point:
            return torch.arange(info.numel, dtype=info.dtype).reshape(info.shape)
        return 0.05 * torch.randn(info.shape, generator=generator, dtype=info.dtype)

    return {key: entry(key, info) for key, info in expected.items()}


def without(state_dict: dict[str, Tensor], *prefixes: str) -> dict[str, Tensor]:
    """The entries that begin with none of the prefixes."""
    return {key: tensor for key, tensor in state_dict.items() if not key.startswith(prefixes)}


def only(state_dict: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries that begin with the prefix."""
    return {key: tensor for key, tensor in state_dict.items() if key.startswith(prefix)}


def saved(path: Path, state_dict: dict[str, Tensor]) -> Path:
    """`write_weights`, in silence."""
    return write_weights(path, state_dict, progress=False)


def same(got: dict[str, Tensor], want: dict[str, Tensor]) -> bool:
    """Whether two state dicts have the same keys, dtypes and bits."""
    return got.keys() == want.keys() and all(
        got[key].dtype == tensor.dtype and torch.equal(got[key], tensor) for key, tensor in want.items()
    )
