"""`SqlStore`: the methods of `abc.Store`, each a unit for the writer or a query for the reader."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import anyio
import anyio.to_thread

from ..abc import Store
from ..exceptions import BadInput, StoreError
from ..protocol.records import (
    Accepted,
    Checkpoint,
    Claim,
    ClaimRequest,
    DeadLetter,
    DeletedSession,
    EventPage,
    HeartbeatAnswer,
    HeldTask,
    InboxPage,
    InstanceRecord,
    NewTask,
    Reaped,
    Report,
    ReportAnswer,
    SendAnswer,
    ServiceRecord,
    SessionRecord,
    TaskFilter,
    TaskRecord,
    Ticket,
)
from ..protocol.sealing import Sealer
from . import accept_units, outside_units, queries, recovery_units, report_units, session_units, upkeep_units
from .inline import Inline
from .reader import Reader
from .transaction import NAMELESS, Connection, Durability, Names
from .urls import database_of
from .work import T, Unit, closed
from .writer import Writer

_ALONE = Names(alone=True)


# The mixin's __aexit__ names its three arguments, the one of abc takes any: called by `async with`, they are the same.
class SqlStore(anyio.AsyncContextManagerMixin, Store):  # type: ignore[misc]
    """The truth in a database. `async with store:` owns the writer's task and the reader's thread. Leaving it commits
    the units that wait for the writer; callers who are not that far yet, and all later ones, get `StoreUnavailable`.

    Args:
        url: `sqlite:///relative.db`, `sqlite:////absolute.db`, or `sqlite://` for a store in memory. The latter runs
            inline, without threads, so tests can use an autojump clock with it. `postgresql://user:password@host/database`
            for a store that several control planes use, with the options of libpq behind a `?`; it needs the extra
            `postgres`.
        sealer: Seals contexts and checkpoints, and refuses what was changed: a claim then comes without it and says so in
            `state_error`. None: no secret is set, and what is stored is trusted.
        durable: "normal": what was answered survives the end of the process by SIGKILL. "full": also a loss of power. With
            PostgreSQL, "normal" is what its `synchronous_commit` says.
        batch_size: The most units that are committed together; None is what fits the database.
        backlog: The most units that wait for the writer; callers beyond that wait to get in.
        flush_timeout: Seconds that leaving the block spends at most on units that wait.

    Raises:
        StoreError: the URL names no store that can be used. Nothing is opened before the block is entered.
    """

    def __init__(
        self,
        url: str,
        sealer: Sealer | None = None,
        *,
        durable: Durability = "normal",
        batch_size: int | None = None,
        backlog: int = 1024,
        flush_timeout: float = 10.0,
    ) -> None:
        if durable not in ("normal", "full"):
            raise StoreError(f"A store is durable 'normal' or 'full', not {durable!r}.")
        self._database = database_of(url, durable, sealer)
        self.exclusive = self._database.exclusive
        self._batch_size = batch_size or self._database.batch_size
        self._backlog = backlog
        self._flush_timeout = flush_timeout
        self._writer: Writer | Inline | None = None
        self._reader: Reader | Inline | None = None

    @asynccontextmanager
    async def __asynccontextmanager__(self) -> AsyncIterator[SqlStore]:
        serving = self._serving_inline if self._database.inline else self._serving_in_threads
        failure: Exception | None = None
        async with serving():
            try:
                yield self
            except Exception as error:
                # Raised again below: through the task group of the writer it would come out as an exception group.
                failure = error
        if failure is not None:
            raise failure

    @asynccontextmanager
    async def _serving_inline(self) -> AsyncIterator[None]:
        connection = self._database.connect()
        inline = self._writer = self._reader = Inline(connection)
        try:
            yield
        finally:
            inline.close()
            connection.close()

    @asynccontextmanager
    async def _serving_in_threads(self) -> AsyncIterator[None]:
        """The closing order, from the inside: the writer commits what waits, the reader answers, the file is closed."""
        limiter = anyio.CapacityLimiter(1)
        async with AsyncExitStack() as stack:
            with anyio.CancelScope(shield=True):  # opening is short, and what it took must be given back
                await anyio.to_thread.run_sync(self._database.open, limiter=limiter)
                stack.push_async_callback(_shielded, self._database.close, limiter)
                connections = await anyio.to_thread.run_sync(self._connect_both, limiter=limiter)
            for connection in connections:
                stack.push_async_callback(_shielded, connection.close, limiter)
            writer = self._writer = Writer(connections[0], batch_size=self._batch_size, backlog=self._backlog)
            reader = self._reader = Reader(connections[1])
            await stack.enter_async_context(reader.serving())
            stack.callback(connections[1].hurry, self._flush_timeout)
            await stack.enter_async_context(self._writing(writer, connections[0]))
            yield

    @asynccontextmanager
    async def _writing(self, writer: Writer, connection: Connection) -> AsyncIterator[None]:
        # Shielded: whoever is cancelled within the block may still have an ending to store. Ended by `close`.
        scope = anyio.CancelScope(shield=True)

        async def write() -> None:
            with scope:
                await writer.run()

        async with anyio.create_task_group() as task_group:
            task_group.start_soon(write, name="store writer")
            try:
                yield
            finally:
                writer.close()
                scope.deadline = anyio.current_time() + self._flush_timeout
                connection.hurry(self._flush_timeout)

    def _connect_both(self) -> tuple[Connection, Connection]:
        writing = self._database.connect()
        try:
            return writing, self._database.connect()
        except BaseException:
            writing.close()
            raise

    async def _write(self, unit: Unit[T], *arguments: Any, names: Names = NAMELESS) -> T:
        if self._writer is None:
            raise closed()
        return await self._writer.submit(unit, *arguments, names=names)

    async def _read(self, query: Unit[T], *arguments: Any) -> T:
        if self._reader is None:
            raise closed()
        return await self._reader.submit(query, *arguments)

    def statistics(self) -> Mapping[str, Any]:
        numbers: dict[str, Any] = {}
        for part in (self._reader, self._writer):
            if part is not None:
                numbers.update(part.statistics())
        return numbers

    # Services and instances

    async def put_service(self, service: ServiceRecord, instance: InstanceRecord | None = None) -> None:
        await self._write(session_units.put_service, service, instance, names=Names(service.service_name))

    async def delete_service(self, service_name: str) -> bool:
        return await self._write(session_units.delete_service, service_name)

    async def delete_instance(self, instance_id: str) -> None:
        await self._write(session_units.delete_instance, instance_id, names=Names(instance_id))

    async def get_service(self, service_name: str) -> ServiceRecord | None:
        return await self._read(queries.get_service, service_name)

    async def list_services(self) -> list[ServiceRecord]:
        return await self._read(queries.list_services)

    async def list_instances(self) -> list[InstanceRecord]:
        return await self._read(queries.list_instances)

    async def list_strangers(self) -> list[str]:
        return await self._read(queries.list_strangers)

    async def heartbeat(self, instance_id: str, held: Sequence[HeldTask]) -> HeartbeatAnswer:
        return await self._write(recovery_units.heartbeat, instance_id, tuple(held), names=Names(instance_id))

    # Sessions

    async def create_session(self, session: SessionRecord) -> bool:
        return await self._write(session_units.create_session, session, names=Names(session.session_id))

    async def get_session(self, session_id: str) -> SessionRecord | None:
        return await self._read(queries.get_session, session_id)

    async def list_sessions(self, *, after: str | None = None, limit: int = 100) -> list[SessionRecord]:
        return await self._read(queries.list_sessions, after or "", max(limit, 0))

    async def merge_state(self, session_id: str, changes: Mapping[str, Any]) -> SessionRecord | None:
        try:
            encoded = json.dumps(dict(changes), ensure_ascii=False, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise BadInput(f"The changes of a session's state must be JSON: {error}") from error
        return await self._write(session_units.merge_state, session_id, encoded, names=Names(sessions=(session_id,)))

    async def delete_session(self, session_id: str) -> DeletedSession | None:
        return await self._write(
            session_units.delete_session, session_id, names=Names(sessions=(session_id,), alone=True)
        )

    # The life of a task

    async def accept(self, task: NewTask, claim: ClaimRequest | None = None) -> Accepted:
        # In a session, tasks that come together stay in their order; so do those whose ids nobody else can have.
        names = NAMELESS if task.digest is None else Names(task.task_id)
        if task.session_id is not None:
            names = Names(sessions=(task.session_id,))
        return await self._write(accept_units.accept, task, claim, names=names)

    async def claim(self, request: ClaimRequest) -> Claim | None:
        return await self._write(accept_units.claim, request, names=Names(request.task_id))

    async def report(self, report: Report) -> ReportAnswer:
        # Only an ending frees the next one in its line.
        names = Names(report.task_id) if report.terminal is None else _task(report.task_id)
        return await self._write(report_units.report, report, names=names)

    async def release(
        self,
        task_id: str,
        epoch: int,
        checkpoint: Checkpoint | None,
        now: float,
        *,
        idle: bool = False,
        wake_at: float | None = None,
    ) -> ReportAnswer:
        return await self._write(
            report_units.release, task_id, epoch, checkpoint, now, idle, wake_at, names=_task(task_id)
        )

    async def request_cancel(self, task_id: str, now: float) -> SendAnswer:
        return await self._write(outside_units.request_cancel, task_id, now, names=_task(task_id))

    async def expire(self, now: float, *, limit: int = 500) -> list[SendAnswer]:
        return await self._write(outside_units.expire, now, max(limit, 0), names=_ALONE)

    async def send(self, task_id: str, payload: str, now: float) -> SendAnswer:
        return await self._write(outside_units.send, task_id, payload, now, names=_task(task_id))

    async def pull(self, task_id: str, epoch: int, after: int) -> InboxPage:
        return await self._read(queries.pull, task_id, epoch, after)

    async def reap(self, dead_instances: Sequence[str], now: float) -> Reaped:
        return await self._write(recovery_units.reap, tuple(dead_instances), now, names=_ALONE)

    async def due_tickets(
        self,
        *,
        limit: int = 1000,
        now: float | None = None,
        since: float | None = None,
        service_name: str | None = None,
    ) -> list[Ticket]:
        return await self._read(queries.due_tickets, now, since, service_name, max(limit, 0))

    # Replay, timers, upkeep

    async def retry(self, task_id: str, now: float, *, fresh: bool = False) -> Accepted:
        return await self._write(recovery_units.retry, task_id, now, fresh, names=_task(task_id))

    async def wake(self, now: float, *, limit: int = 500) -> list[Ticket]:
        return await self._write(outside_units.wake, now, max(limit, 0), names=_ALONE)

    async def next_due(self, now: float) -> float | None:
        return await self._read(queries.next_due, now)

    async def reclaim(self, instance_id: str, strays: Sequence[HeldTask], now: float) -> Reaped:
        return await self._write(recovery_units.reclaim, instance_id, tuple(strays), now, names=_ALONE)

    async def purge(self, before: float, *, limit: int = 500) -> int:
        return await self._write(upkeep_units.purge, before, max(limit, 0), names=_ALONE)

    async def count_queued(self, service_name: str) -> int:
        return await self._read(queries.count_queued, service_name)

    async def put_dead_letter(self, letter: DeadLetter) -> None:
        await self._write(upkeep_units.put_dead_letter, letter)

    async def list_dead_letters(self, *, before: int | None = None, limit: int = 100) -> list[DeadLetter]:
        return await self._read(queries.list_dead_letters, queries.NEWEST if before is None else before, max(limit, 0))

    # Reading

    async def get_task(self, task_id: str) -> TaskRecord | None:
        return await self._read(queries.get_task, task_id)

    async def list_tasks(self, which: TaskFilter) -> list[TaskRecord]:
        return await self._read(queries.list_tasks, which, max(which.limit, 0))

    async def read_events(self, task_id: str, start: int, limit: int = 1000) -> EventPage | None:
        return await self._read(queries.read_events, task_id, start, max(limit, 0))

    async def count_tasks(self) -> Mapping[str, Mapping[str, int]]:
        return await self._read(queries.count_tasks)

    async def oldest_queued(self, now: float) -> Mapping[str, float]:
        return await self._read(queries.oldest_queued, now)


def _task(task_id: str) -> Names:
    """What a unit names that may change the line of the task's session, which only the database knows."""
    return Names(task_id, sessions_of=(task_id,))


def open_store(url: str, **options: Any) -> Store:
    """The store that a URL names, to be entered with `async with`. The options are those of `SqlStore`.

    Raises:
        StoreError: the URL names no store that can be used.
    """
    return SqlStore(url, **options)


async def _shielded(close: Callable[[], None], limiter: anyio.CapacityLimiter) -> None:
    with anyio.CancelScope(shield=True):  # bounded: closing a file
        await anyio.to_thread.run_sync(close, limiter=limiter)
