"""Publishing with confirmations, over one connection to RabbitMQ."""

from __future__ import annotations

import re
from enum import Enum
from typing import Final, cast

import aio_pika
from aio_pika import exceptions as amqp
from aiormq import Channel as ClientChannel

from ..exceptions import QueueUnavailable, TooLarge
from .rabbitmq_link import Away, RabbitMQConnection
from .rabbitmq_topology import BROADCAST, TICKETS, topic_key

_TICKET: Final = aio_pika.DeliveryMode.PERSISTENT
_WAKE_UP: Final = aio_pika.DeliveryMode.NOT_PERSISTENT
_TOO_LARGE: Final = re.compile(r"message size (\d+) is larger than configured max size (\d+)")


class Outcome(Enum):
    """What became of a message."""

    TAKEN = "taken"
    NOWHERE = "nowhere"
    """It came back: no queue gets what is published there."""
    REFUSED = "refused"
    """A queue that should get it did not take it."""
    TOO_LARGE = "too large"


class Publisher:
    """Publishes over one connection. Any number of messages are on their way at the same time."""

    def __init__(self, connection: RabbitMQConnection) -> None:
        self.connection = connection
        self._channel: ClientChannel | None = None

    async def publish(self, body: bytes, topic: str) -> Outcome:
        return await self.connection.call(self._publish, TICKETS, body, topic, _TICKET)

    async def broadcast(self, body: bytes, topic: str) -> Outcome:
        return await self.connection.call(self._publish, BROADCAST, body, topic, _WAKE_UP)

    # On the asyncio side

    async def open(self) -> None:
        channel = await self.connection.open_channel(confirms=True, on_lost=self.connection.drop)
        self._channel = cast("ClientChannel", await channel.get_underlay_channel())

    async def _publish(self, exchange: str, body: bytes, topic: str, mode: aio_pika.DeliveryMode) -> Outcome:
        assert self._channel is not None
        properties = aio_pika.Message(body, content_type="application/json", delivery_mode=mode).properties
        # Into a connection that the server does not read, nothing is written: it would only gather here.
        await self.connection.wait_unblocked()
        try:
            # Not by aio-pika's exchange: it waits until each message is on the wire before it sends the next one.
            await self._channel.basic_publish(
                body,
                exchange=exchange,
                routing_key=topic_key(topic),
                properties=properties,
                mandatory=mode is _TICKET,
                wait=False,
            )
        except amqp.PublishError:
            return Outcome.NOWHERE
        except amqp.DeliveryError:
            return Outcome.REFUSED
        except amqp.ChannelPreconditionFailed as error:
            # The server closes the channel, and with it ends what others are publishing: they do it again.
            found = _TOO_LARGE.search(str(error))
            if found is None or int(found[1]) != len(body):
                raise
            return Outcome.TOO_LARGE
        return Outcome.TAKEN


def refusal(outcome: Outcome, topic: str) -> QueueUnavailable | TooLarge:
    if outcome is Outcome.TOO_LARGE:
        return TooLarge(
            f"A message for {topic!r} is larger than the RabbitMQ server takes",
            hint="Send less, or raise max_message_size of the server.",
            topic=topic,
        )
    if outcome is Outcome.NOWHERE:
        return Away(f"RabbitMQ has no queue for {topic!r}, and did not keep the one it was given", topic=topic)
    return QueueUnavailable(
        f"Topic {topic!r} is full, or a queue of it cannot be written",
        hint="Start more consumers of this topic, or raise the limit of its queues by a policy.",
        topic=topic,
    )
