"""What happens to a task from outside: cancel, deadline, event, timer. The rules of `accept_units` hold here too."""

from __future__ import annotations

from ..exceptions import UsageError
from ..protocol.lifecycle import TaskStatus
from ..protocol.records import SendAnswer, Ticket
from .endings import CANCELLED_ERROR, TIMED_OUT_ERROR, end_unowned, has_ended, no_such_task
from .rows import TaskState, lock_state
from .transaction import Transaction


def request_cancel(tx: Transaction, task_id: str, now: float) -> SendAnswer | UsageError:
    state = lock_state(tx, task_id)
    if state is None:
        return no_such_task(task_id)
    if state.is_ended:
        return has_ended(state)
    if state.is_held_by_instance:
        tx.run(tx.sql.flag_cancel, {"task_no": state.no})
        return SendAnswer(task_id, state.session_id, TaskStatus(state.status), owner=state.owner)
    return end_unowned(tx, state, TaskStatus.CANCELLED, CANCELLED_ERROR, now)


def expire(tx: Transaction, now: float, limit: int) -> list[SendAnswer]:
    ended: list[SendAnswer] = []
    for overdue in tx.sql.overdue.values():
        states = map(TaskState._make, tx.take(overdue, {"now": now}, limit - len(ended)))
        ended += [end_unowned(tx, state, TaskStatus.TIMED_OUT, TIMED_OUT_ERROR, now) for state in states]
    return ended


def send(tx: Transaction, task_id: str, payload: str, now: float) -> SendAnswer | UsageError:
    state = lock_state(tx, task_id)
    if state is None:
        return no_such_task(task_id)
    if state.is_ended:
        return has_ended(state)
    row = tx.one(tx.sql.bump_inbox, {"task_no": state.no})
    if row is None:
        return no_such_task(task_id)
    seq = row[0]
    tx.run(tx.sql.insert_inbox, {"task_no": state.no, "seq": seq, "payload": payload, "sent_at": now})
    status = TaskStatus(state.status)
    tickets: tuple[Ticket, ...] = ()
    if status is TaskStatus.WAITING and state.owner is None and tx.run(tx.sql.requeue_unowned, {"task_no": state.no}):
        status, tickets = TaskStatus.QUEUED, (state.ticket(),)
    owner = state.owner if state.is_held_by_instance else None
    return SendAnswer(task_id, state.session_id, status, owner=owner, tickets=tickets, seq=seq)


def wake(tx: Transaction, now: float, limit: int) -> list[Ticket]:
    tickets: list[Ticket] = []
    for row in tx.take(tx.sql.waking, {"now": now}, limit):
        state = TaskState._make(row)
        if tx.run(tx.sql.requeue_unowned, {"task_no": state.no}):
            tickets.append(state.ticket())
    return tickets
