"""The control plane's message queue over HTTP. The other side is `queues.http`.

The routes with a topic in their path are those of the original's simple queue; its clients find them through
`GET /queue_config`. Those below `/queue` give competing consumers, acks and broadcasts to clients of ours.
"""

from __future__ import annotations

import logging
from typing import Annotated, Any, Final
from urllib.parse import urlsplit

import anyio
from pydantic import Field

from ...exceptions import NotFound, QueueUnavailable
from ...protocol import queue_calls as calls
from ...protocol.messages import QueueMessage
from ...queues.leases import LeasedQueue
from ...web import Request, Routes, Wakeup, wait_changed
from ..checks import check_id
from ..plane import ControlPlane
from .models import Strict
from .surroundings import Surroundings

logger = logging.getLogger(__name__)

MAX_WAIT: Final = 60.0
"""Seconds that a long poll may last."""
SHORTEST_WAIT: Final = 0.05
BROKERS_WAIT: Final = 0.5
"""Seconds in which a queue hands over a message that it has: one in this process, and a broker."""
MAX_TOPICS: Final = 10_000
"""Topics made by `POST /topics/{topic}` that are remembered; beyond it no more are made."""


class GetMessageQuery(Strict):
    wait: Annotated[float, Field(ge=0, le=MAX_WAIT, allow_inf_nan=False)] = Field(
        0.0, description="Seconds to wait for a message before null is answered."
    )


