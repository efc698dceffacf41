"""Training data: image pairs on disk, the Fill generator, and the score for Fill."""
