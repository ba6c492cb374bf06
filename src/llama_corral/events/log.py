"""Reading a task's event log from any index until its terminal record, and waiting for that record.

The store and the wake-ups of `Changes` are all there is: a reader keeps a cursor and at most one page, so that a slow
one costs a page of memory and loses nothing. No task runs on a reader's behalf between two of its calls.
"""

from __future__ import annotations

import math
from types import TracebackType
from typing import Final, Protocol, Self

import anyio
from anyio.lowlevel import checkpoint

from ..exceptions import NotFound
from ..protocol.lifecycle import TaskStatus
from ..protocol.records import EventPage, TaskRecord
from .changes import Changes, Watch

PAGE_EVENTS: Final = 500
PAGE_BYTES: Final = 1_000_000
FIRST_PAGE_EVENTS: Final = 100
BACKSTOP: Final = 30.0
_GONE: Final = "It may have been deleted, or it ended too long ago to be kept."


class ReadableLog(Protocol):
    """What readers need of a `Store`."""

    async def read_events(self, task_id: str, start: int, limit: int = 1000) -> EventPage | None: ...

    async def get_task(self, task_id: str) -> TaskRecord | None: ...


class LogReader:
    """An async iterator of `EventPage`: each has events, except that the last may be the terminal record alone.

    With `statuses` one comes also where the task has another status: `status` is the one behind all events so far.

    `ended` is True once the page with the terminal record was read, `drained` if the iteration ends before that because
    the process is stopping; `cursor` is the index at which another reader would go on.

    Resource handling: the reader holds a wake-up handle from its first call on. It lets go of it at the end of the
    iteration, when a call raises or is cancelled, in `close`, and when it is collected; whoever may stop in between
    uses it as a `with` block. After a cancelled call the iteration goes on where it was.

    Error handling: `NotFound` if the task does not exist or was deleted meanwhile; what the store raises.
    """

    def __init__(
        self,
        store: ReadableLog,
        changes: Changes,
        task_id: str,
        start: int = 0,
        *,
        drain: anyio.Event | None = None,
        statuses: bool = False,
        page_events: int = PAGE_EVENTS,
        page_bytes: int = PAGE_BYTES,
        backstop: float | None = BACKSTOP,
    ) -> None:
        self.task_id = task_id
        self.cursor = start
        self.ended = False
        self.drained = False
        self.status: TaskStatus | None = None
        self._statuses = statuses
        self._store = store
        self._changes = changes
        self._drain = drain
        self._page_events = page_events
        self._page_bytes = page_bytes
        self._limit = min(FIRST_PAGE_EVENTS, page_events)
        self._backstop = backstop
        self._watch: Watch | None = None
        self._must_read = True
        self._kept: EventPage | None = None

    async def open(self) -> EventPage:
        """Read once without waiting, so that a missing task is known before an answer is begun. What the page holds
        comes again as the first of the iteration."""
        try:
            if self._kept is not None:
                await checkpoint()
                return self._kept
            self._hold()
            page = self._kept = await self._read()
        except BaseException:
            self.close()
            raise
        return page

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> EventPage:
        try:
            if self._kept is None:
                page = await self._next()
            else:
                await checkpoint()
                page = self._take_kept() or await self._next()
        except BaseException:
            self.close()
            raise
        if self.ended or self.drained:
            self.close()
        return page

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the wake-up handle. The next call, if there is one, takes a new one and reads first."""
        if self._watch is not None:
            self._watch.__exit__(None, None, None)
            self._watch = None

    def __del__(self) -> None:
        self.close()

    def _hold(self) -> Watch:
        if self._watch is None:
            self._watch = self._changes.watch(self.task_id).__enter__()
            self._must_read = True
        return self._watch

    def _take_kept(self) -> EventPage | None:
        page, self._kept = self._kept, None
        return page if page is not None and self._is_news(page) else None

    def _is_news(self, page: EventPage) -> bool:
        before = self.status
        if self._statuses and not self._must_read:
            self.status = page.record.status
        return bool(page.events) or self.ended or self.status is not before

    async def _next(self) -> EventPage:
        while not (self.ended or self.drained):
            watch = self._hold()
            if not self._must_read:
                with anyio.move_on_after(self._backstop):
                    await _wait_news(watch, self._drain)
                self._must_read = True
            page = await self._read()
            if self._is_news(page):
                return page
        raise StopAsyncIteration

    async def _read(self) -> EventPage:
        # Asked before the read: what was stored when the drain began is still delivered.
        draining = _is_draining(self._changes, self._drain)
        page = await self._store.read_events(self.task_id, self.cursor, self._limit)
        if page is None:
            raise NotFound(f"No task {self.task_id!r}", hint=_GONE, task_id=self.task_id)
        if page.events:
            self.cursor = page.events[-1].index + 1
            self._fit_limit(page)
        self._must_read = self.cursor < page.record.event_count
        if not self._must_read:
            self.ended = page.record.status.is_terminal
            self.drained = draining and not self.ended
        return page

    def _fit_limit(self, page: EventPage) -> None:
        """Large events, small pages: a page is to stay near `page_bytes`."""
        size = sum(len(event.payload) for event in page.events)
        self._limit = max(1, min(self._page_events, self._page_bytes * len(page.events) // max(1, size)))


def read_log(
    store: ReadableLog,
    changes: Changes,
    task_id: str,
    start: int = 0,
    *,
    drain: anyio.Event | None = None,
    statuses: bool = False,
    backstop: float | None = BACKSTOP,
) -> LogReader:
    """Iterate over a task's log from index `start` until its terminal record; an index beyond the end waits for it.

    `changes.drain()` ends the iteration cleanly after what is stored; so does the event `drain`, where somebody else
    stops, at the price of a task group for each wait. `backstop` reads again when no news came for so long: wake-ups
    from other processes are hints. With `statuses` a page comes also for the status at the first read and for each change
    of it that a read finds; one that lasts shorter may not be seen.

        with read_log(store, changes, task_id) as log:
            async for page in log:
                ...page.events...
        # now page.record is terminal, or log.drained
    """
    return LogReader(store, changes, task_id, start, drain=drain, statuses=statuses, backstop=backstop)


async def wait_terminal(
    store: ReadableLog,
    changes: Changes,
    task_id: str,
    timeout: float | None,
    *,
    drain: anyio.Event | None = None,
    backstop: float | None = BACKSTOP,
) -> TaskRecord | None:
    """The terminal record of a task; None if it does not come within `timeout` seconds (None: no limit) or the process
    drains first. The store is read at least once, and once more when the time is over.

    Raises:
        NotFound: there is no such task, or it was deleted meanwhile.
    """
    deadline = math.inf if timeout is None else anyio.current_time() + timeout
    with changes.watch(task_id, endings_only=True) as watch:
        while True:
            over = anyio.current_time() >= deadline or _is_draining(changes, drain)
            record = await store.get_task(task_id)
            if record is None:
                raise NotFound(f"No task {task_id!r}", hint=_GONE, task_id=task_id)
            if record.status.is_terminal:
                return record
            if over:
                return None
            patience = math.inf if backstop is None else anyio.current_time() + backstop
            with anyio.CancelScope(deadline=min(deadline, patience)):
                await _wait_news(watch, drain)


def _is_draining(changes: Changes, drain: anyio.Event | None) -> bool:
    return changes.draining or (drain is not None and drain.is_set())


async def _wait_news(watch: Watch, drain: anyio.Event | None) -> None:
    """Return when there is news or the process drains. The caller reads again in both cases."""
    if drain is None or watch.has_news:
        await watch.wait()
    elif drain.is_set():
        await drain.wait()
    else:
        await _wait_either(watch, drain)


async def _wait_either(watch: Watch, drain: anyio.Event) -> None:
    async with anyio.create_task_group() as both:
        both.start_soon(_cancel_at, drain, both.cancel_scope, name="end a reader at drain")
        await watch.wait()
        both.cancel_scope.cancel()


async def _cancel_at(event: anyio.Event, scope: anyio.CancelScope) -> None:
    await event.wait()
    scope.cancel()
