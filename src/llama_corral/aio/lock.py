"""A lock that Trio tasks and asyncio-flavoured steps of the same loop can share.

anyio.Lock belongs to the library that it was first used in. A workflow's state store is used by native steps and by
asyncio-flavoured ones of the same run, so its lock must wake each waiter in the waiter's own language.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
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
