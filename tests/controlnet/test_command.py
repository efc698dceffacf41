"""The command `controlnet`: it hands arguments over unchanged, names itself in help and messages, and is quick to answer."""

import subprocess
import sys
from pathlib import Path

import pytest

import tool_add_control
import tutorial_train
from controlnet import command
from controlnet.command import SUBCOMMANDS, main

ROOT = Path(__file__).parents[2]
SCRIPTS = [name for name in SUBCOMMANDS if name != "app"]


def test_help_is_instant_and_imports_nothing_heavy(tmp_path):
    code = "import sys; from controlnet.command import main; main(['--help']); print({'torch', 'numpy', 'cv2'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.endswith("set()\n"), done.stderr
    for name in SUBCOMMANDS:
        assert f"\n  {name} " in done.stdout


@pytest.mark.parametrize(
    "argv, line",
    [
        (["trian"], "there is no subcommand 'trian'; did you mean train?"),
        (["add_control", "a", "b"], "there is no subcommand 'add_control'; did you mean add-control?"),
        (["--hepl"], "there is no option '--hepl'; did you mean --help?"),
        (["xyzzy"], f"there is no subcommand 'xyzzy'; the subcommands are {', '.join(SUBCOMMANDS)}"),
        (["bad\nname"], "there is no subcommand 'bad\\nname'"),
        (["--print-completion"], "--print-completion takes one of bash, zsh, tcsh"),
        (["--print-completion", "cmd"], "--print-completion takes one of bash, zsh, tcsh"),
    ],
)
def test_a_mistake_is_one_line_with_the_nearest_name(argv, line, capsys):
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert err.startswith(f"controlnet: {line}") and err.count("\n") == 1 and not out


def test_without_a_subcommand_the_help_says_what_there_is(capsys):
    assert main([]) == 2
    out, err = capsys.readouterr()
    assert err == command.HELP and not out


@pytest.mark.parametrize("name", SCRIPTS)
def test_each_subcommand_explains_itself_with_examples(name, capsys):
    try:
        status = main([name, "--help"])
    except SystemExit as end:
        status = end.code
    out, err = capsys.readouterr()
    assert not status and not err
    examples = [line for line in out.splitlines() if line.startswith(f"    controlnet {name} ")]
    assert examples, out
    # What it is called otherwise is not in its examples.
    assert not any(line.startswith("    python ") for line in out.splitlines()), out
    assert "tutorial_train.py [" not in out and "usage: tool_" not in out


@pytest.mark.parametrize(
    "argv",
    [
        ["train", "stepz=3"],
        ["data", "--cuont", "3"],
        ["data", "cany", "a", "b"],
        ["generate", "--wieghts", "x"],
        ["detect", "cany", "a", "b"],
        ["evaluate", "nowhere.safetensors"],
        ["inspect"],
        ["inspect", "nowhere.safetensors"],
        ["add-control", "only-one"],
        ["add-control", "nowhere.safetensors", "out.safetensors"],
        ["convert", "a", "b", "--to", "nothing"],
        ["transfer", "a"],
    ],
)
def test_a_mistake_within_a_subcommand_is_one_line_under_its_name(argv, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        status = main(argv)
    except SystemExit as end:
        status = end.code
    out, err = capsys.readouterr()
    assert status == 2 and err.count("\n") == 1 and not out, (out, err)
    # `inspect` reports on each file under the file's own name.
    start = "nowhere.safetensors: " if argv == ["inspect", "nowhere.safetensors"] else f"controlnet {argv[0]}: "
    assert err.startswith(start) and not list(tmp_path.iterdir())


def test_arguments_reach_the_scripts_own_function_unchanged(monkeypatch):
    given = {}
    for name, module in {"train": tutorial_train, "add-control": tool_add_control}.items():
        monkeypatch.setattr(module, "main", lambda argv, program, name=name: given.update({name: (argv, program)}) or 7)
        assert main([name, "--", "steps=3", "", "a b", "--help"]) == 7
    assert given["train"] == (["--", "steps=3", "", "a b", "--help"], "controlnet train")
    assert given["add-control"][1] == "controlnet add-control"


def test_scripts_keep_their_own_names(capsys):
    with pytest.raises(SystemExit) as end:
        tool_add_control.main(["only-one"])
    assert end.value.code == 2 and capsys.readouterr().err.startswith("tool_add_control.py: ")
    assert tutorial_train.main(["--help"]) == 0 and "\n    python tutorial_train.py [" in capsys.readouterr().out


def test_a_system_library_that_opencv_lacks_is_named(monkeypatch, capsys):
    def failing(name):
        raise ImportError("libGL.so.1: cannot open shared object file: No such file or directory", name="cv2")

    monkeypatch.setattr(command.importlib, "import_module", failing)
    assert main(["detect", "canny", "a", "b"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "libGL.so.1" in err and "libgl1" in err and "opencv-python-headless" in err
    # Any other missing library is no question of OpenCV.
    other = ImportError("libcudart.so.12: cannot open shared object file: No such file or directory", name="torch._C")
    monkeypatch.setattr(command.importlib, "import_module", lambda name: (_ for _ in ()).throw(other))
    with pytest.raises(ImportError, match="libcudart"):
        main(["detect", "canny", "a", "b"])


def test_ctrl_c_while_a_subcommand_is_imported_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(command.importlib, "import_module", lambda name: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main(["train"]) == 130 and capsys.readouterr().err == "controlnet train: interrupted\n"


def test_the_page_without_its_extra_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["app"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "pip install" in err and "controlnet[app]" in err


@pytest.fixture(scope="module")
def bash(tmp_path_factory):
    """The completion script for bash."""
    done = subprocess.run(
        [sys.executable, "-m", "controlnet", "--print-completion", "bash"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    script = tmp_path_factory.mktemp("completion") / "controlnet.bash"
    script.write_text(done.stdout)
    return script


def complete(script: Path, words: list[str]) -> set[str]:
    """What bash offers for the last of these words, with a completion script sourced."""
    quoted = " ".join(f"'{word}'" for word in words)
    code = f"""
source '{script}'
COMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}; COMP_LINE="${{COMP_WORDS[*]}}"; COMP_POINT=${{#COMP_LINE}}
name=$(complete -p controlnet | sed 's/.*-F \\([^ ]*\\).*/\\1/')
$name controlnet '{words[-1]}' '{words[-2]}'
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, timeout=30, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "line, offered",
    [
        (["controlnet", "tra"], {"train", "transfer"}),
        (["controlnet", "train", "learning_"], {"learning_rate="}),
        (["controlnet", "add-control", "--"], {"--config", "--control-from", "--dtype", "--force", "--half", "--help"}),
        (["controlnet", "convert", "--dtype", "b"], {"bfloat16"}),
        (["controlnet", "detect", "can"], {"canny"}),
        (["controlnet", "detect", "canny", "--low"], {"--low-threshold"}),
        (["controlnet", "data", "canny", "--low"], {"--low-threshold"}),
        (["controlnet", "data", "--ch"], {"--check"}),
    ],
)
def test_bash_completes(bash, line, offered):
    assert complete(bash, line) >= offered


def test_completion_is_asked_of_every_parser():
    """A subcommand whose options are not found would fail here, not on a user's machine."""
    from controlnet.completion import completion

    for shell in command.SHELLS:
        text = completion(shell)
        # tcsh lists options without their dashes.
        assert [name for name in (*SUBCOMMANDS, "control-from", "low-memory") if name not in text] == []
