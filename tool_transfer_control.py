"""Move a ControlNet from the base model that it was trained on to another of the same family.

    python tool_transfer_control.py BASE CONTROLLED TARGET OUTPUT

Each is any weights file or diffusers folder: BASE is the model that was trained on (such as SD 1.5), CONTROLLED the
trained one or its ControlNet alone, TARGET the model to be controlled. OUTPUT is a full checkpoint, which holds
CONTROLLED + (TARGET - BASE), and the VAE and text encoder of TARGET.
"""

import argparse
import sys
from collections.abc import Sequence

from cldm.checkpoint import transfer_control
from cldm.command import run_tool
from ldm.files.tensors import FLOAT_DTYPES


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", metavar="BASE", help="the base model that the ControlNet was trained on")
    parser.add_argument("controlled", metavar="CONTROLLED", help="base and ControlNet, or the ControlNet alone")
    parser.add_argument("target", metavar="TARGET", help="the base model that it shall control")
    parser.add_argument("output", metavar="OUTPUT", help=".safetensors, .ckpt, .pth, .pt or .bin file to write")
    parser.add_argument("--dtype", choices=FLOAT_DTYPES, help="of the weights; the widest of the three by default")
    parser.add_argument("--force", action="store_true", help="overwrite OUTPUT if it exists")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)

    def work() -> list[str]:
        return transfer_control(args.base, args.controlled, args.target, args.output, args.dtype, args.force)

    return run_tool("tool_transfer_control.py", work)


if __name__ == "__main__":
    sys.exit(main())
