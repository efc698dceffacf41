"""Lines for the terminal where nobody reads them."""

import os
import sys

from cldm.terminal import fail, show


def test_a_reader_that_has_seen_enough_ends_no_program():
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", encoding="utf-8") as stream:  # whose end writes once more what is left
        show("a line", stream)
        show("another line", stream)


def test_without_stdout_and_stderr_nothing_is_said(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)  # as Python has it where they were closed before it began
    monkeypatch.setattr(sys, "stderr", None)
    show("a line")
    fail("a mistake", "program")
