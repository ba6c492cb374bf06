"""The seam to the services, on a store: what an instance says is written, and what follows from it is done."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

import anyio

from ..abc import Coordinator, LocalService, Store
from ..exceptions import Unavailable
from ..protocol.records import (
    Checkpoint,
    Claim,
    ClaimRequest,
    HeartbeatAnswer,
    HeldTask,
    InboxPage,
    InstanceRecord,
    Registration,
    Report,
    ReportAnswer,
    ServiceInfo,
    ServiceRecord,
    Ticket,
)
from . import checks
from .config import ControlPlaneConfig
from .effects import Effects
from .leases import Leases, Strays
from .registry import Registry, speaks_messages_only
from .reports import take_from_messages

logger = logging.getLogger(__name__)


class StoreCoordinator(Coordinator):
    """The coordinator of the control plane: for services of its process, and behind the routes for the others."""

    def __init__(
        self, store: Store, registry: Registry, effects: Effects, config: ControlPlaneConfig, now: Callable[[], float]
    ) -> None:
        self.config = config
        self._store = store
        self._registry = registry
        self._effects = effects
        self._now = now
        self._strays = Strays(config.lease)
        self._leases = Leases(config.lease)

    async def register(self, info: ServiceInfo, local: LocalService | None = None) -> Registration:
        checks.check_id(info.service_name, "service_name")
        checks.check_id(info.instance_id, "instance_id")
        # A service that claims says something of itself, if only that it takes anything.
        schema = "{}" if info.start_schema is None and info.events is None else info.start_schema
        service = ServiceRecord(info.service_name, info.definition, self._now(), info.events, schema)
        instance = InstanceRecord(
            info.instance_id, info.service_name, info.capacity, self._now(), embedded=local is not None
        )
        before = await self._store.get_service(info.service_name)
        await self._store.put_service(service, instance)
        self._registry.learn(service)
        if local is not None:
            self._registry.add_local(info.service_name, info.instance_id, local)
        if before is not None and speaks_messages_only(before):
            self._effects.tell_others("service", service_name=info.service_name)
            await take_from_messages(self._store, self._effects, info.service_name, self._now())
        logger.info("registered %s of %s, runs at a time: %d", info.instance_id, info.service_name, info.capacity)
        return Registration(self.config.topic_namespace, self.config.heartbeat_interval, lease=self.config.lease)

    async def deregister(self, instance_id: str) -> None:
        self._registry.remove_instance(instance_id)
        self._strays.forget(instance_id)
        with anyio.CancelScope(shield=True):
            # It should hold nothing any more; what it does hold is freed with it.
            self._effects.lost(await self._store.reap([instance_id], self._now()))

    async def claim(self, ticket: Ticket, instance_id: str, nonce: str) -> Claim | None:
        claim = await self._store.claim(ClaimRequest(ticket.task_id, instance_id, nonce, self._now()))
        if claim is None:
            # Most often it is done already; but a task of a session that is ticketed early may not start yet.
            self._effects.look_again()
        else:
            # For who follows its status here. Elsewhere the first report tells: a broadcast for each claim costs more.
            self._effects.changes.notify(ticket.task_id, ended=False)
        return claim

    async def report(self, report: Report) -> ReportAnswer:
        terminal = report.terminal
        # With an ending come tickets and answers to give, and a cancellation must not come in between.
        with anyio.CancelScope(shield=terminal is not None):
            try:
                answer = await self._store.report(report)
            finally:
                if terminal is None and (report.events or report.waiting is not None):
                    self._effects.changed(report.task_id, ended=False)
            if terminal is not None:
                self._effects.ended(report.task_id, terminal, answer)
        return answer

    async def release(
        self,
        task_id: str,
        epoch: int,
        checkpoint: Checkpoint | None,
        *,
        idle: bool = False,
        wake_at: float | None = None,
    ) -> ReportAnswer:
        with anyio.CancelScope(shield=True):
            answer = await self._store.release(task_id, epoch, checkpoint, self._now(), idle=idle, wake_at=wake_at)
            self._effects.released(task_id, answer, wake_at)
        return answer

    async def heartbeat(self, instance_id: str, held: Sequence[HeldTask]) -> HeartbeatAnswer:
        try:
            answer = await self._store.heartbeat(instance_id, held)
        except Unavailable:
            self._leases.heard(instance_id, anyio.current_time())
            raise
        lost = self._strays.lost(instance_id, answer.strays, anyio.current_time())
        if lost:
            await self._reclaim(instance_id, lost)
        return replace(answer, strays=())

    async def _reclaim(self, instance_id: str, lost: Sequence[HeldTask]) -> None:
        """Give tasks that an instance owns without knowing it to others, as if it had died with them."""
        with anyio.CancelScope(shield=True):
            self._effects.lost(await self._store.reclaim(instance_id, lost, self._now()))
        logger.warning("%s did not know of %d of its tasks; they are taken away from it", instance_id, len(lost))

    async def pull(self, task_id: str, epoch: int, after: int) -> InboxPage:
        return await self._store.pull(task_id, epoch, after)
