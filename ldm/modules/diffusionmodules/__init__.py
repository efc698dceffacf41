"""Convolutional blocks: the UNet (`openaimodel`), the autoencoder's halves (`model`) and helpers (`util`)."""
