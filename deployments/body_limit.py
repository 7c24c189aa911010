"""Refuses bodies beyond a limit before anything keeps them in memory, on every route."""

from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.errors import ANSWERS, InputTooLarge, envelope


class BodyLimit:
    """ASGI middleware: 413 as soon as more than max_bytes have come."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self.app = app
        self.max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Count what the app reads; whatever it answers after too much is replaced."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        num_bytes = 0
        is_refused = False

        async def receive_limited() -> Message:
            nonlocal num_bytes, is_refused
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self.max_bytes:
                is_refused = True
                raise InputTooLarge(self.max_bytes)  # so that nothing is made of a part
            return message

        async def send_unless_refused(message: Message) -> None:
            if not is_refused:
                await send(message)

        await self.app(scope, receive_limited, send_unless_refused)
        if is_refused:
            error = InputTooLarge(self.max_bytes)
            content = envelope(ANSWERS[InputTooLarge], str(error), None)
            await JSONResponse(content, 413)(scope, receive, send)
