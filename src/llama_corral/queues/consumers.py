"""The original's layer for users: an object with a handler, registered to a topic. Our own path does not use it.

    consumer = CallableMessageConsumer(id_="printer", message_type="news", handler=print_message)
    async with anyio.create_task_group() as tasks:
        await tasks.start(register_consumer(queue, consumer, topic="llama_deploy.news"))

A message is acked after its handler has succeeded. If the handler raises, the message goes back to the front of the
line and the consumer pauses before it takes the next one, longer with every failure; what was refused (BadInput) or has
failed too often goes to the dead-letter topic. What the *queue* raises is raised out of the task: a consumer never ends
silently.
"""

from __future__ import annotations

import inspect
import logging
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Protocol

import anyio
import httpx
from anyio.abc import TaskStatus
from pydantic import SecretStr

from ..abc import Delivery, MessageQueue
from ..exceptions import BadInput, QueueUnavailable, Unavailable
from ..protocol import topics
from ..protocol.messages import QueueMessage, new_id
from .dead_letter import dead_letter

logger = logging.getLogger(__name__)

REFUSALS: Final = frozenset({400, 405, 410, 413, 415, 422})
"""Statuses which say that this very message will never be taken. Others are trouble of the server or its operator."""


class StartConsumingCallable(Protocol):
    """What `register_consumer` returns: an async function for `task_group.start`. It runs until it is cancelled."""

    async def __call__(self, *, task_status: TaskStatus[None] = ...) -> None: ...


class BaseMessageQueueConsumer(ABC):
    """Handles the messages of one type."""

    def __init__(self, id_: str | None = None, message_type: str = "default") -> None:
        self.id_ = id_ or new_id()
        self.message_type = message_type

    async def process_message(self, message: QueueMessage) -> Any:
        """Handle one message and return what the handler returned.

        Raises:
            BadInput: the message is of another type, or the handler refuses it for good.
        """
        if message.type != self.message_type:
            raise BadInput(
                f"Consumer {self.id_!r} takes messages of type {self.message_type!r}, not {message.type!r}",
                message_id=message.id_,
            )
        return await self._process_message(message)

    @abstractmethod
    async def _process_message(self, message: QueueMessage) -> Any: ...

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[None]:
        """Whatever the consumer keeps open while it consumes."""
        yield


class CallableMessageConsumer(BaseMessageQueueConsumer):
    """Calls a function in this process. A sync handler is called in the event loop; it must not block."""

    def __init__(
        self,
        id_: str | None = None,
        message_type: str = "default",
        handler: Callable[[QueueMessage], Any] | None = None,
    ) -> None:
        super().__init__(id_, message_type)
        if handler is None:
            raise ValueError("A CallableMessageConsumer needs a handler")
        self.handler = handler

    async def _process_message(self, message: QueueMessage) -> Any:
        result = self.handler(message)
        return await result if inspect.isawaitable(result) else result


