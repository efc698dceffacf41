"""Move a ControlNet from the base model that it was trained on to another of the same family.

    python tool_transfer_control.py BASE CONTROLLED TARGET OUTPUT

    python tool_transfer_control.py v1-5-pruned.ckpt control_sd15_canny.pth my_base.safetensors my_base_canny.safetensors

Each is any weights file or diffusers folder: BASE is the model that was trained on (such as SD 1.5), CONTROLLED the
trained one or its ControlNet alone, TARGET the model to be controlled. OUTPUT is a full checkpoint, which holds
CONTROLLED + (TARGET - BASE), and the VAE and text encoder of TARGET.
"""

import sys
from collections.abc import Sequence

from cldm.checkpoint import transfer_control
from cldm.command import Parser, help_text, run_tool
from ldm.files.tensors import FLOAT_DTYPES

PROGRAM = "tool_transfer_control.py"


def build_parser(program: str = PROGRAM) -> Parser:
    parser = Parser(prog=program, description=help_text(__doc__, PROGRAM, program))
    parser.add_argument("base", metavar="BASE", help="the base model that the ControlNet was trained on")
    parser.add_argument("controlled", metavar="CONTROLLED", help="base and ControlNet, or the ControlNet alone")
    parser.add_argument("target", metavar="TARGET", help="the base model that it shall control")
    parser.add_argument("output", metavar="OUTPUT", help=".safetensors, .ckpt, .pth, .pt or .bin file to write")
    parser.add_argument("--dtype", choices=FLOAT_DTYPES, help="of the weights; the widest of the three by default")
    parser.add_argument("--force", action="store_true", help="overwrite OUTPUT if it exists")
    return parser


def main(argv: Sequence[str] | None = None, program: str = PROGRAM) -> int:
    args = build_parser(program).parse_args(argv)

    def work() -> list[str]:
        return transfer_control(args.base, args.controlled, args.target, args.output, args.dtype, args.force)

    return run_tool(program, work)


if __name__ == "__main__":
    sys.exit(main())
