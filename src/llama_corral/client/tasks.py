"""One task: its events, its result, what can be done to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import anyio
from pydantic import BaseModel, ConfigDict, ValidationError

from .. import exceptions as exc
from ..http_answers import not_ours
from ..http_urls import path_of
from ..protocol.lifecycle import TaskStatus
from ..protocol.messages import ErrorRecord, TaskResult
from .events import TaskEvents
from .http import Http, Patience
from .outgoing import event_text

LONG_POLL: Final = 25.0
"""Seconds for which a result is asked at a time: less than most proxies wait for an answer."""

_ENDINGS: Final[dict[str, type[exc.TaskEnded]]] = {
    TaskStatus.FAILED: exc.TaskFailed,
    TaskStatus.CANCELLED: exc.TaskCancelled,
    TaskStatus.TIMED_OUT: exc.TaskTimedOut,
}


class TaskInfo(BaseModel):
    """A task as the server describes it. Times are seconds since the epoch. `attempts`: failures in a row so far; `error` of
    a task that has not ended is that of its last attempt.

    `input`, `result` (the original's text) and `value` (the result as JSON) are there if one task was asked for; a list
    leaves them out.
    """

    model_config = ConfigDict(frozen=True)

    task_id: str
    session_id: str
    service_name: str
    status: TaskStatus
    implicit_session: bool = False
    attempts: int = 0
    max_attempts: int | None = None
    retry_of: str | None = None
    cancel_requested: bool = False
    created_at: float
    not_before: float | None = None
    started_at: float | None = None
    finished_at: float | None = None
    deadline: float | None = None
    event_count: int = 0
    error: ErrorRecord | None = None
    context_saved: bool | None = None
    context_error: str | None = None
    input: str | None = None
    result: str | None = None
    value: Any = None


class Task:
    """A handle on a task. Making one asks nothing; a task that does not exist shows as `NotFound` at the first call.

    Attributes:
        id: Its id.
        session_id: The session it runs in, where it is known without asking.
        status_at_start: Its status in the answer to the request that started it, or found it; None for a handle by id.
    """

    def __init__(
        self,
        http: Http,
        task_id: str,
        reconnect_for: float,
        session_id: str | None = None,
        status_at_start: str | None = None,
    ) -> None:
        self.id = task_id
        self.session_id = session_id
        self.status_at_start = status_at_start
        self._http = http
        self._reconnect_for = reconnect_for

    def __repr__(self) -> str:
        return f"<Task {self.id}>"

    def events(self, start: int = 0, *, follow_status: bool = False) -> TaskEvents:
        """The task's events from index `start` on, as they come, until it has ended.

        Args:
            follow_status: Let `receive` of the stream also tell when the task's status changes.
        """
        return TaskEvents(self._http, self.id, start, self._reconnect_for, follow_status=follow_status)

    async def wait(self, timeout: float | None = None) -> TaskResult:  # noqa: ASYNC109 - as in any client
        """How the task ended, whichever way, as soon as it has.

        Raises:
            TimeoutError: not within `timeout` seconds of this call; the task goes on.
            Unavailable: the server was away for longer than `reconnect_for` seconds.
        """
        patience = Patience(self._reconnect_for)
        with anyio.fail_after(timeout):
            while True:
                asked = anyio.current_time()
                try:
                    record = await self._poll(LONG_POLL)
                    if record is not None:
                        return record
                    if anyio.current_time() - asked < LONG_POLL / 2:
                        raise exc.Draining(f"{self._http.url} is stopping", url=self._http.url)
                except exc.Draining as error:
                    self._http.note(self._http.url, error)
                    await patience.pause(error)
                except exc.Unavailable as error:
                    await patience.pause(error)
                else:
                    patience.progress()

    async def _poll(self, wait: float) -> TaskResult | None:
        answer = await self._http.request("GET", self._path("result"), params={"wait": wait}, wait=wait)
        if answer is None:
            return None
        try:
            return TaskResult.model_validate(answer)
        except ValidationError as error:
            raise not_ours(self._http.url, "its answer is no result of a task") from error

    async def result(self, timeout: float | None = None) -> Any:  # noqa: ASYNC109 - as in any client
        """The result of the workflow, as JSON gives it, as soon as there is one.

        Raises:
            TaskFailed, TaskCancelled, TaskTimedOut: it ended so; the field `error` holds the record of it.
            TimeoutError: it has not ended within `timeout` seconds of this call; it goes on.
            Unavailable: the server was away for longer than `reconnect_for` seconds.
        """
        return outcome(await self.wait(timeout), self.session_id)

    async def status(self) -> TaskInfo:
        """The task as it is now."""
        info = parse_info(self._http, await self._http.request("GET", self._path()))
        self.session_id = info.session_id
        return info

    async def send_event(self, event: Any, data: Mapping[str, Any] | None = None) -> None:
        """Send an event to the workflow, whether it waits for one already or not.

            await task.send_event(HumanResponseEvent(response="yes"))
            await task.send_event("HumanResponseEvent", {"response": "yes"})

        It is sent once: if no answer comes (`Unavailable` with the field `sent` true), it may or may not have arrived.

        Args:
            event: A llama-index event, or the name of its type.
            data: Its fields, where a name is given.

        Raises:
            BadInput: the workflow knows no such event, or its fields are wrong.
            Conflict: the task has ended.
        """
        body = {"agent_id": "", "event_obj_str": event_text(event, data)}
        await self._http.request("POST", self._path("send_event"), body=body)

    async def cancel(self) -> None:
        """Ask for the task's cancellation; repeating it is harmless. Returns when the request is stored: the record says
        cancelled when the run has ended, unless it ended otherwise before.

        Raises:
            Conflict: the task has ended.
        """
        await self._http.request("POST", self._path("cancel"), repeatable=True)

    async def retry(self, *, fresh: bool = False) -> Task:
        """Do again, as a new task, what this one did not complete. It goes on from the checkpoint that was left, if there
        is one. Repeating the call answers the same task.

        Args:
            fresh: From the beginning.

        Raises:
            Conflict: the task has not ended, or completed.
        """
        params = {"fresh": "true"} if fresh else {}
        answer = await self._http.request("POST", self._path("retry"), params=params, repeatable=True)
        if not isinstance(answer, dict) or not isinstance(answer.get("task_id"), str):
            raise not_ours(self._http.url, "its answer is no task")
        return Task(self._http, answer["task_id"], self._reconnect_for, answer.get("session_id"))

    def _path(self, *more: str) -> str:
        return path_of("tasks", self.id, *more)


def outcome(record: TaskResult, session_id: str | None = None) -> Any:
    """The result in a terminal record, or the error that it means."""
    if record.status == TaskStatus.COMPLETED:
        # A service of the original reports its result as text only.
        return record.result if record.value is None and record.result not in ("", "None") else record.value
    kind = _ENDINGS.get(record.status, exc.TaskEnded)
    raise kind(_why(record), task_id=record.task_id, session_id=session_id, status=record.status, error=record.error)


def _why(record: TaskResult) -> str:
    verb = "was cancelled" if record.status == TaskStatus.CANCELLED else record.status.replace("_", " ")
    ended = f"the task {record.task_id} {verb}"
    if record.error is None:
        return f"{ended}: {record.result}" if record.result else ended
    step = f" in step {record.error.step}" if record.error.step else ""
    if record.status != TaskStatus.FAILED:
        # Who ended it, not the workflow, wrote this message, and often with the id in it.
        return record.error.message if record.task_id in record.error.message else f"{ended}: {record.error.message}"
    return f"{ended}{step}: {record.error.type}: {record.error.message}"


def parse_info(http: Http, data: Any) -> TaskInfo:
    try:
        return TaskInfo.model_validate(data)
    except ValidationError as error:
        raise not_ours(http.url, "its answer is no task") from error


OnEvent = Callable[[Any], Any]
