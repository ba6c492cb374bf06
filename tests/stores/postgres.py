"""A place in a PostgreSQL database for tests: a schema of their own, emptied for each of them."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final
from urllib.parse import quote, urlsplit

import pytest

from llama_corral.stores import tables

SERVER: Final = os.environ.get("CORRAL_TEST_POSTGRES_URL", "postgresql://postgres@127.0.0.1:5432/test")


class Place:
    """A schema. `url` leads a store to it; `execute` says something to it past any store."""

    def __init__(self) -> None:
        self.psycopg = pytest.importorskip("psycopg", reason="no psycopg for a server of CORRAL_TEST_POSTGRES_URL")
        where = urlsplit(SERVER)
        try:
            self.connection = self.psycopg.connect(SERVER, autocommit=True, connect_timeout=5)
        except self.psycopg.OperationalError:
            at = f"{where.hostname}:{where.port or 5432}"
            pytest.skip(f"no PostgreSQL at {at}: set CORRAL_TEST_POSTGRES_URL")
        self.schema = f"corral_test_{uuid.uuid4().hex[:12]}"
        self.execute(f"CREATE SCHEMA {self.schema}")
        self.execute(f"SET search_path = {self.schema}")
        self.url = self.url_with(f"-csearch_path={self.schema}")

    def url_with(self, options: str) -> str:
        return f"{SERVER}{'&' if '?' in SERVER else '?'}options={quote(options)}"

    def execute(self, text: str) -> list[tuple]:
        cursor = self.connection.execute(text)
        return cursor.fetchall() if cursor.description else []

    def empty(self) -> None:
        """As if the tables had just been created, if they have. A new schema takes longer by far."""
        if self.execute("SELECT to_regclass('corral_meta')") == [(None,)]:
            return
        names = [table.name for table in tables.metadata.sorted_tables]
        statements = [f"DELETE FROM {name}" for name in names if name != "corral_meta"]
        statements += ["DELETE FROM corral_meta WHERE key <> 'schema_version'"]
        statements += [f"SELECT setval('corral_{name}_no_seq', 1, false)" for name in ("tasks", "dead_letters")]
        self.connection.execute("; ".join(statements))

    def close(self) -> None:
        self.execute(f"DROP SCHEMA {self.schema} CASCADE")
        self.connection.close()


@contextmanager
def open_place() -> Iterator[Place]:
    place = Place()
    try:
        yield place
    finally:
        place.close()
