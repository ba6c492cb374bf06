"""Group commit: one task that takes what has gathered and commits it as one transaction in a worker thread.

No timer: while one batch commits, the next one gathers. At one caller a batch is one unit; at sixteen it is about as
many, for a third to an eighth of the CPU of single commits.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread

from ..exceptions import StoreUnavailable
from .transaction import Connection
from .work import T, Unit, Work, closed, explain, run_alone

logger = logging.getLogger(__name__)


class BatchLostError(Exception):
    """BEGIN or COMMIT failed, or the database undid the whole transaction: nothing of the batch is applied."""


class Writer:
    """Takes units from any number of tasks; `run` is its task, `close` ends it after what was sent before.

    Args:
        connection: Used by one batch at a time, in a worker thread.
        batch_size: The most units in one transaction.
        backlog: The most units that wait; a caller beyond that waits to get in.
    """

    def __init__(self, connection: Connection, *, batch_size: int, backlog: int) -> None:
        self._connection = connection
        self._batch_size = batch_size
        # Of its own: on AnyIO's default limiter, blocked sync steps delayed a commit by a second.
        self._limiter = anyio.CapacityLimiter(1)
        self._send, self._receive = anyio.create_memory_object_stream[Work[Any]](backlog)
        self._units = self._batches = self._largest = self._redone = self._withdrawn = 0

    async def submit(self, unit: Unit[T], *arguments: Any) -> T:
        """Run a unit and return its result after the commit.

        Cancelled while the unit waits: it is withdrawn. Cancelled once it is taken: the commit is waited for first.
        """
        work = Work(unit, arguments)
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
                if not batch:
                    continue
                await anyio.to_thread.run_sync(self._commit, batch, limiter=self._limiter)
                self._count(batch)
                for work in batch:
                    work.done.set()
        finally:
            self._refuse(batch)

    def statistics(self) -> Mapping[str, int]:
        channel = self._send.statistics()
        return {
            "units": self._units,
            "batches": self._batches,
            "largest_batch": self._largest,
            "redone_batches": self._redone,
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

    # In the worker thread

    def _commit(self, batch: list[Work[Any]]) -> None:
        """Give every unit of the batch its outcome."""
        if len(batch) == 1:
            run_alone(self._connection, batch[0])
            return
        try:
            if not self._together(batch):
                self._redone += 1
                self._one_by_one(batch)
        except BatchLostError as lost:
            self._connection.rollback()
            error = lost.__cause__
            assert isinstance(error, Exception)
            logger.error("A batch of %d units was not stored: %s", len(batch), error)
            for work in batch:
                work.fail(_unavailable(self._connection, error))

    def _together(self, batch: list[Work[Any]]) -> bool:
        """All units in one transaction. False if one failed: everything is rolled back."""
        connection = self._connection
        with _losing_the_batch():
            connection.begin()
        try:
            results = [work.run(connection.tx) for work in batch]
        except Exception:
            connection.rollback()
            return False
        with _losing_the_batch():
            connection.commit()
        for work, result in zip(batch, results, strict=True):
            work.succeed(result)
        return True

    def _one_by_one(self, batch: list[Work[Any]]) -> None:
        """The same with a savepoint a unit, so that only the guilty one fails."""
        connection = self._connection
        results: list[tuple[Work[Any], Any]] = []
        with _losing_the_batch():
            connection.begin()
        for work in batch:
            with _losing_the_batch():
                connection.savepoint()
            try:
                result = work.run(connection.tx)
            except Exception as error:
                if not connection.rollback_to_savepoint():
                    raise BatchLostError from error
                work.fail(explain(connection, error))
                continue
            with _losing_the_batch():
                connection.release_savepoint()
            results.append((work, result))
        with _losing_the_batch():
            connection.commit()
        for work, result in results:
            work.succeed(result)


def _unavailable(connection: Connection, error: Exception) -> StoreUnavailable:
    """What those are told who share a transaction with somebody's error."""
    told = explain(connection, error)
    if isinstance(told, StoreUnavailable):
        return told
    lost = StoreUnavailable(f"The store undid the transaction: {error}")
    lost.__cause__ = error
    return lost


@contextmanager
def _losing_the_batch() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise BatchLostError from error
