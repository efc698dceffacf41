"""Shell completion of the command `controlnet`, made once from the command lines of all subcommands."""

import argparse
import importlib
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path

import shtab

from annotator.__main__ import build_parser as detect_parser
from annotator.registry import describe, list_annotators
from cldm.training.settings import Settings
from controlnet.command import PROGRAM, SHELLS, SUBCOMMANDS
from tutorial_dataset import CONDITIONS, check_parser, fill_parser, photos_parser


def completion(shell: str) -> str:
    """The completion script for a shell: subcommands, options, their choices, and files where a file may stand."""
    parser = argparse.ArgumentParser(PROGRAM)
    parser.add_argument("--version", action="store_true", help="the version that is installed")
    parser.add_argument("--print-completion", choices=SHELLS, help="what a shell needs to complete the command")
    commands = parser.add_subparsers()
    for name, subcommand in SUBCOMMANDS.items():
        if name == "train":
            command = commands.add_parser(name, help=subcommand.summary)
            command.add_argument("setting", nargs="*", choices=[f"{field.name}=" for field in fields(Settings)])
        elif name == "detect":
            command = commands.add_parser(name, help=subcommand.summary)
            _add_conditions(command, ((known, detect_parser(known)) for known in list_annotators()))
        elif name == "data":
            parents = [fill_parser(), check_parser()]
            command = commands.add_parser(
                name, help=subcommand.summary, parents=parents, add_help=False, conflict_handler="resolve"
            )
            _add_conditions(command, ((known, photos_parser(known)) for known in CONDITIONS))
        else:
            module = "controlnet.app.command" if name == "app" else subcommand.module
            parents = [importlib.import_module(module).build_parser()]
            commands.add_parser(name, help=subcommand.summary, parents=parents, add_help=False)
    _complete_files(parser)
    return shtab.complete(parser, shell)


def _add_conditions(command: argparse.ArgumentParser, parsers: Iterable[tuple[str, argparse.ArgumentParser]]) -> None:
    """Give a command the sub-command of each condition, out of the parser in which that condition's options are complete."""
    conditions = command.add_subparsers()
    for name, parser in parsers:
        # shtab leaves out what has no help.
        conditions.add_parser(name, parents=[_subparsers(parser)[name]], add_help=False, help=describe(name).title)


def _subparsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    return next((action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction)), {})


def _complete_files(parser: argparse.ArgumentParser) -> None:
    """Let texts and paths be completed as names of files, wherever there is no list to choose from."""
    for action in parser._actions:
        if action.choices is None and action.nargs != 0 and action.type in (None, str, Path):
            action.complete = shtab.FILE  # type: ignore[attr-defined]  # shtab's own way to say so
    for child in _subparsers(parser).values():
        _complete_files(child)
