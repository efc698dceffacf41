"""Set up an environment beside this file and run something in it. Needs nothing but Python 3.10 or newer.

    python3 start.py train [key=value ...]    the main job: tutorial_train.py
    python3 start.py test [pytest options]    lint and the test suite

The environment is made in .venv at the first call and again when pyproject.toml changes.
"""

import hashlib
import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent
ENVIRONMENT = ROOT / ".venv"
PYTHON = ENVIRONMENT / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def prepare() -> None:
    """Make the environment, unless it is there and belongs to this pyproject.toml."""
    wanted = hashlib.sha256((ROOT / "pyproject.toml").read_bytes()).hexdigest()
    stamp = ENVIRONMENT / "made_for"
    if stamp.is_file() and stamp.read_text() == wanted:
        return
    print(
        f"making the environment in {ENVIRONMENT}; the first time this downloads PyTorch, which takes some minutes",
        flush=True,
    )
    venv.create(ENVIRONMENT, with_pip=True, clear=True)
    subprocess.run(
        [PYTHON, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", f"{ROOT}[test]"], check=True
    )
    stamp.write_text(wanted)


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
