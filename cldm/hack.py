"""Switches of the public reference's `cldm.hack`, thin: log levels, attention in slices, long prompts with clip skip."""

import logging

from torch import nn

from ldm.modules.attention import full_attention, set_attention, sliced_attention
from ldm.modules.encoders.modules import FrozenTextEncoder, PromptOptions, set_default_options

logger = logging.getLogger(__name__)


def disable_verbosity() -> None:
    """Only errors from the libraries that warn while text encoders load."""
    for name in ("transformers", "open_clip"):
        logging.getLogger(name).setLevel(logging.ERROR)


def enable_sliced_attention(enabled: bool = True) -> None:
    """From now on every attention layer computes its scores in slices: less memory at once, the same numbers."""
    set_attention(sliced_attention if enabled else full_attention)


def hack_everything(clip_skip: int = 0, model: nn.Module | None = None) -> None:
    """Prompts of up to 225 tokens in three windows (231 positions) and an earlier hidden layer.

    Args:
        clip_skip: n > 1 takes the n-th hidden state from the end, with the final layer norm.
        model: change only this model's text encoder; by default all that exist and will be made, but for those with options of
            their own. `ldm.modules.encoders.modules.set_default_options(None)` undoes that.

    Raises:
        ValueError: `model` has no text encoder of this library.
    """
    options = PromptOptions(windows=3, clip_skip=clip_skip if clip_skip > 1 else None)
    disable_verbosity()
    if model is None:
        set_default_options(options)
    elif isinstance(model.cond_stage_model, FrozenTextEncoder):
        model.cond_stage_model.prompt_options = options
    else:
        raise ValueError(
            f"long prompts need one of the text encoders of ldm.modules.encoders; this model has a "
            f"{type(model.cond_stage_model).__name__}"
        )
    logger.info("long prompts in three windows are on, clip skip %d", max(clip_skip, 1))
