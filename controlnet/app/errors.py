"""A mistake is a message on the page: what a listener raises becomes one sentence, and never a stack or a path of the server."""

import errno
import html
import inspect
import logging
from collections.abc import Callable
from functools import wraps
from typing import Any

import gradio as gr

from cldm.command import MISTAKES
from cldm.low_memory import is_out_of_memory

logger = logging.getLogger(__name__)

_SECONDS = 20  # that a message stays
# What people can mend. The annotators raise ValueError, and ImportError for an extra that is not installed.
_MENDABLE = (*MISTAKES, ValueError, ImportError)


def complaint(error: Exception) -> str:
    """One sentence for people about any error."""
    reason = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror:  # without its number
        reason = f"{error.strerror}: {error.filename}" if error.filename else str(error.strerror)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "The disk of the server is full. Nothing was saved; free some space and try again."
    if is_out_of_memory(error):
        return "There is not enough memory for this. Choose a lower resolution or fewer pictures at once."
    if isinstance(error, _MENDABLE) and reason:
        begins = reason.partition(" ")[0].rstrip(",:;")
        return reason[0].upper() + reason[1:] if begins.isalpha() else reason  # not the name of a file
    logger.error("a listener of the page failed", exc_info=error)
    return "Something went wrong on the server. Its log says what."


def shown(function: Callable[..., Any], hide_paths: Callable[[str], str]) -> Callable[..., Any]:
    """`function`, a listener or a generator, with its errors as messages on the page."""

    def message(error: Exception) -> gr.Error:
        # The page renders messages as HTML, and they may hold names that somebody chose.
        return gr.Error(html.escape(hide_paths(complaint(error)), quote=False), _SECONDS, print_exception=False)

    if inspect.isgeneratorfunction(function):

        @wraps(function)
        def generator(*args: Any, **kwargs: Any) -> Any:
            try:
                yield from function(*args, **kwargs)
            except gr.Error:
                raise
            except Exception as error:
                raise message(error) from None

        return generator

    @wraps(function)
    def listener(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except gr.Error:
            raise
        except Exception as error:
            raise message(error) from None

    return listener
