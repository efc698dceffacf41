"""All samplers by name."""

from typing import Any

import torch

from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.dpm_solver import DPMSolverSampler
from ldm.models.diffusion.guidance import DiffusionModel
from ldm.models.diffusion.plms import PLMSSampler
from ldm.models.diffusion.sampler import Sampler
from ldm.models.diffusion.schedulers import SCHEDULERS, SchedulerSampler

SAMPLERS: dict[str, type[Sampler]] = {"ddim": DDIMSampler, "plms": PLMSSampler, "dpm_solver": DPMSolverSampler}
SAMPLER_NAMES = (*SAMPLERS, *SCHEDULERS)


def make_sampler(sampler: Any, model: DiffusionModel, device: torch.device | str | None = None) -> Sampler:
    """A sampler for a model.

    Args:
        sampler: one of SAMPLER_NAMES, of which those of SCHEDULERS need the library diffusers; a class of a sampler; or a
            scheduler of diffusers, as an object or a class.
        device: where to sample; the model's own device by default.

    Raises:
        ValueError: there is no sampler of that name, or this is none.
    """
    if isinstance(sampler, str):
        if sampler in SAMPLERS:
            return SAMPLERS[sampler](model, device=device)
        if sampler in SCHEDULERS:
            return SchedulerSampler(model, sampler, device)
        raise ValueError(f"unknown sampler {sampler!r}; known are {', '.join(SAMPLER_NAMES)}")
    if isinstance(sampler, type) and issubclass(sampler, Sampler):
        return sampler(model, device=device)
    if isinstance(sampler, Sampler):
        raise ValueError(
            "give the class of a sampler, or its name: a sampler belongs to a model, and is made for each run"
        )
    return SchedulerSampler(model, sampler, device)
