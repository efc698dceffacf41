"""A server of the page for all tests of it, in a folder of its own, and a browser where there is one."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import cv2
import pytest
import torch
from safetensors.torch import load_file, save_file

from cldm.checkpoint import add_control
from cldm.data.fill import draw_fill, generate_fill

pytest.importorskip("gradio", reason="the page needs Gradio: pip install 'controlnet[app]'")

from controlnet.app.conditions import Detectors  # noqa: E402  these need Gradio
from controlnet.app.context import Context  # noqa: E402
from controlnet.app.files import Folders  # noqa: E402
from controlnet.app.models import Catalogue, Models  # noqa: E402
from controlnet.app.training import Runs  # noqa: E402

ROOT = Path(__file__).parents[3]
TINY = ROOT / "models" / "cldm_tiny.safetensors"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SECRET = "not for visitors"  # content of a file on the server that no request may get


@dataclass
class Site:
    """A server's folders, its address, and how it ends."""

    root: Path
    url: str
    process: subprocess.Popen

    @property
    def outputs(self) -> Path:
        return self.root / "outputs"


def write_steered_model(path: Path) -> None:
    """A tiny model whose control has an effect, as a trained one's has, without training it."""
    add_control(TINY, path, progress=False)
    tensors = load_file(path)
    generator = torch.Generator().manual_seed(0)
    for key, tensor in tensors.items():
        is_zero = key.startswith(("control_model.zero_convs", "control_model.middle_block_out"))
        if is_zero or (key.startswith("control_model.input_hint_block") and not tensor.any()):
            tensors[key] = (torch.randn(tensor.shape, generator=generator) * 0.1).to(tensor.dtype)
    save_file(tensors, path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Models, data and pictures for a server."""
    root = tmp_path_factory.mktemp("site")
    (root / "models").mkdir()
    write_steered_model(root / "models" / "steered.safetensors")
    generate_fill(root / "data" / "circles", count=24, size=64, palette="clear", progress=False)
    photos = root / "data" / "photos"
    photos.mkdir()
    for number in range(3):
        cv2.imwrite(str(photos / f"{number}.png"), draw_fill(number, 128, 5).target[:, :, ::-1])
    (root / "secret.txt").write_text(SECRET)
    (root / "data" / "secret.txt").write_text(SECRET)
    return root


@pytest.fixture(scope="module")  # a training that a module leaves behind would slow down all others
def site(folder) -> Iterator[Site]:
    """The server of a module's tests; it has to end in order."""
    with site_in(folder) as started:
        yield started


def make_context(folder: Path, written: Path | None = None) -> Context:
    """What the page's tabs work with, on the folders below `folder`; what is written goes below `written`, if given."""
    written = written or folder
    folders = Folders((folder / "models",), (folder / "data",), written / "runs", written / "outputs")
    catalogue = Catalogue(folders)
    return Context(folders, catalogue, Models(catalogue, torch.device("cpu")), Detectors("cpu"), Runs(folders.runs))


@contextmanager
def site_in(folder: Path, *more: str) -> Iterator[Site]:
    """The page's own command as a process, as people start it, with the folders below `folder` and perhaps more options."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = {
        "models": "models",
        "data": "data",
        "runs": "runs",
        "outputs": "outputs",
        "device": "cpu",
        "port": str(port),
    }
    command = [
        sys.executable,
        "-m",
        "controlnet.app",
        *(part for key, value in options.items() for part in (f"--{key}", value)),
        *more,
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "ANNOTATOR_VERSION": "1.0"}
    with open(folder / "server.log", "wb") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        address = f"http://127.0.0.1:{port}"
        wait_until(lambda: process.poll() is not None or _answers(address), 120)
        assert process.poll() is None, (folder / "server.log").read_text()
        yield Site(folder, address, process)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(90)
    told = (folder / "server.log").read_text()
    assert process.returncode == 143, told
    for run in (folder / "runs").glob("*/log.txt"):  # a training that was going on has been stopped in order
        assert "the same command goes on" in run.read_text()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


def wait_until(is_so, seconds: float = 60) -> None:
    """Wait for a condition; fail when it does not come true."""
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.1)


@pytest.fixture(scope="module")  # its event loop would be in the way of other modules' own
def browser():
    """A headless Chromium of this machine."""
    playwright = pytest.importorskip("playwright.sync_api", reason="the tests of the page need playwright")
    executable = next(filter(None, map(shutil.which, BROWSERS)), None)
    if executable is None:
        pytest.skip("no Chromium on this machine; apt-get install chromium brings one")
    with playwright.sync_playwright() as started:
        # The editors draw with WebGL, which is computed in software here.
        options = ["--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
        chromium = started.chromium.launch(executable_path=executable, args=options)
        yield chromium
        chromium.close()
