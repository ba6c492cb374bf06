"""Routes of sessions: the original's, with ids of the client's own and pages."""

from __future__ import annotations

from typing import Any

from ...exceptions import BadInput
from ...protocol.messages import SessionDefinition, TaskDefinition
from ...protocol.records import TaskFilter
from ...web import Request, Response, Routes
from ..plane import ControlPlane
from .keys import KEY_HEADER, task_id_of
from .models import (
    NewSession,
    SessionOptions,
    SessionsQuery,
    SessionTasksQuery,
    SubmitQuery,
    session_definition,
    task_definition,
)


class SessionRoutes:
    def __init__(self, plane: ControlPlane) -> None:
        self.plane = plane

    def routes(self) -> list[Routes]:
        routes = Routes(tag="Sessions")
        both: dict[str, Any] = {"returns": SessionDefinition, "answers": {201: SessionDefinition}}
        routes.add("POST", "/sessions/create", self.create_session, returns=str, errors=(409,))
        routes.add("GET", "/sessions", self.get_all_sessions, returns=dict[str, SessionDefinition])
        routes.add("GET", "/sessions/{session_id}", self.get_session)
        routes.add("PUT", "/sessions/{session_id}", self.get_or_create_session, **both)
        routes.add("POST", "/sessions/{session_id}/delete", self.delete_session)
        routes.add(
            "POST",
            "/sessions/{session_id}/tasks",
            self.add_task_to_session,
            hot=True,
            errors=(409, 429),
            takes_headers=KEY_HEADER,
        )
        routes.add("GET", "/sessions/{session_id}/tasks", self.get_session_tasks, returns=list[TaskDefinition])
        routes.add("GET", "/sessions/{session_id}/current_task", self.get_current_task)
        routes.add("GET", "/sessions/{session_id}/state", self.get_session_state)
        routes.add("POST", "/sessions/{session_id}/state", self.update_session_state)
        return [routes]

    async def create_session(self, body: NewSession | None = None) -> str:
        """Create a session and answer its id.

        Without a body it gets a fresh id; 409 if the id of the body exists.
        """
        wanted = body or NewSession()
        return (await self.plane.sessions.create(wanted.session_id, policy=wanted.policy)).session_id

    async def get_or_create_session(self, session_id: str, body: SessionOptions | None = None) -> Response:
        """The session of this id, made if it does not exist (201 then)."""
        policy = (body or SessionOptions()).policy
        session, created = await self.plane.sessions.get_or_create(session_id, policy=policy)
        return Response.json(session_definition(session), status=201 if created else 200)

    async def get_all_sessions(self, query: SessionsQuery) -> Response:
        """Sessions by id, in the order of their ids.

        If there are more than `limit`, the header `X-Next-After` holds the value of `after` for the next page.
        """
        sessions = await self.plane.sessions.list(after=query.after, limit=query.limit + 1)
        more = len(sessions) > query.limit
        page = sessions[: query.limit]
        headers = {"X-Next-After": page[-1].session_id} if more else {}
        return Response.json({each.session_id: session_definition(each) for each in page}, headers=headers)

    async def get_session(self, session_id: str) -> SessionDefinition:
        """A session with the ids of its tasks and its state."""
        return session_definition(await self.plane.sessions.get(session_id))

    async def delete_session(self, session_id: str) -> None:
        """Delete a session with its tasks. Those that run are stopped."""
        await self.plane.sessions.delete(session_id)

    async def add_task_to_session(
        self, session_id: str, body: TaskDefinition, query: SubmitQuery, request: Request
    ) -> str:
        """Start a task and answer its id.

        `input` is a JSON object as text: the start arguments. The same task id, or the same `Idempotency-Key` header,
        again is the same task, if everything else is the same too; otherwise it is a conflict.
        """
        if body.session_id not in (None, "", session_id):
            raise BadInput(
                f"The body names the session {body.session_id[:80]!r}, the path {session_id[:80]!r}.",
                hint="Leave session_id out of the body.",
            )
        if not body.agent_id:
            raise BadInput("agent_id is missing: the name of the service.", hint="GET /services lists them.")
        chosen = body.task_id if "task_id" in body.model_fields_set else None
        task_id, client_id = task_id_of(request, body.agent_id, chosen)
        accepted = await self.plane.submit(
            body.agent_id,
            body.input,
            session_id=session_id,
            task_id=task_id,
            client_id=client_id,
            **query.options(),
        )
        return accepted.task_id

    async def get_session_tasks(self, session_id: str, query: SessionTasksQuery) -> Response:
        """The tasks of a session in the order in which they came.

        If there are more than `limit`, these are the newest, and the header `X-Next-Before` holds the value of `before`
        for the page of older ones.
        """
        await self.plane.sessions.get(session_id)
        which = TaskFilter(session_id=session_id, before=query.before, limit=query.limit + 1)
        records = await self.plane.list_tasks(which)
        more = len(records) > query.limit
        page = records[: query.limit][::-1]
        headers = {"X-Next-Before": page[0].task_id} if more else {}
        return Response.json([task_definition(record) for record in page], headers=headers)

    async def get_current_task(self, session_id: str) -> TaskDefinition | None:
        """The session's last task; null if it has none."""
        await self.plane.sessions.get(session_id)
        records = await self.plane.list_tasks(TaskFilter(session_id=session_id, limit=1))
        return task_definition(records[0]) if records else None

    async def get_session_state(self, session_id: str) -> dict[str, Any]:
        """The user's state. Nothing of ours is kept in it."""
        return await self.plane.sessions.state(session_id)

    async def update_session_state(self, session_id: str, body: dict[str, Any]) -> None:
        """Set these keys of the state, as dict.update would. Concurrent updates of different keys all stand."""
        await self.plane.sessions.merge_state(session_id, body)
