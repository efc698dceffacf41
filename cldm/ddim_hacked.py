"""The DDIM sampler for control: conditional and unconditional halves are evaluated apart, so that only one may carry a hint."""

from typing import Any

from torch import Tensor

from ldm.models.diffusion import ddim


class DDIMSampler(ddim.DDIMSampler):
    """As `ldm.models.diffusion.ddim.DDIMSampler`, with guidance in two calls.

    The unconditional conditioning may have `c_concat: None` (guess mode). Numbers equal the base sampler's where that can be used,
    but for `encode` on a model that predicts v: the published numbers take the network's output for eps, and so does this class.
    `encode(..., output_is_eps=False)`, or the base sampler, inverts such a model truly.
    """

    inversion_takes_output_as_eps = True

    def guided_output(self, x: Tensor, t: Tensor, c: Any, scale: float, uncond: Any) -> Tensor:
        """uncond + scale * (cond - uncond), x (B, C, h, w), t (B,) -> (B, C, h, w)."""
        out_cond = self.model.apply_model(x, t, c)
        if uncond is None or scale == 1.0:
            return out_cond
        out_uncond = self.model.apply_model(x, t, uncond)
        return out_uncond + scale * (out_cond - out_uncond)
