"""The one error type of everything that can be wrong with a weights file."""


class CheckpointError(ValueError):
    """A weights file that cannot be read, trusted, recognised or used as asked; the message names the file."""
