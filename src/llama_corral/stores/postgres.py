"""PostgreSQL: any number of control planes, each with a connection for its writer and one for its reader.

A transaction that writes is READ COMMITTED, so each of its statements sees what others have committed before it. What keeps
a unit right that reads before it writes:

* A row that it decides by is read FOR UPDATE, or changed by one statement whose conditions are looked at again when the row
  was not free at once (`claim`, `report`). Whatever belongs to a task - events, inbox, checkpoint - changes only in a
  transaction that has locked the row of the task.
* Who stands in the line of (session, service), and whether the session is there at all, changes only in a transaction that
  has locked the row of the session (`hold_lines`): accept, every ending, freeing the next, deleting. Its statements begin
  after it has the lock, so they see what the one before it did.
* An insertion that must happen once has a unique key and ON CONFLICT, which waits for whoever is just inserting the same;
  what it finds then is read anew.
* Numbers are counted by the statement that writes them (heartbeat, epochs, versions), and never written back from a value
  that was read.
* Units that take many rows (`take`) leave out what others are at, and then wait for it.

Locks are taken in one order, so that transactions wait for each other and not in a circle: the sessions of all units of the
batch by their ids, then tasks by theirs. What comes out of order is rare; the server ends one of the two, which is redone.
"""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Final

import psycopg
from psycopg import errors
from psycopg.pq import TransactionStatus

from ..exceptions import CorralError, StoreError, StoreUnavailable
from ..protocol.records import EventRecord
from ..protocol.sealing import Sealer
from . import postgres_schema
from .postgres_server import Link, Server, hint_of
from .statements import Logging, Statements, Taking, statements_for
from .transaction import Durability, Names, Row, Transaction

logger = logging.getLogger(__name__)

PATIENCE: Final = 2.0
"""Seconds that callers wait for a server that has just gone; later ones are told at once that it is away."""
PAUSE: Final = 0.1
LONGEST_PAUSE: Final = 2.0
_TRIED_AGAIN: Final = "It is looked for every few seconds."

_VICTIMS: Final = (errors.DeadlockDetected, errors.SerializationFailure, errors.LockNotAvailable)


class CommitInDoubtError(Exception):
    """The connection was lost in a COMMIT: it may have been stored."""


class SharedTransaction(Transaction):
    """A transaction beside those of others."""

    __slots__ = ("_held",)

    def __init__(self, cursor: Any, sql: Statements, sealer: Sealer | None = None) -> None:
        super().__init__(cursor, sql, sealer)
        self._held: set[str] = set()

    def begun(self) -> None:
        """It has no locks yet."""
        self._held.clear()

    def run_many(self, sql: str, rows: Iterable[Mapping[str, Any]]) -> None:
        rows = list(rows)
        if len(rows) == 1:  # for many, psycopg waits once; for one, that costs more than it spares
            self._cursor.execute(sql, rows[0])
        else:
            self._cursor.executemany(sql, rows)

    def take(
        self, which: Taking, values: Mapping[str, Any], limit: int = sys.maxsize, *, wait: bool = True
    ) -> list[Row]:
        assert which.free is not None
        if limit <= 0:
            return []
        limited = {**values, "limit": limit}
        if which.lines is not None:
            self._held.update(session_id for (session_id,) in self.all(which.lines, limited))
        rows = self.all(which.free, limited)
        if wait and len(rows) < limit:
            taken = {row[0] for row in rows}
            rows += [row for row in self.all(which.rows, limited) if row[0] not in taken][: limit - len(rows)]
        return rows

    def hold_lines(self, sessions: Collection[str] = (), *, of_tasks: Collection[str] = ()) -> None:
        missing = [session_id for session_id in sessions if session_id not in self._held]
        if of_tasks:
            rows = self.all(self.sql.lock_lines_of, {"tasks": list(of_tasks), "sessions": missing})
        elif len(missing) == 1:
            rows = self.all(self.sql.lock_line, {"session_id": missing[0]})
        elif missing:
            rows = self.all(self.sql.lock_lines, {"sessions": missing})
        else:
            return
        self._held.update(session_id for (session_id,) in rows)

    def hold_tasks(self, session_id: str) -> None:
        self.all(self.sql.lock_tasks, {"session_id": session_id})

    def log(self, change: Logging, values: Mapping[str, Any], events: Sequence[EventRecord]) -> Row | None:
        if not events:
            return self.one(change.change, values)
        assert change.with_events is not None
        columns = {"types": [each.type for each in events], "payloads": [each.payload for each in events]}
        return self.one(change.with_events, {**values, **columns})


