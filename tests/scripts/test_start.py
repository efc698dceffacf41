"""`start.py` deletes no environment that it did not make, repeats what was interrupted, and installs what a command needs once."""

import subprocess

import pytest

import start


@pytest.fixture
def environment(tmp_path, monkeypatch):
    """A place for the environment, in which nothing is really installed; what was done, in order."""
    folder, done = tmp_path / ".venv", []
    monkeypatch.setattr(start, "ENVIRONMENT", folder)
    monkeypatch.setattr(start, "STAMP", folder / "made_for")
    monkeypatch.setattr(start.venv, "create", lambda *args, **kwargs: (folder / "bin").mkdir())

    def run(command, **options):
        if "pip" in command:
            done.append(
                " ".join(
                    word.replace(str(start.ROOT), "HERE") for word in command[3:] if not word.startswith("--quiet")
                )
            )
        elif "import cv2" not in command:
            done.append(" ".join(command[1:]))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(start.subprocess, "run", run)
    return folder, done


INSTALL = "install --disable-pip-version-check --editable HERE"


def test_an_environment_of_somebody_else_stays(environment, capsys):
    folder, done = environment
    folder.mkdir()
    (folder / "pyvenv.cfg").write_text("mine")
    assert start.main(["train"]) == 2 and not done
    assert capsys.readouterr().err == "start.py: .venv was not made by this script; move it away first\n"
    assert (folder / "pyvenv.cfg").read_text() == "mine" and len(list(folder.iterdir())) == 1


def test_an_interrupted_installation_is_repeated(environment, monkeypatch):
    folder, done = environment
    run = start.subprocess.run

    def interrupt(*args, **kwargs):
        (folder / "lib").mkdir()
        (folder / "lib" / "half.py").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(start.subprocess, "run", interrupt)
    with pytest.raises(KeyboardInterrupt):
        start.main(["train"])
    monkeypatch.setattr(start.subprocess, "run", run)
    assert start.main(["train"]) == 0 and done == [INSTALL, "tutorial_train.py"] and not (folder / "lib").exists()
    assert start.main(["train", "steps=3"]) == 0 and done[2:] == ["tutorial_train.py steps=3"]


def test_what_a_command_needs_is_added_once(environment, capsys):
    folder, done = environment
    assert start.main(["train"]) == 0
    assert start.main(["app", "--port", "8000"]) == 0
    assert done == [INSTALL, "tutorial_train.py", f"{INSTALL}[app]", "-m controlnet app --port 8000"]
    assert "installing what `start.py app` needs in addition" in capsys.readouterr().out
    del done[:]
    assert start.main(["app"]) == 0 and start.main(["train"]) == 0
    assert done == ["-m controlnet app", "tutorial_train.py"] and not capsys.readouterr().out
    del done[:]
    assert start.main(["test", "-k", "some"]) == 0
    assert done == [
        f"{INSTALL}[test]",
        "-m ruff check .",
        "-m mypy",
        f"-m pytest -n {start.WORKERS} --dist loadfile -k some",
    ]


def test_the_environment_is_made_again_when_the_project_changes_or_moves(environment, tmp_path, monkeypatch):
    folder, done = environment
    assert start.main(["app"]) == 0
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    (checkout / "pyproject.toml").write_bytes((start.ROOT / "pyproject.toml").read_bytes())
    (folder / "old").touch()
    monkeypatch.setattr(start, "ROOT", checkout)
    assert start.main(["train"]) == 0 and not (folder / "old").exists()
    (checkout / "pyproject.toml").write_text("changed")
    del done[:]
    assert start.main(["app"]) == 0
    assert done == [f"{INSTALL}[app]", "-m controlnet app"]


def test_where_opencv_lacks_a_library_the_headless_one_is_taken(environment, monkeypatch, capsys):
    folder, done = environment
    run = start.subprocess.run
    error = "Traceback ...\nImportError: libGL.so.1: cannot open shared object file: No such file or directory\n"
    monkeypatch.setattr(
        start.subprocess,
        "run",
        lambda command, **options: (
            subprocess.CompletedProcess(command, 1, "", error) if "import cv2" in command else run(command, **options)
        ),
    )
    assert start.main(["train"]) == 0
    assert done[1:3] == [
        "uninstall --disable-pip-version-check --yes opencv-python",
        "install --disable-pip-version-check --force-reinstall --no-deps opencv-python-headless",
    ]
    assert "does not work here (ImportError: libGL.so.1" in capsys.readouterr().out


def test_a_failed_installation_is_one_line(environment, monkeypatch, capsys):
    def fails(command, **options):
        raise subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(start.subprocess, "run", fails)
    assert start.main(["app"]) == 2
    assert capsys.readouterr().err == "start.py: installing failed (pip exited with 1); its own message is above\n"
