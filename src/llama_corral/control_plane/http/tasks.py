"""Routes of tasks, each twice: below its session, as the original has them, and by the task's id alone."""

from __future__ import annotations

from typing import Any

from ...events import NDJSON_CONTENT_TYPE, SSE_CONTENT_TYPE, NdjsonBody, SseBody, parse_cursor, task_result
from ...exceptions import NotFound
from ...protocol.messages import EventDefinition, TaskResult
from ...protocol.records import TaskFilter, TaskRecord
from ...web import Request, Routes, Stream
from ..plane import ControlPlane
from .models import (
    INDEX_SCHEMA,
    CancelAnswer,
    EventsQuery,
    FollowQuery,
    ResultQuery,
    RetryAnswer,
    RetryQuery,
    TaskDetail,
    TaskPage,
    TasksQuery,
    task_detail,
    task_summary,
)

BY_SESSION = "/sessions/{session_id}/tasks/{task_id}"
BY_ID = "/tasks/{task_id}"


class TaskRoutes:
    def __init__(self, plane: ControlPlane) -> None:
        self.plane = plane

    def routes(self) -> list[Routes]:
        sessions, tasks = Routes(tag="Sessions"), Routes(tag="Tasks")
        sse: dict[str, Any] = {"media_type": SSE_CONTENT_TYPE, "takes_headers": {"Last-Event-ID": INDEX_SCHEMA}}
        sessions.add("GET", f"{BY_SESSION}/result", self.get_task_result, hot=True)
        sessions.add("GET", f"{BY_SESSION}/result_stream", self.get_task_result_stream, media_type=NDJSON_CONTENT_TYPE)
        sessions.add("GET", f"{BY_SESSION}/events", self.get_session_task_events, **sse)
        sessions.add("POST", f"{BY_SESSION}/send_event", self.send_event, errors=(409,))
        sessions.add("POST", f"{BY_SESSION}/cancel", self.cancel_session_task, status=202, errors=(409,))
        sessions.add("POST", f"{BY_SESSION}/retry", self.retry_session_task, status=202, errors=(409,))
        tasks.add("GET", "/tasks", self.list_tasks, errors=(404,))
        tasks.add("GET", BY_ID, self.get_task)
        tasks.add("GET", f"{BY_ID}/result", self.get_result, hot=True)
        tasks.add("GET", f"{BY_ID}/events", self.get_task_events, **sse)
        tasks.add("POST", f"{BY_ID}/send_event", self.send_event_to_task, errors=(409,))
        tasks.add("POST", f"{BY_ID}/cancel", self.cancel_task, status=202, errors=(409,))
        tasks.add("POST", f"{BY_ID}/retry", self.retry_task, status=202, errors=(409,))
        return [sessions, tasks]

    # Below a session

    async def get_task_result(
        self, session_id: str, task_id: str, query: ResultQuery, request: Request
    ) -> TaskResult | None:
        """The outcome of a task; null while it is pending.

        A task that did not complete has its error as text in `result`, and says so in `status` and `error`. With
        `?wait=SECONDS` the answer comes as soon as the task ends, or null after that time.
        """
        return await self._result(await self._in_session(session_id, task_id), query, request)

    async def get_task_result_stream(
        self, session_id: str, task_id: str, query: EventsQuery, request: Request
    ) -> Stream:
        """The events of a task as they come, one JSON object a line, until the task has ended.

        A body that breaks off has not come to the task's end: this server stops, or the connection was lost. Go on with
        `?from=` the number of lines that came.
        """
        await self._in_session(session_id, task_id)
        log = self.plane.open_log(task_id, parse_cursor(None, query.start), drain=request.drain)
        await log.open()
        return Stream(NdjsonBody(log), bytes, NDJSON_CONTENT_TYPE, ends_on_drain=False)

    async def get_session_task_events(
        self, session_id: str, task_id: str, query: FollowQuery, request: Request
    ) -> Stream:
        """The events of a task as server-sent events, from the beginning or from where the client left off.

        `id` is the index of the event; send the last one back in `Last-Event-ID` to go on. The last frame is `end` with
        the outcome, or `drain` if this server stops.
        """
        await self._in_session(session_id, task_id)
        return await self._events(task_id, query, request)

    async def send_event(self, session_id: str, task_id: str, body: EventDefinition) -> None:
        """Send an event to a task, whether it waits for one already or not."""
        await self._in_session(session_id, task_id)
        await self.plane.send_event(task_id, body.event_obj_str, service_name=body.agent_id)

    async def cancel_session_task(self, session_id: str, task_id: str) -> CancelAnswer:
        """Cancel a task. The answer comes at once; the record says cancelled when the run has ended."""
        await self._in_session(session_id, task_id)
        return await self._cancel(task_id)

    async def retry_session_task(self, session_id: str, task_id: str, query: RetryQuery) -> RetryAnswer:
        """Do again what an ended task did not complete: see the route by the task's id alone."""
        await self._in_session(session_id, task_id)
        return await self.retry_task(task_id, query)

    # By id

    async def list_tasks(self, query: TasksQuery) -> TaskPage:
        """Tasks, newest first."""
        which = TaskFilter(tuple(query.status), query.service, query.session_id, query.before, query.limit + 1)
        records = await self.plane.list_tasks(which)
        page = records[: query.limit]
        return TaskPage(
            tasks=[task_summary(record) for record in page],
            next=page[-1].task_id if len(records) > query.limit else None,
        )

    async def get_task(self, task_id: str) -> TaskDetail:
        """A task with its input and its outcome."""
        return task_detail(await self.plane.get_task(task_id))

    async def get_result(self, task_id: str, query: ResultQuery, request: Request) -> TaskResult | None:
        """The outcome of a task; null while it is pending, at the latest after `?wait=SECONDS`."""
        return await self._result(await self.plane.get_task(task_id), query, request)

    async def get_task_events(self, task_id: str, query: FollowQuery, request: Request) -> Stream:
        """The events of a task as server-sent events: see the route below the session."""
        return await self._events(task_id, query, request)

    async def send_event_to_task(self, task_id: str, body: EventDefinition) -> None:
        """Send an event to a task, whether it waits for one already or not. `agent_id` may be empty."""
        await self.plane.send_event(task_id, body.event_obj_str, service_name=body.agent_id)

    async def cancel_task(self, task_id: str) -> CancelAnswer:
        """Cancel a task. The answer comes at once; the record says cancelled when the run has ended."""
        return await self._cancel(task_id)

    async def retry_task(self, task_id: str, query: RetryQuery) -> RetryAnswer:
        """Do again, as a new task, what an ended one did not complete. The old one stays as it ended.

        It goes on from the checkpoint that was left, if there is one; with `?fresh=true` it begins again. Repeating the
        request answers the same task.
        """
        accepted = await self.plane.retry(task_id, fresh=query.fresh)
        return RetryAnswer(
            task_id=accepted.task_id,
            session_id=accepted.session_id,
            status=accepted.status,
            retry_of=task_id,
            created=accepted.created,
        )

    # Both

    async def _in_session(self, session_id: str, task_id: str) -> TaskRecord:
        record = await self.plane.get_task(task_id)
        if record.session_id != session_id:
            raise NotFound(
                f"There is no task {task_id!r} in the session {session_id!r}.",
                hint="GET /tasks lists the tasks with their sessions.",
                task_id=task_id,
                session_id=session_id,
            )
        return record

    async def _result(self, record: TaskRecord, query: ResultQuery, request: Request) -> TaskResult | None:
        if not record.status.is_terminal:
            if not query.wait:
                return None
            ended = await self.plane.wait_result(record.task_id, query.wait, drain=request.drain)
            if ended is None:
                return None
            record = ended
        return task_result(record)

    async def _events(self, task_id: str, query: FollowQuery, request: Request) -> Stream:
        start = parse_cursor(request.headers.get("last-event-id"), query.start)
        log = self.plane.open_log(task_id, start, drain=request.drain, statuses=query.status)
        await log.open()
        return Stream(SseBody(log), bytes, SSE_CONTENT_TYPE, ends_on_drain=False)

    async def _cancel(self, task_id: str) -> CancelAnswer:
        answer = await self.plane.cancel(task_id)
        return CancelAnswer(
            task_id=answer.task_id, session_id=answer.session_id, status=answer.status, ended=answer.ended
        )
