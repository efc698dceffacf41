"""Add a ControlNet to a base model: a copy of its encoder with new zero convolutions and hint encoder, to be trained.

    python tool_add_control.py INPUT OUTPUT

    python tool_add_control.py models/v1-5-pruned.ckpt models/control_sd15_ini.safetensors
    python tool_add_control.py cldm_tiny.safetensors control.safetensors
    python tool_add_control.py models/my_base.safetensors OUTPUT.safetensors --control-from control_v11p_sd15_canny.pth

INPUT is any weights file or diffusers folder with a base model; it is read tensor by tensor, and never executed. A
ControlNet that it holds already is kept. OUTPUT's suffix chooses the format: .safetensors, or .ckpt, .pth, .pt, .bin.
"""

import sys
from collections.abc import Sequence

from cldm.checkpoint import AddedControl, add_control
from cldm.checkpoint.names import CONTROL_PREFIX
from cldm.command import Parser, help_text, run_tool
from ldm.files.tensors import FLOAT_DTYPES

PROGRAM = "tool_add_control.py"


def build_parser(program: str = PROGRAM) -> Parser:
    parser = Parser(prog=program, description=help_text(__doc__, PROGRAM, program))
    parser.add_argument("input", metavar="INPUT", help="base model: weights file, or folder of diffusers")
    parser.add_argument("output", metavar="OUTPUT", help="weights file to write")
    parser.add_argument("--config", help="cldm_v15, cldm_v21, cldm_tiny, or a YAML file; "
                        "recognised from the weights by default")  # fmt: skip
    parser.add_argument("--control-from", metavar="FILE", help="start from the ControlNet in this file, of any layout")
    parser.add_argument("--dtype", choices=FLOAT_DTYPES, help="of the weights; as they are by default")
    parser.add_argument(
        "--half", dest="dtype", action="store_const", const="float16", help="the same as --dtype float16"
    )
    parser.add_argument("--force", action="store_true", help="overwrite OUTPUT if it exists")
    return parser


def summary(output: str, added: AddedControl) -> list[str]:
    """What was done."""
    lines = list(added.notes)
    if added.dropped:
        lines.append(f"left out: {len(added.dropped)} entries that the model does not have, first {added.dropped[0]}")
    fresh = sum(key.startswith(CONTROL_PREFIX) for key in added.new)
    lines.append(
        f"wrote {output}: {len(added.tensors)} entries. Of the ControlNet, {len(added.copied)} are copied from the UNet, "
        f"{fresh} are new (zero convolutions and hint encoder) and {len(added.kept)} kept as they were"
    )
    return lines


def main(argv: Sequence[str] | None = None, program: str = PROGRAM) -> int:
    args = build_parser(program).parse_args(argv)

    def work() -> list[str]:
        added = add_control(args.input, args.output, args.config, args.control_from, args.dtype, args.force)
        return summary(args.output, added)

    return run_tool(program, work)


if __name__ == "__main__":
    sys.exit(main())
