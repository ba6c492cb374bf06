"""A lock and a semaphore that Trio tasks and asyncio-flavoured code of the same loop can share.

AnyIO's own belong to the library that they were first used in. A workflow's state store is used by native steps and by
asyncio-flavoured ones of the same run, so its lock must wake each waiter in the waiter's own language. And in the
waiter's own thread: a sync step may run a loop of its own around the store, which is how it is done upstream.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import trio

from .flavour import caller_library, current_task_identity


class FlavourLock:
    """A fair lock for tasks, whatever their library and thread. The holder's second acquire raises RuntimeError."""

    def __init__(self) -> None:
        self._holder: Any = None
        self._waiters: deque[tuple[Any, Callable[[], None]]] = deque()
        # Around a look at the two above, and never around an await: no task waits for it.
        self._guard = threading.Lock()

    @asynccontextmanager
    async def acquire_write(self) -> AsyncIterator[None]:
        """Hold the lock inside the block (the name is the one that upstream's state store calls)."""
        me = current_task_identity()
        with self._guard:
            if self._holder is not None and self._holder is me:
                raise RuntimeError("writer called inside edit_state: mutate the yielded state instead")
            if self._holder is None:
                self._holder = me
                wait = None
            else:
                wait, wake = _waker()
                entry = (me, wake)
                self._waiters.append(entry)
        if wait is not None:
            await self._wait_turn(wait, entry)
        try:
            yield
        finally:
            self._release()

    async def _wait_turn(self, wait: Callable[[], Awaitable[None]], entry: tuple[Any, Callable[[], None]]) -> None:
        try:
            await wait()
        except BaseException:
            with self._guard:
                handed_over = self._holder is entry[0]  # while the cancellation was on its way
                if not handed_over:
                    self._waiters.remove(entry)
            if handed_over:
                self._release()
            raise

    def _release(self) -> None:
        with self._guard:
            self._holder, wake = self._waiters.popleft() if self._waiters else (None, None)
        if wake is not None:
            wake()


class FlavourSemaphore:
    """A fair counter of places for tasks of one thread, whatever their library.

    Args:
        value: Places, at least 1.
    """

    def __init__(self, value: int) -> None:
        self._free = value
        self._waiters: deque[_Waiter] = deque()

    def acquire_nowait(self) -> bool:
        """Take a place if one is free and nobody waits for it; False otherwise."""
        if self._free and not self._waiters:
            self._free -= 1
            return True
        return False

    async def acquire(self) -> None:
        """Take a place, after those who came before."""
        if self.acquire_nowait():
            return
        waiter = _Waiter(*_waker())
        self._waiters.append(waiter)
        try:
            await waiter.wait()
        except BaseException:
            if waiter.granted:
                self.release()  # it was handed over while the cancellation was on its way
            else:
                self._waiters.remove(waiter)
            raise

    def release(self) -> None:
        """Give the place back: to who waits longest, if anybody does."""
        if self._waiters:
            waiter = self._waiters.popleft()
            waiter.granted = True
            waiter.wake()
        else:
            self._free += 1


@dataclass(eq=False, slots=True)
class _Waiter:
    wait: Callable[[], Any]
    wake: Callable[[], None]
    granted: bool = False


def _waker() -> tuple[Callable[[], Awaitable[None]], Callable[[], None]]:
    """A wait function in the caller's library, and the function that ends the wait from whatever thread."""
    thread = threading.get_ident()
    if caller_library() == "trio":
        event = trio.Event()
        token = trio.lowlevel.current_trio_token()

        def wake_trio() -> None:
            if threading.get_ident() == thread:
                event.set()
            else:
                token.run_sync_soon(event.set)

        return event.wait, wake_trio
    loop = asyncio.get_running_loop()
    future: asyncio.Future[None] = loop.create_future()

    async def wait() -> None:
        await future

    def resolve() -> None:
        if not future.done():
            future.set_result(None)

    def wake_asyncio() -> None:
        if threading.get_ident() == thread:
            resolve()
        else:
            loop.call_soon_threadsafe(resolve)

    return wait, wake_asyncio
