"""What changes a task: each function is one all-or-nothing unit of the writer.

Rules of this file: a unit is synchronous, decides by what its statements returned, and can be run again from the start
(a batch in which another unit failed is rolled back and redone). A refusal is *returned* as a `UsageError` before
anything was written, and raised to the caller; a unit that *raises* has failed, and its batch pays for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..exceptions import Conflict, NotFound, UsageError
from ..protocol.lifecycle import TaskStatus
from ..protocol.messages import ErrorRecord
from ..protocol.records import (
    Accepted,
    Checkpoint,
    Claim,
    ClaimRequest,
    ContextUpdate,
    HeartbeatAnswer,
    HeldTask,
    NewTask,
    Report,
    ReportAnswer,
    SendAnswer,
    Terminal,
    Ticket,
)
from .rows import TaskState, claim_answer, lock_state, stored_context
from .transaction import Row, Transaction

CANCELLED_ERROR = ErrorRecord(type="cancelled", message="The task was cancelled while no worker held it.")
TIMED_OUT_ERROR = ErrorRecord(type="timed_out", message="The task's deadline passed while no worker held it.")

_GONE = "It may have been deleted."


def no_such_task(task_id: str) -> NotFound:
    return NotFound(f"There is no task {task_id!r}.", hint=_GONE, task_id=task_id)


def has_ended(state: TaskState) -> Conflict:
    return Conflict(
        f"The task {state.task_id!r} has ended: {state.status}.", task_id=state.task_id, status=TaskStatus(state.status)
    )


# Accept and claim


def accept(tx: Transaction, task: NewTask, claim: ClaimRequest | None) -> Accepted | UsageError:
    status = TaskStatus.QUEUED
    if task.session_id is not None:
        line = tx.one(tx.sql.session_policy, {"session_id": task.session_id, "service_name": task.service_name})
        if line is None:
            return NotFound(f"There is no session {task.session_id!r}.", hint=_GONE, session_id=task.session_id)
        policy, busy = line
        if busy and policy == "reject":
            return _accepted_before(tx, task, claim) or Conflict(
                f"The session {task.session_id!r} is busy on {task.service_name!r}.",
                hint="Wait for its task to end, or use a session with the policy 'enqueue'.",
                session_id=task.session_id,
            )
        if busy and policy == "enqueue":
            status = TaskStatus.HELD
    due = claim is None or task.not_before is None or task.not_before <= claim.now
    taken = claim if status is TaskStatus.QUEUED and due else None
    if taken is not None:
        status = TaskStatus.RUNNING
    # An implicit session is the task's own and needs no name of its own: its id is the task's.
    session_id = task.session_id or task.task_id
    inserted = tx.run(
        tx.sql.insert_task,
        {
            "task_id": task.task_id,
            "session_id": session_id,
            "implicit_session": int(task.session_id is None),
            "service_name": task.service_name,
            "status": status.value,
            "epoch": 0 if taken is None else 1,
            "max_attempts": task.max_attempts,
            "owner": None if taken is None else taken.instance_id,
            "nonce": None if taken is None else taken.nonce,
            "digest": task.digest,
            "created_at": task.created_at,
            "started_at": None if taken is None else taken.now,
            "deadline": task.deadline,
            "not_before": task.not_before,
            "input": task.input,
        },
    )
    if not inserted:
        return _accepted_before(tx, task, claim) or no_such_task(task.task_id)
    return Accepted(
        task.task_id,
        session_id,
        status,
        created=True,
        claim=None if taken is None else _first_claim(tx, task, session_id),
    )


def _first_claim(tx: Transaction, task: NewTask, session_id: str) -> Claim:
    explicit = task.session_id is not None
    return Claim(
        task_id=task.task_id,
        service_name=task.service_name,
        session_id=session_id,
        implicit_session=not explicit,
        epoch=1,
        attempt=1,
        input=task.input,
        created_at=task.created_at,
        deadline=task.deadline,
        context=stored_context(tx, session_id, task.service_name) if explicit else None,
    )


def _accepted_before(tx: Transaction, task: NewTask, claim: ClaimRequest | None) -> Accepted | Conflict | None:
    row = tx.one(tx.sql.accepted_task, {"task_id": task.task_id})
    if row is None:
        return None
    session_id, status, digest = row
    if digest != task.digest:
        return Conflict(
            f"The task id {task.task_id!r} is taken by another request.",
            hint="Use a fresh task id, or repeat the first request unchanged.",
            task_id=task.task_id,
        )
    repeated = None if claim is None else _claim_before(tx, claim)
    return Accepted(task.task_id, session_id, TaskStatus(status), created=False, claim=repeated)


def claim(tx: Transaction, request: ClaimRequest) -> Claim | None:
    row = tx.one(
        tx.sql.claim,
        {
            "task_id": request.task_id,
            "instance_id": request.instance_id,
            "new_nonce": request.nonce,
            "now": request.now,
        },
    )
    return _claim_before(tx, request) if row is None else claim_answer(tx, row)


def _claim_before(tx: Transaction, request: ClaimRequest) -> Claim | None:
    """The claim whose answer was lost: the same instance asks with the same nonce."""
    values = {"task_id": request.task_id, "instance_id": request.instance_id, "new_nonce": request.nonce}
    row = tx.one(tx.sql.claimed, values)
    return None if row is None else claim_answer(tx, row)


# Reports


def report(tx: Transaction, report: Report) -> ReportAnswer:
    row = _note(tx, report) if report.terminal is None else _end(tx, report, report.terminal)
    if row is None:
        return _not_written(tx, report)
    task_no, event_count = row[:2]
    if report.events:
        first = event_count - len(report.events)
        tx.run_many(
            tx.sql.insert_event,
            [
                {"task_no": task_no, "idx": index, "epoch": report.epoch, "type": event.type, "payload": event.payload}
                for index, event in enumerate(report.events, first)
            ],
        )
    if report.terminal is None:
        return ReportAnswer("ok", event_count)
    return ReportAnswer("ok", event_count, _after_ending(tx, report, report.terminal, row))


def _note(tx: Transaction, report: Report) -> Row | None:
    values = {
        "task_id": report.task_id,
        "epoch": report.epoch,
        "seq": report.seq,
        "added": len(report.events),
        "progress": int(report.checkpoint is not None),
    }
    row = tx.one(tx.sql.report[report.waiting], values)
    if row is not None and report.checkpoint is not None:
        _put_checkpoint(tx, row[0], report.epoch, report.checkpoint)
    return row


def _end(tx: Transaction, report: Report, terminal: Terminal) -> Row | None:
    saved: int | None = None
    if terminal.context_error is not None:
        saved = 0
    elif terminal.status is TaskStatus.COMPLETED and report.context is not None:
        saved = 1  # taken back by `_after_ending` where the version does not fit
    values: dict[str, Any] = {
        "task_id": report.task_id,
        "epoch": report.epoch,
        "seq": report.seq,
        "added": len(report.events),
        "now": report.now,
        "new_result": terminal.result,
        "new_result_text": terminal.result_text,
        "new_error": None if terminal.error is None else terminal.error.model_dump_json(),
        "new_context_saved": saved,
        "new_context_error": terminal.context_error,
    }
    return tx.one(tx.sql.end_held[terminal.status], values)


def _after_ending(tx: Transaction, report: Report, terminal: Terminal, row: Row) -> tuple[Ticket, ...]:
    task_no, _, session_id, implicit_session, service_name, inbox_head, has_checkpoint = row
    _delete_leftovers(tx, task_no, inbox_head, has_checkpoint)
    if implicit_session:
        return ()
    if terminal.status is TaskStatus.COMPLETED and report.context is not None and terminal.context_error is None:
        why = _save_context(tx, session_id, service_name, report.context)
        if why is not None:
            tx.run(tx.sql.context_not_saved, {"task_no": task_no, "new_context_error": why})
    return free_next(tx, session_id, service_name)


def _save_context(tx: Transaction, session_id: str, service_name: str, update: ContextUpdate) -> str | None:
    """Store the context if the stored version still is the one that the run started from; else say why not."""
    key = {"session_id": session_id, "service_name": service_name}
    if update.based_on == 0:
        values = {**key, "version": 1, "payload": update.payload, "fingerprint": update.fingerprint}
        if tx.run(tx.sql.insert_context, values):
            return None
    else:
        values = {**key, "based_on": update.based_on, "new_payload": update.payload}
        if tx.run(tx.sql.update_context, {**values, "new_fingerprint": update.fingerprint}):
            return None
    stored = stored_context(tx, session_id, service_name)
    version = 0 if stored is None else stored.version
    return f"The run started from version {update.based_on} of the context; version {version} is stored now."


def _not_written(tx: Transaction, report: Report) -> ReportAnswer:
    """Why the conditional write found no row: gone, fenced, or a repetition of what is stored."""
    state = lock_state(tx, report.task_id)
    if state is None:
        return ReportAnswer("deleted")
    if state.epoch != report.epoch or report.seq > state.report_seq:
        return ReportAnswer("fenced", state.event_count)
    tickets: tuple[Ticket, ...] = ()
    if report.terminal is not None and not state.implicit_session:
        # The first answer may be lost with the tickets in it; publishing a ticket again is free.
        line = {"session_id": state.session_id, "service_name": state.service_name}
        tickets = tuple(Ticket(task_id, state.service_name) for (task_id,) in tx.all(tx.sql.queued_in_line, line))
    return ReportAnswer("ok", state.event_count, tickets)


def release(
    tx: Transaction, task_id: str, epoch: int, checkpoint: Checkpoint | None, now: float, idle: bool
) -> ReportAnswer:
    state = lock_state(tx, task_id)
    if state is None:
        return ReportAnswer("deleted")
    if state.epoch != epoch or state.is_ended:
        return ReportAnswer("fenced", state.event_count)
    if not state.is_held_by_instance:  # released before, and the answer was lost
        waits = state.status == TaskStatus.WAITING
        return ReportAnswer("ok", state.event_count, () if waits else (state.ticket(),))
    if state.cancel_requested:  # its owner gives it back without having heard of it; nobody may ever claim it again
        tx.run(tx.sql.release, {"task_no": state.no, "progress": 0})
        ended = _end_unowned(tx, state, TaskStatus.CANCELLED, CANCELLED_ERROR, now)
        return ReportAnswer("ok", state.event_count, ended.tickets)
    # An idle run leaves memory only if nothing came for it since; else whoever claims it next goes on at once.
    stays_idle = idle and checkpoint is not None and checkpoint.inbox_applied >= state.inbox_head
    statement = tx.sql.leave_idle if stays_idle else tx.sql.release
    tx.run(statement, {"task_no": state.no, "progress": int(checkpoint is not None)})
    if checkpoint is not None:
        _put_checkpoint(tx, state.no, epoch, checkpoint)
    return ReportAnswer("ok", state.event_count, () if stays_idle else (state.ticket(),))


def _put_checkpoint(tx: Transaction, task_no: int, epoch: int, checkpoint: Checkpoint) -> None:
    tx.run(
        tx.sql.put_checkpoint,
        {
            "task_no": task_no,
            "epoch": epoch,
            "inbox_applied": checkpoint.inbox_applied,
            "snapshot": checkpoint.snapshot,
            "fingerprint": checkpoint.fingerprint,
        },
    )


def _delete_leftovers(tx: Transaction, task_no: int, inbox_head: int, has_checkpoint: int) -> None:
    """What only an open task needs. The counters of its row spare a short task two statements."""
    if inbox_head:
        tx.run(tx.sql.delete_inbox, {"task_no": task_no})
    if has_checkpoint:
        tx.run(tx.sql.delete_checkpoint, {"task_no": task_no})


def free_next(tx: Transaction, session_id: str, service_name: str) -> tuple[Ticket, ...]:
    """Queue the first held task of the line, if nothing stands before it."""
    row = tx.one(tx.sql.free_next, {"session_id": session_id, "service_name": service_name})
    return () if row is None else (Ticket(row[0], service_name),)


# From outside: cancel, expire, send, reap, heartbeat


def request_cancel(tx: Transaction, task_id: str, now: float) -> SendAnswer | UsageError:
    state = lock_state(tx, task_id)
    if state is None:
        return no_such_task(task_id)
    if state.is_ended:
        return has_ended(state)
    if state.is_held_by_instance:
        tx.run(tx.sql.flag_cancel, {"task_no": state.no})
        return SendAnswer(task_id, state.session_id, TaskStatus(state.status), owner=state.owner)
    return _end_unowned(tx, state, TaskStatus.CANCELLED, CANCELLED_ERROR, now)


def expire(tx: Transaction, now: float) -> list[SendAnswer]:
    overdue = [TaskState._make(row) for row in tx.all(tx.sql.overdue, {"now": now})]
    return [_end_unowned(tx, state, TaskStatus.TIMED_OUT, TIMED_OUT_ERROR, now) for state in overdue]


def _end_unowned(tx: Transaction, state: TaskState, status: TaskStatus, error: ErrorRecord, now: float) -> SendAnswer:
    """End a task that no instance holds, and free its line."""
    tx.run(
        tx.sql.end_unowned[status],
        {
            "task_no": state.no,
            "now": now,
            "new_error": error.model_dump_json(),
            "new_result_text": error.message,
        },
    )
    _delete_leftovers(tx, state.no, state.inbox_head, state.has_checkpoint)
    tickets = () if state.implicit_session else free_next(tx, state.session_id, state.service_name)
    return state.answer(status, tickets=tickets, ended=True)


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


def reap(tx: Transaction, dead_instances: Sequence[str], now: float) -> list[Ticket]:
    tickets: list[Ticket] = []
    for instance_id in dead_instances:
        tx.run(tx.sql.delete_instance, {"instance_id": instance_id})
        for row in tx.all(tx.sql.owned_by, {"instance_id": instance_id}):
            state = TaskState._make(row)
            tx.run(tx.sql.orphan, {"task_no": state.no, "instance_id": instance_id})
            if state.cancel_requested:
                tickets += _end_unowned(tx, state, TaskStatus.CANCELLED, CANCELLED_ERROR, now).tickets
            elif state.attempts + 1 >= state.max_attempts:
                error = ErrorRecord(
                    type="worker_lost",
                    message=f"The worker was lost {state.attempts + 1} times in a row.",
                    retryable=True,
                )
                tickets += _end_unowned(tx, state, TaskStatus.FAILED, error, now).tickets
            elif tx.run(tx.sql.requeue_unowned, {"task_no": state.no}):
                tickets.append(state.ticket())
    return tickets


def heartbeat(tx: Transaction, instance_id: str, held: Sequence[HeldTask]) -> HeartbeatAnswer:
    known = tx.run(tx.sql.count_heartbeat, {"instance_id": instance_id}) == 1
    fenced: list[str] = []
    news: list[str] = []
    for task in held:
        state = lock_state(tx, task.task_id)
        if state is None or state.epoch != task.epoch or state.owner != instance_id or not state.is_held_by_instance:
            fenced.append(task.task_id)
        elif state.cancel_requested or state.inbox_head > task.inbox_read:
            news.append(task.task_id)
    return HeartbeatAnswer(known, tuple(fenced), tuple(news))
