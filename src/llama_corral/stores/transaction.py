"""One open transaction in the hands of a unit, and the connection it belongs to. Synchronous, one thread at a time."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

from ..exceptions import CorralError
from ..protocol.records import EventRecord
from ..protocol.sealing import Sealer
from .statements import Logging, Statements, Taking

Row = tuple[Any, ...]
Durability = Literal["normal", "full"]


class Cursor(Protocol):
    """What is used of a DBAPI cursor."""

    @property
    def rowcount(self) -> int: ...

    def execute(self, sql: str, parameters: Any = ..., /) -> Any: ...

    def executemany(self, sql: str, parameters: Any, /) -> Any: ...

    def fetchall(self) -> list[Any]: ...


class Names(NamedTuple):
    """What a unit names before it runs. A database with one writer needs none of it.

    `task`: the task (or other row) that it changes. `sessions`, `sessions_of`: sessions, and tasks of sessions, in whose
    lines it may change something. `alone`: it takes many rows or much time, and shares its transaction with nobody.
    """

    task: str = ""
    sessions: tuple[str, ...] = ()
    sessions_of: tuple[str, ...] = ()
    alone: bool = False


NAMELESS = Names()


class Transaction:
    """Runs statements on the cursor. `sql` holds their text: `tx.run(tx.sql.delete_inbox, {...})`. `sealer` seals and checks
    the state that runs go on from; None where no secret is set.

    This one is that of a database with one writer: whatever a unit has read stays as it is until the transaction ends. Where
    others write too, rows stay that were read for update, and the lines of sessions that are held."""

    __slots__ = ("_cursor", "sealer", "sql", "used_epochs")

    def __init__(self, cursor: Cursor, sql: Statements, sealer: Sealer | None = None) -> None:
        self._cursor = cursor
        self.sql = sql
        self.sealer = sealer
        self.used_epochs = 0
        """What `endings.used_epochs` said last: a guess, to be looked at again."""

    def run(self, sql: str, values: Mapping[str, Any]) -> int:
        """The number of rows that the statement changed."""
        self._cursor.execute(sql, values)
        return self._cursor.rowcount

    def run_many(self, sql: str, rows: Iterable[Mapping[str, Any]]) -> None:
        self._cursor.executemany(sql, rows)

    def one(self, sql: str, values: Mapping[str, Any]) -> Row | None:
        """The first row. Fetches all: a statement with RETURNING is complete only then."""
        self._cursor.execute(sql, values)
        rows = self._cursor.fetchall()
        return rows[0] if rows else None

    def all(self, sql: str, values: Mapping[str, Any]) -> list[Row]:
        self._cursor.execute(sql, values)
        return self._cursor.fetchall()

    def take(
        self, which: Taking, values: Mapping[str, Any], limit: int = sys.maxsize, *, wait: bool = True
    ) -> list[Row]:
        """Rows that nobody else changes until the transaction ends, and that still are what was asked for.

        Args:
            limit: Most of them, where the question has one.
            wait: Also for rows that another transaction is at: fewer than `limit` means that there are no others.
        """
        return self.all(which.rows, {**values, "limit": limit})

    def hold_lines(self, sessions: Collection[str] = (), *, of_tasks: Collection[str] = ()) -> None:
        """Nobody else adds a task to these sessions, ends or frees one in them, or deletes them, until the transaction ends.
        Those of `of_tasks` are the sessions of these tasks."""

    def hold_tasks(self, session_id: str) -> None:
        """Nobody else changes or takes away a task of this session, whose line is held, until the transaction ends."""

    def log(self, change: Logging, values: Mapping[str, Any], events: Sequence[EventRecord]) -> Row | None:
        """Change a task and append events to its log. The row that the change answers; None, and nothing is done, if its
        conditions do not hold."""
        row = self.one(change.change, values)
        if row is not None and events:
            task_no, event_count = row[:2]
            self.run_many(
                self.sql.insert_event,
                [
                    {
                        "task_no": task_no,
                        "idx": index,
                        "epoch": values["epoch"],
                        "type": each.type,
                        "payload": each.payload,
                    }
                    for index, each in enumerate(events, event_count - len(events))
                ],
            )
        return row


class Connection(Protocol):
    """A database connection as writer and reader need it; one for each of them."""

    @property
    def tx(self) -> Transaction:
        """What is open since `begin` or `begin_read`."""

    def arrange(self, names: Sequence[Names]) -> list[list[int]]:
        """Which of the units that name this are committed together, and in which order."""

    def begin(self, names: Sequence[Names] = ()) -> None:
        """Start a transaction that may write, of units that name this; waits for other writers, not for ever."""

    def begin_read(self) -> None:
        """Start a transaction that sees one state of the database."""

    def commit(self) -> None: ...

    def rollback(self) -> None:
        """Undo what is open. Never raises: whatever made it necessary is the error to report."""

    def savepoint(self) -> None: ...

    def release_savepoint(self) -> None: ...

    def rollback_to_savepoint(self) -> bool:
        """False if there is no transaction any more: some failures of a database undo all of it."""

    def may_pass(self, error: Exception) -> bool:
        """Whether the same transaction may succeed if it is begun again: it was undone for the sake of another one, or the
        connection was gone. Asked before `rollback`."""

    def translate(self, error: Exception) -> CorralError | None:
        """What a caller is told of an error of the database; None where the error is a fault of ours."""

    def hurry(self, seconds: float) -> None:
        """From another thread: whatever waits for the database gives up after so much more time."""

    def close(self) -> None: ...


class Database(Protocol):
    """Where connections come from. Every method may block: call them in a worker thread, unless it is `inline`."""

    exclusive: bool
    """As in `abc.Store`."""
    inline: bool
    """It blocks nobody: it is in memory, and has one connection."""
    batch_size: int
    """The most units that are committed together, if nobody says otherwise."""

    def open(self) -> None:
        """Create or migrate the tables.

        Raises:
            StoreError: it cannot be used; the hint says what to do.
        """

    def connect(self) -> Connection:
        """A connection of its own for whoever asks. Raises StoreError."""

    def close(self) -> None:
        """Close the connections first."""
