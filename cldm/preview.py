"""Latents as small pictures without the autoencoder's decoder, for a look while sampling."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from cldm.pictures import to_uint8
from ldm.models.diffusion.ddpm import LatentDiffusion

_PATCH = 64  # pixels of a patch of one colour, large enough that its middle knows nothing of its neighbours
_GRID = 6


class LatentPreview:
    """A linear map from a latent's channels to red, green and blue, fitted once to the model's own autoencoder.

    Patches of random colours are encoded, and the map is the least-squares solution from the latents in the patches' middles to
    their colours. That holds for any autoencoder; pictures lack detail, as each pixel stands for a whole patch of the decoder's.

    Args:
        model: a LatentDiffusion, its autoencoder on the device and in the type that encoding takes.
    """

    @torch.no_grad()
    def __init__(self, model: LatentDiffusion) -> None:
        generator = torch.Generator().manual_seed(0)
        # Whatever torch's default type and device are: the generator is of the CPU, where the fitting is done.
        colours = torch.rand(3, _GRID, _GRID, generator=generator, dtype=torch.float32, device="cpu") * 2 - 1
        picture = colours.repeat_interleave(_PATCH, 1).repeat_interleave(_PATCH, 2)[None]  # (1, 3, H, W)
        weight = next(model.first_stage_model.parameters(), picture)
        posterior = model.encode_first_stage(picture.to(weight.device))
        mean: Any = getattr(posterior, "mean", posterior)
        latent = mean[0].float().cpu() * float(model.scale_factor)  # (C, h, w)
        step = latent.shape[1] // _GRID
        middles = latent[:, step // 2 :: step, step // 2 :: step].flatten(1).T  # (patches, C)
        inputs = torch.cat([middles, middles.new_ones(len(middles), 1)], dim=1)
        self.matrix = torch.linalg.lstsq(inputs, colours.flatten(1).T).solution  # (C + 1, 3)

    def __call__(self, latents: Tensor) -> np.ndarray:
        """Scaled latents (N, C, h, w) -> uint8 pictures (N, h, w, 3)."""
        z = latents.detach().float().cpu()
        rgb = torch.einsum("nchw,cr->nrhw", z, self.matrix[:-1]) + self.matrix[-1][:, None, None]
        return to_uint8(rgb.nan_to_num(0.0))
