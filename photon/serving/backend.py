"""Where scans are encoded and questions answered: in this process, or (`ray_app.py`) in workers.

A backend has `encode(key, image, **fields)`, `has(key)`, `stream(chat, keys, timeout, **options)` and `queue_length`.
"""

import asyncio

from fastapi.concurrency import run_in_threadpool

from photon.serving.engine import Answer


class ScanGone(LookupError):
    """A scan that is not held any more."""


class LocalBackend:
    """An `Engine` of this process, with the scans of a `ScanStore`."""

    def __init__(self, engine, store):
        self.engine, self.store = engine, store

    @property
    def queue_length(self):
        return self.engine.queue_length

    async def has(self, key):
        """Whether that scan is encoded."""
        return self.store.get(key) is not None

    async def encode(self, key, image, **fields):
        """Encodes a SimpleITK image and keeps it. Raises `VolumeError` where the model cannot take it."""
        prepared = await run_in_threadpool(self.engine.read, image, **fields)
        self.store.put(key, await run_in_threadpool(self.engine.encode, prepared))

    async def stream(self, chat, keys, timeout, **options):
        """Yields pieces of text, then the `Answer`. Raises what the engine raises, and `ScanGone`."""
        scans = [self.store.get(key) for key in keys]
        if None in scans:
            raise ScanGone("A scan is not held any more; upload it again.")
        async for event in events_of(self.engine, chat, scans, timeout, options):
            yield event


async def events_of(engine, chat, scans, timeout, options):
    """Events of `engine.ask` for asyncio. Closing the generator stops the answer."""
    loop, events = asyncio.get_running_loop(), asyncio.Queue()
    asked = engine.ask(
        chat,
        scans,
        timeout=timeout,
        on_event=lambda event: loop.call_soon_threadsafe(events.put_nowait, event),
        **options,
    )
    try:
        while True:
            event = await events.get()
            if isinstance(event, Exception):
                raise event
            yield event
            if isinstance(event, Answer):
                return
    finally:
        asked.cancel()
