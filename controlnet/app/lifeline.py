"""`python -m controlnet.app.lifeline MODULE ARGUMENTS...`: run a module so that it ends in order when who started it is gone.

The starter holds the other end of this process's standard input. When that closes, by whatever cause, SIGTERM is raised here, which
training and the other commands of this library take as the wish to save and end.
"""

import os
import runpy
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def start(module: str, arguments: Sequence[str], **options: Any) -> subprocess.Popen:
    """Start a module of this environment; `options` are those of Popen. Its end is in order when this process ends, too."""
    command = [sys.executable, "-m", "controlnet.app.lifeline", module, *arguments]
    # What this process can import, the other one can: also where it was started in a folder with packages that are not installed.
    paths = [path or str(Path.cwd()) for path in sys.path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(command, stdin=subprocess.PIPE, env=environment, **options)


def _end_with_starter(starter: int) -> None:
    while os.read(starter, 1024):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def main(argv: Sequence[str]) -> None:
    module, *arguments = argv
    starter = os.dup(0)
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    threading.Thread(target=_end_with_starter, args=[starter], daemon=True).start()
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1:])
