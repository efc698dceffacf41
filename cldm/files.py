"""Files that are whole or not there."""

from annotator.pictures import write_whole

__all__ = ["write_whole"]
