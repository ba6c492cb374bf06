"""What this process knows of services without asking the store. Synchronous; one event loop."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ..abc import LocalService, Reservation
from ..protocol.records import ServiceRecord


def speaks_messages_only(service: ServiceRecord) -> bool:
    """Whether a service takes tasks out of messages and reports by messages, as the original's do. Others claim."""
    return service.events is None and service.start_schema is None


class Registry:
    """Services of this process, and whether the others claim.

    The stored records are the truth about which services exist. This has the objects in this process, and remembers how a
    service name speaks: that rarely changes, and other control planes say when it does.
    """

    def __init__(self) -> None:
        self._locals: dict[str, dict[str, LocalService]] = {}
        self._service_of: dict[str, str] = {}
        self._messages_only: dict[str, bool] = {}

    def add_local(self, service_name: str, instance_id: str, local: LocalService) -> None:
        self.remove_instance(instance_id)
        self._locals.setdefault(service_name, {})[instance_id] = local
        self._service_of[instance_id] = service_name

    def remove_instance(self, instance_id: str) -> None:
        service_name = self._service_of.pop(instance_id, None)
        if service_name is not None:
            instances = self._locals[service_name]
            del instances[instance_id]
            if not instances:
                del self._locals[service_name]

    def remove_service(self, service_name: str) -> None:
        for instance_id in [*self._locals.get(service_name, ())]:
            self.remove_instance(instance_id)
        self.forget(service_name)

    def learn(self, service: ServiceRecord) -> None:
        self._messages_only[service.service_name] = speaks_messages_only(service)

    def learn_all(self, services: Iterable[ServiceRecord]) -> None:
        """All services that there are."""
        self._messages_only = {service.service_name: speaks_messages_only(service) for service in services}

    def forget(self, service_name: str) -> None:
        """How the service speaks may have changed."""
        self._messages_only.pop(service_name, None)

    def is_messages_only(self, service_name: str) -> bool | None:
        """None: never heard of it."""
        return False if service_name in self._locals else self._messages_only.get(service_name)

    def messages_only(self) -> Iterator[str]:
        return (name for name, flag in self._messages_only.items() if flag and name not in self._locals)

    def local(self, service_name: str) -> LocalService | None:
        """Any instance of the service in this process: all of them run the same workflow."""
        instances = self._locals.get(service_name)
        return None if instances is None else next(iter(instances.values()))

    def reserve(self, service_name: str) -> Reservation | None:
        """A free slot of an instance in this process. Who gave one is asked last the next time."""
        instances = self._locals.get(service_name)
        if instances is None:
            return None
        for instance_id, local in instances.items():
            reservation = local.reserve()
            if reservation is not None:
                if len(instances) > 1:
                    instances[instance_id] = instances.pop(instance_id)
                return reservation
        return None

    @property
    def local_instances(self) -> frozenset[str]:
        return frozenset(self._service_of)

    def statistics(self) -> Mapping[str, Any]:
        return {name: len(instances) for name, instances in self._locals.items()}
