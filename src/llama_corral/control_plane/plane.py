"""The control plane: decides over a store, acts over a message queue.

`ControlPlane` is the coordinator of the services in its process, and what the HTTP routes and the message queue call.
All decisions are the store's transactions; `effects.py` does what follows from them.
"""

# ruff: noqa: RUF100 - flake8-async has rules that ruff does not have or has switched off

from __future__ import annotations

import logging
import math
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final, Protocol, Self, Unpack

import anyio

from ..abc import MessageQueue, Store
from ..events import LogReader, Watch, read_log, wait_terminal
from ..exceptions import BadInput, Draining, NotFound, UsageError
from ..protocol.lifecycle import TaskStatus
from ..protocol.messages import ActionTypes, QueueMessage, TaskDefinition, TaskStream
from ..protocol.records import (
    Accepted,
    DeadLetter,
    EventPage,
    SendAnswer,
    TaskFilter,
    TaskRecord,
    Terminal,
)
from ..supervision import SupportGroup, open_support_group
from . import checks
from .acceptance import Acceptance
from .config import ControlPlaneConfig
from .coordinator import StoreCoordinator
from .effects import MESSAGES_INSTANCE, Effects
from .inbound import DeadLetters, Inbound
from .options import TaskOptions
from .registry import Registry
from .reports import MessageReports
from .sessions import Services, Sessions
from .upkeep import Upkeep

logger = logging.getLogger(__name__)

CLOSING_TIME: Final = 5.0
DRAIN_PATIENCE: Final = 3.0
"""Seconds that a request waiting for an ending gets when the process begins to stop."""
OWNER_GRACE: Final = 2.0
"""Seconds after a deadline that an owner gets to report the ending before a waiting request is answered without it."""

_SESSIONS: Final = uuid.UUID("0e2f6b1c-4c1d-4c0e-9d53-6a0c5a7f3a5e")


class Stop(Protocol):
    """An event of AnyIO or of Trio."""

    async def wait(self) -> object: ...


