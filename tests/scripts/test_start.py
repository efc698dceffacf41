"""`start.py` deletes no environment that it did not make, and repeats an installation that was interrupted."""

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
        done.append("install" if "install" in command else "work")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(start.subprocess, "run", run)
    return folder, done


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
    assert start.main(["train"]) == 0 and done == ["install", "work"] and not (folder / "lib").exists()
    assert start.main(["train"]) == 0 and done == ["install", "work", "work"]
