"""Which instances are dead: those whose counter does not move. Judged on one monotonic clock; no clocks are compared."""

from __future__ import annotations

import math
from collections.abc import Iterable

from ..protocol.records import HeldTask, InstanceRecord


class Leases:
    """Remembers when each instance's heartbeat counter was last seen to move.

    The first look at an instance counts as a movement, so nobody is judged before one full lease has passed since this
    process began to look. Of the time between two looks a third of a lease counts at most: if more has passed, it was this
    process that stood still, and heartbeats may have waited outside.
    """

    def __init__(self, lease: float) -> None:
        self._lease = lease
        self._seen: dict[str, tuple[tuple[int, float], float]] = {}
        self._looked = math.inf

    def heard(self, instance_id: str, now: float) -> None:
        """The instance lives, although the store could not count its heartbeat."""
        before = self._seen.get(instance_id)
        if before is not None:
            self._seen[instance_id] = (before[0], now)

    def dead(self, instances: Iterable[InstanceRecord], now: float) -> list[str]:
        """Look at all instances; those that were silent for longer than the lease are returned."""
        seen: dict[str, tuple[tuple[int, float], float]] = {}
        stood_still = max(0.0, now - self._looked - self._lease / 3)
        self._looked = now
        for instance in instances:
            # A restart under the same id sets the counter back: that moves it too.
            counter = (instance.heartbeat, instance.started_at)
            before = self._seen.get(instance.instance_id)
            if before is None or before[0] != counter:
                seen[instance.instance_id] = (counter, now)
            else:
                seen[instance.instance_id] = (counter, min(now, before[1] + stood_still))
        self._seen = seen
        return [instance_id for instance_id, (_, moved) in seen.items() if now - moved > self._lease]


class Strays:
    """Which strays are really lost: tasks that an instance owns and does not name in its heartbeats.

    One heartbeat proves nothing: the answer to the claim may be on its way, and is asked for again where it does not come.
    A stray is lost if every heartbeat of a lease named it, from the first of them to the last. Heartbeats may also go to
    other control planes: after a lease without one it begins anew.
    """

    def __init__(self, lease: float) -> None:
        self._lease = lease
        self._seen: dict[str, tuple[float, dict[tuple[str, int], float]]] = {}

    def lost(self, instance_id: str, strays: Iterable[HeldTask], now: float) -> list[HeldTask]:
        """Take the answer to one heartbeat in and say what to take away from the instance. `now` is monotonic."""
        # Also those of instances that have gone without a word to us.
        self._seen = {each: kept for each, kept in self._seen.items() if now - kept[0] <= self._lease}
        _, before = self._seen.get(instance_id, (now, {}))
        seen = {(each.task_id, each.epoch): before.get((each.task_id, each.epoch), now) for each in strays}
        lost = [HeldTask(*key) for key, first in seen.items() if now - first >= self._lease]
        for each in lost:
            del seen[each.task_id, each.epoch]
        if seen:
            self._seen[instance_id] = (now, seen)
        else:
            self._seen.pop(instance_id, None)
        return lost

    def forget(self, instance_id: str) -> None:
        """The instance has gone."""
        self._seen.pop(instance_id, None)
