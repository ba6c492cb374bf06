"""Which database a URL names. Messages never repeat the URL: it may hold a password."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import sqlalchemy as sa

from ..exceptions import StoreError
from ..protocol.sealing import Sealer
from .sqlite import SqliteDatabase
from .transaction import Database, Durability

_HINT: Final = "Write sqlite:///path/to/file.db or postgresql://user:password@host/database."
_POSTGRES: Final = ("postgresql://", "postgres://")


def database_of(url: str, durable: Durability, sealer: Sealer | None) -> Database:
    """The database that a URL names; nothing of it is opened.

    Raises:
        StoreError: it names none that can be used.
    """
    if not url.startswith(_POSTGRES):
        return SqliteDatabase(sqlite_path(url), durable, sealer)
    try:
        from .postgres import PostgresDatabase
    except ImportError as error:
        raise StoreError(
            f"A PostgreSQL store needs a package that cannot be imported: {error}",
            hint="pip install 'llama-corral[postgres]'",
        ) from error
    return PostgresDatabase(url, durable, sealer)


def sqlite_path(url: str) -> Path | None:
    """The file that a URL names, None for a store in memory or on a server. Raises StoreError."""
    if url.startswith(_POSTGRES):
        return None
    try:
        parsed = sa.make_url(url)
        backend = parsed.get_backend_name()
    except sa.exc.ArgumentError:
        raise StoreError("The URL of the store cannot be read.", hint=_HINT) from None
    if backend != "sqlite":
        raise StoreError(f"There is no store for {backend!r}.", hint=_HINT)
    if parsed.query or parsed.host or parsed.username or parsed.password:
        raise StoreError(
            "The URL of an SQLite store is a path and nothing else.", hint="Write sqlite:///path/to/file.db."
        )
    return None if parsed.database in (None, "", ":memory:") else Path(parsed.database or "")
