"""The command: options, mistakes in one line, and a port that is taken."""

import re
import socket

import httpx
import pytest

from cldm.results import read_png_text
from controlnet.app import command, main
from controlnet.app.command import build_parser
from tests.controlnet.app.conftest import site_in
from tests.controlnet.app.test_http import call, filled, listener


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port", "0"], "--port must lie within 1 and 65535, found 0"),
        (["--port", "x"], "invalid int value: 'x'"),
        (["--keep", "0"], "--keep must be at least 1"),
        (["--largest", "9000"], "--largest must lie within 64 and 4096"),
        (["--models", "nowhere"], "--models: there is no folder nowhere"),
        (["--runs", "{file}"], "--runs: .* is a file"),
        (["--prot", "3"], "unrecognized arguments: --prot 3"),
        (["--device", "warp"], "no device warp"),
        (["--password", ""], "--password is empty; give a password"),
        (["--runs", "{file}-link"], "--runs: .* is a file or a broken link"),
        (["--outputs", "{file}/below"], "--outputs: cannot write into .*/file/below: Not a directory"),
        (["--outputs", "/proc/outputs"], "--outputs: cannot write into /proc/outputs: No such file"),
        (["--host", "no.such.host.invalid"], "--host: no.such.host.invalid is no address of this machine"),
        (["--host", "192.0.2.1"], "--host: 192.0.2.1 is no address of this machine"),
    ],
)
def test_mistakes_are_one_line(arguments, message, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command.tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    for name in ("GRADIO_TEMP_DIR", "GRADIO_ANALYTICS_ENABLED", "DO_NOT_TRACK"):
        monkeypatch.setenv(name, "")  # which the command sets
    (tmp_path / "file").touch()
    (tmp_path / "file-link").symlink_to("file-link")
    try:
        status = main([argument.format(file=tmp_path / "file") for argument in arguments])
    except SystemExit as end:  # of the parser
        status = end.code
    assert status == 2
    told = capfd.readouterr().err
    assert re.search(message, told) and told.startswith("controlnet app: ") and told.count("\n") == 1
    assert list((tmp_path / "temporary").iterdir()) == []


def test_an_empty_variable_is_no_password(tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(command.PASSWORD_VARIABLE, "")
    assert main(["--host", "0.0.0.0"]) == 2
    assert "the variable CONTROLNET_PASSWORD is empty; give a password" in capfd.readouterr().err
    assert command._password(build_parser().parse_args(["--password", "x"])) == "x"


def test_a_port_that_is_taken(tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("GRADIO_TEMP_DIR", "GRADIO_ANALYTICS_ENABLED", "DO_NOT_TRACK"):
        monkeypatch.setenv(name, "")  # which the command sets
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert main(["--port", str(taken.getsockname()[1]), "--device", "cpu"]) == 2
        told = f"cannot listen on 127.0.0.1: port {taken.getsockname()[1]} is in use, or not allowed; choose another --port"
    assert told in capfd.readouterr().err


def test_a_password_is_asked_for_and_low_memory_makes_pictures(folder):
    with (
        site_in(folder, "--password", "open sesame", "--low-memory") as site,
        httpx.Client(base_url=site.url, timeout=60) as client,
    ):
        picture = {"files": ("photo.png", (folder / "data" / "photos" / "0.png").read_bytes(), "image/png")}

        def refused() -> set[int]:
            joined = client.post("/gradio_api/queue/join", json={"data": [], "fn_index": 0, "session_hash": "x"})
            uploaded = client.post("/gradio_api/upload", files=picture)
            return {client.get("/config").status_code, joined.status_code, uploaded.status_code}

        assert refused() == {401} and "Base model" not in client.get("/").text
        for wrong in ("", "open", "open sesame ", "öffne"):
            assert client.post("/login", data={"username": "anyone", "password": wrong}).status_code in (400, 422)
        assert refused() == {401}
        assert client.post("/login", data={"username": "anyone", "password": "open sesame"}).status_code == 200
        config, key = client.get("/config").json(), "0" * 32
        (path,) = client.post("/gradio_api/upload", files=picture).json()
        generate = listener(config, "generate")
        sent = {
            "Steps": 2,
            "browserstate": key,
            "Picture": {"path": path, "meta": {"_type": "gradio.FileData"}},
        }
        told = call(client, generate["id"], filled(config, generate["inputs"], sent))
        assert "1 picture in " in told, told
        (file,) = (site.outputs / key).glob("*.png")
        (control,) = read_png_text(file)["page"]["controls"]
        assert (control["network"], control["condition"]) == ("models/steered.safetensors", "canny")


def test_help_shows_examples(capsys):
    with pytest.raises(SystemExit):
        build_parser().parse_args(["--help"])
    assert "controlnet app --host 0.0.0.0 --password" in capsys.readouterr().out


def test_nobody_listens_to_others_and_no_link_is_made_unless_asked():
    plain = build_parser().parse_args([])
    assert plain.host == "127.0.0.1" and plain.share is False and plain.password is None
