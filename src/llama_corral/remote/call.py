"""One call of a remote workflow: what its step does, and what is known of it meanwhile."""

# ruff: noqa: RUF100 - flake8-async has rules that ruff does not have or has switched off

from __future__ import annotations

import hashlib
import json
import weakref
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Final, Protocol

import anyio
from workflows.events import Event, StopEvent

from ..aio import Bell
from ..client import Client, Task, TaskEvent, TaskEvents
from ..exceptions import BadInput, Conflict
from ..protocol.lifecycle import TaskStatus
from ..protocol.messages import TaskResult, id_of_key
from ..runtime import current_activity
from .events import EventTypes

QUEUED_PATIENCE: Final = 1.0
"""Seconds for which a remote task may be queued before its caller counts as idle. Most are queued for a moment only; but
where a service calls itself, or one that calls it, the slot that the task waits for may be its caller's."""
BEHIND: Final = 1_000
"""Events that a handler's reader may be behind before no more are taken from the remote run's stream."""

_FAILED: Final = frozenset({TaskStatus.FAILED, TaskStatus.CANCELLED, TaskStatus.TIMED_OUT})


class Reader(Protocol):
    """Who reads the events of a call: how many it has had."""

    taken: int


class Call:
    """What is known of a call, from when it is asked for to its end. Its methods are for the thread of its event loop.

    Args:
        name: A name for it that its caller chose, or None.
        run_id: Of the local run of the step that follows the remote one.
    """

    def __init__(self, run_id: str, name: str | None = None) -> None:
        self.run_id = run_id
        self.name = name
        self.ended = False
        self.published = 0
        self.awaited = 0
        """How many wait for its result: then nothing waits for its reader."""
        self.reader: weakref.ref[Reader] | None = None
        self.changed = Bell()
        self._task_id: str | None = None

    def begin(self, task_id: str) -> None:
        self._task_id = task_id
        self.changed.ring()

    def end(self) -> None:
        self.ended = True
        self.changed.ring()

    async def wait_task(self) -> str:
        """The id of the remote task, once there is one. Raises Conflict where the call has ended."""
        while self._task_id is None and not self.ended:
            await self.changed.wait()
        if self._task_id is None or self.ended:
            raise Conflict("the remote run has ended", run_id=self.run_id)
        return self._task_id

    async def wait_reader(self) -> None:
        """Return when the call's reader, if it has one, is near enough. One that stops reading is not waited for once the
        result is."""
        while not self.awaited:
            reader = self.reader() if self.reader is not None else None
            if reader is None or self.published - reader.taken < BEHIND:
                return
            del reader
            await self.changed.wait()


class Caller:
    """The calls that the steps of one run have made."""

    def __init__(self) -> None:
        self._open: list[Call] = []
        self._some = False
        self._changed = Bell()

    def add(self, call: Call) -> None:
        self._open = [*(each for each in self._open if not each.ended), call]
        self._some = True
        self._changed.ring()

    async def wait_call(self, run_id: str | None) -> Call:
        """The open call, or that of the run id, once the first one is made. Raises as `RemoteWorkflow.send_event`."""
        while not self._some:
            await self._changed.wait()
        calls = [each for each in self._open if not each.ended and run_id in (None, each.run_id)]
        if len(calls) == 1:
            return calls[0]
        if calls:
            names = ", ".join(each.run_id for each in calls)
            raise BadInput(f"{len(calls)} remote runs are open", hint=f"Give the run_id of one of them: {names}.")
        raise Conflict("the remote run has ended" if run_id is None else f"no remote run {run_id!r} is open")


@dataclass(frozen=True, slots=True)
class Following:
    """What following a remote run takes. `publish` takes its events, except for those that end it.

    Args:
        identity: Of the local run (`RunHooks`): the remote task's id follows from it, so that a step that runs again finds
            the task which it has started.
        is_handed_on: Whether the remote task is needed after a cancellation.
    """

    call: Call
    service: str
    arguments: dict[str, Any]
    types: EventTypes
    publish: Callable[[Event], None]
    identity: str | None
    is_handed_on: Callable[[], bool]
    session_id: str | None = None
    time_limit: float | None = None

    async def follow(self, client: Client) -> tuple[TaskResult, Event | None]:
        """Start the remote run, or find it, and return how it ended, with the last event of its stream. If this is
        cancelled, or fails, the remote run is cancelled."""
        async with self._started(client) as task:
            self.call.begin(task.id)
            async with task.events(follow_status=True) as events:
                last: Event | None = None
                stream = _IdleStream(events)
                while (item := await stream.receive()) is not None:
                    last = self.types.event_of(item)
                    if not isinstance(last, StopEvent):
                        self.publish(last)
                        self.call.published += 1
                        await self.call.wait_reader()
        assert events.record is not None
        return events.record, last

    @asynccontextmanager
    async def _started(self, client: Client) -> AsyncGenerator[Task, None]:
        for again in count():
            async with client.started(
                self.service,
                self.arguments,
                task_id=self._task_id(again),
                session=self.session_id,
                timeout=self.time_limit,
                keep_on_cancel=self.is_handed_on,
            ) as task:
                # Found as it had failed: whoever runs the step again wants it done.
                if self.identity is None or self.call.name is not None or task.status_at_start not in _FAILED:
                    yield task
                    return

    def _task_id(self, again: int) -> str | None:
        if self.call.name is not None:
            return id_of_key(self.service, f"name\n{self.call.name}")
        if self.identity is None:
            return None
        # A step that asks for something else when it runs again has another task.
        asked = json.dumps([self.arguments, self.session_id, self.time_limit], sort_keys=True)
        return id_of_key(self.service, f"{self.identity}\n{hashlib.sha256(asked.encode()).hexdigest()}\n{again}")


@dataclass(slots=True)
class _IdleStream:
    """Receives events; while the remote run does nothing, as a step that waits for something idle (`wait_elsewhere`)."""

    events: TaskEvents
    status: TaskStatus | None = None
    patient: bool = field(default=True)

    async def receive(self) -> TaskEvent | None:
        while True:
            item = await self._receive()
            if not isinstance(item, TaskStatus):
                return item
            self.status = item
            self.patient = True

    async def _receive(self) -> TaskEvent | TaskStatus | None:
        activity = current_activity()
        if activity is None or self.status in (None, TaskStatus.RUNNING):
            return await self.events.receive()
        if self.status is TaskStatus.QUEUED and self.patient:
            with anyio.move_on_after(QUEUED_PATIENCE):
                return await self.events.receive()  # a cancelled call loses nothing
            self.patient = False
        return await activity.wait_elsewhere(self.events.receive)
