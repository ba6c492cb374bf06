"""Where the servers are that `benchmarks.queues` uses: those that the tests use, by the same variables."""

from __future__ import annotations

import os
import socket
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit, urlunsplit

VARIABLES = {
    "redis": ("CORRAL_TEST_REDIS_URL", "redis://127.0.0.1:6379"),
    "nats": ("CORRAL_TEST_NATS_URL", "nats://127.0.0.1:4222"),
    "rabbitmq": ("CORRAL_TEST_RABBITMQ_URL", "amqp://guest:guest@127.0.0.1:5672/"),
    "postgres": ("CORRAL_TEST_POSTGRES_URL", "postgresql://postgres@127.0.0.1:5432/test"),
}
_PORTS = {"redis": 6379, "nats": 4222, "amqp": 5672, "postgresql": 5432}


def url_of(name: str) -> str:
    """Of a server that the tests use."""
    variable, default = VARIABLES[name]
    return os.environ.get(variable, default)


def available(names: list[str]) -> list[str]:
    """Those that need no server or whose server can be reached; says which cannot, and how to say where it is."""
    there = []
    for name in names:
        missing = [server for server in VARIABLES if server in name and not _reachable(url_of(server))]
        for server in missing:
            print(f"without {name}: {server} does not answer; set {VARIABLES[server][0]}", file=sys.stderr)
        if not missing:
            there.append(name)
    return there


def _reachable(url: str) -> bool:
    parts = urlsplit(url)
    try:
        socket.create_connection((parts.hostname or "127.0.0.1", parts.port or _PORTS[parts.scheme]), timeout=3).close()
    except OSError:
        return False
    return True


@contextmanager
def open_database() -> Iterator[str]:
    """The URL of a PostgreSQL database that is made for the block and removed behind it."""
    import psycopg

    url, name = url_of("postgres"), f"corral_bench_{uuid.uuid4().hex[:12]}"
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
        try:
            yield urlunsplit(urlsplit(url)._replace(path=f"/{name}"))
        finally:
            connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


@contextmanager
def open_namespace(broker: str) -> Iterator[str]:
    """A topic namespace that nobody else uses; what the broker keeps of it is removed behind the block."""
    yield f"corral-bench-{uuid.uuid4().hex[:12]}"
