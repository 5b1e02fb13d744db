"""Who may ask: bearer tokens, compared in constant time. Limits on the size and the pace of a request's body."""

import asyncio
import hashlib
import hmac
import json
import secrets
import time

from starlette.exceptions import HTTPException

DISCARDED = 64 << 20  # bytes of a refused body that are read


class Tokens:
    """The tokens of a server; the position of a token is its owner's number.

    Args: tokens: texts of at least 16 characters; where there are none, one is made (`made`).
    Raises: `ValueError` for short ones.
    """

    def __init__(self, tokens=()):
        self.made = None if tokens else secrets.token_urlsafe(32)
        tokens = list(tokens) or [self.made]
        if any(len(token) < 16 for token in tokens):
            raise ValueError("A token has at least 16 characters; make one with: openssl rand -hex 32")
        self.digests = [hashlib.sha256(token.encode()).digest() for token in tokens]

    def owner(self, header):
        """The number of the token in an Authorization header, `None` where it is none of ours.

        Every token is compared, and digests of equal length, so that the time tells nothing.
        """
        kind, _, given = (header or "").partition(" ")
        digest = hashlib.sha256(given.strip().encode("utf-8", "surrogateescape")).digest()
        found = None
        for number, known in enumerate(self.digests):
            if hmac.compare_digest(digest, known):
                found = number
        return found if kind.lower() == "bearer" else None


class Gate:
    """ASGI middleware: lets nobody in without a token, and no body that is too large (413) or comes too slowly (408).

    Args: app; tokens: `Tokens`; open_paths: answered without a token; most: {path prefix: bytes}, "" last for all
        others; on_status: called with scope and status of each response; slow: seconds for each piece of a body.
    """

    def __init__(self, app, tokens, open_paths, most, on_status, slow=30.0):
        self.app, self.tokens, self.open_paths, self.most = app, tokens, open_paths, most
        self.on_status, self.slow = on_status, slow

    async def __call__(self, scope, receive, send_on):
        if scope["type"] != "http":
            return await self.app(scope, receive, send_on)

        async def send(message):
            if message["type"] == "http.response.start":
                self.on_status(scope, message["status"])
            await send_on(message)

        headers, path = dict(scope["headers"]), scope["path"]
        if path not in self.open_paths:
            owner = self.tokens.owner(headers.get(b"authorization", b"").decode("latin-1"))
            if owner is None:
                await discard(receive, self.slow)
                return await refuse(send, 401, "Give the server's token as Authorization: Bearer TOKEN.", "no_token")
            scope.setdefault("state", {})["owner"] = owner
        most = next(limit for prefix, limit in self.most.items() if path.startswith(prefix))
        declared = headers.get(b"content-length", b"0")
        if not declared.isdigit() or int(declared) > most:
            await discard(receive, self.slow)
            return await refuse(send, 413, f"The body has more than {most} bytes.", "too_large")
        received, ended = 0, False

        async def limited():
            """The body under limits; what comes after it is the client's hanging up, which may take any time."""
            nonlocal received, ended
            if ended:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), self.slow)
            except asyncio.TimeoutError:
                raise BodyError(408, "The body came too slowly.") from None
            received += len(message.get("body", b""))
            if received > most:
                await discard(receive, self.slow)
                raise BodyError(413, f"The body has more than {most} bytes.")
            ended = not message.get("more_body", False)
            return message

        return await self.app(scope, limited, send)


class BodyError(HTTPException):
    """A body that is refused while it comes."""


async def discard(receive, seconds):
    """Reads on for a while, so that a client which is still sending gets the refusal, not a broken connection."""
    left, end = DISCARDED, time.monotonic() + seconds
    while left > 0 and time.monotonic() < end:
        try:
            message = await asyncio.wait_for(receive(), end - time.monotonic())
        except asyncio.TimeoutError:
            return
        left -= len(message.get("body", b""))
        if message["type"] == "http.disconnect" or not message.get("more_body", False):
            return


def error_body(message, code, param=None):
    """An error as the OpenAI API gives it."""
    return {"error": {"message": message, "type": "invalid_request_error", "param": param, "code": code}}


async def refuse(send, status, message, code):
    """Sends an error as a whole response, and has the connection closed."""
    body = json.dumps(error_body(message, code)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()),
               (b"connection", b"close")]  # fmt: skip
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