class RemoteMessageConsumer(BaseMessageQueueConsumer):
    """POSTs each message to a URL and takes the answer's status seriously.

    Args:
        url: Usually the `/process_message` route of a service.
        token: Sent as a bearer token; never shown.
        timeout: Seconds for the whole of one request.
        transport: How httpx gets there, for tests and special networks.
    """

    def __init__(
        self,
        id_: str | None = None,
        url: str = "",
        message_type: str = "default",
        *,
        token: str | SecretStr | None = None,
        timeout: float = 30.0,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        super().__init__(id_, message_type)
        if not url:
            raise ValueError("A RemoteMessageConsumer needs a url")
        self.url = url
        self.timeout = timeout
        self._token = token if isinstance(token, SecretStr | None) else SecretStr(token)
        self._transport = transport
        self._client: httpx.AsyncClient | None = None

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[None]:
        """One client for all messages; without it each message pays for a connection of its own."""
        async with self._new_client() as client:
            self._client = client
            try:
                yield
            finally:
                self._client = None

    async def _process_message(self, message: QueueMessage) -> Any:
        if self._client is None:
            async with self._new_client() as client:
                response = await self._post(client, message)
        else:
            response = await self._post(self._client, message)
        self._check(response)
        if not response.content:
            return None
        # Taken is taken: an answer in another format must not bring the message back.
        is_json = response.headers.get("Content-Type", "").startswith("application/json")
        return response.json() if is_json else response.text

    async def _post(self, client: httpx.AsyncClient, message: QueueMessage) -> httpx.Response:
        body, headers = message.model_dump_json(), {"Content-Type": "application/json"}
        try:
            with anyio.fail_after(self.timeout):
                return await client.post(self.url, content=body, headers=headers)
        except (httpx.TransportError, TimeoutError) as error:
            reason = f"{type(error).__name__} {error}".rstrip()
            raise Unavailable(f"{self.url} did not answer: {reason}", url=self.url) from error

    def _check(self, response: httpx.Response) -> None:
        if response.status_code < 300:
            return
        kind = BadInput if response.status_code in REFUSALS else Unavailable
        raise kind(
            f"{self.url} answered {response.status_code}",
            hint=response.text[:500] or None,
            url=self.url,
            status_code=response.status_code,
        )

    def _new_client(self) -> httpx.AsyncClient:
        headers = {} if self._token is None else {"Authorization": f"Bearer {self._token.get_secret_value()}"}
        # The limit is the fail_after around the request: httpx's own count each read anew.
        return httpx.AsyncClient(headers=headers, timeout=None, transport=self._transport)


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """What happens to a message whose handler raised: `max_failures` deliveries to this consumer, then the dead-letter
    topic; between them a pause of `first_pause` seconds, doubled up to `longest_pause`."""

    max_failures: int = 20
    first_pause: float = 0.05
    longest_pause: float = 5.0

    def pause(self, failures: int) -> float:
        return min(self.longest_pause, self.first_pause * 2.0 ** min(failures - 1, 30))


def register_consumer(
    queue: MessageQueue,
    consumer: BaseMessageQueueConsumer,
    topic: str | None = None,
    *,
    group: str = "default",
    retry: RetryPolicy | None = None,
    dead_letter_topic: str | None = None,
) -> StartConsumingCallable:
    """`start_consuming` with its arguments bound, as the original's `register_consumer` returns it."""
    return partial(
        start_consuming,
        queue,
        consumer,
        topic,
        group=group,
        retry=retry,
        dead_letter_topic=dead_letter_topic,
    )


async def start_consuming(
    queue: MessageQueue,
    consumer: BaseMessageQueueConsumer,
    topic: str | None = None,
    *,
    group: str = "default",
    retry: RetryPolicy | None = None,
    dead_letter_topic: str | None = None,
    task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED,
) -> None:
    """Handle the messages of a topic one after the other until cancelled; for `await task_group.start(...)`, which
    returns when the consumer is registered. What is being handled then goes back to the queue.

    Args:
        topic: By default that of the consumer's message type in the original's namespace.
        dead_letter_topic: By default that of the namespace of `topic`.

    Raises:
        QueueUnavailable: the queue is closed or away.
    """
    topic = topic or topics.topic(topics.DEFAULT_NAMESPACE, consumer.message_type)
    loop = _Consuming(
        queue, consumer, topic, retry or RetryPolicy(), dead_letter_topic or _dead_letter_topic(topic, consumer)
    )
    async with consumer.opened(), queue.consumer(topic, group) as source:
        task_status.started()
        while True:
            for delivery in await source.receive():
                await loop.handle(delivery)


def _dead_letter_topic(topic: str, consumer: BaseMessageQueueConsumer) -> str:
    """A topic is `{namespace}.{message_type}`; what is named otherwise has a dead-letter topic of its own below it."""
    namespace = topic.removesuffix(f".{consumer.message_type}")
    return topics.dead_letter(namespace)


class _Consuming:
    """What happens to one delivery after the other."""

    REMEMBERED = 10_000

    def __init__(
        self, queue: MessageQueue, consumer: BaseMessageQueueConsumer, topic: str, retry: RetryPolicy, dead: str
    ) -> None:
        self._queue = queue
        self._consumer = consumer
        self._topic = topic
        self._retry = retry
        self._dead = dead
        # Failures by message id. Bounded: what is forgotten is counted from one again.
        self._failures: OrderedDict[str, int] = OrderedDict()

    async def handle(self, delivery: Delivery) -> None:
        message = delivery.message
        try:
            await self._consumer.process_message(message)
        except Exception as error:
            await self._failed(delivery, error)
        else:
            self._failures.pop(message.id_, None)
            await delivery.ack()

    async def _failed(self, delivery: Delivery, error: Exception) -> None:
        failures = self._count_failure(delivery.message.id_)
        refused = isinstance(error, BadInput)
        logger.warning(
            "Consumer %s failed on message %s of %s (%d of %d): %s: %s",
            self._consumer.id_,
            delivery.message.id_,
            self._topic,
            failures,
            self._retry.max_failures,
            type(error).__name__,
            error,
        )
        if (refused or failures >= self._retry.max_failures) and await self._bury(delivery, error, failures):
            return
        # The delivery is not kept open during the pause: another consumer may have more luck with it.
        await delivery.nack()
        await anyio.sleep(self._retry.pause(failures))

    async def _bury(self, delivery: Delivery, error: Exception, failures: int) -> bool:
        """False if the dead-letter topic does not take it: then the message stays where it is, and nothing is lost."""
        letter = dead_letter(
            delivery.message,
            self._topic,
            f"{type(error).__name__}: {error}",
            publisher_id=self._consumer.id_,
            failures=failures,
        )
        try:
            await self._queue.publish(letter, self._dead)
        except QueueUnavailable as unavailable:
            logger.warning("The dead-letter topic %s took nothing: %s", self._dead, unavailable)
            return False
        self._failures.pop(delivery.message.id_, None)
        await delivery.ack()
        return True

    def _count_failure(self, message_id: str) -> int:
        failures = self._failures.pop(message_id, 0) + 1
        self._failures[message_id] = failures
        if len(self._failures) > self.REMEMBERED:
            self._failures.popitem(last=False)
        return failures
