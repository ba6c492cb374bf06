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
from ..exceptions import BadInput, Conflict, NotFound, TooManyTasks
from ..protocol import topics
from ..protocol.lifecycle import TaskStatus
from ..protocol.messages import ActionTypes, ErrorRecord, QueueMessage, TaskDefinition, TaskResult, TaskStream
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
"""Tasks kept at a time; one beyond that ends at once as failed, because those in line may all wait for messages that are
behind it in the queue."""
MAX_ENDED = 10_000
"""Ids of ended tasks remembered, to drop a message that is delivered again."""
MAX_CONTEXTS = 1_000
"""Contexts of sessions kept; the one unused for longest is dropped."""
MAX_INBOX = 1_000
"""Outside events kept for one task; those it has taken make room for new ones."""


@dataclass(slots=True)
class _Task:
    definition: TaskDefinition
    now: float
    epoch: int = 0
    report_seq: int = 0
    next_index: int = 0
    inbox: deque[InboxEvent] = field(default_factory=deque)
    inbox_head: int = 0
    inbox_taken: int = 0
    published: int = 0
    """Events of the report in flight that are published: where the queue was away, its repetition goes on there."""
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
        self.topic_namespace = topic_namespace
        self._queue = message_queue
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
            TooManyTasks: too many tasks are open.
        """
        task_id = definition.task_id
        if task_id in self._tasks or task_id in self._ended:
            logger.info("task %s was delivered again and is not started again", task_id)
            return None
        if len(self._tasks) >= MAX_OPEN:
            raise TooManyTasks(f"{MAX_OPEN} tasks are open; the service takes no more", hint="send it again later")
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
            if task.inbox[0].seq > task.inbox_taken:
                raise Conflict(f"task {task_id} has {MAX_INBOX} events that it has not taken", task_id=task_id)
            task.inbox.popleft()
        task.inbox_head += 1
        task.inbox.append(InboxEvent(task.inbox_head, payload))

    async def refuse(self, definition: TaskDefinition, error: TooManyTasks) -> None:
        """End a task that was not admitted, so that whoever waits for it is told."""
        record = ErrorRecord(type=type(error).__name__, message=str(error), retryable=True)
        terminal = Terminal(TaskStatus.FAILED, result_text=str(error), error=record)
        await self._publish(ActionTypes.COMPLETED_TASK, _task_result(definition.task_id, terminal).model_dump())

    async def give_back(self) -> None:
        """Put every task that is still open back on the queue: for another service, or for this one's next start."""
        for task_id, task in list(self._tasks.items()):
            await self._give_back(task_id, task)

    # The seam

    async def register(self, info: ServiceInfo, local: LocalService | None = None) -> Registration:
        self._service_name = info.service_name
        # There is no lease: who holds a task is always this process.
        return Registration(topic_namespace=self.topic_namespace, heartbeat_interval=0.0)

    async def deregister(self, instance_id: str) -> None:
        """Nothing to tell anybody."""

    async def claim(self, ticket: Ticket, instance_id: str, nonce: str) -> Claim | None:
        task = self._tasks.get(ticket.task_id)
        if task is None or task.running:
            return None
        task.running = True
        task.epoch += 1
        task.report_seq = task.published = 0
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
        for event in report.events[task.published :]:
            stream = TaskStream(
                task_id=report.task_id,
                session_id=task.definition.session_id,
                data=json.loads(event.payload),
                index=task.next_index,
                type=event.type,
            )
            await self._publish(ActionTypes.TASK_STREAM, stream.model_dump())
            task.next_index += 1
            task.published += 1
        if report.terminal is not None:
            result = _task_result(report.task_id, report.terminal)
            await self._publish(ActionTypes.COMPLETED_TASK, result.model_dump())
            if report.context is not None:
                self._keep_context(task.session_id, report.context.based_on, report.context.payload)
            return ReportAnswer("ok", next_index=task.next_index, tickets=self._end(report.task_id, task))
        task.report_seq = report.seq
        task.published = 0
        return ReportAnswer("ok", next_index=task.next_index)

    async def release(
        self,
        task_id: str,
        epoch: int,
        checkpoint: Checkpoint | None,
        *,
        idle: bool = False,
        wake_at: float | None = None,
    ) -> ReportAnswer:
        """The task goes back to the queue and starts again: there is no store to keep the checkpoint."""
        task = self._tasks.get(task_id)
        if task is None or task.epoch != epoch:
            return ReportAnswer("fenced")
        return ReportAnswer("ok", tickets=await self._give_back(task_id, task))

    async def heartbeat(self, instance_id: str, held: Sequence[HeldTask]) -> HeartbeatAnswer:
        return HeartbeatAnswer()

    async def pull(self, task_id: str, epoch: int, after: int) -> InboxPage:
        task = self._tasks.get(task_id)
        if task is None or task.epoch != epoch:
            return InboxPage("fenced")
        task.inbox_taken = max(task.inbox_taken, after)
        return InboxPage("ok", tuple(event for event in task.inbox if event.seq > after), head=task.inbox_head)

    # Keeping

    async def _give_back(self, task_id: str, task: _Task) -> tuple[Ticket, ...]:
        """Publish the task and the events that came for it, in their order, and forget it."""
        topic = topics.topic(self.topic_namespace, self._service_name)
        events = [task.definition.model_copy(update={"input": event.payload}) for event in task.inbox]
        for action, definition in [
            (ActionTypes.NEW_TASK, task.definition),
            *((ActionTypes.SEND_EVENT, event) for event in events),
        ]:
            message = QueueMessage(
                type=self._service_name, publisher_id=self._publisher_id, action=action, data=definition.model_dump()
            )
            await self._queue.publish(message, topic)
        del self._tasks[task_id]
        return self._next_in_line(task_id, task)

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
            type=topics.CONTROL_PLANE_NAME,
            publisher_id=self._publisher_id,
            action=action,
            data=data,
        )
        await self._queue.publish(message, topics.topic(self.topic_namespace, topics.CONTROL_PLANE_NAME))
        if self._publish_callback is not None:
            try:
                called = self._publish_callback(message)
                if inspect.isawaitable(called):
                    await called
            except Exception:  # it is told of what has happened; it has no say in it
                logger.exception("the publish callback failed on message %s", message.id_)


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