class PostgresConnection:
    """One connection, used by one thread at a time, made again when it is lost. See `transaction.Connection`.

    Raises:
        StoreError, psycopg.Error: there is none to begin with.
    """

    def __init__(self, database: PostgresDatabase) -> None:
        self._database = database
        self._ends_at = math.inf
        self._down_since: float | None = None
        self._next_attempt = 0.0
        self._pause = PAUSE
        self._why = "it was closed"
        self._away = StoreUnavailable("The store is away.", hint=_TRIED_AGAIN)
        self._use(database.link())

    def _use(self, link: Link) -> None:
        self._link = link
        link.ends_at = self._ends_at
        self._cursor = link.cursor()
        self._tx = SharedTransaction(self._cursor, self._database.sql, self._database.sealer)

    @property
    def tx(self) -> SharedTransaction:
        return self._tx

    # Transactions

    def arrange(self, names: Sequence[Names]) -> list[list[int]]:
        shared = [number for number, each in enumerate(names) if not each.alone]
        shared.sort(key=lambda number: names[number].task)
        groups = [[number] for number, each in enumerate(names) if each.alone]
        return [shared, *groups] if shared else groups

    def begin(self, names: Sequence[Names] = ()) -> None:
        self._begin("BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE")
        sessions = {session_id for each in names for session_id in each.sessions}
        of_tasks = {task_id for each in names for task_id in each.sessions_of}
        self._tx.hold_lines(sessions, of_tasks=of_tasks)

    def begin_read(self) -> None:
        self._begin("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")

    def _begin(self, how: str) -> None:
        if self._link.closed:
            self._connect_again()
        self._tx.begun()
        self._cursor.execute(how.encode())

    def commit(self) -> None:
        try:
            self._cursor.execute(b"COMMIT")
        except psycopg.Error as error:
            if not self._link.closed:
                raise
            self._why = self._database.server.why(error)
            raise CommitInDoubtError from error
        if self._cursor.statusmessage != "COMMIT":
            raise errors.InFailedSqlTransaction("the server has rolled back instead of committing")

    def rollback(self) -> None:
        if self._link.closed or self._link.info.transaction_status is TransactionStatus.IDLE:
            return
        try:
            self._cursor.execute(b"ROLLBACK")
        except psycopg.Error:
            # The server undoes what is open when the connection goes; the error that led here is the one to report.
            self._link.close()

    def savepoint(self) -> None:
        self._cursor.execute(b"SAVEPOINT unit")

    def release_savepoint(self) -> None:
        self._cursor.execute(b"RELEASE SAVEPOINT unit")

    def rollback_to_savepoint(self) -> bool:
        try:
            self._cursor.execute(b"ROLLBACK TO SAVEPOINT unit")
            self._cursor.execute(b"RELEASE SAVEPOINT unit")
        except psycopg.Error:
            self._link.close()
            return False
        self._tx.begun()  # locks taken since are gone; to lock a second time what is still locked does no harm
        return True

    # Failures

    def may_pass(self, error: Exception) -> bool:
        if isinstance(error, errors.ReadOnlySqlTransaction):
            self._link.close()  # it is not the primary any more; another server may be, at the next connection
        if not isinstance(error, psycopg.Error):
            return False
        if self._link.closed:
            self._why = self._database.server.why(error)
            return True
        return isinstance(error, _VICTIMS)

    def translate(self, error: Exception) -> CorralError | None:
        if isinstance(error, CommitInDoubtError):
            return StoreUnavailable(
                "The connection to the store was lost in a commit: whether it was stored is not known.",
                hint="Repeat the call with the same ids.",
                in_doubt=True,
            )
        if isinstance(error, StoreUnavailable):  # of `_connect_again`; each caller gets one of its own
            return StoreUnavailable(error.message, hint=error.hint)
        return self._database.server.translate(error)

    def _connect_again(self) -> None:
        """Raises StoreUnavailable after a short patience; while the server stays away, at once between attempts."""
        now = time.monotonic()
        if self._down_since is None:
            self._down_since, self._next_attempt, self._pause = now, 0.0, PAUSE
            logger.warning("the connection to the store was lost: %s", self._why)
        while now >= self._next_attempt and now < self._ends_at:
            try:
                self._use(self._database.link())
            except (psycopg.Error, StoreError) as error:
                self._away = self._told_of(error)
                now = time.monotonic()
                if isinstance(error, psycopg.Error) and now < self._down_since + PATIENCE:
                    time.sleep(self._pause)
                else:
                    self._next_attempt = now + self._pause
                    self._pause = min(2 * self._pause, LONGEST_PAUSE)
                now = time.monotonic()
            else:
                logger.info("connected to the store again, after %.1f s", time.monotonic() - self._down_since)
                self._down_since = None
                return
        raise StoreUnavailable(self._away.message, hint=self._away.hint)

    def _told_of(self, error: psycopg.Error | StoreError) -> StoreUnavailable:
        if isinstance(error, StoreError):
            return StoreUnavailable(error.message, hint=error.hint)
        why = self._database.server.why(error)
        return StoreUnavailable(f"The store is away: {why}", hint=hint_of(error) or _TRIED_AGAIN)

    # Closing

    def hurry(self, seconds: float) -> None:
        self._ends_at = self._link.ends_at = time.monotonic() + seconds

    def close(self) -> None:
        self._link.close()


class PostgresDatabase:
    """The database behind a store. Every method may block: call them in a worker thread.

    Args:
        url: As libpq reads it.
        durable: "full" asks the server for `synchronous_commit` where it would do without.
        sealer: What seals the state that runs go on from.

    Raises:
        StoreError: the URL cannot be read.
    """

    exclusive = False
    inline = False
    batch_size = 64

    def __init__(self, url: str, durable: Durability, sealer: Sealer | None = None) -> None:
        self.server = Server(url, durable)
        self.sealer = sealer
        self.sql = statements_for("postgresql")

    def open(self) -> None:
        """Create or migrate the tables; others that start at the same time wait for it.

        Raises:
            StoreError: it cannot be used; the hint says what to do.
        """
        try:
            link = self.server.connect()
            try:
                postgres_schema.prepare(link)
            finally:
                link.close()
        except psycopg.Error as error:
            raise self.server.unusable(error) from error

    def connect(self) -> PostgresConnection:
        """A connection of its own for whoever asks. Raises StoreError."""
        try:
            return PostgresConnection(self)
        except psycopg.Error as error:
            raise self.server.unusable(error) from error

    def link(self) -> Link:
        """A new connection to tables that stay as they are. Raises StoreError, psycopg.Error."""
        link = self.server.connect()
        try:
            postgres_schema.use(link)
        except BaseException:
            link.close()
            raise
        return link

    def close(self) -> None:
        """Connections hold all that there is to give back."""
