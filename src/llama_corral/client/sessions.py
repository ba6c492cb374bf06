"""Sessions: runs of one session share the context that their workflow keeps, and a state that belongs to the user."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..http_answers import not_ours
from ..http_urls import path_of
from ..protocol.records import SessionPolicy
from .outgoing import start_arguments
from .tasks import Task, TaskInfo

if TYPE_CHECKING:
    from .api import Client


class Session:
    """A handle on a session that exists, or did when it was made.

    Attributes:
        id: Its id.
    """

    def __init__(self, client: Client, session_id: str) -> None:
        self.id = session_id
        self._client = client

    def __repr__(self) -> str:
        return f"<Session {self.id}>"

    async def start(
        self,
        service: str,
        arguments: Mapping[str, Any] | None = None,
        /,
        **more: Any,
    ) -> Task:
        """Start a task in this session: see `Client.start` for the options."""
        return await self._client.start(service, arguments, session=self, **more)

    async def run(
        self,
        service: str,
        arguments: Mapping[str, Any] | None = None,
        /,
        **more: Any,
    ) -> Any:
        """Run a service in this session and return its result: see `Client.run` for the options."""
        return await self._client.run(service, arguments, session=self, **more)

    async def state(self) -> dict[str, Any]:
        """The user's state. The contexts of workflows are not part of it."""
        state: dict[str, Any] = await self._client.http.request("GET", self._path("state"))
        return state

    async def update_state(self, changes: Mapping[str, Any] | None = None, /, **more: Any) -> None:
        """Set these keys of the state, as `dict.update` would. Concurrent updates of different keys all stand."""
        body = start_arguments(changes, more)
        await self._client.http.request("POST", self._path("state"), body=body, repeatable=True)

    async def tasks(self, *, limit: int = 100) -> list[TaskInfo]:
        """The session's tasks, newest first."""
        return await self._client.tasks(session=self, limit=limit)

    async def delete(self) -> None:
        """Delete the session with its tasks. Those that run are stopped."""
        await self._client.sessions.delete(self.id)

    def _path(self, *more: str) -> str:
        return path_of("sessions", self.id, *more)


class Sessions:
    """`client.sessions`."""

    def __init__(self, client: Client) -> None:
        self._client = client

    async def create(self, session_id: str | None = None, *, policy: SessionPolicy = "enqueue") -> Session:
        """A new session.

        Args:
            session_id: Its id; a fresh one if not given.
            policy: What a second task on one service does while the first is open: wait its turn (`enqueue`), be refused
                (`reject`), or run beside it (`concurrent`).

        Raises:
            Conflict: the id exists.
        """
        body = {"session_id": session_id, "policy": policy}
        answer = await self._client.http.request("POST", "/sessions/create", body=body)
        if not isinstance(answer, str):
            raise not_ours(self._client.http.url, "its answer is no id of a session")
        return Session(self._client, answer)

    async def get(self, session_id: str) -> Session:
        """Raises `NotFound` where there is no such session."""
        await self._client.http.request("GET", path_of("sessions", session_id))
        return Session(self._client, session_id)

    async def get_or_create(self, session_id: str, *, policy: SessionPolicy = "enqueue") -> Session:
        """The session of exactly this id; it is made, with this policy, if it does not exist."""
        await self._client.http.request("PUT", path_of("sessions", session_id), body={"policy": policy})
        return Session(self._client, session_id)

    async def list(self, *, after: str | None = None, limit: int = 1000) -> list[Session]:
        """Sessions in the order of their ids, from the one behind `after` on. The own sessions of single tasks are not
        among them."""
        answer = await self._client.http.request("GET", "/sessions", params={"after": after, "limit": limit})
        if not isinstance(answer, dict):
            raise not_ours(self._client.http.url, "its answer is no list of sessions")
        return [Session(self._client, session_id) for session_id in answer]

    async def delete(self, session_id: str) -> None:
        """Delete a session with its tasks. Those that run are stopped.

        Raises:
            NotFound: there is no such session.
        """
        await self._client.http.request("POST", path_of("sessions", session_id, "delete"))
