"""Losses that train an autoencoder."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ldm.modules.distributions.distributions import DiagonalGaussianDistribution


class ReconstructionKL(nn.Module):
    """Absolute reconstruction error plus a lightly weighted KL term (Rombach et al. 2022, appendix G, without the discriminator).

    Args:
        kl_weight: weight of the divergence from the standard normal.
        logvar_init: log-variance of the reconstruction's noise; its exponential divides the reconstruction error.
    """

    def __init__(self, kl_weight: float = 1e-6, logvar_init: float = 0.0) -> None:
        super().__init__()
        self.kl_weight = kl_weight
        self.logvar_init = logvar_init

    def forward(
        self, inputs: Tensor, reconstructions: Tensor, posterior: DiagonalGaussianDistribution, split: str = "train"
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """inputs and reconstructions (B, C, H, W) -> the loss and its named terms.

        Both are summed over a picture and averaged over the batch, so the KL weight does not depend on the size.
        """
        error = (inputs - reconstructions).abs()
        weighted = (error / torch.exp(torch.tensor(self.logvar_init)) + self.logvar_init).flatten(1).sum(1).mean()
        kl = posterior.kl().mean()
        loss = weighted + self.kl_weight * kl
        return loss, {
            f"{split}/total_loss": loss.detach(),
            f"{split}/kl_loss": kl.detach(),
            f"{split}/rec_loss": error.mean().detach(),
        }
