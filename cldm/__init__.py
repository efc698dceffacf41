"""ControlNet on top of latent diffusion: the networks, checkpoints, data, sampling and logging."""
