"""A lock and a semaphore that Trio tasks and asyncio-flavoured code of the same loop can share.

AnyIO's own belong to the library that they were first used in. A workflow's state store is used by native steps and by
asyncio-flavoured ones of the same run, so its lock must wake each waiter in the waiter's own language.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import trio

from .flavour import caller_library, current_task_identity


class FlavourLock:
    """A fair lock for tasks of one thread, whatever their library. The holder's second acquire raises RuntimeError."""

    def __init__(self) -> None:
        self._holder: Any = None
        self._waiters: deque[tuple[Any, Callable[[], None]]] = deque()

    @asynccontextmanager
    async def acquire_write(self) -> AsyncIterator[None]:
        """Hold the lock inside the block (the name is the one that upstream's state store calls)."""
        me = current_task_identity()
        if self._holder is not None and self._holder is me:
            raise RuntimeError("writer called inside edit_state: mutate the yielded state instead")
        if self._holder is None:
            self._holder = me
        else:
            await self._wait_turn(me)
        try:
            yield
        finally:
            self._release()

    async def _wait_turn(self, me: Any) -> None:
        wait, wake = _waker()
        entry = (me, wake)
        self._waiters.append(entry)
        try:
            await wait()
        except BaseException:
            if self._holder is me:
                self._release()  # it was handed over while the cancellation was on its way
            else:
                self._waiters.remove(entry)
            raise

    def _release(self) -> None:
        if self._waiters:
            self._holder, wake = self._waiters.popleft()
            wake()
        else:
            self._holder = None


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


def _waker() -> tuple[Callable[[], Any], Callable[[], None]]:
    """A wait function and the function that ends the wait, in the caller's library."""
    if caller_library() == "trio":
        event = trio.Event()
        return event.wait, event.set
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def wait() -> None:
        await future

    def wake() -> None:
        if not future.done():
            future.set_result(None)

    return wait, wake
