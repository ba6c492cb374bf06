"""One sleeper for everything that becomes due by itself: deadlines, later starts, timers of runs out of memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

import anyio

LONGEST_SLEEP: Final = 3600.0


class Alarm:
    """Knows the next moment at which something is due and nothing else: whoever is woken asks the store what it is, and
    when to be woken again. So a million deadlines cost no memory.

    Moments are wall-clock time, seconds since the epoch.
    """

    def __init__(self) -> None:
        self.next = math.inf
        self._earlier = anyio.Event()

    def add(self, moment: float | None) -> None:
        """Something is due then. Moments later than one that is known are found when that one has come."""
        if moment is not None and moment < self.next:
            self.next = moment
            self._earlier.set()

    async def wait_due(self, now: Callable[[], float]) -> float:
        """Return the next moment when it has come; it is forgotten then. What is added from now on is for the next call."""
        while self.next > now():
            self._earlier = anyio.Event()
            # Wall clocks are set, and a timer of the loop does not notice.
            with anyio.move_on_after(min(LONGEST_SLEEP, self.next - now())):
                await self._earlier.wait()
        due, self.next = self.next, math.inf
        return due
