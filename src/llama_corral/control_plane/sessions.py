"""Sessions and services as a control plane offers them to clients: what is stored, and who is told when it changes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import anyio

from ..abc import Store
from ..exceptions import BadInput, Conflict, NotFound
from ..protocol.messages import ServiceDefinition, new_id
from ..protocol.records import ServiceRecord, SessionPolicy, SessionRecord
from .checks import check_id
from .effects import Effects
from .registry import Registry, speaks_messages_only


def no_such_session(session_id: str) -> NotFound:
    return NotFound(
        f"There is no session {session_id!r}.",
        hint="POST /sessions/create makes one, PUT /sessions/{session_id} one with an id of your own.",
        session_id=session_id,
    )


def no_such_service(service_name: str) -> NotFound:
    return NotFound(
        f"There is no service {service_name!r}.", hint="GET /services lists the services.", service_name=service_name
    )


class Sessions:
    """Sessions with their user state. Methods raise `NotFound` for a session that does not exist."""

    def __init__(self, store: Store, effects: Effects, now: Callable[[], float]) -> None:
        self._store = store
        self._effects = effects
        self._now = now

    async def create(self, session_id: str | None = None, *, policy: SessionPolicy = "enqueue") -> SessionRecord:
        """A new session; `Conflict` if the id exists."""
        session = self._new(session_id, policy)
        if not await self._store.create_session(session):
            raise Conflict(
                f"The session {session.session_id!r} exists already.",
                hint="PUT /sessions/{session_id} takes it as it is.",
                session_id=session.session_id,
            )
        return session

    async def get(self, session_id: str) -> SessionRecord:
        session = await self._store.get_session(session_id)
        if session is None:
            raise no_such_session(session_id)
        return session

    async def get_or_create(self, session_id: str, *, policy: SessionPolicy = "enqueue") -> tuple[SessionRecord, bool]:
        """The session of exactly this id, and whether it is new."""
        session = self._new(session_id, policy)
        if await self._store.create_session(session):
            return session, True
        return await self.get(session_id), False

    async def list(self, *, after: str | None = None, limit: int = 100) -> list[SessionRecord]:
        return await self._store.list_sessions(after=after, limit=limit)

    async def delete(self, session_id: str) -> None:
        """Remove a session with all that belongs to it. Runs of its tasks are stopped, their readers get `NotFound`."""
        session = await self.get(session_id)
        with anyio.CancelScope(shield=True):
            deleted = await self._store.delete_session(session_id)
            if deleted is None:
                raise no_such_session(session_id)
            for task_id, owner in deleted.running:
                self._effects.wake(owner, task_id, "deleted")
            for task_id in session.task_ids:
                self._effects.changed(task_id)

    async def state(self, session_id: str) -> dict[str, Any]:
        state: dict[str, Any] = json.loads((await self.get(session_id)).state)
        return state

    async def merge_state(self, session_id: str, changes: Mapping[str, Any]) -> dict[str, Any]:
        """Set these top-level keys; concurrent merges of different keys all stand."""
        session = await self._store.merge_state(session_id, changes)
        if session is None:
            raise no_such_session(session_id)
        merged: dict[str, Any] = json.loads(session.state)
        return merged

    def _new(self, session_id: str | None, policy: SessionPolicy) -> SessionRecord:
        chosen = new_id() if session_id is None else check_id(session_id, "session_id")
        return SessionRecord(chosen, policy=policy, created_at=self._now())


class Services:
    """The registered services. Instances register themselves through the coordinator."""

    def __init__(self, store: Store, registry: Registry, effects: Effects, now: Callable[[], float]) -> None:
        self._store = store
        self._registry = registry
        self._effects = effects
        self._now = now

    async def define(self, definition: ServiceDefinition) -> ServiceRecord:
        """Insert or replace a service by its definition alone, as the original's services register.

        A service with instances keeps what they said of it. Any other one is taken for one that gets its tasks as whole
        messages and reports by messages.
        """
        name = check_id(definition.service_name, "service_name")
        if name in _RESERVED:
            raise BadInput(f"A service cannot be named {name!r}.", hint="The name is one of ours.", name="service_name")
        text = definition.model_dump_json()
        before = await self._store.get_service(name)
        record = ServiceRecord(name, text, self._now())
        if before is not None and await self._has_instances(name):
            record = ServiceRecord(name, text, before.registered_at, before.events, before.start_schema)
        await self._store.put_service(record)
        self._registry.learn(record)
        if before is None or speaks_messages_only(before) is not speaks_messages_only(record):
            self._effects.tell_others("service", service_name=name)
        return record

    async def get(self, service_name: str) -> ServiceRecord:
        service = await self._store.get_service(service_name)
        if service is None:
            raise no_such_service(service_name)
        return service

    async def list(self) -> list[ServiceRecord]:
        return await self._store.list_services()

    async def remove(self, service_name: str) -> bool:
        """Forget a service and its instances; False if there is none. Its tasks stay, new ones are refused."""
        self._registry.remove_service(service_name)
        self._effects.tell_others("service", service_name=service_name)
        return await self._store.delete_service(service_name)

    async def status(self) -> dict[str, dict[str, Any]]:
        """Numbers for each service: its open tasks by status, its instances and their capacity, and for how many seconds
        the task at the front of its line could have been claimed (`oldest_queued`; None without a line)."""
        counts = await self._store.count_tasks()
        now = self._now()
        oldest = await self._store.oldest_queued(now)
        table: dict[str, dict[str, Any]] = {}
        for name in [*(service.service_name for service in await self._store.list_services()), *counts]:
            table.setdefault(name, dict.fromkeys(_COUNTED, 0) | dict(counts.get(name, {})))
        for name, row in table.items():
            row["oldest_queued"] = max(0.0, now - oldest[name]) if name in oldest else None
        for instance in await self._store.list_instances():
            if instance.service_name in table:
                table[instance.service_name]["instances"] += 1
                table[instance.service_name]["capacity"] += instance.capacity
        return table

    async def _has_instances(self, service_name: str) -> bool:
        if self._registry.local(service_name) is not None:
            return True
        return any(each.service_name == service_name for each in await self._store.list_instances())


_COUNTED = ("held", "queued", "running", "waiting", "instances", "capacity")
# "control_plane" is the topic of our own messages; the others are paths below /services.
_RESERVED = frozenset({"control_plane", "dead_letter", "register", "deregister"})
