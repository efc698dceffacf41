"""An exponential moving average of a model's parameters."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn


class LitEma(nn.Module):
    """Keeps a running average of `model`'s trainable parameters in its own buffers.

    A buffer's name is the parameter's without its dots, which is how published checkpoints (`model_ema.*`) name them.

    Args:
        model: whose parameters are averaged.
        decay: weight of the average against the new value, in [0, 1].
        use_num_upates: weigh the first updates less, (1 + n) / (10 + n). (The argument is spelled so in the public interface.)
    """

    decay: torch.Tensor
    num_updates: torch.Tensor

    def __init__(self, model: nn.Module, decay: float = 0.9999, use_num_upates: bool = True) -> None:
        super().__init__()
        if not 0.0 <= decay <= 1.0:
            raise ValueError(f"decay must be between 0 and 1, found {decay}")
        self.m_name2s_name = {name: name.replace(".", "") for name, p in model.named_parameters() if p.requires_grad}
        self.register_buffer("decay", torch.tensor(decay, dtype=torch.float32))
        self.register_buffer("num_updates", torch.tensor(0 if use_num_upates else -1, dtype=torch.int))
        parameters = dict(model.named_parameters())
        for name, buffer_name in self.m_name2s_name.items():
            self.register_buffer(buffer_name, parameters[name].detach().clone())
        self.collected_params: list[torch.Tensor] = []

    def reset_num_updates(self) -> None:
        """Start the warm-up of the decay again."""
        self.num_updates.zero_()

    @torch.no_grad()
    def forward(self, model: nn.Module) -> None:
        """Move the average towards `model`'s present parameters."""
        decay = self.decay
        if self.num_updates >= 0:
            self.num_updates += 1
            decay = torch.minimum(decay, (1 + self.num_updates) / (10 + self.num_updates))
        averages = dict(self.named_buffers())
        parameters = dict(model.named_parameters())
        for name, buffer_name in self.m_name2s_name.items():
            averages[buffer_name].lerp_(parameters[name].to(averages[buffer_name]), 1.0 - decay)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Overwrite `model`'s parameters with the average."""
        averages = dict(self.named_buffers())
        parameters = dict(model.named_parameters())
        for name, buffer_name in self.m_name2s_name.items():
            parameters[name].copy_(averages[buffer_name])

    def store(self, parameters: Iterable[nn.Parameter]) -> None:
        """Remember the present values, to come back to with `restore`."""
        self.collected_params = [p.detach().clone() for p in parameters]

    @torch.no_grad()
    def restore(self, parameters: Iterable[nn.Parameter]) -> None:
        """Put the values back that `store` remembered."""
        for p, stored in zip(parameters, self.collected_params, strict=True):
            p.copy_(stored)
        self.collected_params = []


@contextmanager
def ema_weights(ema: LitEma, model: nn.Module) -> Iterator[None]:
    """Inside it `model` holds the averages that `ema` keeps; afterwards its own weights again."""
    averaged = [p for name, p in model.named_parameters() if name in ema.m_name2s_name]
    ema.store(averaged)
    ema.copy_to(model)
    try:
        yield
    finally:
        ema.restore(averaged)
