"""Ways to sample with less memory: attention in slices, the autoencoder in tiles and one picture at a time, parts moved when used."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from annotator.detector import first_line
from ldm.models.autoencoder import AutoencoderKL
from ldm.modules.attention import get_attention, set_attention, sliced_attention
from ldm.util import ConfigError

BAND_POSITIONS = 256 * 256  # pixels of a band in the autoencoder's largest maps


@dataclass(frozen=True)
class LowMemory:
    """What a pipeline does to need less memory; each costs some time, none changes the pictures beyond rounding.

    Attributes:
        sliced_attention: scores of one picture and a few queries at a time; of use where torch has no fused kernel for them.
        vae_tiles: the autoencoder works through its largest maps in bands of rows.
        vae_one_at_a_time: pictures are encoded and decoded one after the other.
        offload: text encoder, UNet with ControlNets, and autoencoder are on the pipeline's device only while they are used, and
            where the model is (in main memory) otherwise.
    """

    sliced_attention: bool = False
    vae_tiles: bool = False
    vae_one_at_a_time: bool = False
    offload: bool = False

    @contextmanager
    def applied(self, first_stage: nn.Module) -> Iterator[None]:
        """Inside it attention and `first_stage` work as the switches say; another autoencoder than AutoencoderKL has no switches."""
        with ExitStack() as undo:
            if self.sliced_attention:
                undo.callback(set_attention, get_attention())
                set_attention(sliced_attention)
            if isinstance(first_stage, AutoencoderKL):
                before = first_stage.band_positions, first_stage.one_at_a_time
                undo.callback(_set_switches, first_stage, *before)
                bands = BAND_POSITIONS if self.vae_tiles else before[0]
                _set_switches(first_stage, bands, self.vae_one_at_a_time or before[1])
            yield

    @contextmanager
    def resident(self, parts: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
        """Inside it `parts` are on `device`; afterwards, with `offload`, where they were."""
        if not self.offload:
            yield
            return
        homes = [next((p.device for p in part.parameters()), device) for part in parts]
        try:
            for part in parts:
                part.to(device)
            yield
        finally:
            for part, home in zip(parts, homes, strict=True):
                part.to(home)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is not enough memory, on whichever device."""
    text = str(error)
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and ("out of memory" in text or "allocate memory" in text)
    )


@contextmanager
def memory_advice(what_helps: str) -> Iterator[None]:
    """Within it, running out of memory is an error of one line that says what helps.

    Raises:
        ConfigError: the memory does not suffice.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise ConfigError(f"not enough memory; {what_helps} may help ({first_line(error)})") from error


def _set_switches(first_stage: AutoencoderKL, band_positions: int | None, one_at_a_time: bool) -> None:
    first_stage.band_positions, first_stage.one_at_a_time = band_positions, one_at_a_time
