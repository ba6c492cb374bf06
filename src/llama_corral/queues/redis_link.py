"""One connection to a Redis server that is opened again whenever it is lost.

It sits on coredis' connections, not on its client and pool: those drop a connection whose reader was cancelled, and with it
the messages that the server had handed out. Here a request that nobody waits for any more is answered all the same, and
its answer can be asked for later.
"""

from __future__ import annotations

import logging
import math
import ssl
from collections.abc import Awaitable, Callable
from typing import Any, Final

import anyio
import anyio.abc
from coredis import exceptions as redis

from ..exceptions import CorralError, QueueUnavailable, SetupError
from ..supervision import Backoff, open_support_group
from .redis_connection import Connection, RedisAddress, run_connection
from .redis_scripts import Argument

logger = logging.getLogger(__name__)

ANSWER_TIME: Final = 10.0
"""Seconds after which a server that does not answer counts as lost."""
LEAST_ANSWER_TIME: Final = 2.0
"""Seconds that a request gets however little patience is left."""
PING_PERIOD: Final = 15.0
"""Seconds between two looks whether an idle connection still has somebody at its other end."""
OLDEST_SERVER: Final = (6, 2)

LOST: Final = (redis.ConnectionError, redis.ReadOnlyError, TimeoutError)
"""Errors after which a connection is to be opened again: it is lost, or leads to a server that cannot do anything now (it
loads its data, it is a replica)."""

_TLS_LOST: Final = (ssl.SSLEOFError, ssl.SSLZeroReturnError, ssl.SSLSyscallError)


