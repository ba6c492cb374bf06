"""Messages and definitions as the original (llama_deploy 0.6) puts them on the wire: its names, fields and defaults.

What we add is optional, so that the original's client and services can read it. Numbers in `TaskStream.index` count from 0.
"""

from __future__ import annotations

import uuid
from enum import StrEnum
from typing import Any

from pydantic import BaseModel, ConfigDict, Field


def new_id() -> str:
    """A fresh id for a session, a task, a message or an instance."""
    return str(uuid.uuid4())


def id_of_key(service_name: str, key: str) -> str:
    """The id of the task that an `Idempotency-Key` means: the same for the same service and key, wherever it is asked."""
    return str(uuid.uuid5(_KEYS, f"{service_name}\n{key}"))


_KEYS = uuid.UUID("5a7f3a5e-6a0c-4d53-9c0e-1b1f2f0f7b1d")
MAX_KEY = 255
"""The most characters of an `Idempotency-Key`."""


class ActionTypes(StrEnum):
    """What a message asks its receiver to do. `WAKE_UP` is ours: something about a task changed, pull it."""

    NEW_TASK = "new_task"
    COMPLETED_TASK = "completed_task"
    REQUEST_FOR_HELP = "request_for_help"
    NEW_TOOL_CALL = "new_tool_call"
    COMPLETED_TOOL_CALL = "completed_tool_call"
    TASK_STREAM = "task_stream"
    SEND_EVENT = "send_event"
    WAKE_UP = "wake_up"


class QueueMessageStats(BaseModel):
    """Times as text, filled in by whoever publishes or processes; nothing decides by them."""

    publish_time: str | None = None
    process_start_time: str | None = None
    process_end_time: str | None = None


class QueueMessage(BaseModel):
    """The envelope of everything that a message queue carries."""

    id_: str = Field(default_factory=new_id)
    publisher_id: str = "default"
    data: dict[str, Any] = Field(default_factory=dict)
    action: ActionTypes | None = None
    stats: QueueMessageStats = Field(default_factory=QueueMessageStats)
    type: str = "default"


class TaskDefinition(BaseModel):
    """A task as it is asked for. `input` is a JSON object as text: the start arguments of the workflow."""

    input: str
    task_id: str = Field(default_factory=new_id)
    session_id: str | None = None
    agent_id: str | None = None


class SessionDefinition(BaseModel):
    """A session with the ids of its tasks in order and its user state."""

    session_id: str = Field(default_factory=new_id)
    task_ids: list[str] = Field(default_factory=list)
    state: dict[str, Any] = Field(default_factory=dict)


class EventDefinition(BaseModel):
    """An outside event for a running task. `event_obj_str` is the event as upstream's JsonSerializer writes it."""

    agent_id: str
    event_obj_str: str


class ErrorRecord(BaseModel):
    """Why a task did not complete: what was raised, where. `traceback` only in debug."""

    model_config = ConfigDict(frozen=True)

    type: str
    message: str
    step: str | None = None
    retryable: bool = False
    traceback: str | None = None


class TaskResult(BaseModel):
    """The outcome of a task.

    `result` is the original's text: `str()` of the result, or the text of the error. Beside it stand our `status`, the
    result as JSON in `value`, and `error`; the original's client ignores them.
    """

    task_id: str
    history: list[dict[str, Any]] = Field(default_factory=list)
    result: str
    data: dict[str, Any] = Field(default_factory=dict)
    status: str = "completed"
    value: Any = None
    error: ErrorRecord | None = None


class TaskStream(BaseModel):
    """One event of a task. `data` is the event's fields; `type` (ours) names its class."""

    task_id: str
    session_id: str | None = None
    data: dict[str, Any]
    index: int
    type: str | None = None


class ServiceDefinition(BaseModel):
    """A service as it is registered and listed."""

    service_name: str
    description: str = ""
    prompt: list[dict[str, Any]] = Field(default_factory=list)
    host: str | None = None
    port: int | None = None
