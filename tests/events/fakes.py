"""A log in memory with hooks exactly where readers can be interleaved."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import anyio
from anyio.lowlevel import checkpoint

from llama_corral.events import Changes
from llama_corral.exceptions import CorralError
from llama_corral.protocol.lifecycle import TaskStatus
from llama_corral.protocol.records import EventPage, StoredEvent, TaskRecord


class FakeLog:
    """`read_events` and `get_task` of a store with one task.

    `after_read` runs once, when the next read has seen its snapshot and has not yet returned it: between a reader's
    read and its wait.
    """

    def __init__(self, changes: Changes, task_id: str = "t") -> None:
        self.changes = changes
        self.task_id = task_id
        self.events: list[StoredEvent] = []
        self.record: TaskRecord | None = TaskRecord(
            task_id=task_id,
            session_id="s",
            implicit_session=True,
            service_name="w",
            status=TaskStatus.RUNNING,
            input="{}",
            epoch=1,
            attempts=0,
            owner="i",
            cancel_requested=False,
            created_at=0.0,
        )
        self.reads = 0
        self.limits: list[int] = []
        self.largest_page = 0
        self.after_read: Callable[[], None] | None = None
        self.hang: anyio.Event | None = None
        self.fail: CorralError | None = None

    def append(self, *values: Any, notify: bool = True) -> None:
        for value in values:
            payload = value if isinstance(value, str) else json.dumps({"n": value})
            self.events.append(StoredEvent(len(self.events), 1, "Progress", payload))
        assert self.record is not None
        self.record = replace(self.record, event_count=len(self.events))
        if notify:
            self.changes.notify(self.task_id, ended=False)

    def turn(self, status: TaskStatus) -> None:
        """Another status that is no ending."""
        assert self.record is not None
        self.record = replace(self.record, status=status)
        self.changes.notify(self.task_id, ended=False)

    def end(self, status: TaskStatus = TaskStatus.COMPLETED, *, notify: bool = True) -> None:
        assert self.record is not None
        self.record = replace(self.record, status=status, result='{"a": 1}', result_text="a=1", owner=None)
        if notify:
            self.changes.notify(self.task_id)

    def delete(self) -> None:
        self.record = None
        self.changes.notify(self.task_id)

    async def read_events(self, task_id: str, start: int, limit: int = 1000) -> EventPage | None:
        await self._look()
        self.limits.append(limit)
        page = None
        if self.record is not None and task_id == self.task_id:
            page = EventPage(self.record, tuple(self.events[start : start + limit]))
            self.largest_page = max(self.largest_page, len(page.events))
        self._interleave()
        await checkpoint()
        return page

    async def get_task(self, task_id: str) -> TaskRecord | None:
        await self._look()
        record = self.record if task_id == self.task_id else None
        self._interleave()
        await checkpoint()
        return record

    async def _look(self) -> None:
        await checkpoint()
        self.reads += 1
        if self.hang is not None:
            await self.hang.wait()
        if self.fail is not None:
            raise self.fail

    def _interleave(self) -> None:
        hook, self.after_read = self.after_read, None
        if hook is not None:
            hook()
