"""Idle runs leave memory: one task a service, which sleeps until the run that has waited for longest is due."""

from __future__ import annotations

import time
from collections import OrderedDict
from typing import Protocol

import anyio
import anyio.lowlevel


class Leaver(Protocol):
    """What the sweeper knows of an execution."""

    def leave(self) -> bool:
        """Leave memory; False where that is not possible now."""


class IdleSweeper:
    """Tells runs to leave that have been idle for long enough.

    Args:
        timeout: Seconds.
    """

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self._due: OrderedDict[Leaver, float] = OrderedDict()
        self._first = anyio.Event()

    def __len__(self) -> int:
        return len(self._due)

    def add(self, execution: Leaver) -> None:
        """The execution's run has become idle."""
        # All wait for the same time, so that the order in which they came is the order in which they are due.
        self._due[execution] = time.monotonic() + self.timeout
        self._first.set()

    def discard(self, execution: Leaver) -> None:
        """It goes on, or has ended."""
        self._due.pop(execution, None)

    async def sweep_forever(self) -> None:
        """The support task."""
        while True:
            if not self._due:
                self._first = anyio.Event()
                await self._first.wait()
                continue
            execution, due = next(iter(self._due.items()))
            remaining = due - time.monotonic()
            if remaining > 0:
                await anyio.sleep(remaining)
                continue
            del self._due[execution]
            if not execution.leave():
                self.add(execution)
            await anyio.lowlevel.checkpoint()  # a snapshot takes its time, and many may be due
