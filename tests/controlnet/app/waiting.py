"""A command that waits until it is told to end, and then says so in a file: `python -m tests.controlnet.app.waiting FILE [STATUS]`."""

import signal
import sys
import time
from pathlib import Path

if __name__ == "__main__":

    def end(number, frame):
        Path(sys.argv[1]).write_text("ended in order")
        sys.exit(int(sys.argv[2]) if len(sys.argv) > 2 else 143)

    signal.signal(signal.SIGTERM, end)
    Path(sys.argv[1]).write_text("waiting")
    time.sleep(60)
