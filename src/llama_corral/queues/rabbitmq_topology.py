"""What a topic is in RabbitMQ: how things are called, and how they are declared.

Three durable exchanges serve all topics. `llama_corral` routes a ticket by its topic to the queue of each group that is
known.
Where none is, it hands it to its alternate exchange `llama_corral.unclaimed`, which has a route to the queue of the group
`default` as soon as somebody has published in vain. So the ticket waits there; and should another group come instead, that
queue gets nothing more, and does not fill up. `llama_corral.broadcast` routes to the queues of whoever listens.

Queues of groups are quorum queues. They are declared by whoever comes first, and never deleted here.
"""

from __future__ import annotations

import asyncio
import logging
from hashlib import sha256
from typing import Any, Final
from urllib.parse import quote

from aio_pika import ExchangeType
from aio_pika import exceptions as amqp

from ..exceptions import SetupError
from .rabbitmq_link import RabbitMQConnection

logger = logging.getLogger(__name__)

TICKETS: Final = "llama_corral"
UNCLAIMED: Final = "llama_corral.unclaimed"
BROADCAST: Final = "llama_corral.broadcast"
WAITING_GROUP: Final = "default"

_EXCHANGES: Final[dict[str, dict[str, Any]]] = {
    UNCLAIMED: {},
    TICKETS: {"alternate-exchange": UNCLAIMED},
    BROADCAST: {},
}

# How often a message may come back before the server drops it: 20 times since RabbitMQ 4, if nobody says otherwise. There is
# no word for "for ever" that all versions know.
_NO_LIMIT: Final = 2**31 - 1

_TOPIC_BYTES: Final = 150
_GROUP_BYTES: Final = 80


def topic_key(topic: str) -> str:
    """The topic as a routing key."""
    return _token(topic, _TOPIC_BYTES)


def queue_name(topic: str, group: str) -> str:
    """Of the queue of a group. It can be read: `llama_corral:group:topic`, each quoted as in a URL."""
    return f"{TICKETS}:{_token(group, _GROUP_BYTES)}:{topic_key(topic)}"


def _token(name: str, limit: int) -> str:
    token = quote(name, safe="")
    if len(token) <= limit:
        return token
    # AMQP has 255 bytes. The star is never in what is quoted, so nobody else is called so.
    digest = sha256(name.encode()).hexdigest()
    return f"{token[: limit - len(digest) - 1]}*{digest}"


# On the asyncio side


async def declare_exchanges(connection: RabbitMQConnection) -> None:
    """Raises what the client raises, and SetupError."""
    try:
        async with await connection.open_channel() as channel:
            for name, arguments in _EXCHANGES.items():
                await channel.declare_exchange(name, ExchangeType.DIRECT, durable=True, arguments=arguments)
    except amqp.ChannelPreconditionFailed as error:
        raise SetupError(
            f"An exchange of that name is there and is another one: {error}",
            hint="Delete it, or use another virtual host.",
        ) from error


class Declarations:
    """Makes groups known, one after the other: RabbitMQ ends the connection of whoever consumes a quorum queue that another
    one is just declaring, and a service may begin with several consumers.

    Args:
        max_messages: Limit of each queue.
    """

    def __init__(self, max_messages: int) -> None:
        self._max_messages = max_messages
        self._turn = asyncio.Lock()

    async def group(self, connection: RabbitMQConnection, topic: str, group: str) -> str:
        """From now on the group gets what is published to the topic. Its queue's name."""
        name = queue_name(topic, group)
        await self._declare(connection, name, TICKETS, topic)
        return name

    async def waiting(self, connection: RabbitMQConnection, topic: str) -> None:
        """Give what is published to a topic without groups a place to wait for the first consumer."""
        await self._declare(connection, queue_name(topic, WAITING_GROUP), UNCLAIMED, topic)

    async def _declare(self, connection: RabbitMQConnection, name: str, exchange: str, topic: str) -> None:
        arguments: dict[str, Any] = {
            "x-queue-type": "quorum",
            "x-max-length": self._max_messages,
            "x-overflow": "reject-publish",
            "x-delivery-limit": _NO_LIMIT,
        }
        async with self._turn:
            try:
                async with await connection.open_channel() as channel:
                    queue = await channel.declare_queue(name, durable=True, arguments=arguments)
                    await queue.bind(exchange, topic_key(topic))
            except amqp.ChannelPreconditionFailed as error:
                # It was declared with another limit, which stays: whoever wants another one sets a policy.
                logger.info("the queue %s is used as it is: %s", name, error)
                async with await connection.open_channel() as channel:
                    queue = await channel.get_queue(name, ensure=False)
                    await queue.bind(exchange, topic_key(topic))
