"""A connection to a RabbitMQ server or cluster that is opened again whenever it is lost.

aio-pika's client runs on the asyncio side (`aio.client`). It is made anew for each connection, instead of its own robust
one: that restores by itself what was consumed and bound, whoever still wants it, and waits for a server without a word.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import ssl
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextvars import ContextVar
from typing import Any, Final, TypeVar

import aio_pika
import anyio
import anyio.abc
from aio_pika import exceptions as amqp
from aio_pika.abc import AbstractChannel, AbstractConnection
from yarl import URL

from ..aio.client import AsyncioSide
from ..exceptions import CorralError, QueueUnavailable, SetupError
from ..supervision import Backoff
from .rabbitmq_address import RabbitMQAddress

logger = logging.getLogger(__name__)

T = TypeVar("T")

CONNECT_TIME: Final = 10.0
"""Seconds for a connection to be opened and prepared."""
CLOSING_TIME: Final = 2.0

TROUBLE: Final = amqp.CONNECTION_EXCEPTIONS
"""What the client raises."""

_TLS_LOST: Final = (ssl.SSLEOFError, ssl.SSLZeroReturnError, ssl.SSLSyscallError)
_NOT_ALLOWED: Final = 530
_CREDENTIALS: Final = re.compile(r"//[^/@\s]*@")
_OF_USER: Final = re.compile(r" for user '.*'")
_REFUSED: Final = re.compile(r"access to (\w+ '[^']*')")


class Away(QueueUnavailable):
    """The server is not there, or did not answer: what was asked for may be asked again."""


class RabbitMQConnection:
    """One connection, until it is lost.

    Attributes:
        is_lost: It can do nothing more.
    """

    def __init__(self, side: AsyncioSide, address: RabbitMQAddress, host: str, on_lost: Callable[[], None]) -> None:
        self.address = address
        self.is_lost = False
        self._side = side
        self._host = host
        self._on_lost = on_lost
        self._connection: AbstractConnection | None = None
        self._reason: BaseException | None = None

    # For tasks of either library

    async def call(self, fn: Callable[..., Coroutine[Any, Any, T]], *args: Any) -> T:
        """Await `fn(*args)` on the asyncio side.

        Raises:
            Away, SetupError: what the client's errors mean.
        """
        try:
            return await self._side.call(fn, *args)
        except TROUBLE as error:
            raise explain(error, self.address) from _shown(error)

    async def open(self) -> None:
        """Connect. Raises Away and SetupError."""
        await self.call(self._open)

    async def close(self) -> None:
        """Bounded."""
        self.drop()
        with anyio.move_on_after(CLOSING_TIME * 2, shield=True), contextlib.suppress(*TROUBLE):
            await self._side.call(self._close)

    async def is_blocked(self) -> bool:
        """Whether the server takes nothing at present, because its memory or disk is full."""
        with contextlib.suppress(Away, *TROUBLE):
            return await self._side.call(self._is_blocked)
        return False

    def drop(self, reason: BaseException | None = None) -> None:
        """Use it no more: somebody opens another one."""
        if not self.is_lost:
            self.is_lost = True
            self._reason = reason
            self._on_lost()

    def lost(self) -> Away:
        reason = (
            "" if self._reason is None else f": {type(self._reason).__name__} {_without_user(self._reason)}".rstrip()
        )
        return Away(f"The connection to RabbitMQ at {self.address} is lost{reason}")

    # On the asyncio side

    async def open_channel(
        self, *, confirms: bool = False, on_lost: Callable[[], None] | None = None
    ) -> AbstractChannel:
        """A channel of its own. Whoever opens it closes it.

        Args:
            confirms: Whether publishing waits for the server's confirmation, and raises where a message is returned.
            on_lost: Called when it is closed, by whomever.
        """
        if self._connection is None or self.is_lost:
            raise self.lost()
        channel = self._connection.channel(publisher_confirms=confirms, on_return_raises=confirms)
        await channel.initialize()
        if on_lost is not None:
            channel.close_callbacks.add(lambda *_: on_lost())
            if channel.is_closed:
                on_lost()
        return channel

    async def wait_unblocked(self) -> None:
        """Return when the server reads what is published."""
        if self._connection is None or self._connection.transport is None:
            raise self.lost()
        await self._connection.transport.ready()

    async def _open(self) -> None:
        url = URL(self.address.client_url(self._host))
        # Kept before it is connected: one that nobody closes closes itself when it is collected, in whatever loop there is.
        self._connection = connection = aio_pika.Connection(url, ssl_context=self.address.tls)
        connection.close_callbacks.add(lambda _, reason: self.drop(reason))
        await connection.connect()

    async def _close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            async with asyncio.timeout(CLOSING_TIME):
                await connection.close()

    async def _is_blocked(self) -> bool:
        try:
            async with asyncio.timeout(0):
                await self.wait_unblocked()
        except TimeoutError:
            return True
        return False


class RabbitMQLink:
    """Keeps a connection open. Started with `await group.start(link.keep)`.

    Args:
        name: What the connection is for, in logs.
        patience: Seconds for which the first connection is tried.
        prepare: Called with each new connection before others may use it. It raises Away or SetupError.
        on_change: Called when there is a connection, and when there is none any more.

    Attributes:
        connection: The open one, None while there is none.
        reconnects: How often it was opened again.
    """

    def __init__(
        self,
        side: AsyncioSide,
        address: RabbitMQAddress,
        *,
        name: str,
        patience: float,
        prepare: Callable[[RabbitMQConnection], Awaitable[None]],
        on_change: Callable[[], None],
    ) -> None:
        self.address = address
        self.connection: RabbitMQConnection | None = None
        self.reconnects = -1
        self._side = side
        self._name = name
        self._patience = patience
        self._prepare = prepare
        self._on_change = on_change
        self._backoff = Backoff(initial=0.05, maximum=2.0, healthy_after=5.0)
        self._attempts = 0
        self._reason: CorralError | None = None

    async def keep(self, *, task_status: anyio.abc.TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Runs until it is cancelled.

        Raises:
            QueueUnavailable: no connection could be opened within `patience` seconds.
            SetupError: none ever will be: wrong credentials, no such virtual host, no permission.
        """
        failures, give_up = 0, anyio.current_time() + self._patience
        while True:
            begun, is_first = anyio.current_time(), self.reconnects < 0
            seconds = min(CONNECT_TIME, give_up - begun) if is_first else CONNECT_TIME
            error = await self._live(seconds, task_status)
            failures = 1 if anyio.current_time() - begun >= self._backoff.healthy_after else failures + 1
            delay, self._reason = self._backoff.delay(failures), error
            if self.reconnects < 0 and (isinstance(error, SetupError) or anyio.current_time() + delay > give_up):
                raise error
            level = logging.WARNING if failures == 1 else logging.DEBUG
            logger.log(level, "the %s connection to RabbitMQ is opened again: %s", self._name, error)
            await anyio.sleep(delay)

    async def _live(self, seconds: float, task_status: anyio.abc.TaskStatus[None]) -> CorralError:
        """One connection, from its opening to its end. Why it ended."""
        lost = anyio.Event()
        host = self.address.hosts[self._attempts % len(self.address.hosts)]
        self._attempts += 1
        connection = RabbitMQConnection(self._side, self.address, host, lost.set)
        try:
            with anyio.move_on_after(seconds):
                await connection.open()
                await self._prepare(connection)
                self.connection, self._reason = connection, None
            if self.connection is None:
                return Away(f"RabbitMQ at {self.address} did not answer in time")
            self.reconnects += 1
            if self.reconnects:
                logger.info("the %s connection to RabbitMQ is open again", self._name)
            else:
                task_status.started()
            self._on_change()
            await lost.wait()
            return connection.lost()
        except (QueueUnavailable, SetupError) as error:
            return error
        finally:
            if self.connection is not None:
                self.connection = None
                self._on_change()
            await connection.close()  # noqa: ASYNC102 - shielded and bounded there

    def away(self) -> Away:
        """Why there is no connection."""
        reason = "" if self._reason is None else f": {self._reason}"
        hint = None if self._reason is None else self._reason.hint
        return Away(f"There is no connection to RabbitMQ at {self.address}{reason}", hint=hint)


