"""Creating the tables, and leading an older schema forward."""

from __future__ import annotations

from collections.abc import Mapping

import sqlalchemy as sa
from sqlalchemy.engine.interfaces import Dialect

from ..exceptions import StoreError
from . import tables

# Written out and never changed: `tables` says what the newest version is, a migration what one version was.
_FROM_1 = (
    "ALTER TABLE corral_tasks ADD COLUMN retry TEXT",
    "ALTER TABLE corral_tasks ADD COLUMN wake_at DOUBLE",
    "ALTER TABLE corral_tasks ADD COLUMN retry_of TEXT",
    "ALTER TABLE corral_instances ADD COLUMN embedded BIGINT DEFAULT '0' NOT NULL",
    "ALTER TABLE corral_checkpoints ADD COLUMN event_count BIGINT DEFAULT '0' NOT NULL",
    "ALTER TABLE corral_checkpoints ADD COLUMN seal TEXT",
    "ALTER TABLE corral_contexts ADD COLUMN seal TEXT",
    (
        "CREATE TABLE corral_dead_letters (no INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, topic TEXT NOT NULL, "
        "reason TEXT NOT NULL, message TEXT NOT NULL, at DOUBLE NOT NULL)"
    ),
    "CREATE INDEX corral_dead_letters_at ON corral_dead_letters (at)",
    "DROP INDEX corral_tasks_deadline",
    (
        "CREATE INDEX corral_tasks_deadline ON corral_tasks (status, deadline) "
        "WHERE deadline IS NOT NULL AND owner IS NULL"
    ),
    "CREATE INDEX corral_tasks_wake ON corral_tasks (status, wake_at) WHERE wake_at IS NOT NULL",
    (
        "CREATE INDEX corral_tasks_start ON corral_tasks (status, not_before) "
        "WHERE not_before IS NOT NULL AND status = 'queued'"
    ),
    "CREATE INDEX corral_tasks_finished ON corral_tasks (finished_at) WHERE finished_at IS NOT NULL",
)

MIGRATIONS: Mapping[str, Mapping[int, tuple[str, ...]]] = {"sqlite": {1: _FROM_1}, "postgresql": {}}
"""By dialect: the SQL that leads from a schema version to the next one. Runs in one transaction with the new version row.
Version 1 was never on anything but SQLite."""


# Rows that are changed again and again: room beside them keeps a change that no index sees out of the indexes, what is dead
# goes before much of it has gathered, and how many of them are open is counted while that is still nearly true.
_STORAGE = tuple(
    f"ALTER TABLE {name} SET (fillfactor = 85, autovacuum_vacuum_scale_factor = 0.02, "
    "autovacuum_analyze_scale_factor = 0.01)"
    for name in ("corral_tasks", "corral_checkpoints")
)


def creation(dialect: Dialect) -> list[str]:
    """The statements that create every table and index."""
    statements: list[str] = []
    for table in tables.metadata.sorted_tables:
        statements.append(str(sa.schema.CreateTable(table).compile(dialect=dialect)))
        # A set of Core, ordered here so that two runs create the same file.
        indexes = sorted(table.indexes, key=lambda index: str(index.name))
        statements += [str(sa.schema.CreateIndex(index).compile(dialect=dialect)) for index in indexes]
    if dialect.name == "postgresql":
        statements += _STORAGE
    return statements


def steps_from(found: int, dialect: str) -> list[str]:
    """The statements that lead from the found version to ours.

    Raises:
        StoreError: the store was written by a newer llama-corral, or there is no way forward from it.
    """
    if found > tables.SCHEMA_VERSION:
        raise StoreError(
            f"The store has schema version {found}; this llama-corral knows versions up to {tables.SCHEMA_VERSION}.",
            hint="Start it with the llama-corral that wrote it, or a newer one.",
            found=found,
            known=tables.SCHEMA_VERSION,
        )
    steps: list[str] = []
    for version in range(found, tables.SCHEMA_VERSION):
        if version not in MIGRATIONS[dialect]:
            raise StoreError(
                f"The store has schema version {found}, from which no migration is known.",
                hint="Restore it from a backup, or start with an empty store.",
                found=found,
            )
        steps += MIGRATIONS[dialect][version]
    return steps
