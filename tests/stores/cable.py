"""The way to a server, for tests that cut it, or block it, at a certain moment."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from urllib.parse import urlsplit

import anyio
import anyio.abc


class Cable:
    """Passes on what clients and a server say to each other, until it is told otherwise.

    Attributes:
        url: The server's, by way of the cable.
    """

    def __init__(self, url: str) -> None:
        self._server = urlsplit(url)
        self.url = ""
        self._before: bytes | None = None
        self._behind: bytes | None = None
        self._answer_of: anyio.abc.SocketStream | None = None
        self._free = anyio.Event()
        self._free.set()

    def cut_before(self, text: bytes) -> None:
        """The next message of a client with this text does not arrive, and its connection is gone."""
        self._before = text

    def cut_behind(self, text: bytes) -> None:
        """The next message of a client with this text arrives; its answer does not, and its connection is gone."""
        self._behind = text

    def block(self) -> None:
        """Nothing arrives any more, and nobody is told."""
        self._free = anyio.Event()

    def unblock(self) -> None:
        self._free.set()

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[Cable]:
        async with (
            await anyio.create_tcp_listener(local_host="127.0.0.1") as listener,
            anyio.create_task_group() as tasks,
        ):
            port = listener.extra(anyio.abc.SocketAttribute.local_port)
            user = self._server.netloc.rpartition("@")[0]
            self.url = self._server._replace(netloc=f"{user}@127.0.0.1:{port}").geturl()
            tasks.start_soon(listener.serve, self._connect)
            yield self
            tasks.cancel_scope.cancel()

    async def _connect(self, client: anyio.abc.SocketStream) -> None:
        host, port = self._server.hostname or "", self._server.port or 5432
        with suppress(OSError):  # the server is away
            async with client, await anyio.connect_tcp(host, port) as server, anyio.create_task_group() as tasks:
                tasks.start_soon(self._pass_on, server, client, tasks.cancel_scope)
                await self._pass_on(client, server, tasks.cancel_scope)

    async def _pass_on(
        self, source: anyio.abc.SocketStream, target: anyio.abc.SocketStream, both: anyio.CancelScope
    ) -> None:
        with suppress(anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError):
            while True:
                data = await source.receive()
                await self._free.wait()
                if self._answer_of is source:
                    break
                if self._before is not None and self._before in data:
                    self._before = None
                    break
                if self._behind is not None and self._behind in data:
                    self._behind, self._answer_of = None, target
                await target.send(data)
        both.cancel()
