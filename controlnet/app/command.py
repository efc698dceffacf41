"""The command: options of the web page, and starting and ending its server."""

import argparse
import hmac
import importlib.util
import logging
import os
import shutil
import socket
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cldm.command import Parser, device_option, run_command
from cldm.terminal import show
from ldm.util import ConfigError

PROGRAM = "controlnet app"
PASSWORD_VARIABLE = "CONTROLNET_PASSWORD"
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_DTYPES = ("float32", "float16", "bfloat16")

_EXAMPLES = """examples:
  controlnet app                                        on this machine alone: http://127.0.0.1:7860
  controlnet app --host 0.0.0.0 --password secret       for others in the network, too
  controlnet app --models /disk/weights --dtype float16 with Stable Diffusion on a GPU
"""


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog=PROGRAM, description="Generate, detect, look at models and train in a browser.", epilog=_EXAMPLES,
        allow_abbrev=False,
    )  # fmt: skip
    server = parser.add_argument_group("server")
    server.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s: this machine alone)")
    server.add_argument("--port", type=int, help="port to listen on (default: the first free one from 7860)")
    server.add_argument("--password", help=f"ask visitors for it; or set the variable {PASSWORD_VARIABLE}")
    server.add_argument("--share", action="store_true", help="also open a public link through Gradio's servers")
    folders = parser.add_argument_group("folders; nothing else can be chosen on the page")
    folders.add_argument(
        "--models", action="append", type=Path, metavar="FOLDER", help="weights; may be repeated (models)"
    )
    folders.add_argument(
        "--data",
        action="append",
        type=Path,
        metavar="FOLDER",
        help="training data and pictures; may be repeated (training, data)",
    )
    folders.add_argument("--runs", type=Path, default=Path("runs"), metavar="FOLDER", help="of training (%(default)s)")
    folders.add_argument(
        "--outputs", type=Path, default=Path("outputs"), metavar="FOLDER", help="for pictures (%(default)s)"
    )
    model = parser.add_argument_group("models")
    model.add_argument("--device", help="cpu, cuda, mps, xpu (default: an accelerator if there is one)")
    model.add_argument("--dtype", choices=_DTYPES, default="float32", help="precision of the weights (%(default)s)")
    model.add_argument(
        "--low-memory", action="store_true", help="keep models in main memory, parts on the device while used"
    )
    model.add_argument("--keep", type=int, default=1, metavar="N", help="models that stay in memory (%(default)s)")
    model.add_argument(
        "--largest", type=int, default=1024, metavar="PIXELS", help="of the shorter side of pictures (%(default)s)"
    )
    return parser


def check(options: argparse.Namespace) -> None:
    """Find mistakes before anything is loaded.

    Raises:
        ConfigError: names the option and what it may be.
    """
    if options.port is not None and not 0 < options.port < 2**16:
        raise ConfigError(f"--port must lie within 1 and 65535, found {options.port}")
    host = options.host.strip("[]")  # as addresses with colons are written before a port
    try:
        family = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family, socket.SOCK_STREAM) as tried:
            tried.bind((host, 0))  # any free port
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"--host: {options.host} is no address of this machine") from error
    if options.keep < 1:
        raise ConfigError(f"--keep must be at least 1, found {options.keep}")
    if not 64 <= options.largest <= 4096:
        raise ConfigError(f"--largest must lie within 64 and 4096, found {options.largest}")
    for name in ("models", "data"):
        for folder in getattr(options, name) or ():
            if not folder.is_dir():
                raise ConfigError(f"--{name}: there is no folder {folder}")
    for name in ("runs", "outputs"):
        if os.path.lexists(getattr(options, name)) and not getattr(options, name).is_dir():
            raise ConfigError(f"--{name}: {getattr(options, name)} is a file or a broken link")
    try:
        options.outputs.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=options.outputs).close()  # rights alone do not tell it, of a read-only disk for one
    except OSError as error:
        raise ConfigError(f"--outputs: cannot write into {options.outputs}: {error.strerror or error}") from error
    if _password(options) == "":
        source = f"the variable {PASSWORD_VARIABLE}" if options.password is None else "--password"
        raise ConfigError(f"{source} is empty; give a password, or leave it out where nobody shall be asked for one")
    if importlib.util.find_spec("gradio") is None:
        raise ConfigError("the page needs Gradio: pip install 'controlnet[app]'")


def _password(options: argparse.Namespace) -> str | None:
    """What visitors are asked for; None for nothing."""
    return options.password if options.password is not None else os.environ.get(PASSWORD_VARIABLE)


def make_context(options: argparse.Namespace) -> Any:
    """What the page works with, from the options."""
    import torch

    from controlnet.app.conditions import Detectors
    from controlnet.app.context import Context
    from controlnet.app.files import Folders
    from controlnet.app.models import Catalogue, Models
    from controlnet.app.training import Runs

    plain = Folders()
    folders = Folders(
        tuple(options.models or plain.models), tuple(options.data or plain.data), options.runs, options.outputs
    )
    catalogue, device = Catalogue(folders), device_option(options.device)
    models = Models(catalogue, device, getattr(torch, options.dtype), options.keep, options.low_memory)
    return Context(folders, catalogue, models, Detectors(options.device), Runs(folders.runs), options.largest)


def serve(options: argparse.Namespace) -> int:
    """Serve the page until the process is told to end; then training is saved and temporary files go."""
    check(options)
    temporary = tempfile.mkdtemp(prefix="controlnet-")
    try:
        # Gradio reads these when it is imported: nothing is reported or asked over the network, and uploads lie in our folder.
        os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": temporary, "DO_NOT_TRACK": "1"}
        context = make_context(options)
        try:
            launch(context, options)
            threading.Event().wait()
        finally:
            context.runs.close()
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return 0


def launch(context: Any, options: argparse.Namespace) -> Any:
    """Start the server in threads of its own; the page and its address.

    Raises:
        ConfigError: the port is in use.
    """
    from starlette.middleware import Middleware

    from controlnet.app.page import CSS, build, theme
    from controlnet.app.uploads import MAX_BYTES, Guard

    password = _password(options)
    if password is None and (options.host not in _LOOPBACK or options.share):
        logging.warning("anyone who reaches this page can use it; --password asks visitors for one")
    page = build(context).queue(max_size=64)
    try:
        _, address, public = page.launch(
            server_name=options.host, server_port=options.port, share=options.share, theme=theme(), css=CSS,
            auth=(lambda name, given: hmac.compare_digest(given.encode(), password.encode())) if password else None,
            auth_message="Any name will do; the password is the server's.",
            max_file_size=MAX_BYTES, app_kwargs={"middleware": [Middleware(Guard)], "docs_url": None, "redoc_url": None},
            show_error=False, footer_links=[], run_history=False, enable_monitoring=False, ssr_mode=False, pwa=False,
            mcp_server=False, prevent_thread_lock=True, quiet=True, inbrowser=False,
        )  # fmt: skip
    except OSError as error:
        # Gradio says the same of whatever it was.
        ports = (
            f"port {options.port} is in use, or not allowed" if options.port else "all ports that were tried are in use"
        )
        raise ConfigError(f"cannot listen on {options.host}: {ports}; choose another --port") from error
    show(f"the page is at {address}" + (f" and, for everyone, at {public}" if public else "") + "; Ctrl-C ends it")
    return page


def main(argv: Sequence[str] | None = None) -> int:
    """Serve the web page; 0, or 2 for a mistake, 130 after Ctrl-C, 143 after SIGTERM."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    options = build_parser().parse_args(argv)
    return run_command(PROGRAM, lambda: serve(options), interrupted="ended; training, if there was any, is saved")