def explain(error: BaseException, address: RabbitMQAddress) -> CorralError:
    """What an error of the client, or of what is below it, means to callers of a queue."""
    text, root = _without_user(error), _root(error)
    if isinstance(error, amqp.ProbableAuthenticationError | amqp.AuthenticationError):
        return SetupError(
            f"RabbitMQ at {address} does not know the user or the password",
            hint="Put them into the URL: amqp://user:password@host:port/vhost; special characters as %XX.",
        )
    if _is_not_let_in(error):
        return SetupError(
            f"RabbitMQ at {address} does not let us in: no such virtual host, or not for this user",
            hint="Create it (rabbitmqctl add_vhost), or give the user its permissions (rabbitmqctl set_permissions).",
        )
    if isinstance(error, amqp.ChannelClosed) and "ACCESS_REFUSED" in text:
        found = _REFUSED.search(text)
        return SetupError(
            f"RabbitMQ at {address} refuses access to {found[1] if found else 'something'}",
            hint="The user must be allowed to configure, write and read what is called llama_corral.*.",
        )
    if isinstance(root, ssl.SSLCertVerificationError):
        return SetupError(
            f"The certificate of RabbitMQ at {address} is not trusted: {root.verify_message}",
            hint="Name the certificates to trust with ?cafile=PATH.",
        )
    if isinstance(root, ssl.SSLError) and not isinstance(root, _TLS_LOST):
        return SetupError(f"No TLS with RabbitMQ at {address}: {root.reason or root}", hint="Is it a port with TLS?")
    return Away(f"RabbitMQ at {address} is away: {type(error).__name__} {text}".rstrip())


