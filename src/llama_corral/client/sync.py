"""`SyncClient`: the same verbs for programs without an event loop."""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

from anyio.from_thread import BlockingPortal, start_blocking_portal

from ..protocol.messages import TaskResult
from ..protocol.records import SessionPolicy
from .api import CANCEL_GRACE, Client
from .events import TaskEvent, TaskEvents
from .services import Service
from .sessions import Session
from .tasks import OnEvent, Task, TaskInfo

T = TypeVar("T")


class _Bridge:
    """Runs coroutine functions in the client's event loop and waits for them."""

    def __init__(self, portal: BlockingPortal) -> None:
        self._portal = portal

    def __call__(self, fn: Callable[..., Awaitable[T]], *args: Any, **kwargs: Any) -> T:
        ended = threading.Event()

        async def call() -> T:
            try:
                return await fn(*args, **kwargs)
            finally:
                ended.set()

        future = self._portal.start_task_soon(call)
        try:
            return future.result()
        except BaseException:
            # Ctrl-C while we wait: cancel the call, and let it tell the server before anybody closes the connections.
            if future.cancel():
                ended.wait(2 * CANCEL_GRACE)
            raise


class SyncEvents:
    """A task's events as they come: see `TaskEvents`. `with` closes its connection early; the ending does too."""

    def __init__(self, call: _Bridge, events: TaskEvents) -> None:
        self._call = call
        self._events = events

    @property
    def cursor(self) -> int:
        return self._events.cursor

    @property
    def record(self) -> TaskResult | None:
        return self._events.record

    def __iter__(self) -> Iterator[TaskEvent]:
        return self

    def __next__(self) -> TaskEvent:
        # None instead of StopAsyncIteration, which could not pass through a future.
        event = self._call(_next, self._events)
        if event is None:
            raise StopIteration
        return event

    def close(self) -> None:
        self._call(self._events.aclose)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


async def _next(events: TaskEvents) -> TaskEvent | None:
    return await anext(events, None)


class SyncTask:
    """See `Task`."""

    def __init__(self, call: _Bridge, task: Task) -> None:
        self._call = call
        self._task = task

    def __repr__(self) -> str:
        return repr(self._task)

    @property
    def id(self) -> str:
        return self._task.id

    @property
    def session_id(self) -> str | None:
        return self._task.session_id

    def events(self, start: int = 0) -> SyncEvents:
        return SyncEvents(self._call, self._task.events(start))

    def wait(self, timeout: float | None = None) -> TaskResult:
        return self._call(self._task.wait, timeout)

    def result(self, timeout: float | None = None) -> Any:
        return self._call(self._task.result, timeout)

    def status(self) -> TaskInfo:
        return self._call(self._task.status)

    def send_event(self, event: Any, data: Mapping[str, Any] | None = None) -> None:
        self._call(self._task.send_event, event, data)

    def cancel(self) -> None:
        self._call(self._task.cancel)

    def retry(self, *, fresh: bool = False) -> SyncTask:
        return SyncTask(self._call, self._call(self._task.retry, fresh=fresh))


class SyncSession:
    """See `Session`."""

    def __init__(self, call: _Bridge, session: Session) -> None:
        self._call = call
        self._session = session

    def __repr__(self) -> str:
        return repr(self._session)

    @property
    def id(self) -> str:
        return self._session.id

    def start(self, service: str, arguments: Mapping[str, Any] | None = None, /, **options: Any) -> SyncTask:
        return SyncTask(self._call, self._call(self._session.start, service, arguments, **options))

    def run(self, service: str, arguments: Mapping[str, Any] | None = None, /, **options: Any) -> Any:
        return self._call(self._session.run, service, arguments, **options)

    def state(self) -> dict[str, Any]:
        return self._call(self._session.state)

    def update_state(self, changes: Mapping[str, Any] | None = None, /, **more: Any) -> None:
        self._call(self._session.update_state, changes, **more)

    def tasks(self, *, limit: int = 100) -> list[TaskInfo]:
        return self._call(self._session.tasks, limit=limit)

    def delete(self) -> None:
        self._call(self._session.delete)


