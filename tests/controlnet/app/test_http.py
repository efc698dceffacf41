"""What somebody sends who does not use the page as it is meant: no path of the server is reached or shown, and the page lives on."""

import json
import uuid

import httpx
import pytest
from PIL import Image, PngImagePlugin

from cldm.results import PNG_KEY
from tests.controlnet.app.conftest import SECRET


@pytest.fixture(scope="module")
def client(site):
    with httpx.Client(base_url=site.url, timeout=30) as opened:
        yield opened


@pytest.fixture(scope="module")
def config(client):
    return client.get("/config").json()


def listener(config: dict, elem_id: str) -> dict:
    """The listener to the click of a button."""
    (button,) = (one["id"] for one in config["components"] if one["props"].get("elem_id") == elem_id)
    return next(
        one for one in config["dependencies"] if [button, "click"] in [list(target) for target in one["targets"]]
    )


def filled(config: dict, inputs: list[int], changes: dict[str, object]) -> list:
    """The values that a page sends that was just opened, but for components with some labels, or of some types."""
    components = {one["id"]: one for one in config["components"]}
    data = []
    for one in inputs:
        kind, props = components[one]["type"], components[one]["props"]
        data.append(changes.get(props.get("label"), changes.get(kind, props.get("value"))))
    return data


def call(client: httpx.Client, number: int, data: list, session: str | None = None) -> str:
    """What the server says to a listener's call, as it stands in the stream of its events."""
    session = session or uuid.uuid4().hex
    body = {"fn_index": number, "data": data, "session_hash": session, "event_data": None, "trigger_id": None}
    joined = client.post("/gradio_api/queue/join", json=body)
    if joined.status_code != 200:
        return joined.text
    told = []
    with client.stream("GET", "/gradio_api/queue/data", params={"session_hash": session}) as events:
        for line in events.iter_lines():
            told.append(line)
            if "process_completed" in line or "unexpected_error" in line:
                break
    return "\n".join(told)


@pytest.mark.parametrize(
    "path",
    [
        "secret.txt",
        "data/secret.txt",
        "server.log",
        "models/steered.safetensors",
        "../secret.txt",
        "outputs",
        "data/photos/0.png",
    ],
)
@pytest.mark.parametrize(
    "route", ["/gradio_api/file=", "/file=", "/gradio_api/file/", "/static/", "/assets/", "/svelte/"]
)
def test_no_file_of_the_server_is_served(client, site, route, path):
    for form in (
        f"{site.root}/{path}",
        path,
        f"//{site.root}/{path}",
        f"..%2f..%2f{path}",
        f"%2e%2e/{site.root}/{path}",
    ):
        answer = client.get(route + form)
        assert answer.status_code in (400, 403, 404, 405) and SECRET not in answer.text, form


def test_other_servers_are_not_asked_for_a_visitor(client, site):
    for route in ("/gradio_api/proxy=", "/gradio_api/file="):
        answer = client.get(f"{route}{site.url}/config")
        assert answer.status_code in (400, 403, 404) or answer.headers.get("location", "").startswith("http")
        assert "dependencies" not in answer.text


@pytest.mark.parametrize("kind", ["path", "address", "data"])
def test_a_picture_is_what_was_uploaded_and_nothing_else(client, config, site, kind):
    detect = listener(config, "detect")
    sent = {
        "path": {"path": str(site.root / "data" / "photos" / "0.png")},
        "address": {"path": f"{site.url}/favicon.ico"},
        "data": {"path": None, "url": "data:image/png;base64,AAAA"},
    }[kind]
    data = filled(config, detect["inputs"], {"image": {**sent, "meta": {"_type": "gradio.FileData"}}})
    told = call(client, detect["id"], data)
    assert '"success": false' in told or '"success":false' in told
    assert str(site.root) not in told and "Traceback" not in told


def test_a_name_that_is_not_in_the_list_opens_nothing(client, config, site):
    look = listener(config, "what-is-it")
    for name in (
        "/etc/passwd",
        "../secret.txt",
        str(site.root / "secret.txt"),
        "hf://owner/name",
        {"path": "/etc/passwd"},
        None,
    ):
        told = call(client, look["id"], [name])
        assert '"success": false' in told or '"success":false' in told
        told = told.replace(str(name), "")  # what was asked for may be in the answer
        assert str(site.root) not in told and SECRET not in told and "Traceback" not in told


def test_numbers_out_of_range_are_refused(client, config):
    generate = listener(config, "generate")
    absurd = {
        "Steps": 10**9,
        "Shorter side in pixels": 10**6,
        "Pictures": -3,
        "Sampler": "__import__('os')",
        "Base model": "/etc/passwd",
    }
    for label, value in absurd.items():
        data = filled(config, generate["inputs"], {label: value})
        told = call(client, generate["id"], data)
        assert '"success": false' in told or '"success":false' in told
        assert "Traceback" not in told


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"settings": {"steps": 500}}', "as it is in the picture: steps: 500"),
        ('{"settings": {"prompt": "\\ud800"}}', "The settings in this picture are damaged"),
    ],
)
def test_settings_of_a_file_that_the_page_cannot_hold_are_said_on_it(client, config, tmp_path, text, message):
    info = PngImagePlugin.PngInfo()
    info.add_itxt(PNG_KEY, text)
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png", pnginfo=info)
    (path,) = client.post("/gradio_api/upload", files={"files": ("a.png", (tmp_path / "a.png").read_bytes())}).json()
    (button,) = (one["id"] for one in config["components"] if one["props"].get("elem_id") == "load-file")
    load = next(one for one in config["dependencies"] if [button, "upload"] in [list(t) for t in one["targets"]])
    told = call(client, load["id"], [{"path": path, "meta": {"_type": "gradio.FileData"}}])
    assert message in told and "process_completed" in told


def test_a_made_up_visitor_has_no_gallery(client, config):
    (visitor,) = (one["id"] for one in config["components"] if one["type"] == "browserstate")
    opened = next(one for one in config["dependencies"] if visitor in one["outputs"])
    data = filled(config, opened["inputs"], {"browserstate": "../../data"})
    told = call(client, opened["id"], data)
    assert "../../data" not in told and "photos" not in told


def test_large_requests_and_uploads_are_refused(client):
    assert client.post("/gradio_api/queue/join", content=b"x" * (3 * 2**20)).status_code == 413
    files = {"files": ("big.png", b"x" * (21 * 2**20))}
    answer = client.post("/gradio_api/upload", files=files)
    assert answer.status_code == 413
    assert client.post("/gradio_api/queue/join", content=b"{" * 1000).status_code in (400, 422)


def test_the_page_calls_no_other_server_and_says_nothing_of_this_one(client, config, site):
    page = client.get("/")
    assert page.headers["content-security-policy"].startswith("default-src 'self'")
    assert "fonts.googleapis" not in page.text and str(site.root) not in page.text
    assert str(site.root) not in json.dumps(config)
    assert client.get("/gradio_api/info").json()["named_endpoints"] == {}
    assert client.get("/docs").status_code == 404
    assert client.get("/gradio_api/monitoring").status_code in (403, 404)


def test_a_name_in_the_host_header_does_not_open_the_page_to_other_sites(client):
    answer = client.post(
        "/gradio_api/queue/join", json={}, headers={"Origin": "http://evil.example", "Host": "localhost"}
    )
    assert (
        "access-control-allow-origin" not in answer.headers
        or answer.headers["access-control-allow-origin"] != "http://evil.example"
    )
