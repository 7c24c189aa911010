"""Shows each caller what is left of its key's request rate."""

import math

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from credits.rates import Allowance


class RateHeaders:
    """ASGI middleware: `x-ratelimit-*` on every answer to a key that has a limit."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The authenticator leaves the allowance in the request's state."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        state = scope.setdefault("state", {})

        async def send_with_headers(message: Message) -> None:
            allowance: Allowance | None = state.get("allowance")
            if message["type"] == "http.response.start" and allowance is not None:
                headers = MutableHeaders(scope=message)
                headers["x-ratelimit-limit-requests"] = str(allowance.limit)
                headers["x-ratelimit-remaining-requests"] = str(allowance.remaining)
                whole_after_ms = math.ceil(1000 * allowance.whole_after_s)
                headers["x-ratelimit-reset-requests"] = f"{whole_after_ms}ms"
            await send(message)

        await self.app(scope, receive, send_with_headers)
