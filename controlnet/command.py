"""The command `controlnet`: one name for all that can be run, each with the command line that it has as a script or module."""

import difflib
import importlib
import sys
from collections.abc import Sequence
from typing import NamedTuple

from cldm.terminal import fail

PROGRAM = "controlnet"


class Subcommand(NamedTuple):
    """What a subcommand runs: `main(argv, program)` of a module, which is imported only then, and not for the help."""

    module: str
    summary: str


SUBCOMMANDS = {
    "train": Subcommand("tutorial_train", "train a ControlNet; without settings, a tiny one on drawn data"),
    "data": Subcommand("tutorial_dataset", "make training data, drawn or from pictures, or check some"),
    "generate": Subcommand("cldm.generate", "make pictures from hints and prompts"),
    "detect": Subcommand("annotator.__main__", "make hints from pictures: edges, depth, pose and more"),
    "evaluate": Subcommand("cldm.evaluate", "score how well a model follows its hints"),
    "inspect": Subcommand("cldm.checkpoint.__main__", "tell what a weights file is"),
    "add-control": Subcommand("tool_add_control", "give a base model a ControlNet, to be trained"),
    "convert": Subcommand("tool_convert_control", "convert weights from any layout to any other"),
    "transfer": Subcommand("tool_transfer_control", "move a ControlNet to another base model"),
    "app": Subcommand("controlnet.app", "open the web page"),
}

SHELLS = ("bash", "zsh", "tcsh")
HELP = """usage: controlnet SUBCOMMAND ...

Train, convert and use ControlNets.

{subcommands}

  --help                      this text; controlnet SUBCOMMAND --help explains one, with examples
  --version                   the version that is installed
  --print-completion SHELL    what bash, zsh or tcsh needs to complete the command; see docs/command.md

examples:
  controlnet train                            data, training and result on a tiny model, in minutes
  controlnet detect canny photos/ edges/      the edges of all pictures in a folder
  controlnet generate edges.png out/ --weights control_sd15_canny.pth --prompt "a bird"
""".format(subcommands="\n".join(f"  {name:<14}{known.summary}" for name, known in SUBCOMMANDS.items()))


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand with the arguments behind its name; the exit status is the subcommand's, or 2 for a mistake."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    first = arguments[0] if arguments else ""
    if first in SUBCOMMANDS:
        return run(first, arguments[1:])
    if first in ("", "-h", "--help"):
        print(HELP, end="", file=sys.stdout if first else sys.stderr)
        return 0 if first else 2
    if first == "--version":
        from importlib.metadata import version

        print(PROGRAM, version(PROGRAM))
        return 0
    if first == "--print-completion":
        return print_completion(arguments[1:])
    what = "option" if first.startswith("-") else "subcommand"
    nearest = difflib.get_close_matches(first, [*SUBCOMMANDS, "--help", "--version", "--print-completion"], 1)
    known = f"did you mean {nearest[0]}?" if nearest else f"the subcommands are {', '.join(SUBCOMMANDS)}"
    fail(f"there is no {what} {first!r}; {known}", PROGRAM)
    return 2


def run(name: str, arguments: list[str]) -> int:
    """Run one subcommand; if a library that OpenCV needs is not on this machine, one line says what to install."""
    program = f"{PROGRAM} {name}"
    try:
        subcommand = importlib.import_module(SUBCOMMANDS[name].module)
        # The page has this one name; the others are scripts and modules, which are told how they are called here.
        return subcommand.main(arguments) if name == "app" else subcommand.main(arguments, program=program)
    except ImportError as error:
        missing = missing_library(error)
        if missing is None:
            raise
        fail(
            f"opencv-python needs {missing} of a desktop, which is not on this machine; install it (on Debian and Ubuntu: "
            "apt-get install libgl1 libglib2.0-0), or do without: pip uninstall -y opencv-python, then "
            "pip install --force-reinstall opencv-python-headless",
            program,
        )
        return 2
    except KeyboardInterrupt:  # while it was imported; later it is the subcommand's to say how to go on
        fail("interrupted", program)
        return 130


def missing_library(error: ImportError) -> str | None:
    """The name of the system library without which OpenCV cannot be imported, if that is what the error says."""
    library, _, rest = str(error).partition(":")
    return library if error.name == "cv2" and "cannot open shared object file" in rest else None


def print_completion(arguments: list[str]) -> int:
    """Print what a shell needs to complete the command."""
    if len(arguments) != 1 or arguments[0] not in SHELLS:
        fail(f"--print-completion takes one of {', '.join(SHELLS)}", PROGRAM)
        return 2
    from controlnet.completion import completion

    print(completion(arguments[0]))
    return 0
