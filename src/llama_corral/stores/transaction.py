"""One open transaction in the hands of a unit, and the connection it belongs to. Synchronous, one thread at a time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from ..exceptions import CorralError
from ..protocol.sealing import Sealer
from .statements import Statements

Row = tuple[Any, ...]


class Cursor(Protocol):
    """What is used of a DBAPI cursor."""

    @property
    def rowcount(self) -> int: ...

    def execute(self, sql: str, parameters: Any = ..., /) -> Any: ...

    def executemany(self, sql: str, parameters: Any, /) -> Any: ...

    def fetchall(self) -> list[Any]: ...


class Transaction:
    """Runs statements on the cursor. `sql` holds their text: `tx.run(tx.sql.delete_inbox, {...})`. `sealer` seals and checks
    the state that runs go on from; None where no secret is set."""

    __slots__ = ("_cursor", "sealer", "sql")

    def __init__(self, cursor: Cursor, sql: Statements, sealer: Sealer | None = None) -> None:
        self._cursor = cursor
        self.sql = sql
        self.sealer = sealer

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


class Connection(Protocol):
    """A database connection as writer and reader need it; one for each of them."""

    tx: Transaction

    def begin(self) -> None:
        """Start a transaction that may write; waits for other writers, not for ever."""

    def begin_read(self) -> None:
        """Start a transaction that sees one state of the database."""

    def commit(self) -> None: ...

    def rollback(self) -> None:
        """Undo what is open. Never raises: whatever made it necessary is the error to report."""

    def savepoint(self) -> None: ...

    def release_savepoint(self) -> None: ...

    def rollback_to_savepoint(self) -> bool:
        """False if there is no transaction any more: some failures of a database undo all of it."""

    def translate(self, error: Exception) -> CorralError | None:
        """What a caller is told of an error of the database; None where the error is a fault of ours."""

    def close(self) -> None: ...
