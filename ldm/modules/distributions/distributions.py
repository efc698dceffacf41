"""Gaussian distributions with diagonal covariance: the autoencoder's posterior."""

import math

import torch
from torch import Tensor


class DiagonalGaussianDistribution:
    """A normal distribution for each element, from the mean and log-variance that a network gives.

    Args:
        parameters: (B, 2C, H, W), mean before log-variance; the log-variance is clipped to [-30, 20].
        deterministic: no variance, so that sampling gives the mean.
    """

    def __init__(self, parameters: Tensor, deterministic: bool = False) -> None:
        self.parameters = parameters
        self.mean, logvar = parameters.chunk(2, dim=1)
        self.logvar = logvar.clamp(-30.0, 20.0)
        self.deterministic = deterministic
        self.std = torch.zeros_like(self.mean) if deterministic else torch.exp(0.5 * self.logvar)
        self.var = torch.zeros_like(self.mean) if deterministic else torch.exp(self.logvar)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """mean + std * noise, (B, C, H, W); noise comes from the global generator by default."""
        # Drawn on the CPU as the reference does, so that a seed gives the same latents on every device.
        noise = torch.randn(self.mean.shape, generator=generator)
        return self.mean + self.std * noise.to(self.mean)

    def mode(self) -> Tensor:
        """The mean, (B, C, H, W)."""
        return self.mean

    def kl(self, other: "DiagonalGaussianDistribution | None" = None) -> Tensor:
        """Kullback-Leibler divergence to `other`, or to the standard normal, summed over each image: (B,)."""
        if self.deterministic:
            return torch.zeros(1, device=self.mean.device)
        if other is None:
            terms = self.mean**2 + self.var - 1.0 - self.logvar
        else:
            terms = (self.mean - other.mean) ** 2 / other.var + self.var / other.var - 1.0 - self.logvar + other.logvar
        return 0.5 * terms.flatten(1).sum(1)

    def nll(self, sample: Tensor, dims: tuple[int, ...] = (1, 2, 3)) -> Tensor:
        """Negative log-likelihood of `sample` (B, C, H, W), summed over `dims`."""
        if self.deterministic:
            return torch.zeros(1, device=self.mean.device)
        return 0.5 * torch.sum(math.log(2 * math.pi) + self.logvar + (sample - self.mean) ** 2 / self.var, dim=dims)


def normal_kl(mean1: Tensor, logvar1: Tensor | float, mean2: Tensor | float, logvar2: Tensor | float) -> Tensor:
    """Kullback-Leibler divergence between normal distributions, elementwise with broadcasting; in nats."""
    tensors = [x for x in (mean1, logvar1, mean2, logvar2) if isinstance(x, Tensor)]
    if not tensors:
        raise ValueError("at least one argument of normal_kl must be a tensor")
    logvar1, logvar2 = (x if isinstance(x, Tensor) else torch.tensor(x).to(tensors[0]) for x in (logvar1, logvar2))
    return 0.5 * (-1.0 + logvar2 - logvar1 + torch.exp(logvar1 - logvar2) + (mean1 - mean2) ** 2 * torch.exp(-logvar2))