class ControlPlane(anyio.AsyncContextManagerMixin, StoreCoordinator):
    """Accepts tasks, gives them to instances, keeps what they report, and cleans up after what died.

        async with SqlStore(url) as store, MemoryMessageQueue() as queue, ControlPlane(store, queue) as plane:
            await plane.register(info, service)
            accepted = await plane.submit("hello", {"name": "Ada"})
            record = await plane.wait_result(accepted.task_id, timeout=10)

    Services of this process belong inside the block; when it is left, what they caused last is still published.

    Args:
        store: Open, and stays open longer than the block. So does `queue`.
        config: Names and times; read from the environment if not given.
        alone: No other control plane uses the store (an embedded one with an exclusive lock). Then every embedded instance
            stored at the start is dead, and what it held is queued again at once. Workers are judged by their lease.
        now: The wall clock.

    Attributes:
        config: The settings in force.
        alone: As given.
        queue: The message queue it was given.
        sessions: Create, get, delete sessions and their state.
        services: Definitions and numbers of the services.
    """

    def __init__(
        self,
        store: Store,
        queue: MessageQueue,
        *,
        config: ControlPlaneConfig | None = None,
        alone: bool = False,
        now: Callable[[], float] = time.time,
    ) -> None:
        config = config if config is not None else ControlPlaneConfig()
        registry = Registry()
        super().__init__(store, registry, Effects(store, queue, registry, config, now, alone=alone), config, now)
        self.draining = False
        self._patient_until = math.inf
        self._support: SupportGroup | None = None
        self.queue = queue
        self.alone = alone
        self._reports = MessageReports(store, self._effects, now)
        self._upkeep = Upkeep(store, queue, registry, self._effects, self._reports, self._leases, config, now)
        self._acceptance = Acceptance(store, registry, self._effects, config, now, alone=alone)
        self._inbound = Inbound(
            queue, config.topic_namespace, self._effects.publisher_id, self._effects.peers, self.process_message
        )
        self._dead_letters = DeadLetters(store, queue, config.topic_namespace, now)
        self.sessions = Sessions(store, self._effects, now)
        self.services = Services(store, registry, self._effects, now)

    @asynccontextmanager
    async def __asynccontextmanager__(self) -> AsyncGenerator[Self, None]:
        async with open_support_group() as support:
            self._support = support
            await support.start(self._effects.publish_forever, name="publish", grace=CLOSING_TIME)
            await self._upkeep.start(alone=self.alone)
            support.start_soon(self._upkeep.backstop_forever, name="backstop")
            support.start_soon(self._upkeep.alarm_forever, name="alarm")
            support.start_soon(self._reap, name="reaper")
            support.start_soon(self._upkeep.listen_forever, name="other control planes")
            if not self.alone:
                support.start_soon(self._upkeep.announce_forever, name="word to other control planes")
            support.start_soon(self._inbound.consume_forever, name="messages of services")
            support.start_soon(self._dead_letters.consume_forever, name="dead letters")
            if self.config.retention:
                support.start_soon(self._upkeep.purge_forever, name="retention")
            try:
                yield self
            finally:
                self.draining = True
                self._effects.tell_others("left")
                self._effects.close()

    async def _reap(self) -> None:
        await self._upkeep.reap_forever(alone=self.alone)

    def refuse_new(self) -> None:
        """Accept no more tasks: the services of this process are about to drain. Requests that wait for a working run go
        on waiting; those whose task nobody works on are answered."""
        if not self.draining:
            self.draining = True
            self._effects.changes.notify_all()

    def drain_on(self, stop: Stop) -> None:
        """When `stop` is set, refuse new tasks and answer whoever waits, at the latest after `DRAIN_PATIENCE`. Call it
        inside the block."""
        self.start_helper(self._drain_on, stop, name="drain")

    def start_helper(self, fn: Callable[..., Awaitable[None]], *args: Any, name: str) -> None:
        """Run a part of somebody who serves the control plane until the block is left. Call it inside the block."""
        assert self._support is not None, "the control plane is not open"
        self._support.start_soon(fn, *args, name=name)

    async def _drain_on(self, stop: Stop) -> None:
        await stop.wait()
        self.draining = True
        self._patient_until = anyio.current_time() + DRAIN_PATIENCE
        self._effects.changes.notify_all()

    # Tasks

    async def submit(
        self,
        service_name: str,
        arguments: str | Mapping[str, Any],
        *,
        session_id: str | None = None,
        task_id: str | None = None,
        client_id: bool = True,
        **options: Unpack[TaskOptions],
    ) -> Accepted:
        """Accept a task. When this returns it is stored and will end in exactly one record; whether it has started, or
        waits for a slot or its turn, is in the answer's status. A cancelled call may or may not have stored it.

        Args:
            arguments: The start arguments of the workflow: a JSON object, or the text of one.
            session_id: Run in this session; None: in one of its own, which ends with the task.
            task_id: An id chosen by the client. The same again under the same id is answered as the first time.
            client_id: False if `task_id` is fresh, so that nobody will repeat it.
            options: When it starts and ends at the latest, how often it is tried: see `TaskOptions`.

        Raises:
            NotFound: the service or the session does not exist.
            BadInput: the arguments are no JSON object, or the workflow refuses them; a bad id or option.
            Conflict: the task id belongs to another request; the session is busy and takes one task at a time.
            TooManyTasks: `max_queued_tasks` wait for the service already. Nothing was stored.
            Draining: this process stops.
        """
        self._check_draining()
        return await self._acceptance.submit(
            service_name, arguments, session_id=session_id, task_id=task_id, client_id=client_id, options=options
        )

    async def retry(self, task_id: str, *, fresh: bool = False) -> Accepted:
        """Do again what an ended task did not complete, as a new task; the old one stays as it ended. It has no deadline.
        Repeating the call answers the same task.

        Args:
            fresh: From the beginning, also where a checkpoint was left to go on from.

        Raises:
            NotFound: no such task.
            Conflict: it has not ended, or completed; its session is gone, or busy and takes one task at a time.
            Draining: this process stops.
        """
        self._check_draining()
        return await self._acceptance.retry(task_id, fresh=fresh)

    def _check_draining(self) -> None:
        if self.draining:
            raise Draining("This control plane is stopping.", hint="Send the request again; another one may answer it.")

    async def run(
        self,
        service_name: str,
        arguments: str | Mapping[str, Any],
        *,
        task_id: str,
        session_id: str | None = None,
        client_id: bool = False,
        abandoned: Callable[[], bool] = lambda: True,
        **options: Unpack[TaskOptions],
    ) -> tuple[Accepted, Terminal | None]:
        """`submit`, then wait for the ending. None: this process stops, or the owner did not end the task in time; the
        task goes on.

        Args:
            abandoned: Asked when the call is cancelled: whether the task is to be cancelled with it. One that an earlier
                request had started never is.
        """
        effects = self._effects
        with effects.changes.watch(task_id, endings_only=True) as watch, effects.endings.expect(task_id):
            accepted = await self.submit(
                service_name, arguments, session_id=session_id, task_id=task_id, client_id=client_id, **options
            )
            try:
                return accepted, await self._wait_ending(accepted, watch, options.get("timeout"))
            except anyio.get_cancelled_exc_class():
                if accepted.created and abandoned():
                    with anyio.move_on_after(CLOSING_TIME, shield=True):
                        await self._abandon(task_id)
                raise

    async def _wait_ending(self, accepted: Accepted, watch: Watch, time_limit: float | None) -> Terminal | None:
        fresh = accepted.created  # it wakes us when it ends; a repeated one may have ended before we came
        with anyio.move_on_after(None if time_limit is None else time_limit + OWNER_GRACE) as limit:
            while True:
                limit.deadline = min(limit.deadline, self._patient_until)
                if fresh:
                    with anyio.move_on_after(self.config.backstop_interval):
                        await watch.wait()
                fresh = True
                terminal = self._effects.endings.get(accepted.task_id)
                if terminal is not None:
                    return terminal
                record = await self.get_task(accepted.task_id)
                if record.status.is_terminal:
                    return Terminal(
                        record.status, record.result, record.result_text, record.error, record.context_error
                    )
                if self.draining and record.status is not TaskStatus.RUNNING:
                    return None
        return None

    async def _abandon(self, task_id: str) -> None:
        try:
            await self.cancel(task_id)
        except UsageError:
            logger.debug("the task %s ended before it could be cancelled", task_id)

    async def cancel(self, task_id: str) -> SendAnswer:
        """Ask for a task's cancellation. One that nobody holds ends at once; else its owner is told, and its record
        says cancelled when the run has ended, unless it ended otherwise before.

        Raises:
            NotFound, Conflict: no such task; it has ended.
        """
        with anyio.CancelScope(shield=True):
            answer = await self._store.request_cancel(task_id, self._now())
            self._effects.answered(answer, "cancel")
            if answer.owner == MESSAGES_INSTANCE:
                await self._reports.end(await self.get_task(task_id), TaskStatus.CANCELLED, "The task was cancelled.")
        return answer

    async def send_event(self, task_id: str, payload: str, *, service_name: str | None = None) -> SendAnswer:
        """Give a task an outside event, whether it asks for one already or not.

        Args:
            payload: The event as JSON text, as upstream's JsonSerializer writes it.
            service_name: What the sender takes for the task's service; checked if given.

        Raises:
            BadInput: the event is malformed or of a type that the workflow does not know; the service is another one.
            NotFound, Conflict: no such task; it has ended.
        """
        record = await self.get_task(task_id)
        if service_name and service_name != record.service_name:
            raise BadInput(
                f"The task {task_id!r} runs on {record.service_name!r}, not on {service_name!r}.",
                hint="Name the service that the task was given to, or none.",
            )
        local = self._registry.local(record.service_name)
        if local is not None:
            payload = local.check_event(payload)
        else:
            service = await self._store.get_service(record.service_name)
            if service is not None:
                self._registry.learn(service)
            payload = checks.check_event(None if service is None else service.events, payload)
        with anyio.CancelScope(shield=True):
            answer = await self._store.send(task_id, payload, self._now())
            self._effects.answered(answer, "event")
        if self._registry.is_messages_only(record.service_name):
            self._forward_event(record, payload)
        return answer

    def _forward_event(self, record: TaskRecord, payload: str) -> None:
        event = TaskDefinition(
            input=payload, task_id=record.task_id, session_id=record.session_id, agent_id=record.service_name
        )
        message = QueueMessage(
            publisher_id=self._effects.publisher_id,
            action=ActionTypes.SEND_EVENT,
            type=record.service_name,
            data=event.model_dump(),
        )
        self._effects.send_message(message)

    async def get_task(self, task_id: str) -> TaskRecord:
        """Raises `NotFound`."""
        record = await self._store.get_task(task_id)
        if record is None:
            raise self._no_such_task(task_id)
        return record

    def _no_such_task(self, task_id: str) -> NotFound:
        hint = "GET /tasks lists the tasks. It may have been deleted"
        if self.config.retention:
            hint += f", or have ended more than {self.config.retention / 86_400:.3g} days ago"
        return NotFound(f"There is no task {task_id!r}.", hint=f"{hint}.", task_id=task_id)

    async def list_tasks(self, which: TaskFilter) -> list[TaskRecord]:
        return await self._store.list_tasks(which)

    async def read_events(self, task_id: str, start: int = 0, limit: int = 1000) -> EventPage:
        """What is in the log now. Raises `NotFound`."""
        page = await self._store.read_events(task_id, start, limit)
        if page is None:
            raise self._no_such_task(task_id)
        return page

    async def list_dead_letters(self, *, before: int | None = None, limit: int = 100) -> list[DeadLetter]:
        """Messages that nobody could read or handle, newest first, from the one before number `before` on."""
        return await self._store.list_dead_letters(before=before, limit=limit)

    def open_log(self, task_id: str, start: int = 0, *, drain: Any = None, statuses: bool = False) -> LogReader:
        """The task's events from `start` to the terminal record, as they come: see `events.read_log`."""
        return read_log(
            self._store,
            self._effects.changes,
            task_id,
            start,
            drain=drain,
            backstop=self.config.backstop_interval,
            statuses=statuses,
        )

    async def wait_result(
        self,
        task_id: str,
        timeout: float | None = None,  # noqa: ASYNC109 - of the task, not of the call
        *,
        drain: Any = None,
    ) -> TaskRecord | None:
        """The terminal record; None if it does not come within `timeout` seconds, or `drain` is set.

        Raises:
            NotFound: there is no such task, or it was deleted meanwhile.
        """
        return await wait_terminal(
            self._store, self._effects.changes, task_id, timeout, drain=drain, backstop=self.config.backstop_interval
        )

    # Messages of services that report by messages

    async def process_message(self, message: QueueMessage) -> None:
        """NEW_TASK, TASK_STREAM or COMPLETED_TASK, as the original's services and clients send them. Repeating one
        changes nothing.

        Raises:
            BadInput: another action, or its data are malformed.
            UsageError: what `submit` raises; a task that does not exist, or that an instance holds.
        """
        handled = checks.message_data(message)
        if isinstance(handled, TaskDefinition):
            await self.submit_definition(handled)
        elif isinstance(handled, TaskStream):
            await self._reports.stream(handled)
        else:
            await self._reports.completed(handled)

    async def submit_definition(self, definition: TaskDefinition) -> Accepted:
        """A task as the original's clients write it; without a session it gets one of its own, which stays."""
        if not definition.agent_id:
            raise BadInput("The task does not name its service: agent_id is missing.", hint="GET /services lists them.")
        session_id = definition.session_id
        if not session_id:
            # Whoever is refused leaves nothing, and whoever repeats a message means the same session.
            checks.check_id(definition.task_id, "task_id")
            await self._acceptance.check_start(definition.agent_id, checks.start_arguments(definition.input)[1])
            session_id = str(uuid.uuid5(_SESSIONS, definition.task_id))
            await self.sessions.get_or_create(session_id)
        return await self.submit(
            definition.agent_id, definition.input, session_id=session_id, task_id=definition.task_id
        )

    def statistics(self) -> Mapping[str, Any]:
        """Numbers to look at: of this process, the store and the queue."""
        return {
            "draining": self.draining,
            "local_services": self._registry.statistics(),
            **self._effects.statistics(),
            "store": self._store.statistics(),
            "queue": self.queue.statistics(),
        }
