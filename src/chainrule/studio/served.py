"""The page on an address: nothing from elsewhere, nothing of the disk but what is shown, and no code."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

from chainrule.errors import UserError
from chainrule.loop import stop_signals
from chainrule.studio.desk import Desk

HOME = ("127.0.0.1", "localhost", "::1")
# A browser fetches from this address alone, whatever a page says. Gradio's own pages have scripts and styles in them.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; worker-src 'self' blob:; object-src 'none'; "
    "base-uri 'self'; form-action 'self'; frame-ancestors 'self'"
)
Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]


class Guarded:
    """Every answer says to the browser what it may fetch. An ASGI middleware."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Message, receive: Any, send: Send) -> None:
        """Answer as the app does, with one header more."""

        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (b"content-security-policy", POLICY.encode())]
            await send(message)

        await self.app(scope, receive, sent)


@contextmanager
def started(desk: Desk, host: str, port: int) -> Iterator[str]:
    """Within the block the page is served; the value is its address. Port 0 is any that is free.

    The pictures that are shown lie in a temporary folder that goes with the block. Raises UserError for an address that is taken or
    not here.
    """
    with tempfile.TemporaryDirectory(prefix="chainrule-") as held:
        os.environ |= {"GRADIO_TEMP_DIR": held, "GRADIO_ANALYTICS_ENABLED": "False"}  # read while gradio is imported and asked
        from chainrule.studio.page import LOOK, build

        page = build(desk).queue(default_concurrency_limit=1, max_size=32)
        try:
            _, address, _ = page.launch(
                server_name=host, server_port=port or None, prevent_thread_lock=True, quiet=True, share=False, inbrowser=False,
                allowed_paths=[], max_file_size="2mb", ssr_mode=False, pwa=False, mcp_server=False, enable_monitoring=False,
                footer_links=[], app_kwargs={"middleware": _middleware(host)}, **LOOK,
            )  # fmt: skip
        except OSError as error:
            raise UserError(
                f"port {port} of {host} is taken, or not of this machine; choose another --port, or 0 for any"
            ) from error
        try:
            yield address
        finally:
            page.close(verbose=False)


def until_stopped() -> None:
    """Wait for Ctrl-C, SIGTERM or SIGHUP."""
    with stop_signals() as asked:
        while not asked():
            time.sleep(0.2)


def _middleware(host: str) -> list[Any]:
    """At home only requests that were meant for home are answered: another site's name may lead here too."""
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    home = [Middleware(TrustedHostMiddleware, allowed_hosts=list(HOME))] if host in HOME else []
    return [Middleware(Guarded), *home]
