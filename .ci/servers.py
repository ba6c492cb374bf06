"""Servers for the tests: those that answer already, and for the others one of our own each.

    python .ci/servers.py

Prints `export CORRAL_TEST_..._URL=...` lines, then `ready`, and keeps what it has started until its standard input is
closed. Which server is where goes to standard error. Exit code 1: a server is neither there nor installed; the line says
which and what to do.

A server that answers at its default address is used as it is. Where the variable is set, that is where it must be.
"""

from __future__ import annotations

import logging
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from urllib.parse import urlsplit

import anyio

from llama_corral.supervision import SupportGroup, open_support_group
from llama_corral.testing.servers import ServerMissingError, ServerProcess

CONNECT_TIME = 5.0
"""Seconds that a server gets for its first answer."""
START_TIME = 90.0
"""Seconds that one of our own gets from its start to its first answer."""


class MissingError(Exception):
    """A server is neither there nor installed."""


async def ask_postgres(url: str) -> None:
    import psycopg

    def ask() -> None:
        with psycopg.connect(url, connect_timeout=int(CONNECT_TIME)) as connection:
            connection.execute("SELECT 1")

    await anyio.to_thread.run_sync(ask, abandon_on_cancel=True)


async def ask_redis(url: str) -> None:
    import coredis

    async with coredis.Redis.from_url(url) as client:
        await client.ping()


async def ask_nats(url: str) -> None:
    import nats

    async def quiet(_error: Exception) -> None:
        pass

    client = await nats.connect(url, connect_timeout=CONNECT_TIME, allow_reconnect=False, error_cb=quiet)
    try:
        await client.jetstream().account_info()
    finally:
        await client.close()


async def ask_rabbitmq(url: str) -> None:
    import aio_pika

    async with await aio_pika.connect(url, timeout=CONNECT_TIME) as connection:
        await connection.channel()


@dataclass(frozen=True)
class Wanted:
    """A server that tests need. `kept`: module and class of one of our own; `package`: Debian's."""

    name: str
    variable: str
    default: str
    ask: Callable[[str], Awaitable[None]]
    kept: str
    package: str


WANTED = (
    Wanted(
        "PostgreSQL",
        "CORRAL_TEST_POSTGRES_URL",
        "postgresql://postgres@127.0.0.1:5432/test",
        ask_postgres,
        "postgres:PostgresServer",
        "postgresql",
    ),
    Wanted("Redis", "CORRAL_TEST_REDIS_URL", "redis://127.0.0.1:6379", ask_redis, "redis:RedisServer", "redis-server"),
    Wanted("NATS", "CORRAL_TEST_NATS_URL", "nats://127.0.0.1:4222", ask_nats, "nats:NatsServer", "nats-server"),
    Wanted(
        "RabbitMQ",
        "CORRAL_TEST_RABBITMQ_URL",
        "amqp://guest:guest@127.0.0.1:5672/",
        ask_rabbitmq,
        "rabbitmq:RabbitMQServer",
        "rabbitmq-server",
    ),
)


async def problem(wanted: Wanted, url: str) -> str | None:
    """Why it cannot be used; None: it answers. Without the URL, which may hold a password."""
    try:
        with anyio.fail_after(CONNECT_TIME):
            await wanted.ask(url)
    except Exception as error:
        return type(error).__name__
    return None


async def find(wanted: Wanted, group: SupportGroup, folder: Path) -> str:
    """The URL of one that answers.

    Raises:
        MissingError: there is none, and none can be started.
    """
    began = time.monotonic()
    given = os.environ.get(wanted.variable)
    url = given or wanted.default
    found = await problem(wanted, url)
    place = urlsplit(url).netloc.rpartition("@")[2]
    if found is None:
        tell(f"{wanted.name}: answers at {place}")
        return url
    if given:
        raise MissingError(f"{wanted.name} does not answer at {place} ({found}), where {wanted.variable} says it is")
    try:
        server = make(wanted, group, folder)
    except ServerMissingError as error:
        raise MissingError(
            f"{wanted.name} does not answer at {place} ({found}), and {error}: apt-get install {wanted.package}, or say in "
            f"{wanted.variable} where one is"
        ) from None
    await server.start()
    with anyio.fail_after(START_TIME):
        while await problem(wanted, server.url) is not None:  # noqa: ASYNC110 -- between two attempts to connect
            await anyio.sleep(0.1)
    tell(f"{wanted.name}: nothing at {place}; one of our own on port {server.port}, {time.monotonic() - began:.1f} s")
    return server.url


def make(wanted: Wanted, group: SupportGroup, folder: Path) -> ServerProcess:
    module, _, name = wanted.kept.partition(":")
    own = folder / module
    own.mkdir(mode=0o755)
    kind: type[ServerProcess] = getattr(import_module(f"llama_corral.testing.servers.{module}"), name)
    return kind(group, own)


def tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


async def main() -> None:
    urls: dict[str, str] = {}

    async def note(wanted: Wanted) -> None:
        urls[wanted.variable] = await find(wanted, group, folder)

    with tempfile.TemporaryDirectory(prefix="corral-servers-") as place:
        folder = Path(place)
        folder.chmod(0o755)  # noqa: ASYNC240 -- for those that run as another user
        async with open_support_group() as group:
            async with anyio.create_task_group() as tasks:
                for wanted in WANTED:
                    tasks.start_soon(note, wanted)
            for variable, url in sorted(urls.items()):
                print(f"export {variable}={shlex.quote(url)}")
            print("ready", flush=True)
            await anyio.to_thread.run_sync(sys.stdin.read)


if __name__ == "__main__":
    logging.disable()  # clients log what is said below in one line
    try:
        anyio.run(main)
    except* MissingError as missing:
        for error in missing.exceptions:
            tell(f"{error}")
        sys.exit(1)
