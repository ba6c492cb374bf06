"""Routes of instances in other processes: `Coordinator` over HTTP. The other side is `services.http_coordinator`.

They are served until the HTTP server closes, also while it drains: workers report what they still do.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic_core import to_json

from ...exceptions import BadInput
from ...protocol import calls
from ...protocol.messages import ServiceDefinition
from ...protocol.records import (
    Checkpoint,
    Claim,
    HeartbeatAnswer,
    InboxPage,
    Registration,
    Report,
    ReportAnswer,
    ServiceInfo,
    Terminal,
)
from ...web import Routes
from .. import checks
from ..effects import MESSAGES_INSTANCE
from ..plane import ControlPlane
from .surroundings import Surroundings

MAX_CAPACITY: Final = 1_000_000
REPORT_BODY_LIMIT: Final = 32_000_000
"""A checkpoint of 8 MB is JSON within JSON within JSON on its way, and every quotation mark of it grows."""
_LARGEST: Final = 2**63 - 1


class _EventType(BaseModel):
    """A member of `ServiceInfo.events`; it has more, which only clients read."""

    qualified_name: str


class _StartSchema(BaseModel):
    required: list[str] = []


_EVENT_TYPES: Final = TypeAdapter(list[_EventType])


class InstanceRoutes:
    """What an instance says is checked here as far as the control plane and its clients will read it: nothing that a
    worker sends may fail a request of somebody else.

    Args:
        now: The wall clock. Times of reports are those of the control plane, so that clocks are not mixed.
    """

    def __init__(self, plane: ControlPlane, surroundings: Surroundings, now: Callable[[], float] = time.time) -> None:
        self.plane = plane
        self.surroundings = surroundings
        self.now = now

    def routes(self) -> list[Routes]:
        routes = Routes(tag="Instances")
        routes.add("POST", calls.REGISTER, self.register, hot=True)
        routes.add("POST", calls.DEREGISTER, self.deregister, hot=True)
        routes.add("POST", calls.CLAIM, self.claim, hot=True)
        routes.add("POST", calls.REPORT, self.report, hot=True, body_limit=REPORT_BODY_LIMIT)
        routes.add("POST", calls.RELEASE, self.release, hot=True, body_limit=REPORT_BODY_LIMIT)
        routes.add("POST", calls.HEARTBEAT, self.heartbeat, hot=True)
        routes.add("POST", calls.PULL, self.pull, hot=True)
        routes.add("GET", calls.QUEUE, self.get_queue)
        return [routes]

    async def register(self, body: ServiceInfo) -> Registration:
        """Make a service and an instance of it known, and agree on a version of the protocol."""
        version = calls.common_version(body.protocol_versions)
        _check_instance(body.instance_id)
        _check_info(body)
        return replace(await self.plane.register(body), protocol_version=version)

    async def deregister(self, body: calls.DeregisterCall) -> None:
        """The instance takes nothing more; what it still holds is given to others."""
        _check_instance(body.instance_id)
        await self.plane.deregister(body.instance_id)

    async def claim(self, body: calls.ClaimCall) -> Claim | None:
        """Take the task of a ticket; null if it is not there to be taken. The same nonce gets the same answer."""
        _check_instance(body.instance_id)
        checks.check_id(body.nonce, "nonce")
        return await self.plane.claim(body.ticket, body.instance_id, body.nonce)

    async def report(self, body: Report) -> ReportAnswer:
        """Store what happened in a run: events, a checkpoint, the ending. A repeated `seq` changes nothing."""
        _check_numbers(body.epoch, body.seq)
        _check_checkpoint(body.checkpoint)
        for event in body.events:
            _check_event(event.payload)
        if body.terminal is not None:
            _check_terminal(body.terminal)
        if body.context is not None:
            _check_numbers(body.context.based_on)
        return await self.plane.report(replace(body, now=self.now()))

    async def release(self, body: calls.ReleaseCall) -> ReportAnswer:
        """Hand a task back, or let its run leave memory until an event comes."""
        _check_numbers(body.epoch)
        _check_checkpoint(body.checkpoint)
        if body.wake_at is not None and not 0 <= body.wake_at <= _LARGEST:
            raise BadInput("wake_at must be a time in seconds", name="wake_at")
        return await self.plane.release(body.task_id, body.epoch, body.checkpoint, idle=body.idle, wake_at=body.wake_at)

    async def heartbeat(self, body: calls.HeartbeatCall) -> HeartbeatAnswer:
        """Say what the instance holds, and learn what is not its own any more, was cancelled, or has news."""
        _check_instance(body.instance_id)
        for held in body.held:
            _check_numbers(held.epoch, held.inbox_read)
        return await self.plane.heartbeat(body.instance_id, body.held)

    async def pull(self, body: calls.PullCall) -> InboxPage:
        """Outside events of a task after a cursor, and whether it is to be cancelled."""
        _check_numbers(body.epoch, body.after)
        return await self.plane.pull(body.task_id, body.epoch, body.after)

    async def get_queue(self) -> calls.QueueInfo:
        """Where instances find the message queue. They have its credentials from elsewhere. No URL: it is served here,
        below `/queue`."""
        return calls.QueueInfo(self.surroundings.queue_url, self.plane.config.topic_namespace)


def _check_instance(instance_id: str) -> None:
    checks.check_id(instance_id, "instance_id")
    if instance_id == MESSAGES_INSTANCE:
        raise BadInput(f"the instance id {instance_id!r} is reserved", name="instance_id")


def _check_info(info: ServiceInfo) -> None:
    if not 0 <= info.capacity <= MAX_CAPACITY:
        raise BadInput(f"capacity must be from 0 to {MAX_CAPACITY}", name="capacity")
    definition = _read(TypeAdapter(ServiceDefinition), info.definition, "definition")
    if definition.service_name != info.service_name:
        raise BadInput("the definition is that of another service", name="definition")
    if info.events is not None:
        _read(_EVENT_TYPES, info.events, "events")
    if info.start_schema is not None:
        _read(TypeAdapter(_StartSchema), info.start_schema, "start_schema")


def _check_terminal(terminal: Terminal) -> None:
    if not terminal.status.is_terminal:
        raise BadInput(f"a task cannot end as {terminal.status}", name="terminal.status")
    if terminal.result is not None:
        _check_result(terminal.result)


def _check_checkpoint(checkpoint: Checkpoint | None) -> None:
    if checkpoint is not None:
        _check_numbers(checkpoint.inbox_applied, checkpoint.event_count)


def _check_numbers(*numbers: int) -> None:
    for number in numbers:
        if not 0 <= number <= _LARGEST:
            raise BadInput(f"epoch, seq and counts must be from 0 to {_LARGEST}")


def _check_event(payload: str) -> None:
    """It goes to streams as it is, on a line of its own. Lone surrogates in it are escapes: clients read them."""
    try:
        value = json.loads(payload, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"the payload of an event is no JSON: {error}", name="events") from error
    if not isinstance(value, dict) or "\n" in payload or "\r" in payload:
        raise BadInput("the payload of an event must be a JSON object on one line", name="events")


def _check_result(result: str) -> None:
    """It is answered inside of other JSON."""
    try:
        to_json(json.loads(result), inf_nan_mode="null")
    except (ValueError, RecursionError) as error:
        raise BadInput(f"the result cannot be answered as JSON: {error}", name="terminal.result") from error


def _refuse_constant(name: str) -> None:
    raise ValueError(f"JSON has no {name}")


def _read(adapter: TypeAdapter[Any], text: str, name: str) -> Any:
    try:
        return adapter.validate_json(text)
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False, include_context=False)[0]
        raise BadInput(f"{name}: {found['msg']}", name=name) from error
