"""Records that cross the seams between service, control plane and store.

All values that a store keeps as JSON are JSON text (`str`) here: they are encoded once, where they arise, and passed
through unchanged. Times are seconds since the epoch (wall clock); durations are seconds. Records are immutable.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from .lifecycle import TaskStatus
from .messages import ErrorRecord

PROTOCOL_VERSIONS: Final = (1,)
"""Versions of the protocol between instances and control planes that this release speaks. A new field with a default is no
new version: both sides ignore what they do not know."""

SessionPolicy = Literal["enqueue", "reject", "concurrent"]
"""What a second task of one session on one service does: wait its turn, be refused, or run beside the first."""


@dataclass(frozen=True, slots=True)
class EventRecord:
    """A published event. `payload` is a JSON object: the fields of the event (upstream's `model_dump(mode="json")`)."""

    type: str
    payload: str


@dataclass(frozen=True, slots=True)
class StoredEvent:
    """An event in the log. `index` counts from 0 without a gap; `epoch` says which claim wrote it."""

    index: int
    epoch: int
    type: str
    payload: str


@dataclass(frozen=True, slots=True)
class InboxEvent:
    """An outside event for a task. `payload` is JSON text as upstream's JsonSerializer writes an event. `seq` from 1."""

    seq: int
    payload: str


@dataclass(frozen=True, slots=True)
class StoredContext:
    """The last good context of (session, service). `payload` is JSON text; `version` grows by one at every save."""

    version: int
    payload: str
    fingerprint: str | None = None


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A snapshot from which a run can go on. `inbox_applied` is the highest inbox seq that is part of it.

    `event_count`: how many events the log had at the snapshot; those behind them may be published again by a run that goes
    on from it. The store counts it, whatever is given. `progress`: a step has completed since the run was claimed, so the
    failures before it do not count any more.
    """

    snapshot: str
    inbox_applied: int
    fingerprint: str | None = None
    event_count: int = 0
    progress: bool = True


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """What a task asks for when its workflow raises. How often is `NewTask.max_attempts`, which counts lost workers too.

    `errors` are names of exception classes, bare or with their module, bases included; None: any error. The wait before
    attempt n is `backoff * factor ** (n - 2)` seconds, `max_backoff` at most.
    """

    errors: tuple[str, ...] | None = None
    backoff: float = 1.0
    factor: float = 2.0
    max_backoff: float = 60.0

    def delay(self, failures: int) -> float:
        """Seconds to wait after this many failures in a row (from 1)."""
        if not self.backoff:
            return 0.0
        try:
            return min(self.max_backoff, self.backoff * self.factor ** (failures - 1))
        except OverflowError:
            return self.max_backoff


@dataclass(frozen=True, slots=True)
class ContextUpdate:
    """A context to store with a completed ending. It is stored only if the stored version still is `based_on`
    (0: nothing was stored); otherwise the ending stands, and its record says `context_saved = false`."""

    based_on: int
    payload: str
    fingerprint: str | None = None


@dataclass(frozen=True, slots=True)
class Terminal:
    """The ending of a task.

    `result` is the result as JSON text (None unless completed), `result_text` the original's string form.
    `context_error` says why no context could be encoded, if so; the record then has `context_saved = false`.
    """

    status: TaskStatus
    result: str | None = None
    result_text: str = ""
    error: ErrorRecord | None = None
    context_error: str | None = None


@dataclass(frozen=True, slots=True)
class NewTask:
    """A task to accept. `not_before`: no claim before that time. `retry`: None where a raising workflow ends its task.
    `retry_of`: the task that this one repeats.

    `session_id` None makes an implicit session of the task's own, which ends with it.

    `digest` identifies the content of the request: a second accept of the same `task_id` with the same digest answers
    the first one's acceptance, with another digest it is a conflict.
    """

    task_id: str
    service_name: str
    input: str
    created_at: float
    session_id: str | None = None
    deadline: float | None = None
    not_before: float | None = None
    max_attempts: int = 3
    digest: str | None = None
    retry: RetryPolicy | None = None
    retry_of: str | None = None


@dataclass(frozen=True, slots=True)
class Ticket:
    """A task is ready to be claimed by any instance of its service."""

    task_id: str
    service_name: str


@dataclass(frozen=True, slots=True)
class ClaimRequest:
    """`nonce` is fresh for every claim and the same when a lost answer is asked for again."""

    task_id: str
    instance_id: str
    nonce: str
    now: float


@dataclass(frozen=True, slots=True)
class Claim:
    """What an instance gets to work on. `epoch` fences everything it will write about the task.

    `next_index` is the index that the task's next event will get. `attempt` counts from 1. `state_error`: the stored
    context or checkpoint was changed, or belongs elsewhere, and was left out for that: the task is to fail with it.
    `inbox`: the first outside events that the checkpoint does not have; `pull` gives those behind them.
    """

    task_id: str
    service_name: str
    session_id: str
    implicit_session: bool
    epoch: int
    attempt: int
    input: str
    created_at: float
    deadline: float | None = None
    context: StoredContext | None = None
    checkpoint: Checkpoint | None = None
    inbox: tuple[InboxEvent, ...] = ()
    next_index: int = 0
    cancel_requested: bool = False
    retry: RetryPolicy | None = None
    state_error: str | None = None


@dataclass(frozen=True, slots=True)
class Accepted:
    """The answer to an accepted task. `claim` is set where the acceptance included the claim that was asked for."""

    task_id: str
    session_id: str
    status: TaskStatus
    created: bool
    claim: Claim | None = None


@dataclass(frozen=True, slots=True)
class Report:
    """What happened in a run since its last report. One report of a task is in flight at a time.

    `seq` counts from 1 within an epoch; a repeated seq is answered `ok` and changes nothing. `waiting` is the run's state
    after these events, None where it did not change. `checkpoint` is the run as it was after exactly these events.
    `terminal` ends the task, unless it failed with a retryable error and may be tried again.
    """

    task_id: str
    epoch: int
    seq: int
    now: float
    events: tuple[EventRecord, ...] = ()
    waiting: bool | None = None
    checkpoint: Checkpoint | None = None
    terminal: Terminal | None = None
    context: ContextUpdate | None = None


ReportStatus = Literal["ok", "fenced", "deleted"]


@dataclass(frozen=True, slots=True)
class ReportAnswer:
    """`fenced`: another epoch owns the task, or it ended; `deleted`: it is gone. Either way: stop.

    `next_index`: the index that the next event of the task will get. `tickets`: tasks that became queued by this report.
    `retry_at`: the task did not end by this report but is queued again, not to be claimed before that time; no ticket of it
    is among `tickets`.
    """

    status: ReportStatus
    next_index: int = 0
    tickets: tuple[Ticket, ...] = ()
    retry_at: float | None = None


@dataclass(frozen=True, slots=True)
class InboxPage:
    """Outside events after a cursor, in order, with the highest seq there is and the cancel flag."""

    status: ReportStatus
    events: tuple[InboxEvent, ...] = ()
    head: int = 0
    cancel_requested: bool = False


@dataclass(frozen=True, slots=True)
class HeldTask:
    """A task in the hands of an instance: its epoch and the highest inbox seq that the instance has read."""

    task_id: str
    epoch: int
    inbox_read: int = 0


@dataclass(frozen=True, slots=True)
class HeartbeatAnswer:
    """`fenced`: held tasks that are not the instance's any more. `news`: held tasks with a cancel request or a newer
    inbox head than the heartbeat named. `known`: False if the instance must register again. `strays`: tasks that the
    instance owns in the store and did not name; the coordinator acts on them, instances do not."""

    known: bool = True
    fenced: tuple[str, ...] = ()
    news: tuple[str, ...] = ()
    strays: tuple[HeldTask, ...] = ()


@dataclass(frozen=True, slots=True)
class SendAnswer:
    """Where an outside event or a cancel request went. `status` is the task's status after it.

    `owner`: the instance to wake, None where no instance holds the task. `tickets`: tasks that became queued by it.
    `ended`: the request itself ended the task (a cancel of a task that nobody holds).
    """

    task_id: str
    session_id: str
    status: TaskStatus
    owner: str | None = None
    tickets: tuple[Ticket, ...] = ()
    ended: bool = False
    seq: int = 0


@dataclass(frozen=True, slots=True)
class Reaped:
    """What became of tasks that were taken away from lost instances: those queued again, and what else became queued with
    them; those that ended, because a cancel was requested or their attempts are used up."""

    tickets: tuple[Ticket, ...] = ()
    ended: tuple[SendAnswer, ...] = ()


@dataclass(frozen=True, slots=True)
class TaskRecord:
    """A task as it is stored. `error` of an open task is that of its last failed attempt."""

    task_id: str
    session_id: str
    implicit_session: bool
    service_name: str
    status: TaskStatus
    input: str
    epoch: int
    attempts: int
    owner: str | None
    cancel_requested: bool
    created_at: float
    started_at: float | None = None
    finished_at: float | None = None
    deadline: float | None = None
    result: str | None = None
    result_text: str = ""
    error: ErrorRecord | None = None
    event_count: int = 0
    context_saved: bool | None = None
    context_error: str | None = None
    max_attempts: int = 3
    not_before: float | None = None
    retry_of: str | None = None


@dataclass(frozen=True, slots=True)
class EventPage:
    """A consistent look at a task's log: events from an index on, and the ending if there is one.

    `record.event_count` is the length of the log; when `record.status` is terminal the log is complete.
    """

    record: TaskRecord
    events: tuple[StoredEvent, ...] = ()


@dataclass(frozen=True, slots=True)
class SessionRecord:
    """A session. `state` is a JSON object as text: the user's own state, nothing of ours is kept in it."""

    session_id: str
    state: str = "{}"
    version: int = 0
    policy: SessionPolicy = "enqueue"
    created_at: float = 0.0
    task_ids: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class DeletedSession:
    """What went with a deleted session: the tasks that instances still hold, as (task_id, owner)."""

    session_id: str
    running: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class ServiceRecord:
    """A registered service. `definition` is its ServiceDefinition as JSON text; `events` and `start_schema` describe what
    its workflow takes: JSON text, None where the service did not say."""

    service_name: str
    definition: str
    registered_at: float
    events: str | None = None
    start_schema: str | None = None


@dataclass(frozen=True, slots=True)
class InstanceRecord:
    """A running instance of a service. `embedded`: it lives in the process of its control plane and ends with it."""

    instance_id: str
    service_name: str
    capacity: int
    started_at: float
    heartbeat: int = 0
    embedded: bool = False


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A message that nobody can use: where it was found, why, and the message as JSON text. `no` grows with each."""

    topic: str
    reason: str
    message: str
    at: float
    no: int = 0


@dataclass(frozen=True, slots=True)
class TaskFilter:
    """Which tasks to list, newest first. `before` is the task id at which the page before this one ended."""

    status: tuple[TaskStatus, ...] = ()
    service_name: str | None = None
    session_id: str | None = None
    before: str | None = None
    limit: int = 100


@dataclass(frozen=True, slots=True)
class Registration:
    """The answer to a service that registers. `protocol_version` is the one to speak from now on: the newest that both
    know. `lease`: seconds without a heartbeat after which the instance's tasks are given to others; 0 if there is none."""

    topic_namespace: str
    heartbeat_interval: float
    protocol_version: int = 1
    lease: float = 0.0


@dataclass(frozen=True, slots=True)
class ServiceInfo:
    """What a service says of itself when it registers. `definition` is its ServiceDefinition as JSON text. `events`: JSON
    text of a list of `{"name", "qualified_name", "schema"}` of the events it takes from outside; `start_schema`: the JSON
    schema of its start event."""

    definition: str
    service_name: str
    instance_id: str
    capacity: int
    events: str | None = None
    start_schema: str | None = None
    protocol_versions: tuple[int, ...] = PROTOCOL_VERSIONS
