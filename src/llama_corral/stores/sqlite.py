"""SQLite: one process, one file (or memory), a connection for the writer and one for the reader."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from ..exceptions import BadInput, CorralError, StoreError, StoreUnavailable
from ..protocol.sealing import Sealer
from . import schema, tables
from .process_lock import ProcessLock
from .statements import DIALECTS, Statements, statements_for
from .transaction import Durability, Names, Transaction

APPLICATION_ID: Final = 0x4C4C4352  # "LLCR" in the header of the file: it is ours
_MAGIC: Final = b"SQLite format 3\0"
_APPLICATION_ID_AT: Final = slice(68, 72)
_BUSY_TIMEOUT: Final = 5.0  # seconds; only a program that ignores our lock, such as a shell, makes us wait

_HINTS: Final = {
    "SQLITE_FULL": "Free some space on its disk.",
    "SQLITE_BUSY": "Another program has the file open; close it.",
    "SQLITE_READONLY": "Make the file and its directory writable.",
    "SQLITE_CORRUPT": "Restore the file from a backup.",
    "SQLITE_NOTADB": "Restore the file from a backup.",
}


class SqliteConnection:
    """One connection, used by one thread at a time. See `transaction.Connection`."""

    def __init__(self, connection: sqlite3.Connection, sql: Statements, sealer: Sealer | None) -> None:
        self._connection = connection
        self._cursor = connection.cursor()
        self.tx = Transaction(self._cursor, sql, sealer)

    def arrange(self, names: Sequence[Names]) -> list[list[int]]:
        return [list(range(len(names)))] if names else []

    def begin(self, names: Sequence[Names] = ()) -> None:
        self._cursor.execute("BEGIN IMMEDIATE")

    def begin_read(self) -> None:
        self._cursor.execute("BEGIN")

    def commit(self) -> None:
        self._cursor.execute("COMMIT")

    def rollback(self) -> None:
        try:
            if self._connection.in_transaction:
                self._cursor.execute("ROLLBACK")
        except sqlite3.Error:
            # SQLite undoes what is open when the connection goes; the error that led here is the one to report.
            return

    def savepoint(self) -> None:
        self._cursor.execute("SAVEPOINT unit")

    def release_savepoint(self) -> None:
        self._cursor.execute("RELEASE unit")

    def rollback_to_savepoint(self) -> bool:
        if not self._connection.in_transaction:  # a full disk, for one, undoes the whole transaction
            return False
        self._cursor.execute("ROLLBACK TO unit")
        self._cursor.execute("RELEASE unit")
        return True

    def may_pass(self, error: Exception) -> bool:
        return False

    def translate(self, error: Exception) -> CorralError | None:
        return translate(error)

    def hurry(self, seconds: float) -> None:
        """A file answers or fails by itself."""

    def close(self) -> None:
        self._connection.close()


def translate(error: Exception) -> CorralError | None:
    """What a caller is told of an error of sqlite3; None where it is a fault of ours."""
    unbindable = isinstance(error, sqlite3.ProgrammingError) and str(error).startswith("Error binding")
    if unbindable or isinstance(error, (sqlite3.DataError, UnicodeEncodeError, OverflowError)):
        # A lone surrogate, a number beyond 64 bits, a text beyond SQLite's limit.
        return BadInput(f"A value cannot be stored: {error}")
    if isinstance(error, sqlite3.IntegrityError) or not isinstance(error, sqlite3.Error):
        return None
    return StoreUnavailable(f"The store failed: {error}", hint=_hint(error))


def _hint(error: sqlite3.Error) -> str | None:
    name = getattr(error, "sqlite_errorname", None) or ""
    return next((hint for prefix, hint in _HINTS.items() if name.startswith(prefix)), None)


class SqliteDatabase:
    """The file behind a store. Every method may block: call them in a worker thread, unless the store is in memory.

    Args:
        path: None for a store in memory, which has one connection and ends with it.
        durable: "normal" survives a SIGKILL of the process, "full" also a loss of power.
        sealer: What seals the state that runs go on from.
    """

    exclusive = True
    batch_size = 256

    def __init__(self, path: Path | None, durable: Durability, sealer: Sealer | None = None) -> None:
        self.path = path
        self.inline = path is None
        self._sealer = sealer
        self._file: Path | str = ":memory:"
        self._durable = durable
        self._sql = statements_for("sqlite")
        self._lock: ProcessLock | None = None

    def open(self) -> None:
        """Take the store for this process, and create or migrate its tables.

        Raises:
            StoreError: it cannot be used; the hint says what to do.
        """
        if self.path is None:
            return
        # Once, as the working directory may change: one file, one lock, whatever links lead to it.
        self._file = path = Path(os.path.realpath(self.path))
        _check_is_ours(path)
        self._lock = ProcessLock(path)
        try:
            connection = self._connect()
            try:
                _prepare(connection, path)
                connection.execute("PRAGMA journal_mode = WAL")
            finally:
                connection.close()
        except sqlite3.Error as error:
            self.close()
            raise _unusable(path, error) from error
        except BaseException:
            self.close()
            raise

    def connect(self) -> SqliteConnection:
        """A connection of its own for whoever asks; of a store in memory, a store of its own too."""
        connection = self._connect()
        if self.path is None:
            _prepare(connection, None)
            return SqliteConnection(connection, self._sql, self._sealer)
        connection.execute("PRAGMA synchronous = " + self._durable.upper())
        connection.execute("PRAGMA temp_store = MEMORY")
        connection.execute("PRAGMA cache_size = -16000")  # KiB
        # After a burst the log is cut to this; without a limit the file stays as large as it ever was.
        connection.execute("PRAGMA journal_size_limit = 67108864")
        return SqliteConnection(connection, self._sql, self._sealer)

    def close(self) -> None:
        """Give the store back to other processes. Close the connections first."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _connect(self) -> sqlite3.Connection:
        return sqlite3.connect(
            self._file, timeout=_BUSY_TIMEOUT, isolation_level=None, check_same_thread=False, cached_statements=256
        )


