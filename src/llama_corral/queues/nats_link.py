"""The connection of a queue in NATS, opened again whenever it is lost."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Final

import anyio
import anyio.abc

from ..aio.client import AsyncioSide
from ..exceptions import QueueUnavailable, SetupError
from ..supervision import Backoff
from .nats_address import NatsAddress
from .nats_connection import Away, NatsConnection

logger = logging.getLogger(__name__)

CONNECT_TIME: Final = 10.0
"""Seconds for a connection to be opened and prepared, to whichever of the servers."""
HEALTHY_AFTER: Final = 5.0
"""Seconds after which the loss of a connection is no failure in a row."""


class NatsLink:
    """Keeps a connection open. Started with `await group.start(link.keep)`.

    Args:
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
        address: NatsAddress,
        *,
        patience: float,
        prepare: Callable[[NatsConnection], Awaitable[None]],
        on_change: Callable[[], None],
    ) -> None:
        self.connection: NatsConnection | None = None
        self.reconnects = -1
        self._side = side
        self._address = address
        self._patience = patience
        self._prepare = prepare
        self._on_change = on_change
        self._backoff = Backoff(initial=0.05, maximum=2.0)
        self._reason: QueueUnavailable | SetupError | None = None

    async def keep(self, *, task_status: anyio.abc.TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Runs until it is cancelled.

        Raises:
            QueueUnavailable: no connection could be opened within `patience` seconds.
            SetupError: none ever will be: wrong credentials, no JetStream, a stream that is not ours.
        """
        give_up = anyio.current_time() + self._patience
        failures = 0
        while True:
            left = CONNECT_TIME if self.reconnects >= 0 else min(CONNECT_TIME, give_up - anyio.current_time())
            error, connected = await self._serve(left, task_status)
            failures = 1 if connected > HEALTHY_AFTER else failures + 1
            delay = self._backoff.delay(failures)
            if self.reconnects < 0 and (isinstance(error, SetupError) or anyio.current_time() + delay > give_up):
                raise error
            logger.log(logging.WARNING if failures == 1 else logging.DEBUG, "connecting to NATS again: %s", error)
            self._reason = error
            await anyio.sleep(delay)

    async def _serve(
        self, seconds: float, task_status: anyio.abc.TaskStatus[None]
    ) -> tuple[QueueUnavailable | SetupError, float]:
        """One connection, from its opening to its end: why it ended, and how long it was usable."""
        lost = anyio.Event()
        connection = NatsConnection(self._side, self._address, lost.set)
        try:
            error = await self._open(connection, seconds)
            if error is not None:
                return error, 0
            self.reconnects += 1
            if self.reconnects == 0:
                task_status.started()
            else:
                logger.info("connected to NATS at %s again", self._address)
            self._set(connection)
            since = anyio.current_time()
            await lost.wait()
            self._set(None)
            return connection.no_answer(lost=True), anyio.current_time() - since
        finally:
            self.connection = None
            await connection.close()  # noqa: ASYNC102 - shielded and bounded there

    async def _open(self, connection: NatsConnection, seconds: float) -> QueueUnavailable | SetupError | None:
        with anyio.move_on_after(seconds):
            try:
                await connection.open()
                await self._prepare(connection)
            except (QueueUnavailable, SetupError) as error:
                return error
            return connection.no_answer(lost=True) if connection.is_lost else None
        return Away(f"The NATS server at {self._address} did not answer in time")

    def _set(self, connection: NatsConnection | None) -> None:
        self.connection = connection
        self._on_change()

    def away(self) -> Away:
        """Why there is no connection."""
        reason = "" if self._reason is None else f": {self._reason}"
        return Away(f"There is no connection to the NATS server at {self._address}{reason}")
