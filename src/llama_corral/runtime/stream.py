"""The events that a run published: a ring that never blocks the publisher, and readers at their own pace."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, NoReturn

import anyio.lowlevel

from ..aio import Bell
from ..exceptions import EventsLost
from .upstream import Event

if TYPE_CHECKING:
    from .run import Run

READ_BURST = 64
"""Buffered events that a reader gets without a checkpoint in between."""


class EventRing:
    """The latest published events.

    Args:
        size: Events kept; the oldest fall out.
    """

    __slots__ = ("changed", "closed", "events", "published")

    def __init__(self, size: int) -> None:
        self.events: deque[Event] = deque(maxlen=size)
        self.changed = Bell()
        """Rings when an event was appended or the ring was closed."""
        self.published = 0
        self.closed = False
        """No more events will come."""

    def __len__(self) -> int:
        return len(self.events)

    @property
    def first(self) -> int:
        """The position of the oldest event that is left: as many have fallen out."""
        return self.published - len(self.events)

    def append(self, event: Event) -> None:
        self.events.append(event)
        self.published += 1
        self.changed.ring()

    def close(self) -> None:
        self.closed = True
        self.changed.ring()


class EventReader:
    """An async iterator over a run's published events. Each reader has its own position; nothing needs closing."""

    def __init__(self, ring: EventRing, run: Run) -> None:
        self._ring = ring
        self._run = run
        self._next = 0
        self._burst = 0

    def __aiter__(self) -> EventReader:
        return self

    async def __anext__(self) -> Event:
        """The next event. Cancelling the call loses none.

        Raises:
            EventsLost: this reader was too slow; iterating again goes on with the oldest event that is left.
        """
        ring = self._ring
        if self._burst >= READ_BURST:
            self._burst = 0
            await anyio.lowlevel.checkpoint()
        while True:
            behind = ring.published - self._next
            if behind > len(ring.events):
                self._skip_lost(behind - len(ring.events))
            if behind:
                self._next += 1
                self._burst += 1
                return ring.events[-behind]
            if ring.closed:
                await anyio.lowlevel.checkpoint()
                raise StopAsyncIteration
            self._burst = 0
            if self._run.is_child:
                await self._run.wait_as_parent(self._is_blocked, ring.changed.wait)
            else:
                await ring.changed.wait()

    def _skip_lost(self, lost: int) -> NoReturn:
        self._next += lost
        raise EventsLost(
            f"{lost} events of run {self._run.run_id} were lost to this reader",
            hint="read faster, or open the run with a larger event_buffer",
            lost=lost,
        )

    def _is_blocked(self) -> bool:
        return self._next >= self._ring.published and not self._ring.closed
