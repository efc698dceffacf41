"""Whole models: the first stage (`autoencoder`) and the diffusion models with their samplers (`diffusion`)."""
