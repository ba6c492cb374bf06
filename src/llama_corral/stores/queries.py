"""What only reads: functions for the reader, each within one transaction that sees one state of the database."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Final

from ..exceptions import NotFound
from ..protocol.lifecycle import TaskStatus
from ..protocol.records import (
    DeadLetter,
    EventPage,
    InboxPage,
    InstanceRecord,
    ServiceRecord,
    SessionRecord,
    StoredEvent,
    TaskFilter,
    TaskRecord,
    Ticket,
)
from .rows import TaskState, inbox_events, session_record, task_record
from .transaction import Transaction

NEWEST: Final = sys.maxsize
"""Above every number of a task or a dead letter: where the first page of a list starts."""


def get_service(tx: Transaction, service_name: str) -> ServiceRecord | None:
    row = tx.one(tx.sql.get_service, {"service_name": service_name})
    return None if row is None else ServiceRecord(*row)


def list_services(tx: Transaction) -> list[ServiceRecord]:
    return [ServiceRecord(*row) for row in tx.all(tx.sql.list_services, {})]


def list_instances(tx: Transaction) -> list[InstanceRecord]:
    return [
        InstanceRecord(instance_id, service_name, capacity, started_at, heartbeat, bool(embedded))
        for instance_id, service_name, capacity, started_at, heartbeat, embedded in tx.all(tx.sql.list_instances, {})
    ]


def list_strangers(tx: Transaction) -> list[str]:
    return [owner for (owner,) in tx.all(tx.sql.list_strangers, {})]


def get_session(tx: Transaction, session_id: str) -> SessionRecord | None:
    row = tx.one(tx.sql.get_session, {"session_id": session_id})
    return None if row is None else session_record(tx, row)


def list_sessions(tx: Transaction, after: str, limit: int) -> list[SessionRecord]:
    return [session_record(tx, row) for row in tx.all(tx.sql.list_sessions, {"after": after, "limit": limit})]


def get_task(tx: Transaction, task_id: str) -> TaskRecord | None:
    row = tx.one(tx.sql.get_task, {"task_id": task_id})
    return None if row is None else task_record(row)


def read_events(tx: Transaction, task_id: str, start: int, limit: int) -> EventPage | None:
    row = tx.one(tx.sql.get_task, {"task_id": task_id})
    if row is None:
        return None
    record = task_record(row)
    if start >= record.event_count:
        return EventPage(record)
    rows = tx.all(tx.sql.read_events, {"task_no": row[-1], "start": start, "limit": limit})
    return EventPage(record, tuple(StoredEvent(*event) for event in rows))


def pull(tx: Transaction, task_id: str, epoch: int, after: int) -> InboxPage:
    row = tx.one(tx.sql.get_state, {"task_id": task_id})
    if row is None:
        return InboxPage("deleted")
    state = TaskState._make(row)
    if state.epoch != epoch or not state.is_held_by_instance:
        return InboxPage("fenced")
    events = inbox_events(tx, state.no, after) if state.inbox_head > after else ()
    return InboxPage("ok", events, state.inbox_head, bool(state.cancel_requested))


def due_tickets(
    tx: Transaction, now: float | None, since: float | None, service_name: str | None, limit: int
) -> list[Ticket]:
    if now is None:
        rows = tx.all(tx.sql.queued_tickets, {"limit": limit})
    elif since is not None:
        rows = tx.all(tx.sql.due_since, {"limit": limit, "now": now, "since": since})
    elif service_name is not None:
        rows = tx.all(tx.sql.due_of_service, {"limit": limit, "now": now, "service_name": service_name})
    else:
        rows = tx.all(tx.sql.due_tickets, {"limit": limit, "now": now})
    return [Ticket(*row) for row in rows]


def next_due(tx: Transaction, now: float) -> float | None:
    questions = (*tx.sql.next_deadline.values(), tx.sql.next_wake, tx.sql.next_start)
    answers = (row[0] for text in questions for row in tx.all(text, {"now": now}))
    return min((float(due) for due in answers if due is not None), default=None)


def count_queued(tx: Transaction, service_name: str) -> int:
    row = tx.one(tx.sql.count_queued, {"service_name": service_name})
    assert row is not None
    return int(row[0])


def list_dead_letters(tx: Transaction, before: int, limit: int) -> list[DeadLetter]:
    return [DeadLetter(*row) for row in tx.all(tx.sql.list_dead_letters, {"before": before, "limit": limit})]


def count_tasks(tx: Transaction) -> Mapping[str, Mapping[str, int]]:
    counts: dict[str, dict[str, int]] = {}
    for service_name, status, number in tx.all(tx.sql.count_open, {}):
        counts.setdefault(service_name, {})[status] = number
    return counts


def oldest_queued(tx: Transaction, now: float) -> Mapping[str, float]:
    """One step into an index for each service, and one for each task before the first that may start."""
    found: dict[str, float] = {}
    for service_name, numbers in count_tasks(tx).items():
        if numbers.get(TaskStatus.QUEUED):
            row = tx.one(tx.sql.oldest_queued, {"service_name": service_name, "now": now})
            if row is not None:
                found[service_name] = max(float(row[0]), float(row[1] or 0.0))
    return found


def list_tasks(tx: Transaction, which: TaskFilter, limit: int) -> list[TaskRecord] | NotFound:
    before = NEWEST
    if which.before is not None:
        row = tx.one(tx.sql.task_number, {"task_id": which.before})
        if row is None:
            return NotFound(
                f"There is no task {which.before!r} to go on from.",
                hint="Start again at the first page.",
                task_id=which.before,
            )
        before = row[0]
    if which.session_id is not None:
        implicit = get_task(tx, which.session_id)  # its session has the id of the task
        if implicit is not None and implicit.implicit_session:
            return [implicit] if which.before is None and limit > 0 and _fits(implicit, which) else []
    numbers = _newest_numbers(tx, which, before, limit)
    rows = (tx.one(tx.sql.get_task_by_no, {"task_no": number}) for number in numbers)
    return [task_record(row) for row in rows if row is not None]


def _fits(record: TaskRecord, which: TaskFilter) -> bool:
    return (not which.status or record.status in which.status) and which.service_name in (None, record.service_name)


def _newest_numbers(tx: Transaction, which: TaskFilter, before: int, limit: int) -> list[int]:
    """The numbers of a page, newest first.

    Several statuses are asked for one by one, each a walk of `limit` entries along an index; as one condition they
    would be a walk over the whole table. A service without a status is all statuses, which spares an index.
    """
    statuses: tuple[TaskStatus | None, ...] = tuple(dict.fromkeys(which.status)) or (None,)
    if which.service_name is not None and which.session_id is None and not which.status:
        statuses = tuple(TaskStatus)
    values = {
        "before": before,
        "limit": limit,
        "service_name": which.service_name,
        "session_id": which.session_id,
    }
    numbers: list[int] = []
    for status in statuses:
        chosen = (status is not None, which.service_name is not None, which.session_id is not None)
        numbers += [no for (no,) in tx.all(tx.sql.newest[chosen], {**values, "status": status})]
    return sorted(numbers, reverse=True)[:limit]
