"""Which instances are dead: those whose counter does not move. Judged on one monotonic clock; no clocks are compared."""

from __future__ import annotations

from collections.abc import Iterable

from ..protocol.records import InstanceRecord


class Leases:
    """Remembers when each instance's heartbeat counter was last seen to move.

    The first look at an instance counts as a movement, so nobody is judged before one full lease has passed since this
    process began to look.
    """

    def __init__(self, lease: float) -> None:
        self._lease = lease
        self._seen: dict[str, tuple[tuple[int, float], float]] = {}

    def dead(self, instances: Iterable[InstanceRecord], now: float) -> list[str]:
        """Look at all instances; those that were silent for longer than the lease are returned."""
        seen: dict[str, tuple[tuple[int, float], float]] = {}
        for instance in instances:
            # A restart under the same id sets the counter back: that moves it too.
            counter = (instance.heartbeat, instance.started_at)
            before = self._seen.get(instance.instance_id)
            seen[instance.instance_id] = before if before is not None and before[0] == counter else (counter, now)
        self._seen = seen
        return [instance_id for instance_id, (_, moved) in seen.items() if now - moved > self._lease]
