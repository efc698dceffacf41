"""Switches of the public reference's `cldm.hack`, thin: log levels, attention in slices, long prompts with clip skip."""

import logging

import torch
from torch import nn

from ldm.modules.attention import full_attention, set_attention, sliced_attention
from ldm.modules.encoders.modules import FrozenCLIPEmbedder

logger = logging.getLogger(__name__)


def disable_verbosity() -> None:
    """Only errors from the libraries that warn while text encoders load."""
    for name in ("transformers", "open_clip"):
        logging.getLogger(name).setLevel(logging.ERROR)


def enable_sliced_attention(enabled: bool = True) -> None:
    """From now on every cross-attention layer works one image at a time: less memory at once, the same numbers."""
    set_attention(sliced_attention if enabled else full_attention)


def hack_everything(clip_skip: int = 0, model: nn.Module | None = None) -> None:
    """Prompts of up to 225 tokens in three chunks (231 positions) and an earlier hidden layer, for SD 1.x text encoders.

    Args:
        clip_skip: n > 1 takes the n-th hidden state from the end, with the final layer norm.
        model: change only this model's text encoder; by default all that exist and will be made.
    """
    if model is not None and not isinstance(model.cond_stage_model, FrozenCLIPEmbedder):
        raise ValueError(
            f"long prompts are for SD 1.x text encoders; this model has a {type(model.cond_stage_model).__name__}"
        )
    disable_verbosity()
    chosen = FrozenCLIPEmbedder if model is None else model.cond_stage_model

    def encode(self: FrozenCLIPEmbedder, text: list[str] | str) -> torch.Tensor:
        return self.encode_long(text, clip_skip=max(clip_skip, 1))

    chosen.forward = encode if model is None else encode.__get__(chosen)  # type: ignore[method-assign]
    logger.info("long prompts in three chunks are on, clip skip %d", max(clip_skip, 1))