def _is_not_let_in(error: BaseException) -> bool:
    """Whether it was the name of the virtual host that the server closed the connection for."""
    if isinstance(error, amqp.InvalidFrameError):  # aiormq 7.2 does not read why
        return "OpenOk" in str(error) and "Connection.Close" in str(error)
    return isinstance(error, amqp.ConnectionClosed) and _NOT_ALLOWED in error.args[:1]


def _root(error: BaseException) -> BaseException:
    """The error that the others were raised from."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _without_user(said: object) -> str:
    return _OF_USER.sub("", _CREDENTIALS.sub("//", str(said)))


def _shown(error: BaseException) -> BaseException | None:
    """The error, unless its text names a user."""
    return error if _without_user(error) == str(error) else None


# What the client logs

_is_ours: ContextVar[bool] = ContextVar("llama_corral_rabbitmq", default=False)


class _Quiet(logging.Filter):
    """Makes what the client logs about connections of ours a matter of debugging: it warns of every attempt to connect, and
    names the user. What matters of it is logged here, once. Connections of others go on as they were."""

    def filter(self, record: logging.LogRecord) -> bool:
        if not _is_ours.get():
            return True
        logger.debug("%s: %s", record.name, _without_user(record.getMessage()))
        return False


_QUIET: Final = _Quiet()


@contextlib.contextmanager
def quiet_client() -> Iterator[None]:
    """Asyncio tasks that inherit their context from inside the block log quietly."""
    # A filter sees what is logged to its own logger only.
    for name in ("aiormq.connection", "aiormq.channel", "aio_pika.connection", "aio_pika.channel", "aio_pika.tools"):
        logging.getLogger(name).addFilter(_QUIET)
    token = _is_ours.set(True)
    try:
        yield
    finally:
        _is_ours.reset(token)
