"""Bodies, queries and answers of the routes that are ours. What the original has too is in `protocol.messages`."""

from __future__ import annotations

import json
from typing import Annotated, Any, Final

from pydantic import BaseModel, ConfigDict, Field

from ...protocol.lifecycle import TaskStatus
from ...protocol.messages import ErrorRecord, SessionDefinition, TaskDefinition
from ...protocol.records import DeadLetter, SessionPolicy, SessionRecord, TaskRecord
from ...web import ErrorBody
from ..checks import MAX_TIMEOUT
from ..options import MAX_ATTEMPTS, MAX_BACKOFF, MAX_DELAY, MAX_FACTOR, MAX_NAMES, TaskOptions, retry_policy

Seconds = Annotated[float, Field(gt=0, le=MAX_TIMEOUT, allow_inf_nan=False)]
Pause = Annotated[float, Field(ge=0, le=MAX_BACKOFF, allow_inf_nan=False)]
PageSize = Annotated[int, Field(ge=1, le=10_000)]


INDEX_SCHEMA: Final[dict[str, Any]] = {"type": "string", "pattern": "^[0-9]{1,18}$"}
"""Of an event, as text: what `events.parse_cursor` takes."""


class Strict(BaseModel):
    """Refuses members that it does not know: a misspelt option must not be ignored in silence."""

    model_config = ConfigDict(extra="forbid")


class NewSession(Strict):
    """`policy` says what a second task of the session on one service does: wait its turn, be refused, or run beside."""

    session_id: str | None = None
    policy: SessionPolicy = "enqueue"


class SessionOptions(Strict):
    policy: SessionPolicy = "enqueue"


class SessionsQuery(Strict):
    after: str | None = Field(None, description="Session id at which the page before this one ended.")
    limit: PageSize = 1000


class ServiceQuery(BaseModel):
    service_name: str


class SessionTasksQuery(Strict):
    before: str | None = Field(None, description="Task id at which the page of newer tasks began.")
    limit: PageSize = 1000


class SubmitQuery(Strict):
    timeout: Seconds | None = Field(None, description="Seconds until the task ends as timed out.")
    delay: Annotated[float, Field(ge=0, le=MAX_DELAY, allow_inf_nan=False)] | None = Field(
        None, description="Seconds before which the task does not start."
    )
    not_before: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = Field(
        None, description="The same as a time: seconds since the epoch."
    )
    max_attempts: Annotated[int, Field(ge=1, le=MAX_ATTEMPTS)] | None = Field(
        None, description="How often the task may be tried: lost workers count, and the errors in `retry_on`."
    )
    retry_on: list[str] = Field(
        default=[],
        max_length=MAX_NAMES,
        description="Class of an error of the workflow after which it is tried again, bare or with its module, or a base"
        " of it; `*` for any. Repeat it for several. Without it no error is.",
    )
    backoff: Pause | None = Field(None, description="Seconds before the second attempt; 1 if not given.")
    backoff_factor: Annotated[float, Field(ge=1, le=MAX_FACTOR, allow_inf_nan=False)] | None = Field(
        None, description="By what each further pause is longer; 2 if not given."
    )
    max_backoff: Pause | None = Field(None, description="The longest pause, in seconds; 60 if not given.")

    def options(self) -> TaskOptions:
        """Raises `BadInput` for options that contradict each other."""
        if not self.model_fields_set:
            return {}
        return {
            "timeout": self.timeout,
            "delay": self.delay,
            "not_before": self.not_before,
            "max_attempts": self.max_attempts,
            "retry": retry_policy(
                self.retry_on, backoff=self.backoff, factor=self.backoff_factor, max_backoff=self.max_backoff
            ),
        }


class ResultQuery(Strict):
    wait: Annotated[float, Field(ge=0, le=3600, allow_inf_nan=False)] = Field(
        0.0, description="Seconds to wait for the ending before null is answered."
    )


class EventsQuery(Strict):
    start: str | None = Field(
        None,
        alias="from",
        description="Index of the first event wanted; 0 if not given.",
        json_schema_extra={"anyOf": [INDEX_SCHEMA, {"type": "null"}]},
    )


class FollowQuery(EventsQuery):
    status: bool = Field(
        False,
        description="Also tell the task's status, at once and when it has changed: frames `status` without an id.",
    )


class RetryQuery(Strict):
    fresh: bool = Field(False, description="From the beginning, also where a checkpoint was left.")


class DeadLettersQuery(Strict):
    before: int | None = Field(None, description="Number at which the page before this one ended.")
    limit: Annotated[int, Field(ge=1, le=1000)] = 100


