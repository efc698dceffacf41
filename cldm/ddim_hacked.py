"""The DDIM sampler under the name by which scripts of the public reference import it."""

from ldm.models.diffusion import ddim


class DDIMSampler(ddim.DDIMSampler):
    """As `ldm.models.diffusion.ddim.DDIMSampler`, but for `encode` on a model that predicts v.

    There the published numbers take the network's output for eps, and so does this class; `encode(..., output_is_eps=False)`, or the
    base sampler, inverts such a model truly. (The reference needs this class because only it takes an unconditional half without a
    hint. Here every sampler does.)
    """

    inversion_takes_output_as_eps = True
