"""The package that is built: it holds everything that the command `controlnet` needs, and nothing of the rest; importing it is light."""

import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from controlnet.command import SUBCOMMANDS

ROOT = Path(__file__).parents[1]
# What only extras bring along, or takes long to import.
HEAVY = ["bitsandbytes", "diffusers", "gradio", "matplotlib", "mediapipe", "onnxruntime", "open_clip", "scipy", "timm", "torchmetrics",
         "torchvision", "transformers", "webdataset"]  # fmt: skip


def build(source: Path, folder: Path, *targets: str) -> list[Path]:
    """Build from a folder without the network, with what is installed here."""
    options = [argument for target in targets for argument in ("-t", target)]
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-d", str(folder), *options],
        cwd=source, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The sdist and the wheel of this checkout."""
    files = build(ROOT, tmp_path_factory.mktemp("dist"), "sdist", "wheel")
    return {file.suffix: file for file in files}


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """A folder with the wheel's files, as pip would lay them down."""
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(built[".whl"]) as wheel:
        wheel.extractall(folder)
    return folder


def test_the_wheel_holds_what_the_command_runs(built):
    with zipfile.ZipFile(built[".whl"]) as wheel:
        names = set(wheel.namelist())
        entry_points = next(wheel.read(name).decode() for name in names if name.endswith("entry_points.txt"))
        metadata = next(wheel.read(name).decode() for name in names if name.endswith(".dist-info/METADATA"))
    assert "controlnet = controlnet.command:main" in entry_points
    for subcommand in SUBCOMMANDS.values():
        if subcommand.module != "controlnet.app":
            assert subcommand.module.replace(".", "/") + ".py" in names
    tops = {name.partition("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {"annotator", "cldm", "controlnet", "ldm", "tool_add_control.py", "tool_convert_control.py", "tool_transfer_control.py",
                    "tutorial_dataset.py", "tutorial_train.py"}  # fmt: skip
    assert {f"{package}/py.typed" for package in ("annotator", "cldm", "controlnet", "ldm")} <= names
    assert {
        f"cldm/resources/models/cldm_{name}.{suffix}"
        for name in ("v15", "v21", "tiny")
        for suffix in ("yaml", "entries.json")
    } <= names
    assert "cldm/resources/models/cldm_tiny.safetensors" in names
    assert any(name.startswith("cldm/resources/configs/") for name in names)
    # Every file of the packages is there, whatever its suffix, and nothing that git does not know.
    tracked = subprocess.run(
        ["git", "ls-files", "ldm", "cldm", "annotator", "controlnet"], cwd=ROOT, capture_output=True, text=True
    )
    if tracked.returncode == 0:
        inside = {name for name in names if ".dist-info/" not in name and "/resources/" not in name and "/" in name}
        assert inside >= set(tracked.stdout.split())
        assert not any("__pycache__" in name or "/ckpts/" in name for name in names)
    assert re.search(r"^Requires-Dist: opencv-python>=", metadata, re.MULTILINE)


def test_a_wheel_built_from_the_sdist_is_the_same(built, tmp_path):
    with tarfile.open(built[".gz"]) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    (again,) = build(source, tmp_path / "dist", "wheel")
    with zipfile.ZipFile(again) as first, zipfile.ZipFile(built[".whl"]) as second:
        assert {n: first.getinfo(n).CRC for n in first.namelist()} == {
            n: second.getinfo(n).CRC for n in second.namelist()
        }


def test_the_main_job_and_all_tools_run_outside_of_the_checkout(installed, tmp_path):
    """One process, as each would import torch again; the checkout is not on its path."""
    run, tiny = "run", "cldm_tiny.safetensors"
    data = ["data=set", f"out={run}", "accelerator=cpu", "held_out=2", "batch_size=2", "steps=2", "log_every=1", "sample_steps=2",
            "pictures=0", "pictures_before=false"]  # fmt: skip
    model = f"{run}/model.safetensors"
    commands = [
        ["data", "--out", "set", "--count", "6", "--size", "64", "--palette", "clear", "--workers", "1"],
        ["data", "--check", "set"],
        ["train", *data],
        ["train", *data],  # it is finished and says so
        ["inspect", tiny, model],
        ["add-control", tiny, "control.safetensors"],
        ["add-control", tiny, "control.safetensors"],  # nothing is written over
        ["convert", model, "plain.safetensors", "--to", "control-plain"],
        ["transfer", tiny, "plain.safetensors", tiny, "moved.safetensors"],
        ["detect", "canny", "set/target", "edges", "--workers", "1"],
        ["generate", "set/source/0.png", "made", "--weights", model, "--steps", "2", "--prompt", "red circle", "--device", "cpu"],
        ["evaluate", model, "set", "--condition", "fill", "--pairs", "2", "--steps", "2", "--device", "cpu", "--out", "scores"],
    ]  # fmt: skip
    expected = [0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0]
    driver = f"""
import json, sys
from pathlib import Path
root, site = Path({str(ROOT)!r}), Path({str(installed)!r})
sys.path = [str(site), *(entry for entry in sys.path if entry and Path(entry).resolve() != root)]
from controlnet.command import main
codes = []
for argv in json.loads(sys.argv[1]):
    print("##", *argv, flush=True)
    codes.append(main(argv))
files = {{name: Path(getattr(m, "__file__", None) or site) for name, m in sys.modules.items()}}
libraries = Path(sys.prefix)  # an environment may lie in the checkout
outside = [name for name, f in files.items() if f.is_relative_to(root) and not f.is_relative_to(libraries)]
print("RESULT", json.dumps([codes, outside]))
"""
    done = subprocess.run(
        [sys.executable, "-c", driver, json.dumps(commands)],
        cwd=tmp_path, capture_output=True, text=True, timeout=200,
        env={**os.environ, "PYTHONPATH": str(installed)},
    )  # fmt: skip
    report = done.stdout[-3000:] + done.stderr[-3000:]
    assert done.returncode == 0, report
    codes, outside = json.loads(done.stdout.rpartition("RESULT")[2])
    assert codes == expected and not outside, report
    for name in (
        f"{run}/result.png",
        f"{run}/curves.png",
        "moved.safetensors",
        "edges/0.png",
        "made/0_0.png",
        "scores/evaluation.json",
    ):
        assert (tmp_path / name).is_file(), name


@pytest.mark.parametrize("module", ["cldm.cldm", "cldm.pipeline", "cldm.model", "annotator", "tutorial_train"])
def test_importing_it_is_light(module):
    """What only extras bring, or takes long, is imported when it is used.

    What others import is theirs: Lightning imports torchmetrics, and that imports whatever it finds of transformers, SciPy, Matplotlib.
    """
    code = f"""
import importlib, sys
from pathlib import Path
ROOT, found = Path({str(ROOT)!r}), []
OURS = {{str(ROOT / name) for name in ("ldm", "cldm", "annotator", "controlnet")}} | {{str(p) for p in ROOT.glob("*.py")}}
class Watch:
    def find_spec(self, name, path=None, target=None):
        if name in {HEAVY!r}:
            frame = sys._getframe(1)
            while "importlib" in frame.f_code.co_filename:
                frame = frame.f_back
            if any(frame.f_code.co_filename.startswith(place) for place in OURS):
                found.append((name, frame.f_code.co_filename))
sys.meta_path.insert(0, Watch())
importlib.import_module({module!r})
print(found)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[]\n"


def test_it_imports_without_the_packages_of_extras(tmp_path):
    """Transformers and SciPy cannot be hidden so: torchmetrics asks for them by their metadata."""
    extras = ["bitsandbytes", "diffusers", "gradio", "mediapipe", "onnxruntime", "webdataset"]
    code = f"""
import sys
for name in {extras!r}:
    sys.modules[name] = None
import cldm.cldm, cldm.pipeline, cldm.generate, cldm.evaluate, tutorial_train, tutorial_dataset, annotator.__main__
print(sorted({{"open_clip", "timm"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[]\n"
