"""A control plane behind a real server in a thread of its own: on Trio, whatever backend the test runs on."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any, TypeVar
from urllib.parse import urlsplit

import anyio
import trio

from llama_corral.control_plane import ControlPlane, ControlPlaneConfig
from llama_corral.control_plane.http import control_plane_app
from llama_corral.queues.memory import MemoryMessageQueue
from llama_corral.settings import ServerSettings
from llama_corral.stores import SqlStore
from llama_corral.web import WebApp, serve

T = TypeVar("T")


class Threaded:
    """`run` calls an async function in the server's event loop; `drain` begins its graceful stop."""

    url: str
    plane: ControlPlane
    store: SqlStore
    app: WebApp

    def __init__(self, store: str, settings: ServerSettings, config: ControlPlaneConfig, queue: MemoryMessageQueue):
        self._url = store
        self._settings = settings
        self._config = config
        self.queue = queue
        self._up = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="core", daemon=True)

    @property
    def port(self) -> int:
        port = urlsplit(self.url).port
        assert port is not None
        return port

    async def start(self) -> None:
        self._thread.start()
        await anyio.to_thread.run_sync(self._up.wait)
        if self._failure is not None:
            raise self._failure

    async def end(self) -> None:
        if self._thread.is_alive():
            with suppress(trio.RunFinishedError):
                await self.run(self._drain)
        await anyio.to_thread.run_sync(self._thread.join)
        if self._failure is not None:
            raise self._failure

    async def drain(self) -> None:
        await self.run(self._drain)

    async def run(self, fn: Callable[..., Awaitable[T]], *args: Any, **options: Any) -> T:
        call = partial(trio.from_thread.run, partial(fn, *args, **options), trio_token=self._token)
        return await anyio.to_thread.run_sync(call)

    async def _drain(self) -> None:
        self._stop.set()

    def _run(self) -> None:
        try:
            trio.run(self._main)
        except BaseException as error:  # noqa: ASYNC103 - raised again where the test ends
            self._failure = error
        finally:
            self._up.set()

    async def _main(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        self._stop = trio.Event()
        async with SqlStore(self._url) as self.store, self.queue:
            async with ControlPlane(self.store, self.queue, config=self._config, alone=True) as self.plane:
                self.app = control_plane_app(self.plane, self._settings, version="0")
                async with trio.open_nursery() as nursery:
                    (self.url,) = await nursery.start(partial(serve, self.app, self._settings, stop=self._stop))
                    self._up.set()


@asynccontextmanager
async def open_core(
    *,
    port: int = 0,
    store: str = "sqlite://",
    token: str | None = None,
    queue: MemoryMessageQueue | None = None,
    body_limit: int = 10_000_000,
    graceful_timeout: float = 5.0,
    **config: Any,
) -> AsyncIterator[Threaded]:
    settings = ServerSettings(port=port, token=token, body_limit=body_limit, graceful_timeout=graceful_timeout)
    core = Threaded(store, settings, ControlPlaneConfig(**config), queue or MemoryMessageQueue())
    await core.start()
    try:
        yield core
    finally:
        with anyio.CancelScope(shield=True):
            await core.end()
