"""Routes of the control plane itself and of its services."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ...protocol.messages import QueueMessage, ServiceDefinition
from ...web import Request, Routes
from ..config import ControlPlaneConfig
from ..plane import ControlPlane
from ..sessions import no_such_service
from .models import DeadLetterPage, DeadLettersQuery, ServiceQuery, StatusAnswer, dead_letter_item
from .queue import simple_queue_config
from .surroundings import Surroundings

_SECRET = re.compile(r"pass|secret|token|credential|(^|_)key|auth", re.IGNORECASE)
_USERINFO = re.compile(r"(?<=://)[^/?#\s]*@")


def without_credentials(value: Any) -> Any:
    """The same without what a name says is secret, and without user and password in URLs."""
    if isinstance(value, Mapping):
        return {name: without_credentials(item) for name, item in value.items() if not _SECRET.search(str(name))}
    if isinstance(value, (list, tuple)):
        return [without_credentials(item) for item in value]
    return _USERINFO.sub("", value) if isinstance(value, str) else value


class ServiceRoutes:
    """The original's `Control Plane`, `Message Queue` and `Services` routes, and `/status`."""

    def __init__(self, plane: ControlPlane, queue_config: Mapping[str, Any] | None, surroundings: Surroundings) -> None:
        self.plane = plane
        self.surroundings = surroundings
        self.queue_config = None if queue_config is None else without_credentials(queue_config)

    def routes(self) -> list[Routes]:
        own, services, queue = Routes(tag="Control Plane"), Routes(tag="Services"), Routes(tag="Message Queue")
        own.add("GET", "/", self.home)
        own.add("POST", "/process_message", self.process_message, errors=(404, 409, 429))
        own.add("GET", "/status", self.status)
        queue.add("GET", "/queue_config", self.get_message_queue_config)
        queue.add("GET", "/dead_letters", self.list_dead_letters)
        services.add("POST", "/services/register", self.register_service, returns=ControlPlaneConfig)
        services.add("POST", "/services/deregister", self.deregister_service, errors=(404,))
        services.add("GET", "/services/{service_name}", self.get_service, returns=ServiceDefinition)
        services.add("GET", "/services", self.get_all_services, returns=dict[str, ServiceDefinition])
        return [own, queue, services]

    async def home(self) -> dict[str, str]:
        """The configuration, as text."""
        config = self.plane.config
        return {
            "running": str(config.running and not self.plane.draining),
            "step_interval": str(config.step_interval),
            "services_store_key": config.services_store_key,
            "tasks_store_key": config.tasks_store_key,
            "session_store_key": config.session_store_key,
        }

    async def process_message(self, body: QueueMessage) -> None:
        """Take a NEW_TASK, TASK_STREAM or COMPLETED_TASK message from a service or client of the original.

        A message that comes twice changes nothing.
        """
        await self.plane.process_message(body)

    async def status(self) -> StatusAnswer:
        """How much waits and runs, by service; and what this control plane works with."""
        return StatusAnswer.model_validate(
            {
                "services": await self.plane.services.status(),
                "draining": self.plane.draining,
                "store": self.surroundings.store,
                "queue": self.surroundings.queue,
                "control_planes": self.plane.statistics()["control_planes"],
            }
        )

    async def get_message_queue_config(self, request: Request) -> dict[str, dict[str, Any]]:
        """Which message queue the original's services are to use. Credentials are never part of it.

        The original takes the first one, which works for its services whatever the queue is: this server is a bridge to it.
        The second one says what that is.
        """
        if self.queue_config is not None:
            return dict(self.queue_config)
        config = simple_queue_config(request)
        if self.surroundings.queue_url is not None:
            settings = {"type": self.surroundings.queue, "url": self.surroundings.queue_url}
            config[f"{type(self.plane.queue).__name__}Config"] = settings
        return config

    async def list_dead_letters(self, query: DeadLettersQuery) -> DeadLetterPage:
        """Messages that nobody could read or handle, newest first."""
        letters = await self.plane.list_dead_letters(before=query.before, limit=query.limit + 1)
        page = letters[: query.limit]
        return DeadLetterPage(
            dead_letters=[dead_letter_item(letter) for letter in page],
            next=page[-1].no if len(letters) > query.limit else None,
        )

    async def register_service(self, body: ServiceDefinition) -> dict[str, Any]:
        """Register a service, or register it again."""
        await self.plane.services.define(body)
        return self.plane.config.public()

    async def deregister_service(self, query: ServiceQuery) -> None:
        """Forget a service. Its tasks stay; new ones are refused."""
        if not await self.plane.services.remove(query.service_name):
            raise no_such_service(query.service_name)

    async def get_service(self, service_name: str) -> ServiceDefinition:
        """A service by its name."""
        return ServiceDefinition.model_validate_json((await self.plane.services.get(service_name)).definition)

    async def get_all_services(self) -> dict[str, ServiceDefinition]:
        """All services by name."""
        services = await self.plane.services.list()
        return {each.service_name: ServiceDefinition.model_validate_json(each.definition) for each in services}
