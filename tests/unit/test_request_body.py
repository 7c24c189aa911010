"""Forms as long as a body may be."""

import asyncio
import base64

import httpx
from starlette.requests import Request
from starlette.types import Message

from deployments.request_body import CreateBody, read_create_body

IMAGE = bytes(2 << 20)


def read_form(fields: dict[str, str]) -> CreateBody:
    form = {name: (None, value) for name, value in fields.items()}
    sent = httpx.Request("POST", "http://x", files=form)
    headers = [(b"content-type", sent.headers["content-type"].encode())]

    async def receive() -> Message:
        return {"type": "http.request", "body": sent.read(), "more_body": False}

    scope = {"type": "http", "method": "POST", "path": "/", "query_string": b"", "headers": headers}
    return asyncio.run(read_create_body(Request(scope, receive)))


def test_a_long_data_url_comes_in_a_form() -> None:
    url = "data:image/png;base64," + base64.b64encode(IMAGE).decode()
    body = read_form({"prompt": "x", "input_reference[image_url]": url})
    assert body.image == IMAGE
