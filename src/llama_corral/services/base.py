"""What every service has in common: a name, a queue, a control plane to register with."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import anyio
import anyio.abc
from pydantic import SecretStr
from pydantic_core import from_json, to_json

from ..abc import MessageQueue
from ..exceptions import BadInput, NotFound
from ..http_link import HttpLink
from ..http_urls import path_of
from ..protocol import topics
from ..protocol.messages import QueueMessage, ServiceDefinition
from ..queues.consumers import BaseMessageQueueConsumer, StartConsumingCallable, register_consumer


class BaseService(ABC):
    """A service: it has a name and a definition, takes messages from a queue, processes them in a loop, can be launched
    in this process or as an HTTP server, and can be registered with a control plane and a message queue.

    Long-running methods take `task_status` and are started with `task_group.start`: they report when they really work,
    and cancelling their task group ends them.

    Args:
        name: The service's name; its topic is `{topic_namespace}.{name}`.
        control_plane_url: Where `register_to_control_plane` and the session state are, None without one.
        token: Bearer token of the control plane.
    """

    def __init__(self, name: str, control_plane_url: str | None = None, token: SecretStr | None = None) -> None:
        self._service_name = name
        self._control_plane_url = control_plane_url
        self._token = token
        self._topic_namespace = topics.DEFAULT_NAMESPACE
        self._consuming: anyio.CancelScope | None = None

    @property
    def service_name(self) -> str:
        return self._service_name

    @property
    def topic_namespace(self) -> str:
        """What the names of the service's topics begin with: the control plane's namespace."""
        return self._topic_namespace

    @property
    @abstractmethod
    def service_definition(self) -> ServiceDefinition:
        """What the service tells others of itself."""

    @property
    @abstractmethod
    def message_queue(self) -> MessageQueue:
        """The queue that the service takes from and publishes to. Whoever made it closes it."""

    @abstractmethod
    def as_consumer(self, remote: bool = False) -> BaseMessageQueueConsumer:
        """A consumer that hands each message to `process_message`: in this process, or with `remote` by a request to
        the service's own HTTP server."""

    @abstractmethod
    async def processing_loop(self, *, task_status: anyio.abc.TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Take and process messages until the service is stopped. Started when it takes the first."""

    @abstractmethod
    async def process_message(self, message: QueueMessage) -> Any:
        """Process one message."""

    @abstractmethod
    async def launch_local(self, *, task_status: anyio.abc.TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Run the service in this process without a server of its own, until it is stopped."""

    @abstractmethod
    async def launch_server(self, *, task_status: anyio.abc.TaskStatus[str] = anyio.TASK_STATUS_IGNORED) -> None:
        """Run the service with an HTTP server of its own, until it is stopped. Started with the URL it listens on."""

    # The control plane, over HTTP

    async def register_to_control_plane(self, control_plane_url: str) -> None:
        """Make the service known to a control plane and take over its topic namespace. Repeating it is harmless.

        Raises:
            Unavailable: the control plane cannot be reached.
            BadInput, Unauthorized: it refused.
        """
        self._control_plane_url = control_plane_url.rstrip("/")
        answer = await self._ask("POST", "/services/register", body=self.service_definition.model_dump())
        self._topic_namespace = str((answer or {}).get("topic_namespace") or self._topic_namespace)

    async def deregister_from_control_plane(self) -> None:
        """Take the service off the control plane's list. Raises as `register_to_control_plane` does."""
        if not self._control_plane_url:
            raise BadInput("the service is not registered", hint="call register_to_control_plane(url) first")
        await self._ask("POST", "/services/deregister", service_name=self.service_name)

    async def get_session_state(self, session_id: str) -> dict[str, Any] | None:
        """The user's state of a session; None if there is no such session, or no control plane was given.

        Raises:
            Unavailable: the control plane cannot be reached; that is no reason to run a task on an empty state.
        """
        if not self._control_plane_url:
            return None
        try:
            state = await self._ask("GET", path_of("sessions", session_id, "state"))
        except NotFound:
            return None
        return dict(state or {})

    async def update_session_state(self, session_id: str, state: dict[str, Any]) -> None:
        """Update keys of a session's user state: those that are given, and no others."""
        if self._control_plane_url:
            await self._ask("POST", path_of("sessions", session_id, "state"), body=state)

    async def _ask(self, method: str, path: str, *, body: Any = None, **params: str) -> Any:
        # A link a call: these calls are rare (start, stop, user state). What tasks need goes through the coordinator.
        async with HttpLink(self._control_plane_url or "", self._token) as link:
            content = None if body is None else to_json(body)
            return await link.ask(method, path, from_json, body=content, params=params or None)

    # The message queue

    async def register_to_message_queue(self) -> StartConsumingCallable:
        """A function that consumes the service's topic through its own HTTP server (`launch_server`), as the original
        did: start it with `task_group.start`."""
        start = register_consumer(
            self.message_queue, self.as_consumer(remote=True), topic=self.get_topic(self.service_name)
        )
        scope = self._consuming = anyio.CancelScope()

        async def consume(*, task_status: anyio.abc.TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
            with scope:
                await start(task_status=task_status)

        return consume

    async def deregister_from_message_queue(self) -> None:
        """End what `register_to_message_queue` returned, if it runs; what it was handling goes back to the queue."""
        if self._consuming is not None:
            self._consuming.cancel()
            self._consuming = None

    def get_topic(self, msg_type: str) -> str:
        """The topic of a message type in the control plane's namespace."""
        return topics.topic(self._topic_namespace, msg_type)
