"""Accepting connections for Hypercorn's protocols, in place of its own accept loop.

Two of its habits cost a busy server a tenth of its CPU: the head and the body of an answer were two writes, and every
pause between two requests was a new task with a lock, a scope and a nursery. Here they are one write, and one task a
connection whose deadline moves.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import trio
from hypercorn.config import Config
from hypercorn.events import Closed, Event, RawData
from hypercorn.trio.lifespan import Lifespan
from hypercorn.trio.task_group import TaskGroup
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import TrioSingleTask, WorkerContext
from hypercorn.typing import AppWrapper, ConnectionState, LifespanState

Listener = trio.SocketListener | trio.SSLListener[trio.SocketStream]


async def serve_connections(
    app: AppWrapper,
    config: Config,
    listener: Listener,
    url: str,
    *,
    wait_stop: Callable[[], Awaitable[None]],
    task_status: trio.TaskStatus[list[str]] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Accept until `wait_stop` returns; then connections get `config.graceful_timeout` seconds to end, also those whose
    client has stopped reading. Started with the URLs when it accepts. Closes the listener."""
    state: LifespanState = {}
    lifespan = Lifespan(app, config, state)
    context = WorkerContext(None)

    opened: set[Connection] = set()

    async def handle(stream: Any) -> None:
        connection = Connection(app, config, context, ConnectionState(state.copy()), stream)
        opened.add(connection)
        try:
            await connection.run()
        finally:
            opened.discard(connection)

    async with trio.open_nursery() as lifespan_nursery:
        await lifespan_nursery.start(lifespan.handle_lifespan)
        await lifespan.wait_for_startup()
        async with trio.open_nursery() as connections:
            try:
                async with trio.open_nursery() as accepting:
                    await accepting.start(
                        partial(trio.serve_listeners, handle, [listener], handler_nursery=connections)
                    )
                    await config.log.info("Running on %s (CTRL + C to quit)", url)
                    task_status.started([url])
                    await wait_stop()
                    accepting.cancel_scope.cancel()
            finally:
                connections.cancel_scope.deadline = trio.current_time() + config.graceful_timeout
                for connection in opened:
                    connection.stop_writing_at(connections.cancel_scope.deadline)
                await context.terminated.set()  # noqa: ASYNC102 - sets an event; does not wait
        await lifespan.wait_for_shutdown()
        lifespan_nursery.cancel_scope.cancel()


class Connection(TCPServer):
    """Hypercorn's connection with fewer writes and fewer tasks."""

    def __init__(
        self, app: AppWrapper, config: Config, context: WorkerContext, state: ConnectionState, stream: Any
    ) -> None:
        super().__init__(app, config, context, state, stream)
        self._timer = IdleTimer(self)
        self.idle_task = self._timer
        self._head = b""
        # Writes are shielded, so that an answer is written whole; this is what ends one that nobody reads.
        self._last_moment = math.inf
        self._writing: trio.CancelScope | None = None

    def stop_writing_at(self, deadline: float) -> None:
        """What the client has not taken by then is not sent."""
        self._last_moment = deadline
        if self._writing is not None:
            self._writing.deadline = deadline

    async def _read_data(self) -> None:
        try:
            await super()._read_data()
        finally:
            self._timer.end()

    async def protocol_send(self, event: Event) -> None:
        if isinstance(event, RawData):
            await self._write(event.data)
        elif isinstance(event, Closed):
            await self._flush()
            await super().protocol_send(event)
        else:
            await super().protocol_send(event)

    async def close_idle(self) -> None:
        """The client's time to send another request is over."""
        with trio.CancelScope(shield=True):
            await self._initiate_server_close()

    async def _write(self, data: bytes) -> None:
        if not self._head and data.startswith(b"HTTP/1.") and b"\r\ncontent-length: " in data:
            # Its body, or its end, comes next: whoever announces a length has the body at hand. The head of a stream
            # announces none and goes out at once.
            self._head = data
            return
        data, self._head = self._head + data, b""
        if not data:  # the end of a message of known length
            return
        try:
            self.send_lock.acquire_nowait()
        except trio.WouldBlock:  # streams of one HTTP/2 connection
            await self.send_lock.acquire()
        try:
            with trio.CancelScope(shield=True, deadline=self._last_moment) as self._writing:
                await self.stream.send_all(data)
            if self._writing.cancelled_caught:
                await self.protocol.handle(Closed())
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            await self.protocol.handle(Closed())
        finally:
            self._writing = None
            self.send_lock.release()

    async def _flush(self) -> None:
        if self._head:
            await self._write(b"")


class IdleTimer(TrioSingleTask):
    """Closes a connection that is idle for too long, or when the server ends."""

    def __init__(self, connection: Connection) -> None:
        super().__init__()
        self._connection = connection
        self._scope: trio.CancelScope | None = None
        self._idle = False

    async def restart(self, task_group: Any, action: Callable[..., Any]) -> None:
        self._idle = True
        if self._scope is None:
            assert isinstance(task_group, TaskGroup)
            assert task_group._nursery is not None
            self._scope = trio.CancelScope()
            task_group._nursery.start_soon(self._watch, self._scope, name="idle connection")
        self._scope.deadline = trio.current_time() + self._connection.config.keep_alive_timeout

    async def stop(self) -> None:
        self._idle = False
        if self._scope is not None:
            self._scope.deadline = math.inf

    def end(self) -> None:
        """The client closed the connection, or we did."""
        self._idle = False
        if self._scope is not None:
            self._scope.cancel()

    async def _watch(self, scope: trio.CancelScope) -> None:
        with scope:
            await self._connection.context.terminated.wait()
        # A busy connection is closed after its answer: Hypercorn looks at `terminated` there.
        if self._idle:
            await self._connection.close_idle()
