"""`python -m controlnet.app`: the web page; `--help` explains its options."""

import sys

from controlnet.app import main

if __name__ == "__main__":
    sys.exit(main())
