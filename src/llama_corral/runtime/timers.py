"""A run's timers: one heap of ticks by the time at which they are due."""

from __future__ import annotations

import heapq
import math
from collections.abc import Hashable

from .upstream import WorkflowTick


class Timers:
    """Ticks that are due later. A timer with a key replaces the one before it with the same key.

    Replaced and discarded timers stay in the heap until they come up or outnumber the live ones: a run that waits a
    million times keeps no million timers.
    """

    __slots__ = ("_dead", "_heap", "_latest", "_sequence")

    def __init__(self) -> None:
        # The sequence keeps ticks that are due together in the order in which they were scheduled.
        self._heap: list[tuple[float, int, WorkflowTick, Hashable]] = []
        self._latest: dict[Hashable, int] = {}
        self._sequence = 0
        self._dead = 0

    def __len__(self) -> int:
        return len(self._heap) - self._dead

    def __contains__(self, key: Hashable) -> bool:
        return key in self._latest

    def schedule(self, at: float, tick: WorkflowTick, key: Hashable = None) -> None:
        """Have the tick due at a time, in seconds since the epoch."""
        self._sequence += 1
        if key is not None:
            self.discard(key)
            self._latest[key] = self._sequence
        heapq.heappush(self._heap, (at, self._sequence, tick, key))

    def discard(self, key: Hashable) -> None:
        """Forget the timer of that key, if there is one."""
        if self._latest.pop(key, None) is None:
            return
        self._dead += 1
        if self._dead > 16 and self._dead * 2 > len(self._heap):
            self._heap = [entry for entry in self._heap if self._is_live(entry)]
            heapq.heapify(self._heap)
            self._dead = 0

    def next_at(self) -> float:
        """When the next tick is due; infinity if there is none."""
        while self._heap and not self._is_live(self._heap[0]):
            heapq.heappop(self._heap)
            self._dead -= 1
        return self._heap[0][0] if self._heap else math.inf

    def take_due(self, now: float) -> list[WorkflowTick]:
        """Remove and return what is due, in order."""
        due: list[WorkflowTick] = []
        while self.next_at() <= now:
            _, _, tick, key = heapq.heappop(self._heap)
            if key is not None:
                del self._latest[key]
            due.append(tick)
        return due

    def _is_live(self, entry: tuple[float, int, WorkflowTick, Hashable]) -> bool:
        key = entry[3]
        return key is None or self._latest.get(key) == entry[1]
