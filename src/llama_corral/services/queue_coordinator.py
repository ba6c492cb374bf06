"""The coordinator of a service on a bare queue: the original's protocol, without a control plane of ours.

Tasks come as NEW_TASK messages with their whole input, outside events as SEND_EVENT messages; what a run publishes leaves
as TASK_STREAM and its ending as COMPLETED_TASK, to the control plane's topic. Everything in between is kept in memory: the
promises of a store do not hold here, those of the original do, and tasks of a session run one at a time and in order.
"""

from __future__ import annotations

import inspect
import json
import logging
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from ..abc import Coordinator, LocalService, MessageQueue
from ..exceptions import BadInput, Conflict, NotFound
from ..protocol import topics
from ..protocol.lifecycle import TaskStatus
from ..protocol.messages import ActionTypes, QueueMessage, TaskDefinition, TaskResult, TaskStream, new_id
from ..protocol.records import (
    Checkpoint,
    Claim,
    HeartbeatAnswer,
    HeldTask,
    InboxEvent,
    InboxPage,
    Registration,
    Report,
    ReportAnswer,
    ServiceInfo,
    StoredContext,
    Terminal,
    Ticket,
)

logger = logging.getLogger(__name__)

PublishCallback = Callable[[QueueMessage], Awaitable[None] | None]

MAX_OPEN = 10_000
"""Tasks kept at a time; beyond it a NEW_TASK is refused and its message stays with the queue."""
MAX_ENDED = 10_000
"""Ids of ended tasks remembered, to drop a message that is delivered again."""
MAX_CONTEXTS = 1_000
"""Contexts of sessions kept; the one unused for longest is dropped."""
MAX_INBOX = 1_000
"""Outside events kept for one task."""


@dataclass(slots=True)
class _Task:
    definition: TaskDefinition
    now: float
    epoch: int = 0
    report_seq: int = 0
    next_index: int = 0
    inbox: list[InboxEvent] = field(default_factory=list)
    running: bool = False

    @property
    def session_id(self) -> str:
        return self.definition.session_id or self.definition.task_id


