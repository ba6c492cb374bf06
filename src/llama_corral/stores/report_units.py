"""What an instance says of a task that it holds: reports and releases. The rules of `accept_units` hold here too."""

from __future__ import annotations

import dataclasses
from typing import Any

from ..protocol.lifecycle import TaskStatus
from ..protocol.records import Checkpoint, ContextUpdate, Report, ReportAnswer, StoredContext, Terminal, Ticket
from . import seals
from .endings import CANCELLED_ERROR, delete_leftovers, end_unowned, free_next
from .rows import lock_state, put_checkpoint, retry_policy
from .transaction import Row, Transaction


def report(tx: Transaction, report: Report) -> ReportAnswer:
    terminal = report.terminal
    retry_at = None if terminal is None else _retry_time(tx, report, terminal)
    row: Row | None
    if terminal is None:
        row = _note(tx, report)
    elif retry_at is not None:
        row = _try_again(tx, report, terminal, retry_at)
    else:
        row = _end(tx, report, terminal)
    if row is None:
        return _not_written(tx, report)
    event_count = row[1]
    if terminal is None or retry_at is not None:
        return ReportAnswer("ok", event_count, retry_at=retry_at)
    return ReportAnswer("ok", event_count, _after_ending(tx, report, terminal, row))


def _retry_time(tx: Transaction, report: Report, terminal: Terminal) -> float | None:
    """When the task is to be tried again instead of ending; None if it ends. Only a retryable failure costs a look."""
    if not _is_retryable(terminal) or terminal.status is not TaskStatus.FAILED:
        return None
    state = lock_state(tx, report.task_id)
    policy = None if state is None else retry_policy(state.retry)
    if state is None or policy is None or state.cancel_requested or state.attempts + 1 >= state.max_attempts:
        return None
    retry_at = report.now + policy.delay(state.attempts + 1)
    return retry_at if state.deadline is None or retry_at < state.deadline else None


def _is_retryable(terminal: Terminal) -> bool:
    return terminal.error is not None and terminal.error.retryable


def _try_again(tx: Transaction, report: Report, terminal: Terminal, retry_at: float) -> Row | None:
    values = {
        "task_id": report.task_id,
        "epoch": report.epoch,
        "seq": report.seq,
        "added": len(report.events),
        "retry_at": retry_at,
        "new_error": None if terminal.error is None else terminal.error.model_dump_json(),
    }
    return tx.log(tx.sql.try_again, values, report.events)


def _note(tx: Transaction, report: Report) -> Row | None:
    values = {
        "task_id": report.task_id,
        "epoch": report.epoch,
        "seq": report.seq,
        "added": len(report.events),
        **_counts_of(report.checkpoint),
    }
    row = tx.log(tx.sql.report[report.waiting], values, report.events)
    if row is not None and report.checkpoint is not None:
        task_no, event_count, service_name = row
        checkpoint = dataclasses.replace(report.checkpoint, event_count=event_count)
        put_checkpoint(tx, task_no, report.task_id, service_name, report.epoch, checkpoint)
    return row


def _counts_of(checkpoint: Checkpoint | None) -> dict[str, int]:
    """What a checkpoint changes in the row of its task."""
    return {
        "snapshot": int(checkpoint is not None),
        "progress": int(checkpoint is not None and checkpoint.progress),
    }


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
    return tx.log(tx.sql.end_held[terminal.status], values, report.events)


def _after_ending(tx: Transaction, report: Report, terminal: Terminal, row: Row) -> tuple[Ticket, ...]:
    task_no, _, session_id, implicit_session, service_name, inbox_head, has_checkpoint = row
    if terminal.status is TaskStatus.COMPLETED or not _is_retryable(terminal):
        delete_leftovers(tx, task_no, inbox_head, has_checkpoint)
    if implicit_session:
        return ()
    tx.hold_lines((session_id,))
    if terminal.status is TaskStatus.COMPLETED and report.context is not None and terminal.context_error is None:
        why = _save_context(tx, session_id, service_name, report.context)
        if why is not None:
            tx.run(tx.sql.context_not_saved, {"task_no": task_no, "new_context_error": why})
    return free_next(tx, session_id, service_name)


def _save_context(tx: Transaction, session_id: str, service_name: str, update: ContextUpdate) -> str | None:
    """Store the context if the stored version still is the one that the run started from; else say why not."""
    key = {"session_id": session_id, "service_name": service_name}
    context = StoredContext(update.based_on + 1, update.payload, update.fingerprint)
    seal = seals.seal_context(tx.sealer, session_id, service_name, context)
    if update.based_on == 0:
        values = {"version": 1, "payload": context.payload, "fingerprint": context.fingerprint, "seal": seal}
        saved = tx.run(tx.sql.insert_context, {**key, **values})
    else:
        values = {"new_payload": context.payload, "new_fingerprint": context.fingerprint, "new_seal": seal}
        saved = tx.run(tx.sql.update_context, {**key, **values, "based_on": update.based_on})
    if saved:
        return None
    stored = tx.one(tx.sql.get_context, key)
    version = 0 if stored is None else stored[0]
    return f"The run started from version {update.based_on} of the context; version {version} is stored now."


def _not_written(tx: Transaction, report: Report) -> ReportAnswer:
    """Why the conditional write found no row: gone, fenced, or a repetition of what is stored."""
    state = lock_state(tx, report.task_id)
    if state is None:
        return ReportAnswer("deleted")
    if state.epoch != report.epoch or report.seq > state.report_seq:
        return ReportAnswer("fenced", state.event_count)
    if report.terminal is not None and state.owner is None:
        if state.is_ended:  # this report let it be tried again, and then it ended while nobody held it
            return ReportAnswer("fenced", state.event_count)
        return ReportAnswer("ok", state.event_count, retry_at=state.not_before)
    tickets: tuple[Ticket, ...] = ()
    if report.terminal is not None and not state.implicit_session:
        # The first answer may be lost with the tickets in it; publishing a ticket again is free.
        line = {"session_id": state.session_id, "service_name": state.service_name}
        tickets = tuple(Ticket(task_id, state.service_name) for (task_id,) in tx.all(tx.sql.queued_in_line, line))
    return ReportAnswer("ok", state.event_count, tickets)


def release(
    tx: Transaction,
    task_id: str,
    epoch: int,
    checkpoint: Checkpoint | None,
    now: float,
    idle: bool,
    wake_at: float | None,
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
        tx.run(tx.sql.release, {"task_no": state.no, **_counts_of(None)})
        ended = end_unowned(tx, state, TaskStatus.CANCELLED, CANCELLED_ERROR, now)
        return ReportAnswer("ok", state.event_count, ended.tickets)
    # An idle run leaves memory only if nothing came for it since; else whoever claims it next goes on at once.
    due = wake_at is not None and wake_at <= now
    stays_idle = idle and not due and checkpoint is not None and checkpoint.inbox_applied >= state.inbox_head
    values = {"task_no": state.no, **_counts_of(checkpoint)}
    if stays_idle:
        tx.run(tx.sql.leave_idle, {**values, "new_wake_at": wake_at})
    else:
        tx.run(tx.sql.release, values)
    if checkpoint is not None:
        checkpoint = dataclasses.replace(checkpoint, event_count=state.event_count)
        put_checkpoint(tx, state.no, task_id, state.service_name, epoch, checkpoint)
    return ReportAnswer("ok", state.event_count, () if stays_idle else (state.ticket(),))
