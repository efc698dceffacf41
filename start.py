"""Set up an environment beside this file and run something in it. Needs nothing but Python 3.10 or newer.

    python3 start.py train [key=value ...]    the main job: tutorial_train.py
    python3 start.py app [options]            the web page, at the address that it prints
    python3 start.py test [pytest options]    lint, types and the test suite; `-n 0` runs its files one after another

The environment is in .venv and reads the code from this folder, so that `git pull` is all an update needs. It is made at the first
call, and made again when pyproject.toml has changed or the folder has moved; what a command needs in addition is installed when it
is first used.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent
ENVIRONMENT = ROOT / ".venv"
PYTHON = ENVIRONMENT / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
# Says that this script made the environment. Once it is installed, it also says for what, and with which extras.
STAMP = ENVIRONMENT / "made_for"
EXTRAS = {"train": "", "app": "app", "test": "test"}
# Test files run side by side; a few, as some take several gigabytes.
PROCESSORS = os.cpu_count() or 1
WORKERS = min(PROCESSORS, 4)


def prepare(extra: str) -> None:
    """Make the environment, unless it is there and belongs to this folder and its pyproject.toml; add the extra if it lacks it."""
    wanted = hashlib.sha256((ROOT / "pyproject.toml").read_bytes() + os.fsencode(ROOT)).hexdigest()
    made_for, *extras = STAMP.read_text().splitlines() if STAMP.is_file() else [""]
    if made_for != wanted:
        print(
            f"making the environment in {ENVIRONMENT}: this takes some minutes, and about 7 GB of disk, most of it for PyTorch",
            flush=True,
        )
        make_environment()
        extras = []
        install(extra)
    elif extra and extra not in extras:
        print(f"installing what `start.py {extra}` needs in addition into {ENVIRONMENT}", flush=True)
        install(extra)
    else:
        return
    STAMP.write_text("\n".join([wanted, *extras, *([extra] if extra else [])]))


def make_environment() -> None:
    """An empty environment, in place of what is there."""
    # The stamp is there from the first to the last moment, so that whatever is interrupted can be made again.
    ENVIRONMENT.mkdir(exist_ok=True)
    STAMP.write_text("not installed yet")
    for entry in list(ENVIRONMENT.iterdir()):
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry != STAMP:
            entry.unlink()
    venv.create(ENVIRONMENT, with_pip=True)


def install(extra: str) -> None:
    """Install what this folder's code needs, and the code itself as a link to this folder."""
    pip("install", "--editable", f"{ROOT}[{extra}]" if extra else str(ROOT))
    # On a machine without a desktop opencv-python may lack system libraries. The headless one does the same for us.
    found = subprocess.run([PYTHON, "-c", "import cv2"], capture_output=True, text=True)
    if found.returncode:
        reason = (found.stderr.strip().splitlines() or ["unknown"])[-1]
        print(f"opencv-python does not work here ({reason}); taking opencv-python-headless instead", flush=True)
        pip("uninstall", "--yes", "opencv-python")
        pip("install", "--force-reinstall", "--no-deps", "opencv-python-headless")


def pip(command: str, *arguments: str) -> None:
    subprocess.run([PYTHON, "-m", "pip", command, "--quiet", "--disable-pip-version-check", *arguments], check=True)


def main(argv: list[str]) -> int:
    if sys.version_info < (3, 10):  # noqa: UP036  this file must say so itself: nothing has been installed yet
        print(f"start.py: needs Python 3.10 or newer, this is {sys.version.split()[0]}", file=sys.stderr)
        return 2
    commands = {
        "train": [["tutorial_train.py", *argv[1:]]],
        "app": [["-m", "controlnet", "app", *argv[1:]]],
        "test": [
            ["-m", "ruff", "check", "."],
            ["-m", "mypy"],
            ["-m", "pytest", "-n", str(WORKERS), "--dist", "loadfile", *argv[1:]],
        ],
    }
    if not argv or argv[0] not in commands:
        print(__doc__)
        return 0 if argv and argv[0] in ("-h", "--help") else 2
    if ENVIRONMENT.exists() and not STAMP.is_file():
        print("start.py: .venv was not made by this script; move it away first", file=sys.stderr)
        return 2
    try:
        prepare(EXTRAS[argv[0]])
    except subprocess.CalledProcessError as error:
        print(
            f"start.py: installing failed (pip exited with {error.returncode}); its own message is above",
            file=sys.stderr,
        )
        return 2
    if argv[0] == "test":
        os.environ["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS") or str(PROCESSORS // WORKERS)
    for command in commands[argv[0]]:
        code = subprocess.run([PYTHON, *command], cwd=ROOT).returncode
        if code:
            return code
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