class QueueCoordinator(Coordinator):
    """Decides for one service on a bare message queue.

    Args:
        message_queue: Where the results and events go.
        topic_namespace: The prefix of the topics.
        publisher_id: Written into the messages.
        publish_callback: Called after each message that was published.
    """

    def __init__(
        self,
        message_queue: MessageQueue,
        *,
        topic_namespace: str = topics.DEFAULT_NAMESPACE,
        publisher_id: str = "default",
        publish_callback: PublishCallback | None = None,
    ) -> None:
        self._queue = message_queue
        self._topic_namespace = topic_namespace
        self._publisher_id = publisher_id
        self._publish_callback = publish_callback
        self._service_name = ""
        self._tasks: dict[str, _Task] = {}
        self._sessions: dict[str, deque[str]] = {}
        self._contexts: OrderedDict[str, StoredContext] = OrderedDict()
        self._ended: OrderedDict[str, None] = OrderedDict()

    # What comes by message

    def admit(self, definition: TaskDefinition, now: float) -> Ticket | None:
        """Keep a NEW_TASK. The ticket if it may start now; None if its session is busy or it is a duplicate.

        Raises:
            Conflict: too many tasks are open.
        """
        task_id = definition.task_id
        if task_id in self._tasks or task_id in self._ended:
            logger.info("task %s was delivered again and is not started again", task_id)
            return None
        if len(self._tasks) >= MAX_OPEN:
            raise Conflict(f"{MAX_OPEN} tasks are open; the service takes no more", hint="send it again later")
        task = self._tasks[task_id] = _Task(definition, now)
        line = self._sessions.setdefault(task.session_id, deque())
        line.append(task_id)
        return Ticket(task_id, self._service_name) if line[0] == task_id else None

    def add_event(self, task_id: str, payload: str) -> None:
        """Keep an outside event for a task.

        Raises:
            NotFound: the task is not known or has ended; nothing is kept.
            Conflict: too many events wait for the task.
        """
        task = self._tasks.get(task_id)
        if task is None:
            raise NotFound(f"task {task_id} is not known here or has ended", task_id=task_id)
        if len(task.inbox) >= MAX_INBOX:
            raise Conflict(f"task {task_id} has {MAX_INBOX} events that it has not taken", task_id=task_id)
        task.inbox.append(InboxEvent(seq=task.inbox[-1].seq + 1 if task.inbox else 1, payload=payload))

    # The seam

    async def register(self, info: ServiceInfo, local: LocalService | None = None) -> Registration:
        self._service_name = info.service_name
        return Registration(topic_namespace=self._topic_namespace, heartbeat_interval=0.0)

    async def deregister(self, instance_id: str) -> None:
        """Nothing to tell anybody."""

    async def claim(self, ticket: Ticket, instance_id: str, nonce: str) -> Claim | None:
        task = self._tasks.get(ticket.task_id)
        if task is None or task.running:
            return None
        task.running = True
        task.epoch += 1
        task.report_seq = 0
        return Claim(
            task_id=ticket.task_id,
            service_name=ticket.service_name,
            session_id=task.session_id,
            implicit_session=task.definition.session_id is None,
            epoch=task.epoch,
            attempt=task.epoch,
            input=task.definition.input,
            created_at=task.now,
            context=self._contexts.get(task.session_id),
            inbox=tuple(task.inbox),
            next_index=task.next_index,
        )

    async def report(self, report: Report) -> ReportAnswer:
        task = self._tasks.get(report.task_id)
        if task is None or task.epoch != report.epoch:
            return ReportAnswer("fenced")
        if report.seq <= task.report_seq:
            return ReportAnswer("ok", next_index=task.next_index)
        for event in report.events:
            stream = TaskStream(
                task_id=report.task_id,
                session_id=task.definition.session_id,
                data=json.loads(event.payload),
                index=task.next_index,
                type=event.type,
            )
            await self._publish(ActionTypes.TASK_STREAM, stream.model_dump())
            task.next_index += 1
        if report.terminal is None:
            task.report_seq = report.seq
            return ReportAnswer("ok", next_index=task.next_index)
        await self._publish(ActionTypes.COMPLETED_TASK, _task_result(report.task_id, report.terminal).model_dump())
        if report.context is not None:
            self._keep_context(task.session_id, report.context.based_on, report.context.payload)
        return ReportAnswer("ok", next_index=task.next_index, tickets=self._end(report.task_id, task))

    async def release(self, task_id: str, epoch: int, checkpoint: Checkpoint | None) -> ReportAnswer:
        """The task goes back to the queue: there is no store to keep it."""
        task = self._tasks.get(task_id)
        if task is None or task.epoch != epoch:
            return ReportAnswer("fenced")
        message = QueueMessage(
            type=self._service_name,
            publisher_id=self._publisher_id,
            action=ActionTypes.NEW_TASK,
            data=task.definition.model_dump(),
        )
        await self._queue.publish(message, topics.topic(self._topic_namespace, self._service_name))
        del self._tasks[task_id]
        return ReportAnswer("ok", tickets=self._next_in_line(task_id, task))

    async def heartbeat(self, instance_id: str, held: Sequence[HeldTask]) -> HeartbeatAnswer:
        return HeartbeatAnswer()

    async def pull(self, task_id: str, epoch: int, after: int) -> InboxPage:
        task = self._tasks.get(task_id)
        if task is None or task.epoch != epoch:
            return InboxPage("fenced")
        events = tuple(event for event in task.inbox if event.seq > after)
        return InboxPage("ok", events, head=task.inbox[-1].seq if task.inbox else 0)

    # Keeping

    def _end(self, task_id: str, task: _Task) -> tuple[Ticket, ...]:
        del self._tasks[task_id]
        self._ended[task_id] = None
        if len(self._ended) > MAX_ENDED:
            self._ended.popitem(last=False)
        return self._next_in_line(task_id, task)

    def _next_in_line(self, task_id: str, task: _Task) -> tuple[Ticket, ...]:
        line = self._sessions[task.session_id]
        was_first = line[0] == task_id
        line.remove(task_id)
        if not line:
            del self._sessions[task.session_id]
            return ()
        return (Ticket(line[0], self._service_name),) if was_first else ()

    def _keep_context(self, session_id: str, based_on: int, payload: str) -> None:
        self._contexts[session_id] = StoredContext(version=based_on + 1, payload=payload)
        self._contexts.move_to_end(session_id)
        if len(self._contexts) > MAX_CONTEXTS:
            self._contexts.popitem(last=False)

    async def _publish(self, action: ActionTypes, data: dict[str, object]) -> None:
        message = QueueMessage(
            id_=new_id(),
            type=topics.CONTROL_PLANE_NAME,
            publisher_id=self._publisher_id,
            action=action,
            data=data,
        )
        await self._queue.publish(message, topics.topic(self._topic_namespace, topics.CONTROL_PLANE_NAME))
        if self._publish_callback is not None:
            called = self._publish_callback(message)
            if inspect.isawaitable(called):
                await called


def _task_result(task_id: str, terminal: Terminal) -> TaskResult:
    error = terminal.error
    return TaskResult(
        task_id=task_id,
        result=terminal.result_text if terminal.status is TaskStatus.COMPLETED or error is None else error.message,
        status=terminal.status.value,
        value=json.loads(terminal.result) if terminal.result is not None else None,
        error=error,
    )


def read_definition(message: QueueMessage) -> TaskDefinition:
    """The TaskDefinition in a message. Raises BadInput where there is none."""
    try:
        return TaskDefinition.model_validate(message.data)
    except ValueError as exc:
        raise BadInput(f"message {message.id_} holds no task definition: {exc}") from exc
