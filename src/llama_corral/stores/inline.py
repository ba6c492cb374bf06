"""Units and queries without threads: each runs at once, in the task that asks. For stores in memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import anyio.lowlevel

from .transaction import NAMELESS, Connection, Names
from .work import T, Unit, Work, closed, run_alone


class Inline:
    """Stands in for `Writer` and `Reader`."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._open = True
        self._units = 0

    async def submit(self, unit: Unit[T], *arguments: Any, names: Names = NAMELESS) -> T:
        # The only point at which the caller can be cancelled: before anything was done.
        await anyio.lowlevel.checkpoint()
        if not self._open:
            raise closed()
        work = Work(unit, arguments)
        run_alone(self._connection, work)
        self._units += 1
        return work.outcome()

    def close(self) -> None:
        self._open = False

    def statistics(self) -> Mapping[str, int]:
        return {"units": self._units, "batches": self._units, "largest_batch": min(self._units, 1), "waiting_units": 0}
