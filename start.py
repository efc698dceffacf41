"""Set up an environment beside this file and run something in it. Needs nothing but Python 3.10 or newer.

    python3 start.py train [key=value ...]    the main job: tutorial_train.py
    python3 start.py test [pytest options]    lint and the test suite

The environment is made in .venv at the first call and again when pyproject.toml changes.
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
STAMP = ENVIRONMENT / "made_for"  # says that this script made the environment and, once it is installed, for what


def prepare() -> None:
    """Make the environment, unless it is there and belongs to this pyproject.toml."""
    wanted = hashlib.sha256((ROOT / "pyproject.toml").read_bytes()).hexdigest()
    if STAMP.is_file() and STAMP.read_text() == wanted:
        return
    print(
        f"making the environment in {ENVIRONMENT}; the first time this downloads PyTorch, which takes some minutes",
        flush=True,
    )
    # The stamp is there from the first to the last moment, so that whatever is interrupted can be made again.
    ENVIRONMENT.mkdir(exist_ok=True)
    STAMP.write_text("not installed yet")
    for entry in list(ENVIRONMENT.iterdir()):
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry != STAMP:
            entry.unlink()
    venv.create(ENVIRONMENT, with_pip=True)
    subprocess.run(
        [PYTHON, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", f"{ROOT}[test]"], check=True
    )
    STAMP.write_text(wanted)


def main(argv: list[str]) -> int:
    if sys.version_info < (3, 10):  # noqa: UP036  this file must say so itself: nothing has been installed yet
        print(f"start.py: needs Python 3.10 or newer, this is {sys.version.split()[0]}", file=sys.stderr)
        return 2
    commands = {
        "train": [["tutorial_train.py", *argv[1:]]],
        "test": [["-m", "ruff", "check", "."], ["-m", "pytest", *argv[1:]]],
    }
    if not argv or argv[0] not in commands:
        print(__doc__)
        return 0 if argv and argv[0] in ("-h", "--help") else 2
    if ENVIRONMENT.exists() and not STAMP.is_file():
        print("start.py: .venv was not made by this script; move it away first", file=sys.stderr)
        return 2
    try:
        prepare()
    except subprocess.CalledProcessError as error:
        print(
            f"start.py: installing failed (pip exited with {error.returncode}); its own message is above",
            file=sys.stderr,
        )
        return 2
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
