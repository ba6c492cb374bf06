"""The asyncio half of an adapter whose client speaks asyncio: everything of the client runs in one place, in the one loop,
and callers of whatever library and task reach it without an asyncio task of their own for each message.

    async with open_asyncio_side("nats") as side:
        client = await side.call(connect, url)        # awaits; cancelling it cancels the call
        await side.send(client.publish, "topic", b"") # hands over and returns; done in the order of sending

What comes back is handed over by callbacks of the client: they run in the thread of the waiters, so they may append to a
deque and set an `anyio.Event` that a waiter made, in either library.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, Final, TypeVar

import anyio
import anyio.lowlevel
import sniffio

from .host import ORPHAN_GRACE, SelfCancelled, _end_orphans, _owned, _owning_loop, call_asyncio, open_asyncio_loop

T = TypeVar("T")

logger = logging.getLogger(__name__)

POSTED_AT_ONCE: Final = 1000
"""Calls that wait for their turn, beyond which `send` waits too."""


class AsyncioSide:
    """Made by `open_asyncio_side`. Its methods can be called from any task of the thread, in either library, whether that
    task was started inside the block or not."""

    def __init__(self, name: str, loop: asyncio.AbstractEventLoop, owned: set[asyncio.Task[Any]]) -> None:
        self.loop = loop
        self._name = name
        self._owned = owned
        # The context of whoever opened it: asyncio tasks inherit from there, not from who happens to call.
        self._context = _context_of(owned)
        self._posted: deque[tuple[Callable[..., Awaitable[Any]], tuple[Any, ...]]] = deque()
        self._room: anyio.Event | None = None
        self._news: asyncio.Future[None] | None = None
        self._closed = False

    async def call(self, fn: Callable[..., Coroutine[Any, Any, T]], *args: Any) -> T:
        """Await `fn(*args)` in an asyncio task of its own, and return what it returns. What it leaves running belongs to
        the block. A cancelled call is over when `fn` has unwound, or when that takes too long.

        Raises:
            SelfCancelled: `fn` was cancelled by asyncio code, or the block is left.
        """
        done = anyio.Event()
        task = self.start_soon(fn, *args)
        task.add_done_callback(lambda _: done.set())
        try:
            await done.wait()
        except BaseException:
            task.cancel()
            with anyio.move_on_after(ORPHAN_GRACE, shield=True):
                await done.wait()
            if task.done() and not task.cancelled() and task.exception() is not None:
                logger.debug("a cancelled call of %s ended otherwise", self._name, exc_info=task.exception())
            raise
        if task.cancelled():
            raise SelfCancelled(f"the asyncio code of {self._name} was cancelled")
        return task.result()

    async def send(self, fn: Callable[..., Awaitable[Any]], *args: Any) -> None:
        """`post`, as soon as fewer than `POSTED_AT_ONCE` wait. The backpressure for whoever sends without an answer."""
        await anyio.lowlevel.checkpoint()
        while len(self._posted) >= POSTED_AT_ONCE and not self._closed:
            if self._room is None:
                self._room = anyio.Event()
            await self._room.wait()
        self.post(fn, *args)

    def post(self, fn: Callable[..., Awaitable[Any]], *args: Any) -> None:
        """Have `await fn(*args)` done soon, one after the other in the order of posting, and return at once. For callers
        that are bounded otherwise (by what they were given, say). What `fn` raises is logged, so let it handle what it
        expects. After the end of the block, nothing happens."""
        if self._closed:
            return
        self._posted.append((fn, args))
        if self._news is not None and not self._news.done():
            self._news.set_result(None)

    async def wait_posted(self) -> None:
        """Return when all that was posted so far has been done."""
        await self.call(self._reach_turn)

    async def _reach_turn(self) -> None:
        turn: asyncio.Future[None] = self.loop.create_future()

        async def reached() -> None:  # noqa: ASYNC124 -- what is posted is awaited
            if not turn.done():
                turn.set_result(None)

        self.post(reached)
        await turn

    def start_soon(self, fn: Callable[..., Coroutine[Any, Any, T]], *args: Any) -> asyncio.Task[T]:
        """Start an asyncio task that belongs to the block: it is cancelled when the block is left."""
        if self._closed:
            raise SelfCancelled(f"the asyncio side of {self._name} is closed")
        name = f"{self._name}: {getattr(fn, '__name__', fn)}"
        task = self.loop.create_task(fn(*args), name=name, context=self._context.copy())
        if task not in self._owned:  # plain asyncio has no task factory of ours
            self._owned.add(task)
            task.add_done_callback(self._owned.discard)
        return task

    async def pump_forever(self) -> None:
        """Do what is posted."""
        # Not `while True`: clients swallow a cancellation here and there.
        while not self._closed:
            while self._posted:
                fn, args = self._posted.popleft()
                try:
                    await call_asyncio(fn, *args)  # a client's own cancellation must not end this task
                except Exception:
                    logger.exception("a posted call of %s failed", self._name)
            if self._room is not None:
                self._room.set()
                self._room = None
            if not self._closed:
                self._news = self.loop.create_future()
                await self._news

    async def close(self) -> None:
        """End what is left, for a limited time."""
        self._closed = True
        self._posted.clear()
        if self._room is not None:
            self._room.set()
        done = anyio.Event()
        ending = self.loop.create_task(_end_orphans(self._owned), context=_context_of(None))
        ending.add_done_callback(lambda _: done.set())
        with anyio.CancelScope(shield=True):  # bounded: see _end_orphans
            await done.wait()


def _context_of(owned: set[asyncio.Task[Any]] | None) -> contextvars.Context:
    """The caller's context, for tasks that belong to these and not to the step in which the caller may be."""
    token = _owned.set(owned)
    try:
        return contextvars.copy_context()
    finally:
        _owned.reset(token)


@contextlib.asynccontextmanager
async def open_asyncio_side(name: str) -> AsyncIterator[AsyncioSide]:
    """A place for the calls of one asyncio client; on Trio in the loop that there is, or in one of its own.

    The client is closed by the body, which knows how. What still runs at the end (on Trio also what the client started by
    itself) is cancelled and awaited for at most `ORPHAN_GRACE` seconds.

    Args:
        name: Of the client, for the names of tasks and for the log.
    """
    async with open_asyncio_loop():
        loop = asyncio.get_running_loop() if sniffio.current_async_library() == "asyncio" else _owning_loop()
        side = AsyncioSide(name, loop, set())
        side.start_soon(side.pump_forever)
        try:
            yield side
        finally:
            await side.close()  # noqa: ASYNC102 - shielded and bounded there
