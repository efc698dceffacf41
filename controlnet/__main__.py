"""`python -m controlnet` is the command `controlnet`."""

import sys

from controlnet.command import main

if __name__ == "__main__":
    sys.exit(main())