class TasksQuery(Strict):
    status: list[TaskStatus] = Field(default=[], description="Repeat it for several.")
    service: str | None = None
    session_id: str | None = None
    before: str | None = Field(None, description="Task id at which the page before this one ended.")
    limit: Annotated[int, Field(ge=1, le=1000)] = 100


class RunQuery(SubmitQuery):
    session_id: str | None = Field(None, description="Run in this session; otherwise in one of the task's own.")
    task_id: str | None = Field(None, description="An id of your own; the same request again joins the same task.")
    detach: bool = Field(False, description="Answer 202 with the ids at once; nobody has to wait.")


class RunAnswer(BaseModel):
    """`result` is the result of the workflow as JSON. Not there with `detach`."""

    task_id: str
    session_id: str
    status: TaskStatus
    result: Any = None


class RunRefusal(ErrorBody):
    """Why a task that was accepted has no result, or none yet. `error` has the fields of an `ErrorRecord` too if the
    task has ended."""

    task_id: str
    session_id: str
    status: TaskStatus
    result: None = None


class CancelAnswer(BaseModel):
    """`ended`: nobody held the task, so it is cancelled already. Otherwise its run has been told."""

    task_id: str
    session_id: str
    status: TaskStatus
    ended: bool


class RetryAnswer(BaseModel):
    """The task that does it again. `created` is False if the same request came before."""

    task_id: str
    session_id: str
    status: TaskStatus
    retry_of: str
    created: bool


class DeadLetterItem(BaseModel):
    """A message that nobody could read or handle: the topic it came from, why, and the message, or the beginning of it as
    text."""

    no: int
    topic: str
    reason: str
    at: float
    message: Any


class DeadLetterPage(BaseModel):
    """Newest first. `next`: give it as `before` to get the next page; null at the end."""

    dead_letters: list[DeadLetterItem]
    next: int | None


class TaskSummary(BaseModel):
    """A task without what it was given and what came out. Times are seconds since the epoch.

    `attempts`: failures in a row so far. `error`: of a task that has not ended, that of its last attempt.
    """

    task_id: str
    session_id: str
    implicit_session: bool
    service_name: str
    status: TaskStatus
    attempts: int
    max_attempts: int
    retry_of: str | None
    cancel_requested: bool
    created_at: float
    not_before: float | None
    started_at: float | None
    finished_at: float | None
    deadline: float | None
    event_count: int
    error: ErrorRecord | None
    context_saved: bool | None
    context_error: str | None


class TaskDetail(TaskSummary):
    """`result` is the original's text, `value` the result as JSON; both null until the task has ended."""

    input: str
    result: str | None
    value: Any


class TaskPage(BaseModel):
    """Newest first. `next`: give it as `before` to get the next page; null at the end."""

    tasks: list[TaskSummary]
    next: str | None


class ServiceStatus(BaseModel):
    """Open tasks by status, and the live instances of the service with the runs they can have at a time.

    `oldest_queued`: seconds for which the task at the front of the line could have been claimed; null without a line.
    """

    held: int
    queued: int
    running: int
    waiting: int
    instances: int
    capacity: int
    oldest_queued: float | None


class StatusAnswer(BaseModel):
    """`store`, `queue`: what they are: sqlite, postgresql; memory, redis, ... `control_planes`: how many there are on the
    store, as far as this one has heard of others lately."""

    services: dict[str, ServiceStatus]
    draining: bool
    store: str | None
    queue: str
    control_planes: int


def session_definition(session: SessionRecord) -> SessionDefinition:
    return SessionDefinition(
        session_id=session.session_id, task_ids=list(session.task_ids), state=json.loads(session.state)
    )


def task_definition(record: TaskRecord) -> TaskDefinition:
    return TaskDefinition(
        input=record.input, task_id=record.task_id, session_id=record.session_id, agent_id=record.service_name
    )


def task_summary(record: TaskRecord) -> TaskSummary:
    return TaskSummary(**{name: getattr(record, name) for name in TaskSummary.model_fields})


def task_detail(record: TaskRecord) -> TaskDetail:
    return TaskDetail(
        **task_summary(record).model_dump(),
        input=record.input,
        result=record.result_text if record.status.is_terminal else None,
        value=None if record.result is None else json.loads(record.result),
    )


def dead_letter_item(letter: DeadLetter) -> DeadLetterItem:
    return DeadLetterItem(
        no=letter.no, topic=letter.topic, reason=letter.reason, at=letter.at, message=json.loads(letter.message)
    )
