"""One connection to a NATS server or cluster, until it is lost.

nats-py's client runs on the asyncio side (`aio.client`). It is made anew for each connection, and its own reconnecting is
held back: what it still buffers would be sent to the next connection, long after its sender was told that it failed, and
it gives up for ever at some errors of the server.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
from collections.abc import Awaitable, Callable
from typing import Final

import anyio
from nats import errors as nats
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from ..aio import SelfCancelled
from ..aio.client import AsyncioSide
from ..exceptions import QueueUnavailable, SetupError
from .nats_address import NatsAddress

logger = logging.getLogger(__name__)

ANSWER_TIME: Final = 5.0
"""Seconds after which a request counts as not answered."""
FLUSH_TIME: Final = 5
CLOSING_TIME: Final = 2.0
SERVER_TIME: Final = 3
"""Seconds that one server gets."""
PING_PERIOD: Final = 10
"""Seconds between two looks whether there is somebody at the other end; the third in vain ends the connection."""
PENDING_BYTES: Final = 4 * 1024 * 1024
"""What may wait in the client for a slow connection."""
CLIENT_NAME: Final = "llama-corral"

_NO_TLS: Final = "the server offers no TLS"


class Away(QueueUnavailable):
    """The server is not there, or did not answer: what was asked for may be asked again."""


class NoResponders(Away):
    """The server is there, and nobody at it listens to what was asked."""


class _Client(Client):
    """The client with two faults less, seen in nats-py 2.16: it tells nobody who it is without TLS where TLS was asked for,
    and its reader does not end, without a word to anybody, at the answer to a flush that was cancelled."""

    demands_tls = False

    async def _process_pong(self) -> None:
        if self._pongs and self._pongs[0].done():
            self._pongs[0] = asyncio.get_running_loop().create_future()
        await super()._process_pong()

    def _connect_command(self) -> bytes:
        if self.demands_tls and not self._server_info.get("tls_required"):
            raise nats.Error(_NO_TLS)
        return super()._connect_command()

    def abort(self) -> None:
        """Drop what is still to be sent: its owner has waited long enough."""
        writer = getattr(self._transport, "_io_writer", None)
        if writer is not None:
            writer.transport.abort()


class Pending:
    """A request on its way, made by `NatsConnection.ask`. Its owner forgets it."""

    def __init__(self, connection: NatsConnection, token: str) -> None:
        self._connection = connection
        self._token = token
        self._done = anyio.Event()
        self._answer: Msg | None = None

    def resolve(self, answer: Msg | None) -> None:
        """None: there will be none, the connection is lost."""
        self._answer = answer
        self._done.set()

    def forget(self) -> None:
        """The answer is not waited for any more."""
        self._connection.forget(self._token)

    async def answer(self) -> Msg:
        """Raises Away if there is none: `NoResponders` if there cannot be one."""
        with anyio.move_on_after(ANSWER_TIME):
            await self._done.wait()
        if self._answer is None:
            raise self._connection.no_answer(lost=self._done.is_set())
        if status_of(self._answer) == "503":
            raise NoResponders(f"Nobody answers at the NATS server at {self._connection.address}")
        return self._answer


def status_of(message: Msg) -> str | None:
    """The status that the server sends in place of a message."""
    return None if message.headers is None or message.data else message.headers.get("Status")


class NatsConnection:
    """One connection, until it is lost.

    Attributes:
        is_lost: It can do nothing more.
        max_payload: Bytes of headers and body that the server takes.
    """

    def __init__(self, side: AsyncioSide, address: NatsAddress, on_lost: Callable[[], None]) -> None:
        self.address = address
        self.is_lost = False
        self.max_payload = 0
        self._side = side
        self._client = _Client()
        self._client.demands_tls = address.tls
        self._on_lost = on_lost
        self._closing = False
        self._failure: Exception | None = None
        self._refused: str | None = None
        self._inbox = ""
        self._number = 0
        self._pending: dict[str, Pending] = {}
        self._subscriptions: set[Subscription] = set()

    # For tasks of either library

    async def open(self) -> None:
        """Connect.

        Raises:
            Away: no server can be reached.
            SetupError: the operator must change something: wrong credentials, a certificate that is not trusted.
        """
        try:
            await self._side.call(self._connect)
        except (nats.Error, OSError, TimeoutError, SelfCancelled) as error:
            reason = self._failure or error
            what = f"{type(reason).__name__} {reason}".rstrip()
            raise Away(f"No NATS server can be reached at {self.address}: {what}") from error

    async def ask(self, subject: str | None, body: bytes = b"", headers: dict[str, str] | None = None) -> Pending:
        """Send a request and return at once. Without a subject it comes back to us, after the server has worked on all
        that was sent before."""
        self._number += 1
        token = str(self._number)
        pending = self._pending[token] = Pending(self, token)
        try:
            if self.is_lost:
                raise self.no_answer(lost=True)
            inbox = f"{self._inbox}.{token}"
            await self._side.send(self._publish, subject or inbox, body, inbox, headers)
        except BaseException:
            self.forget(token)
            raise
        return pending

    async def request(self, subject: str | None, body: bytes = b"", headers: dict[str, str] | None = None) -> Msg:
        """`ask`, and the answer. Raises Away."""
        pending = await self.ask(subject, body, headers)
        try:
            return await pending.answer()
        finally:
            pending.forget()

    async def publish(self, subject: str, body: bytes) -> None:
        """Send a message that nobody answers, and return when the server has handed it on. Raises Away."""
        await self._side.send(self._publish, subject, body, "", None)
        await self.request(None)

    def post(self, subject: str, body: bytes, reply: str = "") -> None:
        """Send a message and return at once. For whoever sends no more than he was given."""
        self._side.post(self._publish, subject, body, reply, None)

    def new_inbox(self) -> str:
        return self._client.new_inbox()

    async def subscribe(self, subject: str, hear: Callable[[Msg], Awaitable[None]], *, flush: bool) -> Subscription:
        """Have `hear` called on the asyncio side with each message, one after the other.

        Args:
            flush: Return when the server knows it.
        """
        made: list[Subscription] = []
        try:
            await self._side.call(self._subscribe, subject, hear, flush, made)
        except (nats.Error, OSError, TimeoutError, SelfCancelled) as error:
            raise self.no_answer(lost=self.is_lost) from error
        except BaseException:
            for subscription in made:  # nobody will end it
                self._side.post(self._drain, subscription)
            raise
        return made[0]

    async def unsubscribe(self, subscription: Subscription) -> None:
        """Return when the server knows it, and the last message that it had sent was heard. Bounded."""
        with anyio.move_on_after(CLOSING_TIME, shield=True):
            with contextlib.suppress(SelfCancelled):
                await self._side.wait_posted()
                await self._side.call(self._drain, subscription)

    async def close(self) -> None:
        """Bounded; sends what was posted."""
        with anyio.move_on_after(CLOSING_TIME * 2, shield=True):
            with contextlib.suppress(SelfCancelled):
                if not self.is_lost:
                    await self._side.wait_posted()
                await self._side.call(self._close)

    def forget(self, token: str) -> None:
        self._pending.pop(token, None)

    def no_answer(self, *, lost: bool) -> Away:
        if lost:
            return Away(f"The connection to the NATS server at {self.address} is lost")
        hint = None if self._refused is None else f"The server has refused something before: {self._refused}"
        return Away(f"The NATS server at {self.address} did not answer in time", hint=hint)

    def _fatal(self, error: Exception) -> SetupError | None:
        """What the operator must change, if that is it."""
        if "authorization violation" in str(error).lower():
            return SetupError(
                f"The NATS server at {self.address} refuses the user, password or token",
                hint="Write them into the URL as nats://user:password@host, with special characters as %XX.",
            )
        if isinstance(error, ssl.SSLCertVerificationError):
            return SetupError(
                f"The certificate of the NATS server at {self.address} is not trusted: {error.verify_message}",
                hint="Name the certificates to trust with ?ca=PATH.",
            )
        if _NO_TLS in str(error):
            return SetupError(f"The NATS server at {self.address} offers no TLS", hint="Write nats://, or set it up.")
        return None

    # On the asyncio side

    async def _connect(self) -> None:
        try:
            await self._client.connect(
                **self.address.options(),
                name=CLIENT_NAME,
                error_cb=self._on_error,
                disconnected_cb=self._on_disconnected,
                closed_cb=self._on_closed,
                connect_timeout=SERVER_TIME,
                max_reconnect_attempts=1,
                reconnect_time_wait=0,
                ping_interval=PING_PERIOD,
                pending_size=0,
            )
            self.max_payload = self._client.max_payload
            self._inbox = self._client.new_inbox()
            await self._subscribe(f"{self._inbox}.*", self._on_answer, False, [])
        except BaseException:
            await self._close()  # noqa: ASYNC102 - bounded
            raise

    async def _publish(self, subject: str, body: bytes, reply: str, headers: dict[str, str] | None) -> None:
        if self.is_lost:
            return
        try:
            await self._client.publish(subject, body, reply=reply, headers=headers)
            if self._client.pending_data_size > PENDING_BYTES:
                await self._client.flush(FLUSH_TIME)
        except (nats.Error, OSError) as error:
            self._lose(error)

    async def _subscribe(
        self, subject: str, hear: Callable[[Msg], Awaitable[None]], flush: bool, made: list[Subscription]
    ) -> None:
        made.append(await self._client.subscribe(subject, cb=hear))
        self._subscriptions.add(made[0])
        if flush:
            await self._client.flush(FLUSH_TIME)

    async def _drain(self, subscription: Subscription) -> None:
        self._subscriptions.discard(subscription)
        with contextlib.suppress(nats.Error, OSError):
            if self.is_lost:
                await subscription.unsubscribe()
            else:
                await subscription.drain()  # type: ignore[no-untyped-call]

    async def _close(self) -> None:
        self._closing = True
        self._lose(None)
        for subscription in self._subscriptions:
            # Before the client: closing a broken connection, it may fail before it ends their tasks.
            with contextlib.suppress(nats.Error, OSError):
                await subscription.unsubscribe()
        self._subscriptions.clear()
        try:
            # One that was never open has nothing to wait for, and after a failed handshake it would be waited for in vain.
            async with asyncio.timeout(CLOSING_TIME if self.max_payload else 0.1):
                await self._client.close()
        except (nats.Error, OSError, TimeoutError) as error:
            logger.debug("closing a connection to NATS: %s: %s", type(error).__name__, error)
        finally:
            self._client.abort()

    async def _on_answer(self, message: Msg) -> None:
        pending = self._pending.get(message.subject.rpartition(".")[2])
        if pending is not None:
            pending.resolve(message)

    async def _on_error(self, error: Exception) -> None:
        logger.debug("client of NATS: %s: %s", type(error).__name__, error)
        if "permissions violation" in str(error).lower():
            self._refused = str(error)
            logger.warning("the NATS server at %s refuses: %s", self.address, error)
        if not self.max_payload:  # it is connecting, and would try again
            self._failure = error
            if fatal := self._fatal(error):
                raise fatal

    async def _on_disconnected(self) -> None:
        self._lose(self._client.last_error)
        if not self._closing:
            # The client goes on to connect again when this returns. It is cancelled when the client is closed.
            await asyncio.get_running_loop().create_future()

    async def _on_closed(self) -> None:
        self._lose(self._client.last_error)

    def _lose(self, error: Exception | None) -> None:
        if self.is_lost:
            return
        self.is_lost = True
        if error is not None:
            logger.debug("the connection to NATS cannot be used any more: %s: %s", type(error).__name__, error)
        for pending in self._pending.values():
            pending.resolve(None)
        self._on_lost()
