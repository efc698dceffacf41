"""Latent diffusion: the autoencoder, the UNet, text encoders, the diffusion process and its samplers. Knows nothing of control."""
