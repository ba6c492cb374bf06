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

from llama_corral.abc import MessageQueue
from llama_corral.control_plane import ControlPlane, ControlPlaneConfig
from llama_corral.control_plane.http import control_plane_app
from llama_corral.queues.memory import MemoryMessageQueue
from llama_corral.settings import ServerSettings
from llama_corral.stores import SqlStore
from llama_corral.web import WebApp, serve

T = TypeVar("T")


class One:
    """A control plane with its server. `drain` begins its graceful stop; `kill` cuts everything off."""

    url: str
    plane: ControlPlane
    app: WebApp

    def __init__(self, core: Threaded) -> None:
        self._core = core
        self.stop = trio.Event()
        self.scope = trio.CancelScope()
        self.over = trio.Event()

    async def serve(self, core: Threaded, task_status: Any) -> None:
        settings = core.settings
        try:
            with self.scope:
                async with ControlPlane(
                    core.store, core.queue, config=core.config, alone=core.count == 1
                ) as self.plane:
                    self.app = control_plane_app(self.plane, settings, version="0", queue_url=core.queue_url)
                    async with trio.open_nursery() as nursery:
                        (self.url,) = await nursery.start(partial(serve, self.app, settings, stop=self.stop))
                        task_status.started()
        finally:
            self.over.set()

    @property
    def port(self) -> int:
        port = urlsplit(self.url).port
        assert port is not None
        return port

    async def kill(self) -> None:
        async def kill() -> None:
            self.scope.cancel()
            await self.over.wait()

        await self._core.run(kill)

    async def drain(self) -> None:
        async def drain() -> None:
            self.stop.set()

        await self._core.run(drain)


class Threaded:
    """`run` calls an async function in the server's event loop; `drain` begins its graceful stop. With a `count`, several
    control planes on one store and one queue; what is said of one is said of the first."""

    store: SqlStore

    def __init__(
        self,
        store: str,
        settings: ServerSettings,
        config: ControlPlaneConfig,
        queue: MessageQueue,
        count: int = 1,
        queue_url: str = "memory://",
    ) -> None:
        self.queue_url = queue_url
        self._url = store
        self.settings = settings
        self.config = config
        self.count = count
        self.ones = [One(self) for _ in range(count)]
        self.queue: Any = queue
        self._up = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="core", daemon=True)

    @property
    def url(self) -> str:
        return self.ones[0].url

    @property
    def urls(self) -> list[str]:
        return [one.url for one in self.ones]

    @property
    def plane(self) -> ControlPlane:
        return self.ones[0].plane

    @property
    def app(self) -> WebApp:
        return self.ones[0].app

    @property
    def port(self) -> int:
        return self.ones[0].port

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
        for one in self.ones:
            one.stop.set()

    def _run(self) -> None:
        try:
            trio.run(self._main)
        except BaseException as error:  # noqa: ASYNC103 - raised again where the test ends
            self._failure = error
        finally:
            self._up.set()

    async def _main(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        async with SqlStore(self._url) as self.store, self.queue, trio.open_nursery() as nursery:
            for one in self.ones:
                await nursery.start(self._serve, one)
            self._up.set()

    async def _serve(self, one: One, *, task_status: Any) -> None:
        await one.serve(self, task_status)


@asynccontextmanager
async def open_core(
    *,
    port: int = 0,
    store: str = "sqlite://",
    token: str | None = None,
    queue: MessageQueue | None = None,
    count: int = 1,
    queue_url: str = "memory://",
    body_limit: int = 10_000_000,
    graceful_timeout: float = 5.0,
    **config: Any,
) -> AsyncIterator[Threaded]:
    settings = ServerSettings(port=port, token=token, body_limit=body_limit, graceful_timeout=graceful_timeout)
    core = Threaded(store, settings, ControlPlaneConfig(**config), queue or MemoryMessageQueue(), count, queue_url)
    await core.start()
    try:
        yield core
    finally:
        with anyio.CancelScope(shield=True):
            await core.end()
