"""Services that report by messages: TASK_STREAM and COMPLETED_TASK, as the original's services send them.

They take a task out of a message and never claim it. So the task is claimed on their behalf when its message is
published, and what they send is written as that claim's reports: fenced, in order, one ending. Events are known by their
index, so that a message delivered twice is written once.
"""

from __future__ import annotations

import json
import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Final

import anyio

from ..abc import Store
from ..exceptions import BadInput, Conflict, NotFound
from ..protocol.lifecycle import TaskStatus
from ..protocol.messages import ErrorRecord, TaskResult, TaskStream
from ..protocol.records import EventRecord, HeldTask, Report, TaskFilter, TaskRecord, Terminal
from .effects import MESSAGES_INSTANCE, Effects, messages_claim

logger = logging.getLogger(__name__)

PAGE: Final = 500
"""Tasks looked at in one read."""
MAX_TASKS: Final = 10_000
MAX_EARLY: Final = 1_000
LAST_SEQ: Final = 1 << 53
"""The seq of an ending: behind that of every event, which is its index + 1."""


@dataclass(slots=True)
class _Progress:
    """`early`: events that came before one with a lower index. `lock`: messages of a task are written one by one."""

    epoch: int
    next_index: int
    early: dict[int, TaskStream] = field(default_factory=dict)
    lock: anyio.Lock = field(default_factory=anyio.Lock)


async def take_from_messages(store: Store, effects: Effects, service_name: str, now: float) -> None:
    """Whoever registers claims its tasks. Those claimed for messages before would wait for reports that nobody sends."""
    open_ones = TaskFilter((TaskStatus.RUNNING, TaskStatus.WAITING), service_name=service_name, limit=PAGE)
    while records := await store.list_tasks(open_ones):
        held = [HeldTask(each.task_id, each.epoch) for each in records if each.owner == MESSAGES_INSTANCE]
        with anyio.CancelScope(shield=True):
            effects.lost(await store.reclaim(MESSAGES_INSTANCE, held, now))
        open_ones = replace(open_ones, before=records[-1].task_id)


class MessageReports:
    """Writes what messages report. It remembers the last `MAX_TASKS` tasks; the rest is found again in the store.

    One control plane at a time takes messages (see `Peers`). Where a turn changes, another one has written what this one
    does not know, or writes the same once more: each event is a report of its own, whose seq follows from its index.
    """

    def __init__(self, store: Store, effects: Effects, now: Callable[[], float]) -> None:
        self._store = store
        self._effects = effects
        self._now = now
        self._progress: OrderedDict[str, _Progress] = OrderedDict()

    async def stream(self, event: TaskStream) -> None:
        """Append an event, or keep it until those before it have come.

        Raises:
            BadInput: no index can be that large; behind it the ending would come too late.
            NotFound: no such task.
            Conflict: an instance holds the task, or will claim it; only that one may report.
        """
        if event.index >= LAST_SEQ - 1:
            raise BadInput(f"An index must be less than {LAST_SEQ - 1}.", hint="Indices count from 0.", name="index")
        progress = await self._find(event.task_id)
        if progress is None:
            return
        async with progress.lock:
            if event.index > progress.next_index:
                await self._catch_up(event.task_id, progress)
            if event.index < progress.next_index:
                return
            progress.early[event.index] = event
            await self._write_early(event.task_id, progress, gaps=len(progress.early) > MAX_EARLY)

    async def completed(self, result: TaskResult) -> None:
        """End a task; a second ending changes nothing. The errors are those of `stream`."""
        progress = await self._find(result.task_id)
        if progress is None:
            return
        async with progress.lock:
            await self._catch_up(result.task_id, progress)
            await self._write_early(result.task_id, progress, gaps=True)
            await self._end(result.task_id, progress.epoch, _terminal(result))

    async def end(self, record: TaskRecord, status: TaskStatus, message: str) -> None:
        """End a task on behalf of its service, which cannot be told: what it sends later is dropped."""
        error = ErrorRecord(type=status.value, message=message)
        await self._end(record.task_id, record.epoch, Terminal(status, result_text=message, error=error))

    async def _find(self, task_id: str) -> _Progress | None:
        """None: the task has ended, so what comes about it is late."""
        progress = self._progress.get(task_id)
        if progress is not None:
            self._progress.move_to_end(task_id)
            return progress
        record = await self._store.get_task(task_id)
        if record is None:
            raise NotFound(f"There is no task {task_id!r}.", task_id=task_id)
        if record.status.is_terminal:
            logger.info("a message about the task %s came after its end", task_id)
            return None
        # Claiming a task that waits for an instance would take it from the line, and nobody would ever end it.
        strays = record.owner != MESSAGES_INSTANCE and await self._effects.messages_only(record.service_name) is False
        claim = None if strays else await self._store.claim(messages_claim(task_id, self._now()))
        if claim is None:
            raise Conflict(
                f"The task {task_id!r} is {record.status.value} and not a task of a service that reports by messages.",
                task_id=task_id,
                status=record.status,
                owner=None if record.owner == MESSAGES_INSTANCE else record.owner,
            )
        progress = self._progress.setdefault(task_id, _Progress(claim.epoch, claim.next_index))
        while len(self._progress) > MAX_TASKS:
            self._progress.popitem(last=False)
        return progress

    async def _catch_up(self, task_id: str, progress: _Progress) -> None:
        """Another control plane may have written events of the task."""
        claim = await self._store.claim(messages_claim(task_id, self._now()))
        if claim is not None and claim.next_index > progress.next_index:
            progress.epoch, progress.next_index = claim.epoch, claim.next_index
            progress.early = {index: each for index, each in progress.early.items() if index >= claim.next_index}

    async def _write_early(self, task_id: str, progress: _Progress, *, gaps: bool) -> None:
        """Write the events that are next, or all there are."""
        for index in sorted(progress.early):
            if index != progress.next_index and not gaps:
                break
            report = Report(
                task_id, progress.epoch, seq=index + 1, now=self._now(), events=(_event(progress.early[index]),)
            )
            answer = await self._store.report(report)
            del progress.early[index]
            progress.next_index = index + 1
            if answer.status == "ok":
                self._effects.changed(task_id, ended=False)

    async def _end(self, task_id: str, epoch: int, terminal: Terminal) -> None:
        with anyio.CancelScope(shield=True):
            answer = await self._store.report(Report(task_id, epoch, seq=LAST_SEQ, now=self._now(), terminal=terminal))
            self._effects.ended(task_id, terminal, answer)
        self._progress.pop(task_id, None)


def _event(event: TaskStream) -> EventRecord:
    return EventRecord(event.type or "Event", json.dumps(event.data, ensure_ascii=False, separators=(",", ":")))


def _terminal(result: TaskResult) -> Terminal:
    """The original says nothing but a text, also for a failure; ours say the status, the value and the error."""
    try:
        status = TaskStatus(result.status)
    except ValueError:
        status = TaskStatus.COMPLETED
    if not status.is_terminal:
        status = TaskStatus.COMPLETED
    if status is not TaskStatus.COMPLETED:
        error = result.error or ErrorRecord(type=status.value, message=result.result)
        return Terminal(status, result_text=result.result, error=error)
    value = result.value if "value" in result.model_fields_set else result.result
    return Terminal(status, result=json.dumps(value, ensure_ascii=False), result_text=result.result)
