"""A coordinator on a bad line."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Final

from ..abc import Coordinator, LocalService
from ..exceptions import Unavailable
from ..protocol.records import (
    Checkpoint,
    Claim,
    HeartbeatAnswer,
    HeldTask,
    InboxPage,
    Registration,
    Report,
    ReportAnswer,
    ServiceInfo,
    Ticket,
)
from .call_faults import CallFaults

CALLS: Final = ("claim", "report", "release", "heartbeat", "pull")
"""The methods that a fault without a name strikes."""


class FaultyCoordinator(CallFaults, Coordinator):
    """Wraps a coordinator and passes everything on until a test plans a fault; those raise Unavailable.

        coordinator = FaultyCoordinator(control_plane)
        service = WorkflowService(workflow, queue, config, coordinator=coordinator)
        coordinator.lose_answer("report", nth=3)       # the third report from now is stored, the service is told it was not
        coordinator.refuse("claim", times=2)           # the next two do not come through
        coordinator.duplicate("release")               # the next one comes through twice
        coordinator.delay("report"); ...; await coordinator.deliver_held()   # it comes through late, after its repetition
        with coordinator.hang("pull", when="after") as hung: await hung.reached.wait(); ...
        coordinator.at_random(seed=1, lose_answer=0.2, refuse=0.1); ...; coordinator.heal()

    A fault without a method strikes any call about tasks: all but `register` and `deregister`.
    """

    def __init__(self, inner: Coordinator) -> None:
        super().__init__(CALLS, Unavailable)
        self.inner = inner

    async def register(self, info: ServiceInfo, local: LocalService | None = None) -> Registration:
        return await self._call("register", partial(self.inner.register, info, local))

    async def deregister(self, instance_id: str) -> None:
        await self._call("deregister", partial(self.inner.deregister, instance_id))

    async def claim(self, ticket: Ticket, instance_id: str, nonce: str) -> Claim | None:
        return await self._call("claim", partial(self.inner.claim, ticket, instance_id, nonce))

    async def report(self, report: Report) -> ReportAnswer:
        return await self._call("report", partial(self.inner.report, report))

    async def release(
        self,
        task_id: str,
        epoch: int,
        checkpoint: Checkpoint | None,
        *,
        idle: bool = False,
        wake_at: float | None = None,
    ) -> ReportAnswer:
        release = partial(self.inner.release, task_id, epoch, checkpoint, idle=idle, wake_at=wake_at)
        return await self._call("release", release)

    async def heartbeat(self, instance_id: str, held: Sequence[HeldTask]) -> HeartbeatAnswer:
        return await self._call("heartbeat", partial(self.inner.heartbeat, instance_id, held))

    async def pull(self, task_id: str, epoch: int, after: int) -> InboxPage:
        return await self._call("pull", partial(self.inner.pull, task_id, epoch, after))
