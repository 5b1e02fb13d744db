"""The app's web server: Gradio's page and our routes, without Gradio's own ways to store and give files."""

import asyncio
import re
from contextlib import asynccontextmanager, suppress

import gradio as gr
from fastapi import FastAPI
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import PlainTextResponse

from photon.app.page import HEAD, build_page, theme
from photon.app.routes import build_routes
from photon.serving.incoming import sweep

# Gradio keeps uploads under their names and gives any of them to whoever knows the path; nothing here needs that
CLOSED = re.compile(r"/(gradio_api/)?(upload|file|proxy|stream|process_recording|vibe|deep_link|run-history|runs|monitoring|component_server|custom_component)([/=_\-?].*)?$")  # fmt: skip # noqa: E501
POLICY = "; ".join(
    [
        "default-src 'self'", "script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:", "worker-src 'self' blob:",
        "style-src 'self' 'unsafe-inline'", "img-src 'self' data: blob:", "font-src 'self' data:",
        "connect-src 'self' data: blob:", "object-src 'none'", "base-uri 'self'", "form-action 'self'",
    ]
)  # fmt: skip
EXPIRE_EVERY = 60.0  # seconds


class Guard:
    """ASGI middleware: closes Gradio's file routes, and lets the browser reach no other host."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        if CLOSED.match(scope["path"]):
            return await PlainTextResponse("Not found", 404)(scope, receive, send)

        async def with_headers(message):
            if message["type"] == "http.response.start":
                added = {"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff",
                         "Referrer-Policy": "no-referrer"}  # fmt: skip
                if scope["path"].startswith("/photon/visits"):
                    added["Cache-Control"] = "no-store"
                message["headers"] = [*message["headers"], *((k.encode(), v.encode()) for k, v in added.items())]
            await send(message)

        return await self.app(scope, receive, with_headers)


def build_app(engine, visits, limits, tiny, hosts=("localhost", "127.0.0.1")):
    """The ASGI app.

    Args: engine: `Engine`; visits: `Visits`; limits: `Limits` of an upload; tiny: whether the page tells that the
        model is the tiny one; hosts: names under which the server may be reached, or ["*"].
    """

    @asynccontextmanager
    async def lifespan(app):
        sweep()
        task = asyncio.create_task(expire(visits))
        yield
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Guard)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))  # a page elsewhere cannot pose as this one
    app.include_router(build_routes(engine, visits, limits))
    page = build_page(engine, visits, tiny)
    return gr.mount_gradio_app(
        app, page, path="/", theme=theme(), head=HEAD, footer_links=[], run_history=False, ssr_mode=False,
        enable_monitoring=False, pwa=False, mcp_server=False, show_error=False, max_file_size=1,
    )  # fmt: skip


async def expire(visits):
    """Ends idle visits, every minute."""
    while True:
        await asyncio.sleep(EXPIRE_EVERY)
        visits.expire()
