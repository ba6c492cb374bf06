"""The servers that `benchmarks.queues` uses: those that the tests use, by the same variables. Nothing is left on them."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from urllib.parse import quote, urlsplit

VARIABLES = {
    "redis": ("CORRAL_TEST_REDIS_URL", "redis://127.0.0.1:6379"),
    "nats": ("CORRAL_TEST_NATS_URL", "nats://127.0.0.1:4222"),
    "rabbitmq": ("CORRAL_TEST_RABBITMQ_URL", "amqp://guest:guest@127.0.0.1:5672/"),
    "postgres": ("CORRAL_TEST_POSTGRES_URL", "postgresql://postgres@127.0.0.1:5432/test"),
}
_PORTS = {"redis": 6379, "nats": 4222, "amqp": 5672, "postgresql": 5432}
_TOPICS = ("bench", "hello", "nap", "control_plane", "dead_letter")
"""The last parts of the topics that the benchmarks use."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a queue is that nobody else uses. `url`: for a queue of ours; `alone`: for the client alone. `namespace`: what
    its topics begin with."""

    url: str
    alone: str
    namespace: str


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
def open_schema() -> Iterator[str]:
    """The URL of a PostgreSQL store in a schema that is made for the block and removed behind it."""
    import psycopg

    url, name = url_of("postgres"), f"corral_bench_{uuid.uuid4().hex[:12]}"
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(f"CREATE SCHEMA {name}")
        try:
            yield f"{url}{'&' if '?' in url else '?'}options={quote(f'-csearch_path={name}')}"
        finally:
            connection.execute(f"DROP SCHEMA {name} CASCADE")


@contextmanager
def open_place(kind: str) -> Iterator[Place]:
    """On the broker of `kind`. What the queue keeps there is removed behind the block."""
    name = f"corral-bench-{uuid.uuid4().hex[:12]}"
    url = url_of(kind)
    # A stream of its own; the names in other brokers begin with the namespace.
    own = f"{url}{'&' if '?' in url else '?'}stream={name}" if kind == "nats" else url
    try:
        yield Place(own, url, name)
    finally:
        asyncio.run(_FORGET[kind](url, name))


async def _forget_redis(url: str, name: str) -> None:
    import coredis

    client: coredis.Redis[bytes] = coredis.Redis.from_url(url)
    async with client:
        async for key in client.scan_iter(f"*{name}*"):
            await client.delete([key])


async def _forget_nats(url: str, name: str) -> None:
    import nats

    connection = await nats.connect(url)
    try:
        await connection.jetstream().delete_stream(name)
    except nats.js.errors.NotFoundError:
        pass
    finally:
        await connection.close()


async def _forget_rabbitmq(url: str, name: str) -> None:
    import aio_pika

    from llama_corral.queues.rabbitmq_topology import queue_name

    async with await aio_pika.connect(url) as connection, await connection.channel() as channel:
        for last in _TOPICS:
            await channel.queue_delete(queue_name(f"{name}.{last}", "default"))


_FORGET = {"redis": _forget_redis, "nats": _forget_nats, "rabbitmq": _forget_rabbitmq}
