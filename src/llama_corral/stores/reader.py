"""Reads in a thread of its own that takes what is queued: seven times the reads of a thread pool at sixteen callers.

A pool pays a hand-over between threads for every read, and more threads fight for one interpreter lock. Here a drained
batch is one transaction and wakes the event loop once.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import anyio
import anyio.lowlevel

from .transaction import Connection
from .work import T, Unit, Work, closed, explain

BATCH = 64
"""The most reads before the first of them is answered."""
ATTEMPTS = 2
"""How often a batch is read whose connection was gone."""


class Reader:
    """`async with reader.serving():` starts the thread and, on leaving, answers what is queued and ends it."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        # Every entry belongs to a caller that waits, so the number of callers bounds it. None ends the thread.
        self._queue: queue.SimpleQueue[Work[Any] | None] = queue.SimpleQueue()
        self._open = False
        self._reads = self._batches = 0
        self._wake: Callable[..., object]
        self._finished: anyio.Event

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        self._wake = _waker()
        self._finished = anyio.Event()
        thread = threading.Thread(target=self._serve, name="corral-store-reader", daemon=True)
        thread.start()
        self._open = True
        try:
            yield
        finally:
            self._open = False
            self._queue.put(None)
            with anyio.CancelScope(shield=True):  # bounded: the thread answers what is queued and ends
                await self._finished.wait()
            thread.join()

    async def submit(self, query: Unit[T], *arguments: Any) -> T:
        """Run a query in a transaction that sees every write committed before this call."""
        if not self._open:
            await anyio.lowlevel.checkpoint()
            raise closed()
        work = Work(query, arguments)
        self._queue.put(work)
        try:
            await work.done.wait()
        except anyio.get_cancelled_exc_class():
            work.withdrawn = True
            raise
        return work.outcome()

    def statistics(self) -> Mapping[str, int]:
        return {"reads": self._reads, "read_batches": self._batches, "waiting_reads": self._queue.qsize()}

    # In the reader's thread

    def _serve(self) -> None:
        serving = True
        while serving:
            batch, serving = self._gather()
            try:
                self._answer(batch)
            finally:
                self._wake(self._deliver, batch, not serving)

    def _gather(self) -> tuple[list[Work[Any]], bool]:
        batch: list[Work[Any]] = []
        work = self._queue.get()
        while work is not None:
            if not work.withdrawn:
                batch.append(work)
            if len(batch) == BATCH:
                return batch, True
            try:
                work = self._queue.get_nowait()
            except queue.Empty:
                return batch, True
        return batch, False

    def _answer(self, batch: list[Work[Any]]) -> None:
        connection = self._connection
        attempts = ATTEMPTS
        while batch:
            try:
                self._read(batch)
                return
            except Exception as error:
                attempts -= 1
                passes = connection.may_pass(error) and attempts > 0
                connection.rollback()
                batch = [work for work in batch if not work.has_outcome]
                for work in () if passes else batch:
                    work.fail(explain(connection, error))
                if not passes:
                    return

    def _read(self, batch: list[Work[Any]]) -> None:
        """Raises what keeps the rest of the batch from being read."""
        connection = self._connection
        # Began after every read of the batch was asked for, so it sees what their callers have written.
        connection.begin_read()
        for work in batch:
            try:
                work.succeed(work.run(connection.tx))
            except Exception as error:
                if connection.may_pass(error):
                    raise
                work.fail(explain(connection, error))
                connection.rollback()  # after an error, PostgreSQL reads nothing more in a transaction
                connection.begin_read()
        connection.commit()

    # In the event loop

    def _deliver(self, batch: list[Work[Any]], finished: bool) -> None:
        self._batches += 1
        self._reads += len(batch)
        for work in batch:
            work.done.set()
        if finished:
            self._finished.set()


def _waker() -> Callable[..., object]:
    """How another thread makes the current event loop call a function, without waiting for it.

    `anyio.from_thread.run_sync` waits for the answer and would stop the reader for as long as the loop is busy.
    """
    native: Any = anyio.lowlevel.current_token().native_token
    wake: Callable[..., object] = getattr(native, "run_sync_soon", None) or native.call_soon_threadsafe
    return wake
