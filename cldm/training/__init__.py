"""Training: settings, engine, checkpoints, caches, and the instruments that tell how it goes."""