def _check_is_ours(path: Path) -> None:
    """Look without touching: a file of somebody else stays as it is, down to its journal mode."""
    try:
        with path.open("rb") as file:
            header = file.read(100)
    except FileNotFoundError:
        if not path.parent.is_dir():
            raise StoreError(
                f"The directory of the store does not exist: {path.parent}", hint="Create it, or name another file."
            ) from None
        return
    except OSError as error:
        raise _unusable(path, error) from error
    if not header:
        return
    if not header.startswith(_MAGIC):
        raise StoreError(f"The file is not an SQLite database: {path}", hint="Name another file for the store.")
    if int.from_bytes(header[_APPLICATION_ID_AT], "big") == APPLICATION_ID:
        return
    try:
        connection = sqlite3.connect(path.as_uri() + "?mode=ro&immutable=1", uri=True)
        try:
            (count,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        finally:
            connection.close()
    except sqlite3.Error as error:
        raise _unusable(path, error) from error
    if count:
        raise StoreError(f"The database belongs to another program: {path}", hint="Name another file for the store.")


def _prepare(connection: sqlite3.Connection, path: Path | None) -> None:
    """Create the tables in an empty database, or lead an older schema forward: in one transaction."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        (count,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if count:
            statements = schema.steps_from(_schema_version(connection, path), "sqlite")
        else:
            # Before WAL is switched on, so that the header says whose the file is even if we are killed right after.
            statements = [f"PRAGMA application_id = {APPLICATION_ID}", *schema.creation(DIALECTS["sqlite"]())]
        if statements:
            for statement in statements:
                connection.execute(statement)
            version = {"key": "schema_version", "value": str(tables.SCHEMA_VERSION)}
            connection.execute(statements_for("sqlite").put_meta, version)
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def _schema_version(connection: sqlite3.Connection, path: Path | None) -> int:
    row = connection.execute(statements_for("sqlite").get_meta, {"key": "schema_version"}).fetchone()
    if row is None or not str(row[0]).isdecimal():
        raise StoreError(f"The store does not say its schema version: {path}", hint="Restore it from a backup.")
    return int(row[0])


def _unusable(path: Path, error: Exception) -> StoreError:
    hint = _hint(error) if isinstance(error, sqlite3.Error) else None
    return StoreError(
        f"The store cannot be used: {path}: {error}", hint=hint or "Check that the file and its directory are writable."
    )
