"""What is done about lost workers, and about tasks that ended in vain. The rules of `accept_units` hold here too."""

from __future__ import annotations

import dataclasses
import itertools
import uuid
from collections.abc import Sequence
from typing import Final

from ..exceptions import Conflict, NotFound, UsageError
from ..protocol.lifecycle import TaskStatus
from ..protocol.messages import ErrorRecord
from ..protocol.records import Accepted, Checkpoint, HeartbeatAnswer, HeldTask, NewTask, Reaped, SendAnswer, Ticket
from .accept_units import accept, accepted_before
from .endings import CANCELLED_ERROR, end_unowned, no_such_task
from .rows import TaskState, lock_state, put_checkpoint, retry_policy, stored_checkpoint
from .transaction import Transaction

RETRIED: Final = uuid.UUID("6c6c616d-612d-5272-8574-72792d746173")
"""The namespace of the ids of repeated tasks."""


def reap(tx: Transaction, dead_instances: Sequence[str], now: float) -> Reaped:
    taken: list[Ticket | SendAnswer] = []
    for instance_id in dead_instances:
        tx.run(tx.sql.delete_instance, {"instance_id": instance_id})
        for row in tx.take(tx.sql.owned_by, {"instance_id": instance_id}):
            taken += _take_away(tx, TaskState._make(row), now)
    return _reaped(taken)


def reclaim(tx: Transaction, instance_id: str, strays: Sequence[HeldTask], now: float) -> Reaped:
    taken: list[Ticket | SendAnswer] = []
    tx.hold_lines(of_tasks=[stray.task_id for stray in strays])
    for stray in strays:
        state = lock_state(tx, stray.task_id)
        if state is None or state.owner != instance_id or state.epoch != stray.epoch or state.is_ended:
            continue
        taken += _take_away(tx, state, now)
    return _reaped(taken)


def _take_away(tx: Transaction, state: TaskState, now: float) -> Sequence[Ticket | SendAnswer]:
    """Queue a task again that its owner has lost, or end it where that makes no sense any more."""
    tx.run(tx.sql.orphan, {"task_no": state.no, "instance_id": state.owner})
    if state.cancel_requested:
        return (end_unowned(tx, state, TaskStatus.CANCELLED, CANCELLED_ERROR, now),)
    if state.attempts + 1 >= state.max_attempts:
        message = f"The worker was lost {state.attempts + 1} times in a row."
        if state.retry is not None:
            message = f"The worker was lost, and {state.attempts + 1} attempts in a row have failed."
        error = ErrorRecord(type="worker_lost", message=message, retryable=True)
        return (end_unowned(tx, state, TaskStatus.FAILED, error, now),)
    return (state.ticket(),) if tx.run(tx.sql.requeue_unowned, {"task_no": state.no}) else ()


def _reaped(taken: Sequence[Ticket | SendAnswer]) -> Reaped:
    ended = tuple(each for each in taken if isinstance(each, SendAnswer))
    queued = (each.tickets if isinstance(each, SendAnswer) else (each,) for each in taken)
    return Reaped(tuple(itertools.chain.from_iterable(queued)), ended)


def heartbeat(tx: Transaction, instance_id: str, held: Sequence[HeldTask]) -> HeartbeatAnswer:
    """One look at all that the instance owns, however much it holds: what it names besides is not its own any more."""
    known = tx.run(tx.sql.count_heartbeat, {"instance_id": instance_id}) == 1
    owned = {row[0]: row for row in tx.all(tx.sql.owned_briefly, {"instance_id": instance_id})}
    current: set[str] = set()
    news: list[str] = []
    for task in held:
        row = owned.get(task.task_id)
        if row is None or row[1] != task.epoch:
            continue
        current.add(task.task_id)
        _, _, cancel_requested, inbox_head = row
        if cancel_requested or inbox_head > task.inbox_read:
            news.append(task.task_id)
    fenced = dict.fromkeys(task.task_id for task in held if task.task_id not in current)
    strays = tuple(HeldTask(task_id, row[1]) for task_id, row in owned.items() if task_id not in current)
    return HeartbeatAnswer(known, tuple(fenced), tuple(news), strays)


def retry(tx: Transaction, task_id: str, now: float, fresh: bool) -> Accepted | UsageError:
    row = tx.one(tx.sql.repeatable, {"task_id": task_id})
    if row is None:
        return no_such_task(task_id)
    *values, input_ = row
    state = TaskState._make(values)
    if not state.is_ended or state.status == TaskStatus.COMPLETED:
        hint = "Wait for it to end, or cancel it." if not state.is_ended else "Start a new task for another result."
        return Conflict(
            f"The task {task_id!r} is {state.status} and cannot be repeated.",
            hint=hint,
            task_id=task_id,
            status=TaskStatus(state.status),
        )
    again = NewTask(
        task_id=str(uuid.uuid5(RETRIED, task_id)),
        service_name=state.service_name,
        input=input_,
        created_at=now,
        session_id=None if state.implicit_session else state.session_id,
        max_attempts=state.max_attempts,
        digest=f"retry of {task_id}",
        retry=retry_policy(state.retry),
        retry_of=task_id,
    )
    before = accepted_before(tx, again, None)
    if before is not None:
        return before
    checkpoint, refused = (None, None) if fresh else stored_checkpoint(tx, state.no, task_id, state.service_name)
    if refused is not None:
        return Conflict(refused, hint="Repeat the task from its start (fresh).", task_id=task_id)
    accepted = accept(tx, again, None)
    if isinstance(accepted, NotFound):
        return Conflict(accepted.message, hint=accepted.hint, **accepted.fields)
    if isinstance(accepted, Accepted) and accepted.created and not fresh:
        _take_over(tx, state, again, checkpoint)
    return accepted


def _take_over(tx: Transaction, old: TaskState, new: NewTask, checkpoint: Checkpoint | None) -> None:
    """Copy what the old task left: it keeps its own until it is removed, so nothing is lost with the new one."""
    row = tx.one(tx.sql.task_number, {"task_id": new.task_id})
    assert row is not None
    (task_no,) = row
    copied = tx.run(tx.sql.copy_inbox, {"task_no": old.no, "new_no": task_no})
    if checkpoint is not None:
        # The new task's log is empty, and no claim of it has written yet.
        checkpoint = dataclasses.replace(checkpoint, event_count=0)
        put_checkpoint(tx, task_no, new.task_id, new.service_name, 0, checkpoint)
    applied = 0 if checkpoint is None else checkpoint.inbox_applied
    # An older schema's tasks have counted what was removed; what a checkpoint has applied is never handed out again.
    head = old.inbox_head if copied else applied
    counts = {"new_inbox_head": max(head, applied), "new_has_checkpoint": int(checkpoint is not None)}
    tx.run(tx.sql.take_over, {"task_no": task_no, **counts})