class SyncServices:
    """See `Services`."""

    def __init__(self, call: _Bridge, client: Client) -> None:
        self._call = call
        self._services = client.services

    def list(self) -> list[Service]:
        return self._call(self._services.list)

    def get(self, service_name: str) -> Service:
        return self._call(self._services.get, service_name)


class SyncSessions:
    """See `Sessions`."""

    def __init__(self, call: _Bridge, client: Client) -> None:
        self._call = call
        self._sessions = client.sessions

    def create(self, session_id: str | None = None, *, policy: SessionPolicy = "enqueue") -> SyncSession:
        return SyncSession(self._call, self._call(self._sessions.create, session_id, policy=policy))

    def get(self, session_id: str) -> SyncSession:
        return SyncSession(self._call, self._call(self._sessions.get, session_id))

    def get_or_create(self, session_id: str, *, policy: SessionPolicy = "enqueue") -> SyncSession:
        return SyncSession(self._call, self._call(self._sessions.get_or_create, session_id, policy=policy))

    def list(self, *, after: str | None = None, limit: int = 1000) -> list[SyncSession]:
        found = self._call(self._sessions.list, after=after, limit=limit)
        return [SyncSession(self._call, each) for each in found]

    def delete(self, session_id: str) -> None:
        self._call(self._sessions.delete, session_id)


class SyncClient:
    """A `Client` in an event loop of its own, in a thread of its own. It may be used from any number of threads.

        with SyncClient("http://127.0.0.1:8000") as client:
            print(client.run("hello", name="Ada"))

    Arguments are those of `Client`. Leaving the block cancels what other threads still wait for.

    Args:
        backend: The event loop: "trio" or "asyncio".
    """

    services: SyncServices
    sessions: SyncSessions

    def __init__(
        self,
        url: str | Sequence[str] = "http://127.0.0.1:8000",
        *,
        backend: Literal["trio", "asyncio"] = "trio",
        **options: Any,
    ) -> None:
        self._client = Client(url, **options)
        self._backend = backend
        self._stack: ExitStack | None = None

    def __repr__(self) -> str:
        return f"<SyncClient of {self.url}>"

    @property
    def url(self) -> str:
        return self._client.url

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            portal = stack.enter_context(start_blocking_portal(self._backend))
            stack.callback(portal.call, self._client.http.aclose)
            self._call = _Bridge(portal)
            self.services = SyncServices(self._call, self._client)
            self.sessions = SyncSessions(self._call, self._client)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        stack, self._stack = self._stack, None
        if stack is not None:
            stack.__exit__(kind, error, trace)

    def start(
        self, service: str, arguments: Mapping[str, Any] | None = None, /, *, session: Any = None, **options: Any
    ) -> SyncTask:
        """See `Client.start`."""
        started = self._call(self._client.start, service, arguments, session=_plain(session), **options)
        return SyncTask(self._call, started)

    def run(
        self,
        service: str,
        arguments: Mapping[str, Any] | None = None,
        /,
        *,
        session: Any = None,
        on_event: OnEvent | None = None,
        **options: Any,
    ) -> Any:
        """See `Client.run`. `on_event` is called in the thread of the event loop: it must not wait, nor use this client.
        Ctrl-C cancels the task on the server."""
        return self._call(self._client.run, service, arguments, session=_plain(session), on_event=on_event, **options)

    def retry(self, task_id: str, *, fresh: bool = False) -> SyncTask:
        """See `Client.retry`."""
        return self.task(task_id).retry(fresh=fresh)

    def task(self, task_id: str) -> SyncTask:
        return SyncTask(self._call, self._client.task(task_id))

    def tasks(
        self,
        *,
        status: str | Sequence[str] = (),
        service: str | None = None,
        session: Any = None,
        before: str | None = None,
        limit: int = 100,
    ) -> list[TaskInfo]:
        """See `Client.tasks`."""
        return self._call(
            self._client.tasks, status=status, service=service, session=_plain(session), before=before, limit=limit
        )

    def status(self) -> dict[str, Any]:
        """See `Client.status`."""
        return self._call(self._client.status)


def _plain(session: SyncSession | Session | str | None) -> Session | str | None:
    return session.id if isinstance(session, SyncSession) else session
