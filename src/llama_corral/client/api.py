"""`Client`: start tasks, run services, look at what runs."""

from __future__ import annotations

import inspect
import ssl
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final, Self

import anyio
import sniffio
from pydantic import SecretStr

from .. import exceptions as exc
from ..http_answers import not_ours
from ..http_urls import path_of
from ..protocol.messages import MAX_KEY, id_of_key, new_id
from .http import Http
from .outgoing import start_arguments
from .services import Services
from .sessions import Session, Sessions
from .shielding import finish
from .tasks import OnEvent, Task, TaskInfo, outcome, parse_info

CANCEL_GRACE: Final = 5.0
"""Seconds that a cancelled `run` takes at most to tell the server."""


class Client(anyio.AsyncContextManagerMixin):
    """A client of a control plane. Use it as a block, which owns its connections:

        async with Client("http://127.0.0.1:8000", token=...) as client:
            print(await client.run("hello", name="Ada"))

            session = await client.sessions.get_or_create("ada")
            task = await session.start("form", item="llama")
            async for event in task.events():
                print(event.type, event.data)
            print(await task.result())

    Any number of tasks may use it at a time. Nothing polls: results are long polls, events are a stream. Of several control
    planes on one store the first one that answers is asked, until it fails; then the next one, and streams go on there.

    Args:
        url: Where the control plane listens; or several URLs, in a sequence or with commas in between.
        token: Its bearer token, if it wants one.
        timeout: Seconds for one answer to begin. Waiting for events and results has no limit of its own.
        retry_for: Seconds for which a request that may safely be repeated is repeated. A server that has never answered
            this client is not waited for.
        reconnect_for: Seconds without progress after which waiting for events or for a result gives up.
        verify: How a https server is verified: True, or an SSL context.

    Attributes:
        services: List and get services.
        sessions: Create, get, list and delete sessions.
        library: "trio" or "asyncio": what the block was entered in. Its connections work in that one only, which makes a
            difference where Trio hosts an asyncio loop. None before.
    """

    library: str | None = None

    def __init__(
        self,
        url: str | Sequence[str] = "http://127.0.0.1:8000",
        *,
        token: str | SecretStr | None = None,
        timeout: float = 30.0,
        retry_for: float = 10.0,
        reconnect_for: float = 60.0,
        verify: ssl.SSLContext | bool = True,
    ) -> None:
        self.http = Http(url, token, timeout, retry_for, verify)
        self.services = Services(self.http)
        self.sessions = Sessions(self)
        self._reconnect_for = reconnect_for

    def __repr__(self) -> str:
        return f"<Client of {self.url}>"

    @property
    def url(self) -> str:
        """The control plane that was asked last."""
        return self.http.url

    @asynccontextmanager
    async def __asynccontextmanager__(self) -> AsyncGenerator[Self, None]:
        self.library = sniffio.current_async_library()
        try:
            yield self
        finally:
            await self.http.aclose()

    async def start(
        self,
        service: str,
        arguments: Mapping[str, Any] | None = None,
        /,
        *,
        session: Session | str | None = None,
        task_id: str | None = None,
        idempotency_key: str | None = None,
        timeout: float | None = None,  # noqa: ASYNC109 - of the task, not of the call
        delay: float | None = None,
        max_attempts: int | None = None,
        retry_on: str | Sequence[str] = (),
        backoff: float | None = None,
        backoff_factor: float | None = None,
        max_backoff: float | None = None,
        **more: Any,
    ) -> Task:
        """Start a task. When this returns it is stored, and will end in exactly one record.

        Args:
            service: The name of the service.
            arguments: Start arguments of the workflow, where a name is taken here or is no identifier; the others are
                given by name.
            session: Run in this session; otherwise in one of its own, which ends with the task.
            task_id: An id of your own: the same call again, also after a lost answer, is the same task.
            idempotency_key: Instead of `task_id`, a text of your own; the id follows from it and the service.
            timeout: Seconds after which the task, wherever it is, ends as timed out.
            delay: Seconds before which it does not start.
            max_attempts: How often it may be tried: lost workers count, and the errors in `retry_on`.
            retry_on: Classes of errors of the workflow after which it is tried again: names, bare or with their module,
                bases included; "*" for any.
            backoff, backoff_factor, max_backoff: Seconds before the second attempt, by what each further pause is longer,
                and the longest one.

        Raises:
            NotFound: there is no such service or session.
            BadInput: the workflow refuses its start arguments; an option is out of its bounds.
            Conflict: the id belongs to another request; the session takes one task at a time.
            TooManyTasks: too many wait for the service, also after a few further attempts. Nothing was stored.
        """
        body = start_arguments(arguments, more)
        chosen = _chosen_id(service, task_id, idempotency_key)
        params = {
            "detach": "true",
            "task_id": chosen,
            "session_id": _id_of(session),
            "timeout": timeout,
            "delay": delay,
            "max_attempts": max_attempts,
            "retry_on": [retry_on] if isinstance(retry_on, str) else list(retry_on),
            "backoff": backoff,
            "backoff_factor": backoff_factor,
            "max_backoff": max_backoff,
        }
        # With an id of its own it may be repeated: the server joins the task of the first request.
        answer = await self.http.request(
            "POST", path_of("services", service, "run"), params=params, body=body, repeatable=True
        )
        if not isinstance(answer, dict) or "task_id" not in answer:
            raise not_ours(self.url, "its answer is no task")
        return Task(self.http, answer["task_id"], self._reconnect_for, answer.get("session_id"), answer.get("status"))

    async def run(
        self,
        service: str,
        arguments: Mapping[str, Any] | None = None,
        /,
        *,
        on_event: OnEvent | None = None,
        keep_on_cancel: bool = False,
        **more: Any,
    ) -> Any:
        """Run a service and return its result. It survives dropped connections: the task is started under an id of its
        own, and its event stream is taken up where it broke.

        If this call is cancelled, or fails before the task has ended, the task is cancelled on the server; telling it
        takes `CANCEL_GRACE` seconds at most.

        Args:
            service, arguments: As in `start`.
            on_event: Called, and awaited if it is async, with each `TaskEvent`.
            keep_on_cancel: Leave the task running instead.
            more: The options of `start` and start arguments of the workflow, by name.

        Raises:
            TaskFailed, TaskCancelled, TaskTimedOut: it ended so; the field `error` holds the record of it.
            UsageError: as in `start`.
            Unavailable: the server is away, or was for longer than `reconnect_for` seconds.
        """
        async with self.started(service, arguments, keep_on_cancel=keep_on_cancel, **more) as task:
            # Who wants no events waits for the end behind them: an index that no log reaches.
            async with task.events(0 if on_event is not None else BEHIND_ALL) as events:
                async for event in events:
                    called = on_event(event) if on_event is not None else None
                    if inspect.isawaitable(called):
                        await called
            assert events.record is not None
            return outcome(events.record, task.session_id)

    @asynccontextmanager
    async def started(
        self,
        service: str,
        arguments: Mapping[str, Any] | None = None,
        /,
        *,
        task_id: str | None = None,
        idempotency_key: str | None = None,
        keep_on_cancel: bool | Callable[[], bool] = False,
        **more: Any,
    ) -> AsyncGenerator[Task, None]:
        """`start` as a block that owns the task: if it is cancelled or raises, the task is cancelled on the server.

        Leaving it normally, or with a `TaskEnded`, leaves the task as it is. Arguments are those of `start`.

        Args:
            keep_on_cancel: Leave the task running in any case; or what to ask, when it comes to that, whether to.
        """
        chosen = _chosen_id(service, task_id, idempotency_key)
        unclear = False  # whether there may be a task that nobody was told of
        try:

            async def start() -> Task:
                return await self.start(service, arguments, task_id=chosen, **more)

            unclear = True
            try:
                # A request cut short would leave it open whether the task exists when its cancellation comes.
                task = await finish(start, CANCEL_GRACE)
            except exc.CorralError as error:
                unclear = bool(error.fields.get("sent", False))
                raise
            yield task
        except exc.TaskEnded:
            raise
        except BaseException:
            kept = keep_on_cancel() if callable(keep_on_cancel) else keep_on_cancel
            if unclear and not kept:
                with anyio.move_on_after(CANCEL_GRACE, shield=True):
                    await self._cancel_quietly(chosen)
            raise

    async def _cancel_quietly(self, task_id: str) -> None:
        """Cancel a task whose caller has another error to raise."""
        try:
            await self.task(task_id).cancel()
        except exc.CorralError:
            return  # it has ended, was never there, or the server is away and nothing can be done

    async def retry(self, task_id: str, *, fresh: bool = False) -> Task:
        """Do again what an ended task did not complete: see `Task.retry`."""
        return await self.task(task_id).retry(fresh=fresh)

    def task(self, task_id: str) -> Task:
        """A handle on a task by its id. Nothing is asked."""
        return Task(self.http, task_id, self._reconnect_for)

    async def tasks(
        self,
        *,
        status: str | Sequence[str] = (),
        service: str | None = None,
        session: Session | str | None = None,
        before: str | None = None,
        limit: int = 100,
    ) -> list[TaskInfo]:
        """Tasks, newest first.

        Args:
            status: One status or several of them.
            before: The id of the last task of the page before.
        """
        params = {
            "status": [status] if isinstance(status, str) else list(status),
            "service": service,
            "session_id": _id_of(session),
            "before": before,
            "limit": limit,
        }
        answer = await self.http.request("GET", "/tasks", params=params)
        if not isinstance(answer, dict) or not isinstance(answer.get("tasks"), list):
            raise not_ours(self.url, "its answer is no list of tasks")
        return [parse_info(self.http, each) for each in answer["tasks"]]

    async def status(self) -> dict[str, Any]:
        """How much waits and runs: `{"services": {name: {status: number, ...}}, "draining": bool, ...}`."""
        answer: dict[str, Any] = await self.http.request("GET", "/status")
        return answer


BEHIND_ALL: Final = 10**17
"""The index of an event that never comes: a stream from there has the ending only."""


def _chosen_id(service: str, task_id: str | None, idempotency_key: str | None) -> str:
    if idempotency_key is None:
        return new_id() if task_id is None else task_id
    if task_id is not None:
        raise exc.BadInput("Both a task_id and an idempotency_key are given.", hint="One of them is enough.")
    if not 0 < len(idempotency_key) <= MAX_KEY:
        raise exc.BadInput(f"The idempotency_key must have 1 to {MAX_KEY} characters.")
    return id_of_key(service, idempotency_key)


def _id_of(session: Session | str | None) -> str | None:
    return session.id if isinstance(session, Session) else session
