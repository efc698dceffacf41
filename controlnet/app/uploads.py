"""What browsers send: bounded in bytes and pixels, read as pictures only, and never fetched from elsewhere on their behalf."""

import io
import json
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from gradio_client.utils import is_http_url_like
from PIL import Image

from annotator.pictures import read_image

MAX_BYTES = 20 * 2**20  # of an upload
MAX_PIXELS = 2**24  # of a picture: 4,096 a side
_OTHER_BYTES = 2**21  # of any other request
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")  # no format whose reader starts other programs
_MOST_LAYERS = 8  # of an editor
_UPLOADS = ("/gradio_api/upload", "/gradio_api/component_server")

# The page is whole without other servers; the browser is told to ask none.
_HEADERS = {
    "content-security-policy": "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'self'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",
}

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Guard:
    """ASGI middleware: requests of limited size, and headers that keep the browser with this server."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        limit = MAX_BYTES + _OTHER_BYTES if scope["path"].startswith(_UPLOADS) else _OTHER_BYTES
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if not length.isdigit() or int(length) > limit:
            await _refuse(send, limit)
            return
        received = 0

        async def bounded_receive() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            return {"type": "http.disconnect"} if received > limit else message

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = [(name.encode(), value.encode()) for name, value in _HEADERS.items()]
                message = {**message, "headers": [*message.get("headers", ()), *own]}
            await send(message)

        await self.app(scope, bounded_receive, send_with_headers)


async def _refuse(send: Send, limit: int) -> None:
    body = json.dumps({"detail": f"more than {limit // 2**20} MB"}).encode()
    await send({"type": "http.response.start", "status": 413, "headers": [(b"content-type", b"application/json")]})
    await send({"type": "http.response.body", "body": body})


def check_upload(source: str | Path | bytes) -> None:
    """See that a file, or its bytes, is a picture within the bounds; its pixels are not decoded.

    Raises:
        ValueError: it is too large, broken, or no picture.
    """
    size = len(source) if isinstance(source, bytes) else Path(source).stat().st_size
    if size > MAX_BYTES:
        raise ValueError(f"the file has {size / 2**20:.0f} MB; {MAX_BYTES // 2**20} MB are allowed")
    try:
        with Image.open(_opened(source), formats=_FORMATS) as picture:
            width, height = picture.size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError("the file is broken, or no picture; use PNG, JPEG or WebP") from error
    if width * height > MAX_PIXELS:
        raise ValueError(f"the picture has {width} x {height} pixels; {MAX_PIXELS:,} are allowed, such as 4096 x 4096")


def read_upload(source: str | Path | bytes) -> np.ndarray:
    """An uploaded picture, a file or its bytes, as uint8 (H, W), (H, W, 3) or (H, W, 4).

    Raises:
        ValueError: it is too large, broken, or no picture.
    """
    check_upload(source)
    try:
        return read_image(_opened(source))
    except ValueError as error:
        raise ValueError(f"the picture cannot be read: {str(error).partition(': ')[2] or 'it is broken'}") from error


def _opened(source: str | Path | bytes) -> Any:
    return io.BytesIO(source) if isinstance(source, bytes) else source


def guard_picture(component: gr.Image) -> gr.Image:
    """Let an image component give listeners what `read_upload` makes of its picture; listeners must set it by plain values."""

    def preprocess(payload: Any) -> np.ndarray | None:
        return _read(payload)

    component.preprocess = preprocess  # type: ignore[method-assign]  # of this component alone
    return guard_addresses(component)


def guard_editor(component: gr.ImageEditor) -> gr.ImageEditor:
    """The same for an editor, whose value is a dict of `background`, `layers` and `composite`."""

    def preprocess(payload: Any) -> dict[str, Any] | None:
        if payload is None:
            return None
        # Drawings come as blobs that were sent before, other pictures as files.
        sent = component.blob_storage.pop(payload.id, None) if payload.id is not None else payload
        if sent is None:
            return None
        layers = [layer for layer in sent.layers or [] if layer is not None]
        if len(layers) > _MOST_LAYERS:
            raise gr.Error(f"A drawing may have {_MOST_LAYERS} layers.", print_exception=False)
        return {
            "background": _read(sent.background),
            "layers": [_read(layer) for layer in layers],
            "composite": _read(sent.composite),
        }

    component.preprocess = preprocess  # type: ignore[method-assign,assignment]  # as above
    return guard_addresses(component)


def guard_addresses(component: Any) -> Any:
    """Refuse files that a component shall fetch from an address; those that were uploaded are taken."""
    move = component.async_move_resource_to_block_cache

    async def move_upload(path: str | Path | None) -> str | None:
        if path is not None and is_http_url_like(str(path)):
            raise gr.Error("Upload the file; nothing is fetched from elsewhere.", print_exception=False)
        return await move(path)

    component.async_move_resource_to_block_cache = move_upload
    return component


def _read(sent: Any) -> np.ndarray | None:
    if sent is None:
        return None
    source = sent if isinstance(sent, bytes) else getattr(sent, "path", sent)
    if source is None:
        raise gr.Error("Upload the picture as a file.", print_exception=False)
    try:
        return read_upload(source)
    except ValueError as error:
        raise gr.Error(f"{str(error)[0].upper()}{str(error)[1:]}.", print_exception=False) from None
    except OSError:
        raise gr.Error("The upload is not there any more; upload it again.", print_exception=False) from None
