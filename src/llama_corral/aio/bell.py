"""A bell that wakes whoever waits for it, whatever library they speak."""

from __future__ import annotations

import asyncio
from typing import Any

import trio.lowlevel

from .flavour import caller_library


class Bell:
    """Wakes all who wait, each in its own library. Ring it in the thread of the waiters.

    An anyio.Event speaks the library that it was made in, and is made anew for each wait; a run is watched from native and
    from asyncio-flavoured code, for each of its events. So tasks are parked here directly.
    """

    __slots__ = ("_waiting",)

    def __init__(self) -> None:
        self._waiting: list[Any] = []  # Trio's tasks, and futures of asyncio's

    def ring(self) -> None:
        """Wake all who wait now."""
        if self._waiting:
            waiting, self._waiting = self._waiting, []
            for entry in waiting:
                if isinstance(entry, trio.lowlevel.Task):
                    trio.lowlevel.reschedule(entry)
                elif not entry.done():
                    entry.set_result(None)

    async def wait(self) -> None:
        """Return when the bell rings next."""
        if caller_library() == "trio":
            task = trio.lowlevel.current_task()
            self._waiting.append(task)

            def abort(_: Any) -> trio.lowlevel.Abort:
                self._waiting.remove(task)
                return trio.lowlevel.Abort.SUCCEEDED

            await trio.lowlevel.wait_task_rescheduled(abort)
            return
        future = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        try:
            await future
        finally:
            if future in self._waiting:  # the wait was cancelled
                self._waiting.remove(future)
