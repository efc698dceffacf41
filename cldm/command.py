"""What the scripts share as commands: a mistake of the user's becomes one line and an exit status."""

from collections.abc import Callable, Iterable

from cldm.data.pairs import DataError
from cldm.terminal import fail, show
from ldm.files import CheckpointError
from ldm.util import ConfigError

# What the user can mend. Any other error is a defect, of this library or another one, and keeps its traceback.
MISTAKES = (ConfigError, DataError, CheckpointError, OSError)


def run_command(program: str, work: Callable[[], int | None], interrupted: str) -> int:
    """Do a script's work; a mistake of the user's becomes one line on stderr.

    Args:
        program: its name, before the line.
        work: returns the exit status; None stands for 0.
        interrupted: what to say after Ctrl-C.

    Returns:
        the exit status: the work's own, 2 for a mistake, 130 after Ctrl-C.
    """
    try:
        return work() or 0
    except MISTAKES as error:
        fail(error if str(error) else type(error).__name__, program)
        return 2
    except KeyboardInterrupt:
        fail(interrupted)
        return 130


def run_tool(program: str, work: Callable[[], Iterable[str]]) -> int:
    """Do the work of a tool that makes files of others, and show the lines that it returns; exit status as of `run_command`."""
    lines: list[str] = []
    status = run_command(program, lambda: lines.extend(work()), interrupted="interrupted; nothing was written")
    for line in lines:
        show(line)
    return status
