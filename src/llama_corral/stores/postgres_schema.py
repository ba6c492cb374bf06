"""The tables in a PostgreSQL database: created or led forward by whoever comes first, while the others wait."""

from __future__ import annotations

import math
from typing import Final

from psycopg import errors

from ..exceptions import StoreError
from . import schema, tables
from .postgres_server import Link
from .statements import DIALECTS, statements_for

OLDEST_SERVER: Final = 12

# One who creates or changes tables holds the first; everyone who uses them, shared, the second: nobody changes tables under
# a control plane that knows them as they were. Both go with the connection, however it ends.
_KEY: Final = "hashtextextended('llama-corral ' || current_schema() || '{}', 0)"
_ALONE: Final = f"SELECT pg_advisory_xact_lock({_KEY.format('/setup')})"
_NOBODY_ELSE: Final = f"SELECT pg_advisory_xact_lock({_KEY.format('/use')})"
_IN_USE: Final = f"SELECT pg_try_advisory_lock_shared({_KEY.format('/use')})"

# Not to_regclass: it remembers what was not there before we waited for whoever was creating it.
_IS_THERE: Final = """
SELECT 1 FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace
WHERE relname = 'corral_meta' AND nspname = ANY (current_schemas(false))
"""
_LOCK_TIME: Final = "30s"


def prepare(link: Link) -> None:
    """Create the tables in a database that has none of ours, or lead an older schema forward, in one transaction.

    Raises:
        StoreError: the database cannot be used.
        psycopg.Error: it failed.
    """
    _check_server(link)
    found = _version(link)
    if found is not None and not schema.steps_from(found, "postgresql"):
        return
    with link.transaction():
        link.execute(f"SET LOCAL lock_timeout = '{_LOCK_TIME}'")
        link.execute("SET LOCAL statement_timeout = 0")
        link.execute(_ALONE)
        found = _version(link)
        if found is None:
            steps = schema.creation(DIALECTS["postgresql"]())
        elif steps := schema.steps_from(found, "postgresql"):
            _wait_for_others(link, found)
        link.patience = math.inf  # as long as it takes: the server is at work
        try:
            for step in steps:
                link.execute(step.encode())
        except errors.DuplicateTable as error:
            raise StoreError(
                "The database has tables whose names begin with corral_, and no version of them: they are of another "
                "program, or damaged.",
                hint="Use another database or schema for the store, or restore it from a backup.",
            ) from error
        if steps:
            version = {"key": "schema_version", "value": str(tables.SCHEMA_VERSION)}
            link.execute(statements_for("postgresql").put_meta.encode(), version)


def use(link: Link) -> None:
    """Keep the tables as they are for as long as this connection lasts.

    Raises:
        StoreError: they are being changed, or are not those that this llama-corral knows.
    """
    row = link.execute(_IN_USE).fetchone()
    if row is None or not row[0]:
        raise StoreError("Another process is changing the tables of the store.", hint="Try again when it is done.")
    found = _version(link)
    if found is None or schema.steps_from(found, "postgresql"):
        raise StoreError(
            f"The tables of the store are of version {found}, not {tables.SCHEMA_VERSION} any more.",
            hint="Start this process again.",
            found=found,
            known=tables.SCHEMA_VERSION,
        )


def _wait_for_others(link: Link, found: int) -> None:
    try:
        link.execute(_NOBODY_ELSE)
    except errors.LockNotAvailable as error:
        raise StoreError(
            f"The store has the older schema version {found}, and other control planes use it.",
            hint="Stop them first: they cannot use the newer one.",
            found=found,
            known=tables.SCHEMA_VERSION,
        ) from error


def _check_server(link: Link) -> None:
    if link.info.server_version < OLDEST_SERVER * 10_000:
        raise StoreError(f"The server is older than PostgreSQL {OLDEST_SERVER}.", hint="Use a newer one.")
    encoding = link.info.parameter_status("server_encoding")
    if encoding != "UTF8":
        raise StoreError(f"The database is encoded as {encoding}.", hint="Create one with ENCODING 'UTF8'.")
    row = link.execute("SELECT current_schema()").fetchone()
    if row is None or row[0] is None:
        raise StoreError(
            "The search_path names no schema that exists.", hint="CREATE SCHEMA, or name another search_path."
        )


def _version(link: Link) -> int | None:
    """None where there are no tables of ours."""
    if link.execute(_IS_THERE).fetchone() is None:
        return None
    try:
        row = link.execute(statements_for("postgresql").get_meta.encode(), {"key": "schema_version"}).fetchone()
    except errors.UndefinedColumn:
        row = None
    if row is None or not str(row[0]).isdecimal():
        raise StoreError("The store does not say its schema version.", hint="Restore it from a backup.")
    return int(row[0])
