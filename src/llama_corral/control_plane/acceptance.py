"""The door: what a task must fulfil, whether there is room for it, and the one way in which it starts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import anyio

from ..abc import Store
from ..exceptions import TooManyTasks
from ..protocol.lifecycle import TaskStatus
from ..protocol.messages import new_id
from ..protocol.records import Accepted, ClaimRequest, NewTask, Ticket
from . import checks
from .admission import RECOUNT_AFTER, Admission
from .config import ControlPlaneConfig
from .effects import Effects
from .options import TaskOptions, new_task
from .registry import Registry
from .sessions import no_such_service


class Acceptance:
    """Accepts tasks for a control plane. The methods raise as `ControlPlane.submit` says."""

    def __init__(
        self,
        store: Store,
        registry: Registry,
        effects: Effects,
        config: ControlPlaneConfig,
        now: Callable[[], float],
        *,
        alone: bool,
    ) -> None:
        self._store = store
        self._registry = registry
        self._effects = effects
        self._config = config
        self._now = now
        self._admission = Admission(config.max_queued_tasks, alone=alone)
        self._counting = anyio.Lock()

    async def submit(
        self,
        service_name: str,
        arguments: str | Mapping[str, Any],
        *,
        session_id: str | None,
        task_id: str | None,
        client_id: bool,
        options: TaskOptions,
    ) -> Accepted:
        text, parsed = checks.start_arguments(arguments)
        repeatable = task_id is not None and client_id
        task = new_task(
            options,
            task_id=new_id() if task_id is None else checks.check_id(task_id, "task_id"),
            service_name=service_name,
            session_id=session_id,
            text=text,
            now=self._now(),
            max_attempts=self._config.max_attempts,
            repeatable=repeatable,
        )
        await self.check_start(service_name, parsed)
        if not self._admission.take(service_name) and not (repeatable and await self._is_known(task.task_id)):
            await self._admit(service_name)
        with anyio.CancelScope(shield=True):
            accepted = await self._accept(task)
            self._effects.alarm.add(task.deadline)
            self._effects.alarm.add(task.not_before)
        return accepted

    async def retry(self, task_id: str, *, fresh: bool) -> Accepted:
        """Accept a task that does again what an ended one did not complete."""
        with anyio.CancelScope(shield=True):
            accepted = await self._store.retry(task_id, self._now(), fresh=fresh)
            record = await self._store.get_task(accepted.task_id)
            if record is not None and record.status is TaskStatus.QUEUED:
                self._effects.tickets([Ticket(record.task_id, record.service_name)])
        return accepted

    async def check_start(self, service_name: str, arguments: Mapping[str, Any]) -> None:
        """Raise what is wrong with the start arguments of a service, or that there is no such service."""
        local = self._registry.local(service_name)
        if local is not None:
            local.check_start(arguments)
            return
        service = await self._store.get_service(service_name)
        if service is None:
            raise no_such_service(service_name)
        self._registry.learn(service)
        checks.check_start(service.start_schema, arguments)

    async def _is_known(self, task_id: str) -> bool:
        """A request whose first answer was lost adds nothing to what waits."""
        return await self._store.get_task(task_id) is not None

    async def _admit(self, service_name: str) -> None:
        """Count what waits for the service, and take one more or raise."""
        admission = self._admission
        async with self._counting:
            # Whoever had the lock before may have counted for us.
            if admission.take(service_name):
                return
            if admission.may_count(service_name, anyio.current_time()):
                waiting = await self._store.count_queued(service_name)
                if admission.counted(service_name, waiting, anyio.current_time()):
                    return
        raise TooManyTasks(
            f"{service_name!r} is full: about {admission.limit} tasks wait for it.",
            hint="Send the request again later; nothing of it was stored. More workers, or a larger max_queued_tasks, help.",
            service_name=service_name,
            limit=admission.limit,
            retry_after=round(2 * RECOUNT_AFTER),
        )

    async def _accept(self, task: NewTask) -> Accepted:
        """Store it, with the claim if an instance here has a free slot; whichever it is, exactly one way starts it."""
        due = task.not_before is None
        reservation = self._registry.reserve(task.service_name) if due else None
        if reservation is None:
            accepted = await self._store.accept(task)
        else:
            try:
                request = ClaimRequest(task.task_id, reservation.instance_id, new_id(), task.created_at)
                accepted = await self._store.accept(task, request)
            except BaseException:
                reservation.cancel()
                raise
            if accepted.claim is None:
                reservation.cancel()
            else:
                reservation.start(accepted.claim)
        if accepted.status is TaskStatus.QUEUED and due:
            self._effects.tickets([Ticket(accepted.task_id, task.service_name)])
        return accepted
