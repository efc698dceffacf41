"""Guidance: how conditional and unconditional predictions become one (Ho and Salimans 2021, "Classifier-free guidance", eq. 6).

A guidance is an object with one call, `guidance(x, t, step, steps)`, which a sampler makes in each of its steps. It knows model and
conditionings, and is made for one run, so that what is equal in all steps is prepared once.

Shapes: B batch, C h w the latent.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

# What `apply_model` takes: a tensor, a list of tensors, or a dict of lists, by how the model is conditioned.
Conditioning = Tensor | Sequence[Tensor] | Mapping[str, Sequence[Tensor] | Tensor | None] | None
Scale = float | Sequence[float]


class DiffusionModel(Protocol):
    """What samplers need of a model; DDPM, LatentDiffusion and ControlLDM have it.

    A model may also have `make_guidance(cond, uncond, scale)`, which then takes the place of the function of that name here.
    """

    num_timesteps: int
    parameterization: str
    betas: Tensor
    alphas_cumprod: Tensor

    def apply_model(self, x_noisy: Tensor, t: Tensor, cond: Any) -> Tensor:
        """The network's output (B, C, h, w) for x_noisy (B, C, h, w) at t (B,)."""


class Guidance(Protocol):
    """What samplers call. One that remembers something of a run also has `start()`, which is called before each run."""

    def __call__(self, x: Tensor, t: Tensor, step: int = 0, steps: int = 1) -> Tensor:
        """The network's guided output (B, C, h, w) for x (B, C, h, w) at t (B,), in number `step` of a run's `steps`."""


class ScoreCorrector(Protocol):
    """Changes a predicted eps."""

    def modify_score(self, model: Any, eps: Tensor, x: Tensor, t: Tensor, c: Any, **kwargs: Any) -> Tensor: ...


def start_guidance(guidance: Guidance) -> None:
    """Let a guidance forget the run before, if it has anything to forget."""
    start = getattr(guidance, "start", None)
    if start is not None:
        start()


def combine(uncond: Tensor, cond: Tensor, scale: float) -> Tensor:
    """uncond + scale * (cond - uncond)."""
    return uncond + scale * (cond - uncond)


def scale_at(scale: Scale, step: int) -> float:
    """The guidance scale of a step, from one for all or one for each."""
    return scale[step] if isinstance(scale, Sequence) else scale


class Unguided:
    """The conditional prediction alone."""

    def __init__(self, model: DiffusionModel, cond: Conditioning) -> None:
        self.model = model
        self.cond = cond

    def __call__(self, x: Tensor, t: Tensor, step: int = 0, steps: int = 1) -> Tensor:
        return self.model.apply_model(x, t, self.cond)


class SeparateGuidance:
    """Both predictions in two calls, for conditionings that do not fit into one batch."""

    def __init__(self, model: DiffusionModel, cond: Conditioning, uncond: Conditioning, scale: Scale) -> None:
        self.model = model
        self.cond = cond
        self.uncond = uncond
        self.scale = scale

    def __call__(self, x: Tensor, t: Tensor, step: int = 0, steps: int = 1) -> Tensor:
        out_cond = self.model.apply_model(x, t, self.cond)
        scale = scale_at(self.scale, step)
        if scale == 1.0:
            return out_cond
        return combine(self.model.apply_model(x, t, self.uncond), out_cond, scale)


class BatchedGuidance:
    """Both predictions in one call: the unconditional half first."""

    def __init__(self, model: DiffusionModel, cond: Conditioning, uncond: Conditioning, scale: Scale) -> None:
        self.model = model
        self.cond = cond
        self.both = join_conditioning(uncond, cond)
        self.scale = scale

    def __call__(self, x: Tensor, t: Tensor, step: int = 0, steps: int = 1) -> Tensor:
        scale = scale_at(self.scale, step)
        if scale == 1.0:
            return self.model.apply_model(x, t, self.cond)
        both = self.model.apply_model(torch.cat([x, x]), torch.cat([t, t]), self.both)  # (2B, C, h, w)
        of_uncond, of_cond = both.chunk(2)
        return combine(of_uncond, of_cond, scale)


class CorrectedGuidance:
    """Another guidance, whose eps goes through a score corrector.

    Raises:
        ValueError: the model predicts something else than eps.
    """

    def __init__(
        self,
        guidance: Guidance,
        model: DiffusionModel,
        cond: Conditioning,
        corrector: ScoreCorrector,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        if model.parameterization != "eps":
            raise ValueError(
                f"a score corrector needs a model that predicts eps; this one predicts {model.parameterization}"
            )
        self.guidance = guidance
        self.model = model
        self.cond = cond
        self.corrector = corrector
        self.options = dict(options or {})

    def start(self) -> None:
        start_guidance(self.guidance)

    def __call__(self, x: Tensor, t: Tensor, step: int = 0, steps: int = 1) -> Tensor:
        eps = self.guidance(x, t, step, steps)
        return self.corrector.modify_score(self.model, eps, x, t, self.cond, **self.options)


def make_guidance(
    model: DiffusionModel, cond: Conditioning, uncond: Conditioning = None, scale: Scale = 1.0
) -> Guidance:
    """The guidance that conditionings need: none without `uncond` or at scale 1, one batch where they fit, else two calls.

    Args:
        scale: of the guidance, or one for each step.
    """
    if uncond is None or (not isinstance(scale, Sequence) and scale == 1.0):
        return Unguided(model, cond)
    if can_join(uncond, cond):
        return BatchedGuidance(model, cond, uncond, scale)
    return SeparateGuidance(model, cond, uncond, scale)


def can_join(uncond: Conditioning, cond: Conditioning) -> bool:
    """Whether both conditionings fit into one batch."""
    if isinstance(cond, Mapping) and isinstance(uncond, Mapping):
        return set(cond) == set(uncond) and all(can_join(uncond[key], cond[key]) for key in cond)
    if isinstance(cond, (list, tuple)) and isinstance(uncond, (list, tuple)):
        return len(cond) == len(uncond) and all(map(can_join, uncond, cond))
    if isinstance(cond, Tensor) and isinstance(uncond, Tensor):
        return cond.shape[1:] == uncond.shape[1:]
    return cond is None and uncond is None


def join_conditioning(uncond: Any, cond: Any) -> Any:
    """Both conditionings in one batch, unconditional first; see `can_join`."""
    if isinstance(cond, Mapping):
        return {key: join_conditioning(uncond[key], cond[key]) for key in cond}
    if isinstance(cond, (list, tuple)):
        return [join_conditioning(u, c) for u, c in zip(uncond, cond, strict=True)]
    return None if cond is None else torch.cat([uncond, cond])


def check_batch(conditioning: Conditioning, batch_size: int, what: str = "a conditioning") -> None:
    """Raise ValueError if a tensor in `conditioning` is not for `batch_size` pictures."""
    if isinstance(conditioning, Mapping):
        for value in conditioning.values():
            check_batch(value, batch_size, what)
    elif isinstance(conditioning, (list, tuple)):
        for entry in conditioning:
            check_batch(entry, batch_size, what)
    elif isinstance(conditioning, Tensor) and conditioning.dim() and conditioning.shape[0] != batch_size:
        raise ValueError(f"{what} of {conditioning.shape[0]} entries for a batch of {batch_size}")
