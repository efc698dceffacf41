"""What browsers send: bounds, broken files, requests that are too large."""

import asyncio
import io

import cv2
import gradio as gr
import numpy as np
import pytest
from PIL import Image

from controlnet.app import uploads
from controlnet.app.uploads import Guard, guard_addresses, guard_editor, guard_picture, read_upload


def png(*size: int, mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    Image.new(mode, size, 1).save(file, "PNG")
    return file.getvalue()


def test_pictures_of_each_kind(tmp_path):
    for mode, shape in (("RGB", (4, 6, 3)), ("L", (4, 6)), ("RGBA", (4, 6, 4)), ("P", (4, 6, 3))):
        file = tmp_path / f"{mode}.png"
        file.write_bytes(png(6, 4, mode=mode))
        assert read_upload(file).shape == read_upload(file.read_bytes()).shape == shape
    turned = Image.new("RGB", (6, 4))
    turned.save(
        tmp_path / "turned.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
    )
    assert read_upload(tmp_path / "turned.jpg").shape == (6, 4, 3)


_NOISE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
HALF = cv2.imencode(".png", _NOISE)[1].tobytes()[:5000]  # of a picture


@pytest.mark.parametrize(
    ("data", "message"),
    [(b"", "broken, or no picture"), (b"\x89PNG\r\n\x1a\n" + bytes(40), "broken, or no picture"), (HALF, "cannot be read"),
     (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no picture"), (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "no picture")],
)  # fmt: skip
def test_broken_files_and_other_formats_are_refused(data, message):
    with pytest.raises(ValueError, match=message):
        read_upload(data)


def test_too_many_pixels_are_refused_before_they_are_decoded(monkeypatch):
    monkeypatch.setattr(uploads, "read_image", lambda file: pytest.fail("it was decoded"))
    with pytest.raises(ValueError, match="5000 x 5000 pixels"):
        read_upload(png(5000, 5000, mode="1"))
    monkeypatch.setattr(uploads, "MAX_BYTES", 10)
    with pytest.raises(ValueError, match="0 MB are allowed"):
        read_upload(png(4, 4))


def test_components_read_pictures_within_bounds(tmp_path):
    file = tmp_path / "a.png"
    file.write_bytes(png(6, 4))
    picture = guard_picture(gr.Image())
    assert (
        picture.preprocess(picture.data_model(path=str(file))).shape == (4, 6, 3) and picture.preprocess(None) is None
    )
    file.write_bytes(b"broken")
    with pytest.raises(gr.Error, match="broken, or no picture"):
        picture.preprocess(picture.data_model(path=str(file)))
    with pytest.raises(gr.Error, match="not there any more"):
        picture.preprocess(picture.data_model(path=str(tmp_path / "gone.png")))
    with pytest.raises(gr.Error, match="as a file"):
        picture.preprocess(picture.data_model(url="data:image/png;base64,AAAA"))


def test_editors_read_drawings_within_bounds(tmp_path):
    editor = guard_editor(gr.ImageEditor())
    editor.accept_blobs(
        type("Sent", (), {"data": {"type": "background", "index": None, "id": "a"}, "files": [("x", png(6, 4))]})()
    )
    value = editor.preprocess(editor.data_model(background=None, layers=[], composite=None, id="a"))
    assert value["background"].shape == (4, 6, 3) and value["layers"] == [] and value["composite"] is None
    assert (
        editor.preprocess(editor.data_model(background=None, layers=[], composite=None, id="a")) is None
    )  # it is used up
    file = {"path": str(tmp_path / "a.png"), "meta": {"_type": "gradio.FileData"}}
    with pytest.raises(gr.Error, match="8 layers"):
        editor.preprocess(editor.data_model(background=None, layers=[file] * 9, composite=None))


def test_nothing_is_fetched_for_a_visitor():
    component = guard_addresses(gr.File())
    with pytest.raises(gr.Error, match="nothing is fetched"):
        asyncio.run(component.async_move_resource_to_block_cache("http://127.0.0.1:1/a.png"))


def send_through_guard(
    headers: dict[str, str], chunks: list[bytes], path: str = "/gradio_api/queue/join"
) -> tuple[int, dict[str, str], int]:
    """Status, headers and bytes that reached the app."""
    reached, sent = 0, []

    async def app(scope, receive, send):
        nonlocal reached
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            reached += len(message["body"])
            if not message["more_body"]:
                break
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    messages = [{"type": "http.request", "body": chunk, "more_body": True} for chunk in chunks[:-1]]
    messages.append({"type": "http.request", "body": chunks[-1], "more_body": False})

    async def receive():
        return messages.pop(0)

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "path": path, "headers": [(k.encode(), v.encode()) for k, v in headers.items()]}
    asyncio.run(Guard(app)(scope, receive, send))
    start = next(
        (message for message in sent if message["type"] == "http.response.start"), {"status": 0, "headers": []}
    )
    return start["status"], {k.decode(): v.decode() for k, v in start["headers"]}, reached


def test_requests_that_are_too_large_do_not_reach_the_page():
    megabyte = bytes(2**20)
    status, headers, reached = send_through_guard({"content-length": "3"}, [b"abc"])
    assert status == 200 and reached == 3 and "default-src 'self'" in headers["content-security-policy"]
    assert send_through_guard({"content-length": str(2**40)}, [b"abc"])[::2] == (413, 0)
    assert send_through_guard({"content-length": "-1"}, [b"abc"])[::2] == (413, 0)
    status, _, reached = send_through_guard({}, [megabyte] * 30)  # without saying how long it is
    assert status == 0 and reached <= 2 * 2**20
    assert send_through_guard({}, [megabyte] * 15, "/gradio_api/upload")[::2] == (200, 15 * 2**20)
    assert send_through_guard({}, [megabyte] * 30, "/gradio_api/upload")[0] == 0
