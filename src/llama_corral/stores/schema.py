"""Creating the tables, and leading an older schema forward."""

from __future__ import annotations

from collections.abc import Mapping

import sqlalchemy as sa
from sqlalchemy.engine.interfaces import Dialect

from ..exceptions import StoreError
from . import tables

MIGRATIONS: Mapping[int, tuple[str, ...]] = {}
"""The SQL that leads from a schema version to the next one. Runs in one transaction with the new version row."""


def creation(dialect: Dialect) -> list[str]:
    """The statements that create every table and index."""
    statements: list[str] = []
    for table in tables.metadata.sorted_tables:
        statements.append(str(sa.schema.CreateTable(table).compile(dialect=dialect)))
        # A set of Core, ordered here so that two runs create the same file.
        indexes = sorted(table.indexes, key=lambda index: str(index.name))
        statements += [str(sa.schema.CreateIndex(index).compile(dialect=dialect)) for index in indexes]
    return statements


def steps_from(found: int) -> list[str]:
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
        if version not in MIGRATIONS:
            raise StoreError(f"The store has schema version {found}, from which no migration is known.", found=found)
        steps += MIGRATIONS[version]
    return steps