class QueueRoutes:
    """Serves `plane.queue`. What it raises is answered with 503.

    Attributes:
        leased: The consumers and subscriptions of clients; its `run` has to run.
    """

    def __init__(self, plane: ControlPlane, surroundings: Surroundings) -> None:
        self.queue = plane.queue
        self.shortest_wait = SHORTEST_WAIT if surroundings.queue_url is None else BROKERS_WAIT
        # Others may make topics too, of which nothing is known here.
        self.knows_all = plane.alone and surroundings.queue_url is None
        self.leased = LeasedQueue(plane.queue, lease=plane.config.lease)
        self._topics: set[str] = set()

    def routes(self) -> list[Routes]:
        routes = Routes(tag="Message Queue")
        routes.add("POST", "/topics/{topic}", self.create_topic)
        routes.add("POST", "/messages/{topic}", self.publish_message)
        routes.add("GET", "/messages/{topic}", self.get_message, hot=True)
        routes.add("POST", calls.PUBLISH, self.publish, hot=True)
        routes.add("POST", calls.BROADCAST, self.broadcast, hot=True)
        routes.add("POST", calls.CONSUME, self.consume, hot=True)
        routes.add("POST", calls.SUBSCRIBE, self.subscribe, hot=True)
        routes.add("POST", calls.RECEIVE, self.receive, hot=True, errors=(409,))
        routes.add("POST", calls.SETTLE, self.settle, hot=True)
        routes.add("POST", calls.CLOSE, self.close, hot=True)
        return [routes]

    # The original's

    async def create_topic(self, topic: str) -> None:
        """Make a topic that messages can be published to. Repeating it changes nothing."""
        check_id(topic, "topic")
        self._remember(topic)

    async def publish_message(self, topic: str, body: QueueMessage) -> None:
        """Publish a message. 404 if nobody made the topic, or uses it, and if that is known here: not of a broker that
        others use too."""
        self._check_known(topic)
        await self.queue.publish(body, topic)

    async def get_message(self, topic: str, query: GetMessageQuery) -> QueueMessage | None:
        """Take one message off a topic; null if there is none. It is not given back if the answer is lost."""
        self._check_known(topic)
        async with self.queue.consumer(topic) as consumer:
            with anyio.move_on_after(max(query.wait, self.shortest_wait)):
                deliveries = await consumer.receive()
                for delivery in deliveries:
                    with anyio.CancelScope(shield=True):
                        await delivery.ack()
                    return delivery.message
        return None

    def _check_known(self, topic: str) -> None:
        # What the queue itself knows is made by whoever used it: services, the control plane, clients of ours.
        if not self.knows_all:
            check_id(topic, "topic")
        elif topic not in self._topics and topic not in self.queue.statistics()["topics"]:
            raise NotFound(f"topic {topic} not found", hint="POST /topics/{topic} makes it.", topic=topic)

    def _remember(self, topic: str) -> None:
        if topic not in self._topics and len(self._topics) >= MAX_TOPICS:
            raise QueueUnavailable(f"There are {MAX_TOPICS} topics already", limit=MAX_TOPICS)
        self._topics.add(topic)

    # Ours

    async def publish(self, body: calls.PublishCall) -> None:
        """Publish a message to a topic, which is made by it."""
        check_id(body.topic, "topic")
        await self.queue.publish(body.message, body.topic)

    async def broadcast(self, body: calls.PublishCall) -> None:
        """Hand a message to whoever is subscribed now."""
        check_id(body.topic, "topic")
        await self.queue.broadcast(body.message, body.topic)

    async def consume(self, body: calls.OpenCall) -> calls.Lease:
        """Open a competing consumer: each message of a topic goes to one consumer of each group."""
        check_id(body.topic, "topic")
        check_id(body.group, "group")
        lease = await self.leased.open_consumer(body.topic, body.group, body.lease)
        return calls.Lease(lease.lease_id, lease.seconds)

    async def subscribe(self, body: calls.OpenCall) -> calls.Lease:
        """Listen to the broadcasts of a topic."""
        check_id(body.topic, "topic")
        lease = await self.leased.open_subscription(body.topic, body.lease)
        return calls.Lease(lease.lease_id, lease.seconds)

    async def receive(self, body: calls.ReceiveCall, request: Request) -> calls.ReceiveAnswer:
        """Wait for messages of a lease. No messages: time is up, the lease is not known, or the server stops."""
        lease = self.leased.get(body.lease_id)
        if lease is None:
            return calls.ReceiveAnswer(known=False)
        if request.drain.is_set():
            return calls.ReceiveAnswer(draining=True)
        found: tuple[calls.Received, ...] = ()

        async def take() -> None:
            nonlocal found
            found = await lease.receive(body.seq, max(1, body.max_messages))

        with lease.in_use():
            wakeup = await wait_changed(take, request.drain, max(self.shortest_wait, min(body.wait, MAX_WAIT)))
        known = bool(found) or self.leased.get(body.lease_id) is not None
        return calls.ReceiveAnswer(found, known=known, draining=wakeup is Wakeup.DRAIN)

    async def settle(self, body: calls.SettleCall) -> calls.SettleAnswer:
        """Ack deliveries, give others back, give up an answer; or just say that the client is there."""
        lease = self.leased.get(body.lease_id)
        if lease is None:
            return calls.SettleAnswer(known=False)
        with lease.in_use():
            if body.abandoned is not None:
                await lease.abandon(body.abandoned)
            await lease.settle(body.ack, body.nack)
        return calls.SettleAnswer()

    async def close(self, body: calls.CloseCall) -> None:
        """End leases, after settling what is named. What is open then comes back. Unknown ones are passed over."""
        for each in body.leases:
            lease = self.leased.get(each.lease_id)
            if lease is not None:
                try:
                    await lease.settle(each.ack, each.nack)
                except QueueUnavailable as error:
                    logger.info("deliveries of %s come again: %s", lease.topic, error)
                await self.leased.close(lease)


def simple_queue_config(request: Request) -> dict[str, dict[str, Any]]:
    """The original's settings of a simple queue that is this server, at the address that a request came to."""
    use_ssl = request.scope["scheme"] == "https"
    bound = request.scope.get("server") or ("127.0.0.1", None)
    try:
        named = urlsplit(f"//{request.headers.get('host', '')}")
        host, port = named.hostname or bound[0], named.port or (bound[1] if named.hostname is None else None)
    except ValueError:  # no host and port
        host, port = bound
    settings = {
        "type": "simple",
        "host": f"[{host}]" if ":" in host else host,  # the original writes it into a URL as it is
        "port": port or (443 if use_ssl else 80),
        "client_kwargs": {},
        "raise_exceptions": False,
        "use_ssl": use_ssl,
    }
    return {"SimpleMessageQueueConfig": settings}
