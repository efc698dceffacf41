"""Convert weights from any layout to any other: full checkpoints, ControlNets alone, and those of diffusers.

    python tool_convert_control.py INPUT OUTPUT --to LAYOUT

    python tool_convert_control.py runs/tutorial/model.safetensors control.safetensors --to control-plain
    python tool_convert_control.py runs/tutorial/model.safetensors folder/ --to diffusers
    python tool_convert_control.py control_sd15_canny.pth control_canny.safetensors --to control --dtype float16

INPUT is any weights file or diffusers folder; it is recognised by its content, read tensor by tensor, never executed.
"""

import argparse
import sys
from collections.abc import Sequence

from cldm.checkpoint import TARGETS, convert
from cldm.command import Parser, help_text, run_tool
from ldm.files.tensors import FLOAT_DTYPES

PROGRAM = "tool_convert_control.py"


def build_parser(program: str = PROGRAM) -> Parser:
    layouts = "\n".join(f"  {name:<20}{what}" for name, what in TARGETS.items())
    text = help_text(__doc__, PROGRAM, program)
    parser = Parser(prog=program, description=text, epilog=f"layouts:\n{layouts}")
    parser.add_argument("input", metavar="INPUT", help="weights file, or folder of diffusers")
    parser.add_argument(
        "output", metavar="OUTPUT", help=".safetensors, .ckpt, .pth, .pt or .bin file, or a folder to make"
    )
    parser.add_argument("--to", required=True, choices=TARGETS, metavar="LAYOUT", help="one of those below")
    parser.add_argument("--base", metavar="FILE", help="the base model of the ControlNet: supplies what INPUT lacks; if "
                        "the base in INPUT differs (trained with sd_locked=False), it is written beside OUTPUT")  # fmt: skip
    parser.add_argument("--with-base", action="store_true", help="write INPUT's base model beside OUTPUT in any case")
    parser.add_argument("--config", help="configuration by name or path, for models of no known family")
    parser.add_argument("--ema", action="store_true", help="take the EMA weights")
    parser.add_argument("--dtype", choices=FLOAT_DTYPES, help="of the weights; as they are by default")
    parser.add_argument("--global-average-pooling", action=argparse.BooleanOptionalAction,
                        help="the ControlNet averages its outputs (shuffle of ControlNet 1.1), whatever INPUT says")  # fmt: skip
    parser.add_argument(
        "--prediction", choices=("eps", "v"), help="what the model predicts, where the file does not tell"
    )
    parser.add_argument("--force", action="store_true", help="overwrite what exists")
    return parser


def main(argv: Sequence[str] | None = None, program: str = PROGRAM) -> int:
    args = build_parser(program).parse_args(argv)

    def work() -> list[str]:
        return convert(
            args.input,
            args.output,
            args.to,
            base=args.base,
            with_base=args.with_base,
            config=args.config,
            ema=args.ema,
            dtype=args.dtype,
            global_average_pooling=args.global_average_pooling,
            prediction=args.prediction,
            overwrite=args.force,
        )

    return run_tool(program, work)


if __name__ == "__main__":
    sys.exit(main())
