"""The three commands: thin, one clear line for a mistake, exit status 2."""

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tool_add_control
import tool_convert_control
import tool_transfer_control
from cldm.checkpoint import identify
from cldm.command import run_tool
from ldm.files import LazyTensor, write_weights
from tests.checkpoint.files import CONTROL, only, saved, tiny_full, without

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder, full = tmp_path_factory.mktemp("weights"), tiny_full()
    contents = {"base": without(full, CONTROL, "logvar"), "full": full, "control": only(full, CONTROL)}
    return {name: str(saved(folder / f"{name}.safetensors", content)) for name, content in contents.items()}


def test_commands_do_their_work(files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    added, moved, folder = (str(tmp_path / name) for name in ("added.ckpt", "moved.pth", "folder"))
    assert tool_add_control.main([files["base"], added, "--half"]) == 0
    out = capsys.readouterr().out
    assert "42 are new (zero convolutions and hint encoder)" in out and out.count("\n") < 4
    assert identify(added).layout == "full" and "float16" in identify(added).dtypes
    assert tool_transfer_control.main([files["base"], files["control"], files["base"], moved]) == 0
    assert identify(moved).layout == "full"
    assert tool_convert_control.main([files["full"], folder, "--to", "diffusers", "--global-average-pooling"]) == 0
    assert identify(folder).layout == "diffusers-controlnet"
    assert tool_convert_control.main([files["base"], folder + "2", "--to", "diffusers-pipeline"]) == 0
    assert identify(folder + "2").layout == "diffusers-pipeline"
    assert tool_add_control.main([files["base"], added]) == 2
    assert tool_add_control.main([files["base"], added, "--force", "--control-from", folder]) == 0
    assert "float16" not in identify(added).dtypes


@pytest.mark.parametrize(
    ("tool", "arguments", "message"),
    [
        (tool_add_control, ["{folder}/absent.ckpt", "{out}"], "absent.ckpt: does not exist"),
        (tool_add_control, ["{control}", "{out}"], "holds no base model"),
        (tool_add_control, ["{base}", "{folder}/out.onnx"], "end its name in one of"),
        (tool_add_control, ["{base}", "{out}", "--config", "cldm_v15"], "does not fit cldm_v15"),
        (tool_add_control, ["{base}", "{out}", "--config", "nothing"], "there is no file 'nothing'"),
        (tool_add_control, ["{base}", "{base}"], "is also the input"),
        (tool_convert_control, ["{base}", ".", "--to", "diffusers"], "no file or folder to be written"),
        (tool_transfer_control, ["{base}", "{base}", "{base}", "{out}"], "holds no ControlNet"),
        (tool_convert_control, ["{base}", "{out}", "--to", "control"], "holds no ControlNet"),
        (tool_convert_control, ["{control}", "{folder}", "--to", "diffusers"], "something else in it"),
        (tool_convert_control, ["{text}", "{out}", "--to", "full"], "a text file"),
        (tool_convert_control, ["{full}", "n" * 300, "--to", "full"], "File name too long"),
        (tool_convert_control, ["n" * 300, "{out}", "--to", "full"], "File name too long"),
    ],
)
def test_mistakes_get_one_line(
    tool: object,
    arguments: list[str],
    message: str,
    files: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "text.ckpt").write_text("Entry not found")
    places = {
        **files,
        "folder": str(tmp_path),
        "out": str(tmp_path / "out.safetensors"),
        "text": str(tmp_path / "text.ckpt"),
    }
    assert tool.main([argument.format(**places) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1 and not captured.out
    assert not (tmp_path / "out.safetensors").exists()


def test_a_defect_keeps_its_traceback(files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ValueError("a defect of this library, not a mistake of the user")

    monkeypatch.setattr(tool_add_control, "add_control", broken)
    with pytest.raises(ValueError, match="a defect"):
        tool_add_control.main([files["base"], str(tmp_path / "out.safetensors")])


def test_commands_to_copy_are_quoted(files: dict[str, str], tmp_path: Path) -> None:
    odd = tmp_path / "x;touch hacked;.safetensors"
    odd.write_bytes(Path(files["base"]).read_bytes())
    line = next(line for line in identify(odd).suggestions if "add-control" in line)
    assert shlex.split(line.partition(": ")[2]) == ["controlnet", "add-control", str(odd), "OUTPUT"]


@pytest.mark.parametrize("tool", [tool_add_control, tool_transfer_control, tool_convert_control])
def test_help_names_what_is_there(tool: object, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        tool.main(["--help"])
    assert ended.value.code == 0
    assert "OUTPUT" in capsys.readouterr().out


def test_names_in_a_file_cannot_break_the_output(files: dict[str, str], tmp_path: Path) -> None:
    """Lone surrogates and control characters in keys and paths, on a terminal that knows ASCII alone."""
    source = tmp_path / os.fsdecode(b"b\xff\x1b[2J\xc3\xbc.ckpt")
    torch.save({**without(tiny_full(), CONTROL), "bad\ud800\x1b[2Jkey": torch.ones(1)}, source)
    for tool, arguments in (
        (tool_add_control, []),
        (tool_convert_control, ["--to", "full"]),  # which keeps the key, and cannot write it
    ):
        out = str(source.with_suffix(".safetensors"))
        done = subprocess.run(
            [sys.executable, tool.__file__, str(source), out, *arguments, "--force"],
            capture_output=True,
            env={**os.environ, "PYTHONIOENCODING": "ascii:strict"},
        )
        assert done.returncode == (2 if arguments else 0), done.stderr
        text = done.stdout + done.stderr
        assert b"Traceback" not in text and b"\x1b" not in text and b"[2J" in text and text.isascii()


@pytest.mark.parametrize("name", ["stable-diffusion/v1-inference.yaml", "autoencoder/autoencoder_kl_32x32x4.yaml"])
@pytest.mark.parametrize("to", ["diffusers", "diffusers-pipeline"])
def test_configurations_of_other_models_get_one_line(
    name: str, to: str, files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(ROOT / "configs" / name)
    assert tool_convert_control.main([files["full"], str(tmp_path / "out"), "--to", to, "--config", config]) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not os.listdir(tmp_path)


def test_as_a_command_from_another_folder(files: dict[str, str], tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tool_convert_control.py"), files["full"], "out.pth", "--to", "control-plain"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "wrote out.pth" in done.stdout
    assert "%" not in done.stderr  # bars are for terminals
    assert subprocess.run(command, cwd=tmp_path, capture_output=True).returncode == 2


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_what_was_begun_is_removed_on_sigterm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    """Also where a second one arrives while that happens: `timeout` sends one to its child and one to the group."""

    def terminate() -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    def read() -> torch.Tensor:
        terminate()
        return torch.ones(3)

    remove = Path.unlink
    monkeypatch.setattr(Path, "unlink", lambda path, **options: (terminate(), remove(path, **options)))
    tensors = {"a": torch.ones(3), "b": LazyTensor((3,), torch.float32, read)}
    before = signal.getsignal(signal.SIGTERM)
    work = lambda: [str(write_weights(tmp_path / f"out{suffix}", tensors, progress=False))]  # noqa: E731
    assert run_tool("a tool", work) == 143
    assert not os.listdir(tmp_path) and signal.getsignal(signal.SIGTERM) == before
