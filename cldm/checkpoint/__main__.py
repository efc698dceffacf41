"""Recognise weights files: layout, base model, what is missing or extra. They are never executed.

    python -m cldm.checkpoint models/control_sd15_canny.pth
    python -m cldm.checkpoint runs/tutorial/model.safetensors folder_of_diffusers/ --json

The report also says what can be done with each file, and how.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from cldm.checkpoint.opening import identify
from cldm.checkpoint.recognising import LAYOUTS, Report
from cldm.command import Parser, help_text
from cldm.terminal import fail, show
from ldm.files import CheckpointError

PROGRAM = "python -m cldm.checkpoint"
_FAMILIES = {"sd1": "Stable Diffusion 1.x", "sd2": "Stable Diffusion 2.x", "tiny": "tiny", "unknown": "unknown"}
_SHOWN = 3  # keys of a long list


def build_parser(program: str = PROGRAM) -> Parser:
    parser = Parser(prog=program, description=help_text(__doc__, PROGRAM, program))
    parser.add_argument("files", nargs="+", metavar="FILE", help="a weights file, or a folder of diffusers")
    parser.add_argument("--json", action="store_true", help="print one JSON object a file, all keys listed")
    return parser


def main(argv: Sequence[str] | None = None, program: str = PROGRAM) -> int:
    """Print the report of each file named; 0, or 2 if one of them cannot be read."""
    arguments = build_parser(program).parse_args(argv)
    code = 0
    for file in arguments.files:
        try:
            report = identify(file)
        except CheckpointError as error:
            fail(error)
            code = 2
        else:
            for line in [json.dumps(report.as_dict())] if arguments.json else table(report):
                show(line)
    return code


def table(report: Report) -> list[str]:
    """The report for people, a few lines of name and value."""
    layout = LAYOUTS[report.layout] + (", in a Lightning checkpoint" if report.lightning else "")
    family = _FAMILIES[report.family] + (f" (configuration {report.config})" if report.config else "")
    rows = [
        ("file", str(report.path)),
        ("format", report.format + (f", under {' / '.join(report.wrapping)}" if report.wrapping else "")),
        ("layout", layout),
        ("family", family),
        ("prediction", report.prediction or "not told by the file"),
        ("entries", f"{sum(report.parts.values()):,}: " + _counts(report.parts)),
        ("dtypes", _counts(report.dtypes)),
        ("size", f"{report.parameters:,} numbers, {report.bytes / 1e9:.2f} GB"),
        ("EMA", "yes" if report.ema else "no"),
    ]
    for name in ("missing", "extra", "mismatched"):
        keys = getattr(report, name)
        if keys:
            rows.append((name, f"{len(keys):,}: " + ", ".join(keys[:_SHOWN]) + (", ..." if len(keys) > _SHOWN else "")))
    rows += [("", line) for line in report.suggestions]
    return [f"{name:<11} {value}".rstrip() for name, value in rows]


def _counts(numbers: dict[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in numbers.items())


if __name__ == "__main__":
    sys.exit(main())
