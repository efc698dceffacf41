"""What the scripts share as commands: a mistake of the user's becomes one line and an exit status; signals end them in order."""

import argparse
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from cldm.data.pairs import DataError
from cldm.terminal import fail, show
from ldm.files import CheckpointError
from ldm.util import ConfigError

if TYPE_CHECKING:
    import torch

# What the user can mend. Any other error is a defect, of this library or another one, and keeps its traceback.
MISTAKES = (ConfigError, DataError, CheckpointError, FloatingPointError, OSError)


class Parser(argparse.ArgumentParser):
    """A command line whose mistakes are one line on stderr and exit status 2, and whose help keeps the lines of its text."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"formatter_class": argparse.RawDescriptionHelpFormatter, **options})

    def error(self, message: str) -> NoReturn:
        fail(f"{message}; --help shows what it takes", self.prog)
        self.exit(2)


def help_text(text: str | None, own: str, program: str) -> str:
    """A docstring as `--help` shows it, with the name in its examples by which the program was started.

    Args:
        text: the docstring; None where Python has left them out (`-OO`).
        own: the program's name in the docstring: `tutorial_train.py` or `python -m cldm.generate`.
        program: its name now: the same, or `controlnet train`.
    """
    text = text or ""
    return text if program == own else text.replace(f"python {own}", program).replace(own, program)


def device_option(name: str | None) -> "torch.device":
    """The device that an option names; the best one of this machine without it.

    Raises:
        ConfigError: there is no such device.
    """
    from annotator.network import choose_device

    try:
        return choose_device(name)
    except ValueError as error:
        raise ConfigError(str(error)) from error


class Stopped(BaseException):
    """Work that a signal has ended in order; the message says how to go on.

    Not an Exception, as KeyboardInterrupt is none: nothing may take it for an error and carry on.
    """

    def __init__(self, number: int, message: str = "") -> None:
        super().__init__(message)
        self.number = int(number)

    @property
    def status(self) -> int:
        """The exit status that a shell expects: 130 after SIGINT, 143 after SIGTERM."""
        return 128 + self.number


def run_command(
    program: str,
    work: Callable[[], int | None],
    interrupted: str,
    mistakes: tuple[type[Exception], ...] = MISTAKES,
) -> int:
    """Do a script's work; a mistake of the user's becomes one line on stderr.

    Args:
        program: its name, before the line.
        work: returns the exit status; None stands for 0.
        interrupted: what to say after Ctrl-C or SIGTERM.
        mistakes: errors that are the user's to mend.

    Returns:
        the exit status: the work's own, 2 for a mistake, 130 after Ctrl-C, 143 after SIGTERM.
    """
    try:
        with _terminable():
            return work() or 0
    except mistakes as error:
        message = str(error) or type(error).__name__
        if isinstance(error, (FileExistsError, NotADirectoryError)) and error.filename:
            message = f"{error.filename}: there is a file where a folder is needed"
        fail(message, program)
        return 2
    except KeyboardInterrupt:
        fail(interrupted)
        return 128 + signal.SIGINT
    except Stopped as stop:
        fail(str(stop) or interrupted)
        return stop.status


@contextmanager
def _terminable() -> Iterator[None]:
    """Within it SIGTERM is the exception Stopped, so that files are closed and temporary ones removed."""

    def stop(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_IGN)  # `timeout` sends two, and a second would end the cleaning up
        raise Stopped(number)

    with signals_to(stop, signal.SIGTERM):
        yield


def in_main_thread() -> bool:
    """Whether signals can be handled here: Python does so in its main thread alone."""
    return threading.current_thread() is threading.main_thread()


@contextmanager
def signals_to(handler: Callable[[int, FrameType | None], None], *numbers: int) -> Iterator[None]:
    """Within it the handler gets these signals; in another thread than the main one nothing changes."""
    before = {number: signal.signal(number, handler) for number in numbers} if in_main_thread() else {}
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)


def run_tool(program: str, work: Callable[[], Iterable[str]]) -> int:
    """Do the work of a tool that makes files of others, and show the lines that it returns; exit status as of `run_command`."""
    lines: list[str] = []
    status = run_command(
        program, lambda: lines.extend(work()), interrupted="interrupted; what was incomplete is removed"
    )
    for line in lines:
        show(line)
    return status
