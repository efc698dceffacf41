"""Peak memory of a process."""

import resource
import sys
from pathlib import Path


def peak_memory() -> int:
    """Bytes of memory that this process has held at most.

    Linux counts what the parent held into `ru_maxrss` of a new process, so the kernel's own account is read there.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
