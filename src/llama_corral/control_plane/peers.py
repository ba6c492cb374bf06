"""The control planes on one store, as far as they hear of each other. Synchronous, but for waiting; one event loop.

Everything that several of them may do at once is decided by the store. What is left is order: the messages of one task
must be handled one after the other, so one control plane at a time takes them. It is the one that has been there longest.
They hear of each other by broadcast, so that for a moment there may be two of them, or none; the store bears both.
"""

from __future__ import annotations

import math
from typing import Final

import anyio

ANSWER_TIME: Final = 1.0
"""Seconds that others have to answer whoever begins to listen, before it takes a turn."""


class Peers:
    """Which control planes there are, and whose turn it is. Moments are monotonic.

    Args:
        own_id: Sorts by the time at which its owner was started.
        silence: Seconds after which one that says nothing has gone.
        alone: There can be no others.
    """

    def __init__(self, own_id: str, silence: float, *, alone: bool) -> None:
        self._own_id = own_id
        self._silence = silence
        self._alone = alone
        self._heard: dict[str, float] = {}
        self._settled = -math.inf if alone else math.inf
        self._news = anyio.Event()

    def listening(self, now: float) -> None:
        """What others say is heard from now on."""
        if not self._alone:
            self._settled = now + ANSWER_TIME
        self._changed()

    def deaf(self) -> None:
        """What others say is not heard any more; who is there cannot be known."""
        if not self._alone:
            self._settled = math.inf
        self._changed()

    def heard(self, peer_id: str, now: float) -> None:
        """One says that it is there. Those that were silent for too long are forgotten."""
        self._heard = {each: last for each, last in self._heard.items() if now - last <= self._silence}
        self._heard[peer_id] = now
        self._changed()

    def left(self, peer_id: str) -> None:
        """One says that it goes."""
        if self._heard.pop(peer_id, None) is not None:
            self._changed()

    def count(self, now: float) -> int:
        """How many there are, this one among them."""
        return 1 + sum(now - last <= self._silence for last in self._heard.values())

    def has_turn(self, now: float) -> bool:
        return self._free_at() <= now

    async def wait_turn(self) -> None:
        """Return when it is our turn."""
        while not self.has_turn(anyio.current_time()):
            self._news = anyio.Event()
            with anyio.CancelScope(deadline=self._free_at()):
                await self._news.wait()

    async def wait_turn_over(self) -> None:
        """Return when it is not our turn any more."""
        while self.has_turn(anyio.current_time()):
            self._news = anyio.Event()
            await self._news.wait()

    def _free_at(self) -> float:
        """When it is our turn if nothing else is heard."""
        before_us = (last for peer_id, last in self._heard.items() if peer_id < self._own_id)
        silent = max(before_us, default=-math.inf) + self._silence
        return max(self._settled, math.nextafter(silent, math.inf))

    def _changed(self) -> None:
        self._news.set()
