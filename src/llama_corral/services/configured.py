"""The part of a workflow service that its configuration decides: what it says of itself, and how it is launched."""

from __future__ import annotations

import logging

import anyio
import anyio.abc
from pydantic import SecretStr

from ..abc import MessageQueue
from ..protocol.messages import ServiceDefinition, new_id
from ..queues.consumers import BaseMessageQueueConsumer, CallableMessageConsumer, RemoteMessageConsumer
from .base import BaseService
from .config import WorkflowServiceConfig
from .queue_coordinator import PublishCallback

logger = logging.getLogger(__name__)


class ConfiguredService(BaseService):
    """A service with a `WorkflowServiceConfig` and a message queue; `WorkflowService` runs the workflow.

    `instance_id` is fresh for each object: control planes tell instances of one service apart by it.
    """

    def __init__(
        self,
        message_queue: MessageQueue,
        config: WorkflowServiceConfig,
        publish_callback: PublishCallback | None,
        *,
        control_plane_url: str | None,
        token: SecretStr | None,
    ) -> None:
        super().__init__(config.service_name, control_plane_url, token)
        self.config = config
        self.instance_id = new_id()
        self._message_queue = message_queue
        self._publisher_id = f"{type(self).__qualname__}-{self.instance_id}"
        self._publish_callback = publish_callback
        self._port: int | None = None

    @property
    def service_definition(self) -> ServiceDefinition:
        return ServiceDefinition(
            service_name=self.config.service_name,
            description=self.config.description,
            host=self.config.host,
            port=self._port if self._port is not None else self.config.port,
        )

    @property
    def message_queue(self) -> MessageQueue:
        return self._message_queue

    @property
    def publisher_id(self) -> str:
        return self._publisher_id

    @property
    def publish_callback(self) -> PublishCallback | None:
        return self._publish_callback

    def as_consumer(self, remote: bool = False) -> BaseMessageQueueConsumer:
        if remote:
            url = f"{self._own_url()}/process_message"
            return RemoteMessageConsumer(self.publisher_id, url, self.service_name, token=self._token)
        return CallableMessageConsumer(self.publisher_id, self.service_name, self.process_message)

    def _own_url(self) -> str:
        port = self._port if self._port is not None else self.config.port
        return f"{'https' if self.config.use_tls else 'http'}://{self.config.host}:{port}"

    async def launch_local(self, *, task_status: anyio.abc.TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        logger.info("launching %s in this process", self.service_name)
        await self.processing_loop(task_status=task_status)

    def bound_to(self, port: int) -> None:
        """Note the port that the service's own server really listens on."""
        self._port = port


class Latch:
    """An event that can be set and asked outside of any event loop."""

    def __init__(self) -> None:
        self._set = False
        self._event: anyio.Event | None = None

    def is_set(self) -> bool:
        return self._set

    def set(self) -> None:
        self._set = True
        if self._event is not None:
            self._event.set()

    async def wait(self) -> None:
        """Return when the latch is set."""
        while not self._set:
            self._event = anyio.Event()
            await self._event.wait()
