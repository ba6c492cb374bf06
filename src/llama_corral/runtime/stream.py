"""The events that a run published: a ring that never blocks the publisher, and readers at their own pace."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

import anyio
import anyio.lowlevel

from ..exceptions import EventsLost
from .upstream import Event

if TYPE_CHECKING:
    from .run import Run

READ_BURST = 64
"""Buffered events that a reader gets without a checkpoint in between."""


class Bell:
    """Wakes whoever waits, whatever library it waits in: each waiter brings an event of its own.

    An anyio.Event speaks the library that it was made in, and a run is watched from native and from asyncio-flavoured
    code.
    """

    __slots__ = ("_waiting",)

    def __init__(self) -> None:
        self._waiting: list[anyio.Event] = []

    def ring(self) -> None:
        if self._waiting:
            waiting, self._waiting = self._waiting, []
            for event in waiting:
                event.set()

    async def wait(self) -> None:
        """Return when the bell rings next."""
        event = anyio.Event()
        self._waiting.append(event)
        try:
            await event.wait()
        finally:
            if event in self._waiting:
                self._waiting.remove(event)


class EventRing:
    """The latest published events.

    Args:
        size: Events kept; the oldest fall out.
    """

    __slots__ = ("_bell", "_events", "closed", "published")

    def __init__(self, size: int) -> None:
        self._events: deque[Event] = deque(maxlen=size)
        self._bell = Bell()
        self.published = 0
        self.closed = False
        """No more events will come."""

    def __len__(self) -> int:
        return len(self._events)

    @property
    def first(self) -> int:
        """The position of the oldest event that is left: as many have fallen out."""
        return self.published - len(self._events)

    def append(self, event: Event) -> None:
        self._events.append(event)
        self.published += 1
        self._bell.ring()

    def close(self) -> None:
        self.closed = True
        self._bell.ring()

    def at(self, position: int) -> Event:
        return self._events[position - self.first]

    async def wait_changed(self) -> None:
        """Return when an event was appended or the ring was closed."""
        await self._bell.wait()


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
            if self._next < ring.first:
                lost, self._next = ring.first - self._next, ring.first
                raise EventsLost(
                    f"{lost} events of run {self._run.run_id} were lost to this reader",
                    hint="read faster, or open the run with a larger event_buffer",
                    lost=lost,
                )
            if self._next < ring.published:
                event = ring.at(self._next)
                self._next += 1
                self._burst += 1
                return event
            if ring.closed:
                await anyio.lowlevel.checkpoint()
                raise StopAsyncIteration
            self._burst = 0
            await self._run.wait_as_parent(self._is_blocked, ring.wait_changed)

    def _is_blocked(self) -> bool:
        return self._next >= self._ring.published and not self._ring.closed
