"""Group commit: one task that takes what has gathered and commits it as one transaction in a worker thread.

No timer: while one batch commits, the next one gathers. At one caller a batch is one unit; at sixteen it is about as
many, for a third to an eighth of the CPU of single commits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread

from .commits import Commits
from .transaction import NAMELESS, Connection, Names
from .work import T, Unit, Work, closed


class Writer:
    """Takes units from any number of tasks; `run` is its task, `close` ends it after what was sent before.

    Args:
        connection: Used by one batch at a time, in a worker thread.
        batch_size: The most units in one transaction.
        backlog: The most units that wait; a caller beyond that waits to get in.
    """

    def __init__(self, connection: Connection, *, batch_size: int, backlog: int) -> None:
        self._connection = connection
        self._commits = Commits(connection)
        self._batch_size = batch_size
        # Of its own: on AnyIO's default limiter, blocked sync steps delayed a commit by a second.
        self._limiter = anyio.CapacityLimiter(1)
        self._send, self._receive = anyio.create_memory_object_stream[Work[Any]](backlog)
        self._units = self._batches = self._largest = self._withdrawn = 0

    async def submit(self, unit: Unit[T], *arguments: Any, names: Names = NAMELESS) -> T:
        """Run a unit, which will touch what it `names`, and return its result after the commit.

        Cancelled while the unit waits: it is withdrawn. Cancelled once it is taken: the commit is waited for first.
        """
        work = Work(unit, arguments, names)
        try:
            try:
                self._send.send_nowait(work)
            except anyio.WouldBlock:
                await self._send.send(work)
            await work.done.wait()
        except anyio.get_cancelled_exc_class():
            if work.taken:
                with anyio.CancelScope(shield=True):
                    await work.done.wait()
            else:
                work.withdrawn = True
                self._withdrawn += 1
            raise
        except (anyio.ClosedResourceError, anyio.BrokenResourceError):
            raise closed() from None
        return work.outcome()

    def close(self) -> None:
        """Take nothing more. `run` returns when what was taken is committed."""
        self._send.close()

    async def run(self) -> None:
        """Commit batches until `close`. However it ends, nobody is left waiting."""
        batch: list[Work[Any]] = []
        try:
            async for first in self._receive:
                batch = self._gather(first)
                for numbers in self._connection.arrange([work.names for work in batch]):
                    together = [batch[number] for number in numbers]
                    await anyio.to_thread.run_sync(self._commits.commit, together, limiter=self._limiter)
                    self._count(together)
                    for work in together:
                        work.done.set()
        finally:
            self._refuse(batch)

    def statistics(self) -> Mapping[str, int]:
        channel = self._send.statistics()
        return {
            "units": self._units,
            "batches": self._batches,
            "largest_batch": self._largest,
            "redone_batches": self._commits.redone,
            "withdrawn_units": self._withdrawn,
            "waiting_units": channel.current_buffer_used + channel.tasks_waiting_send,
        }

    def _gather(self, first: Work[Any]) -> list[Work[Any]]:
        batch = [first]
        while len(batch) < self._batch_size:
            try:
                batch.append(self._receive.receive_nowait())
            except (anyio.WouldBlock, anyio.EndOfStream):
                break
        batch = [work for work in batch if not work.withdrawn]
        for work in batch:
            work.taken = True
        return batch

    def _count(self, batch: list[Work[Any]]) -> None:
        self._batches += 1
        self._units += len(batch)
        self._largest = max(self._largest, len(batch))

    def _refuse(self, batch: list[Work[Any]]) -> None:
        """Answer the callers that a stopped writer leaves behind."""
        self._send.close()
        while True:
            try:
                batch = [*batch, self._receive.receive_nowait()]
            except (anyio.WouldBlock, anyio.EndOfStream):
                break
        self._receive.close()
        for work in batch:
            if not work.has_outcome:
                work.fail(closed())
            work.done.set()
