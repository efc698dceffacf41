"""Where the random numbers of sampling come from: torch's global generator, or one generator for each picture."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def noise_like(shape: Sequence[int], device: torch.device | str | None, repeat: bool = False) -> Tensor:
    """Standard normal float32 noise from the global generator; `repeat` gives every picture of the batch the same."""
    if repeat:
        one = torch.randn((1, *shape[1:]), device=device, dtype=torch.float32)
        return one.repeat(shape[0], *((1,) * (len(shape) - 1)))
    return torch.randn(tuple(shape), device=device, dtype=torch.float32)


def picture_generators(
    seed: int | Sequence[int], count: int, device: torch.device | str = "cpu"
) -> list[torch.Generator]:
    """A generator for each picture of a batch.

    Args:
        seed: a number, for seeds that count up from it, or one seed for each picture.
        count: number B of pictures.
        device: where the noise is drawn; another device draws other numbers.

    Raises:
        ValueError: there are not as many seeds as pictures, or a seed is no whole number of 0 to 2**64 - 1.
    """
    seeds = [seed + i for i in range(count)] if isinstance(seed, int) else list(seed)
    if len(seeds) != count:
        raise ValueError(f"{len(seeds)} seeds for {count} pictures: give one number, or a seed for each")
    for number in seeds:
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < 2**64:
            raise ValueError(f"a seed must be a whole number from 0 to 2**64 - 1, found {number!r}")
    return [torch.Generator(device).manual_seed(number) for number in seeds]


def _number(device: torch.device) -> tuple[torch.device, ...]:
    """What functions of `torch.cuda` and `torch.xpu` take to know which device is meant; there is only one with `torch.mps`."""
    return () if device.type == "mps" else (device,)


class Noise:
    """The noise of one run.

    Args:
        generators: one for each picture, so that what is drawn for a picture does not depend on the others. By default the global
            generator of the device, which is asked exactly as often as in the public code, so that its samples come out again.
        temperature: multiplies the noise of the steps.
        dropout: share of the steps' noise that is set to zero.
    """

    def __init__(
        self, generators: Sequence[torch.Generator] | None = None, temperature: float = 1.0, dropout: float = 0.0
    ) -> None:
        if not 0 <= dropout < 1:
            raise ValueError(f"noise_dropout must be at least 0 and below 1, found {dropout}")
        if not temperature >= 0:
            raise ValueError(f"temperature must not be negative, found {temperature}")
        self.generators = None if generators is None else list(generators)
        self.temperature = temperature
        self.dropout = dropout

    def normal(self, shape: Sequence[int], device: torch.device) -> Tensor:
        """Standard normal float32 of `shape` (B, C, h, w)."""
        if self.generators is None:
            return noise_like(shape, device)
        if len(self.generators) != shape[0]:
            raise ValueError(f"{len(self.generators)} generators for a batch of {shape[0]}")
        one = (1, *shape[1:])
        return torch.cat(
            [torch.randn(one, generator=g, device=g.device, dtype=torch.float32).to(device) for g in self.generators]
        )

    def state(self, device: torch.device) -> list[Tensor]:
        """Where the generators are, for `restore`; of the global ones, that of `device`."""
        if self.generators is not None:
            return [generator.get_state() for generator in self.generators]
        if device.type == "cpu":
            return [torch.get_rng_state()]
        return [getattr(torch, device.type).get_rng_state(*_number(device))]

    def restore(self, state: Sequence[Tensor], device: torch.device) -> None:
        """Draw from now on what was drawn after `state`."""
        if self.generators is not None:
            for generator, own in zip(self.generators, state, strict=True):
                generator.set_state(own)
        elif device.type == "cpu":
            torch.set_rng_state(state[0])
        else:
            getattr(torch, device.type).set_rng_state(state[0], *_number(device))

    def of_step(self, x: Tensor, sigma: float, repeat: bool = False) -> Tensor | None:
        """What a step adds to x (B, C, h, w), of standard deviation `sigma`; None for nothing.

        From the global generator it is drawn at sigma 0 too, because what is drawn after it depends on it.
        """
        if self.generators is not None:
            if not sigma:
                return None
            drawn = self.normal(x.shape, x.device)
        else:
            drawn = noise_like(x.shape, x.device, repeat)
        if not sigma:
            return None
        drawn = sigma * drawn.to(x.dtype) * self.temperature
        return self._dropped(drawn) if self.dropout > 0 else drawn

    def _dropped(self, noise: Tensor) -> Tensor:
        if self.generators is None:
            return F.dropout(noise, p=self.dropout)
        shape = (1, *noise.shape[1:])
        kept = [
            torch.rand(shape, generator=g, device=g.device, dtype=torch.float32) >= self.dropout
            for g in self.generators
        ]
        return noise * torch.cat(kept).to(noise) / (1 - self.dropout)