class RedisLink:
    """`await group.start(link.keep)`, then `await link.ask(b"PING")`: commands of any number of tasks over one connection.

    Args:
        name: What the connection is for, in logs.
        patience: Seconds for which the first connection is tried.
        prepare: Called with each new connection before others may use it; what it raises ends the connection.
        serve: Called with each connection that may be used, to run until it is lost.
        pinged: Whether an idle connection is looked after. Not for one that waits in a blocking command.

    Attributes:
        connection: The open one, None while there is none.
        reconnects: How often it was opened again.
    """

    def __init__(
        self,
        address: RedisAddress,
        *,
        name: str,
        patience: float,
        prepare: Callable[[Connection], Awaitable[None]] | None = None,
        serve: Callable[[Connection], Awaitable[None]] | None = None,
        pinged: bool = False,
    ) -> None:
        self.address = address
        self.connection: Connection | None = None
        self.reconnects = -1
        self._name = name
        self._patience = patience
        self._prepare = prepare
        self._serve = serve
        self._pinged = pinged
        self._backoff = Backoff(initial=0.05, maximum=2.0, healthy_after=5.0)
        self._scope: anyio.CancelScope | None = None
        self._closed = False
        self._up = anyio.Event()
        self._reason: BaseException | None = None

    # Keeping it

    async def keep(self, *, task_status: anyio.abc.TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Keep the connection open until `close`. Started when it is open for the first time.

        Raises:
            QueueUnavailable: it could not be opened within `patience` seconds.
            SetupError: it never will be: wrong password, wrong certificate, a server too old.
        """
        if self._closed:
            raise self.trouble()
        with anyio.CancelScope() as self._scope:
            failures, give_up = 0, anyio.current_time() + self._patience
            while True:
                begun = anyio.current_time()
                try:
                    await self._live(task_status)
                except (redis.RedisError, OSError, CorralError) as error:
                    self._reason = error
                    failures += 1
                else:
                    is_healthy = anyio.current_time() - begun >= self._backoff.healthy_after
                    failures = 1 if is_healthy else failures + 1
                delay = self._backoff.delay(failures)
                if self.reconnects < 0:
                    trouble = self.trouble()
                    if isinstance(trouble, SetupError) or anyio.current_time() + delay > give_up:
                        raise trouble from self._reason
                level = logging.WARNING if failures == 1 else logging.DEBUG
                logger.log(level, "the %s connection to Redis is opened again: %s", self._name, self.trouble())
                await anyio.sleep(delay)

    async def _live(self, task_status: anyio.abc.TaskStatus[None]) -> None:
        """One connection, from its opening to its end."""
        lost = anyio.Event()
        async with open_support_group() as group:
            connection = await group.start(self._run, lost, name=f"Redis connection ({self._name})")
            check_version(connection)
            if self._prepare is not None:
                await self._prepare(connection)
            self.connection, self._reason = connection, None
            self.reconnects += 1
            if self.reconnects:
                logger.info("the %s connection to Redis is open again", self._name)
            else:
                task_status.started()
            if self._serve is not None:
                group.start_soon(self._serve, connection, name=f"Redis {self._name}")
            self._up.set()
            try:
                await self._watch(connection, lost)
            finally:
                self._down(redis.ConnectionError("the connection was lost"))

    async def _run(self, lost: anyio.Event, *, task_status: anyio.abc.TaskStatus[Connection]) -> None:
        try:
            await run_connection(self.address, task_status=task_status)
        finally:
            lost.set()

    async def _watch(self, connection: Connection, lost: anyio.Event) -> None:
        """Return when the connection is lost, and see to it that this is noticed."""
        while not lost.is_set():
            with anyio.move_on_after(PING_PERIOD if self._pinged else math.inf):
                await lost.wait()
                return
            try:
                await connection.create_request(b"PING", timeout=ANSWER_TIME)
            except (redis.RedisError, TimeoutError) as error:
                self.drop(connection, error)

    def close(self) -> None:
        """End it. Whoever waits for it is told."""
        self._closed = True
        self._up.set()
        if self._scope is not None:
            self._scope.cancel()

    def drop(self, connection: Connection, reason: BaseException) -> None:
        """Do not use this connection any more; open another one."""
        if connection is self.connection:
            self._down(reason)
        connection.invalidate(str(reason))

    def _down(self, reason: BaseException) -> None:
        self.connection = None
        self._reason = self._reason or reason
        if self._up.is_set():
            self._up = anyio.Event()

    # Using it

    async def wait_open(self, deadline: float = math.inf) -> Connection:
        """The connection, as soon as there is one.

        Raises:
            QueueUnavailable: closed, or it is away beyond the deadline.
        """
        with anyio.CancelScope(deadline=deadline):
            while not self._closed:
                if self.connection is not None:
                    return self.connection
                await self._up.wait()
        raise self.trouble()

    async def ask(self, command: bytes, *arguments: Argument, patience: float) -> Any:
        """The answer to a command. It is sent again when the connection was lost, for `patience` seconds, so the server may
        see it twice. Not cancelled: cancelling the call leaves open whether the server does it.

        Raises:
            QueueUnavailable: there was no answer in time; or the answer is that it cannot be done now.
            SetupError: the server refuses us.
        """
        deadline = anyio.current_time() + patience
        while True:
            connection = self.connection or await self.wait_open(deadline)
            begun = anyio.current_time()
            try:
                timeout = min(ANSWER_TIME, max(LEAST_ANSWER_TIME, deadline - begun))
                return await connection.create_request(command, *arguments, timeout=timeout)
            except LOST as error:
                if not isinstance(error, TimeoutError) or anyio.current_time() - begun >= ANSWER_TIME:
                    self.drop(connection, error)
                if anyio.current_time() >= deadline:
                    raise explain(error, self.address) from error
            except redis.NoScriptError:
                raise
            except redis.RedisError as error:
                raise explain(error, self.address) from error

    def trouble(self) -> CorralError:
        """Why there is no connection."""
        if self._closed:
            return QueueUnavailable("The queue is closed", hint="Use it inside its `async with` block.")
        return explain(self._reason or TimeoutError("no answer"), self.address)


def check_version(connection: Connection) -> None:
    """Raises SetupError."""
    version = connection.server_version or ""
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if numbers < OLDEST_SERVER:
        raise SetupError(
            f"The Redis server is version {version}, which is too old",
            hint=f"Use {'.'.join(map(str, OLDEST_SERVER))} or newer.",
            version=version,
        )


def explain(error: BaseException, address: RedisAddress) -> CorralError:
    """What an error of coredis, or of what is below it, means to callers of a queue."""
    root = _root(error)
    where = {"address": str(address)}
    if isinstance(error, CorralError):
        return error
    if isinstance(error, redis.AuthenticationError):
        return SetupError(
            f"Redis at {address} does not know the user or the password",
            hint="Put them into the URL: redis://user:password@host:port; special characters as %XX.",
            **where,
        )
    if isinstance(error, redis.AuthorizationError):
        return SetupError(
            f"Redis at {address} refuses: {error}",
            hint="The user must be allowed streams, scripts and publish/subscribe on keys and channels corral:*.",
            **where,
        )
    if isinstance(root, ssl.SSLError) and not isinstance(root, _TLS_LOST):
        return SetupError(
            f"No TLS with Redis at {address}: {root.reason or root}",
            hint="Is it a TLS port? A certificate of your own is named by ?ssl_ca_certs=FILE.",
            **where,
        )
    if isinstance(error, redis.ResponseError) and "DB index" in str(error):
        return SetupError(f"Redis at {address}: {error}", **where)
    if isinstance(error, redis.RedisError) and not isinstance(error, redis.ConnectionError):
        return QueueUnavailable(f"Redis at {address} cannot do it: {error}", **where)
    reason = "no answer" if isinstance(error, TimeoutError) else f"{type(root).__name__} {root}".rstrip()
    hint = "Is it running, and is the URL right? The queue goes on when it is back."
    return QueueUnavailable(f"Redis at {address} is away: {reason}", hint=hint, **where)


def _root(error: BaseException) -> BaseException:
    """The error that the others were raised from."""
    while True:
        inner = error.exceptions[0] if isinstance(error, BaseExceptionGroup) else error.__cause__
        if inner is None:
            return error
        error = inner
