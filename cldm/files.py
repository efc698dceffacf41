"""Files that are whole or not there."""

import os
import uuid
from pathlib import Path


def write_whole(path: str | os.PathLike, data: bytes) -> None:
    """Write beside the target, flush to the disk, rename: nobody ever sees half a file. Folders are made.

    The temporary name is unique, so that two processes that write the same file do not disturb each other; the last one wins.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
