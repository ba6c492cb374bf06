"""From rows to records. Positions follow the column tuples in `statements`."""

from __future__ import annotations

import dataclasses
import json
from typing import Final, NamedTuple

from ..protocol.lifecycle import TaskStatus
from ..protocol.messages import ErrorRecord
from ..protocol.records import (
    Checkpoint,
    Claim,
    InboxEvent,
    RetryPolicy,
    SendAnswer,
    SessionRecord,
    StoredContext,
    TaskRecord,
    Ticket,
)
from . import seals
from .transaction import Row, Transaction

INBOX_PAGE: Final = 500


class TaskState(NamedTuple):
    """What the units decide by: `statements.STATE`."""

    no: int
    task_id: str
    session_id: str
    implicit_session: int
    service_name: str
    status: str
    epoch: int
    owner: str | None
    report_seq: int
    event_count: int
    inbox_head: int
    has_checkpoint: int
    cancel_requested: int
    attempts: int
    max_attempts: int
    deadline: float | None
    not_before: float | None
    retry: str | None

    @property
    def is_ended(self) -> bool:
        return TaskStatus(self.status).is_terminal

    @property
    def is_held_by_instance(self) -> bool:
        return self.owner is not None and self.status in (TaskStatus.RUNNING, TaskStatus.WAITING)

    def ticket(self) -> Ticket:
        return Ticket(self.task_id, self.service_name)

    def answer(self, status: TaskStatus, *, tickets: tuple[Ticket, ...] = (), ended: bool = False) -> SendAnswer:
        return SendAnswer(self.task_id, self.session_id, status, tickets=tickets, ended=ended)


def lock_state(tx: Transaction, task_id: str) -> TaskState | None:
    """The state of a task that stays as it is until the transaction ends (SQLite has one writer and needs no lock)."""
    row = tx.one(tx.sql.lock_state, {"task_id": task_id})
    return None if row is None else TaskState._make(row)


def task_record(row: Row) -> TaskRecord:
    """From a row that starts with `statements.RECORD`."""
    (
        task_id, session_id, implicit_session, service_name, status, input_, epoch, attempts, owner, cancel_requested,
        created_at, started_at, finished_at, deadline, result, result_text, error, event_count, context_saved,
        context_error, max_attempts, not_before, retry_of,
    ) = row[:23]  # fmt: skip
    return TaskRecord(
        task_id=task_id,
        session_id=session_id,
        implicit_session=bool(implicit_session),
        service_name=service_name,
        status=TaskStatus(status),
        input=input_,
        epoch=epoch,
        attempts=attempts,
        owner=owner,
        cancel_requested=bool(cancel_requested),
        created_at=created_at,
        started_at=started_at,
        finished_at=finished_at,
        deadline=deadline,
        result=result,
        result_text=result_text,
        error=None if error is None else ErrorRecord.model_validate_json(error),
        event_count=event_count,
        context_saved=None if context_saved is None else bool(context_saved),
        context_error=context_error,
        max_attempts=max_attempts,
        not_before=not_before,
        retry_of=retry_of,
    )


def retry_text(policy: RetryPolicy | None) -> str | None:
    return None if policy is None else json.dumps(dataclasses.asdict(policy), ensure_ascii=False, separators=(",", ":"))


def retry_policy(text: str | None) -> RetryPolicy | None:
    if text is None:
        return None
    values = json.loads(text)
    errors = values["errors"]
    return RetryPolicy(
        errors=None if errors is None else tuple(errors),
        backoff=values["backoff"],
        factor=values["factor"],
        max_backoff=values["max_backoff"],
    )


def stored_context(tx: Transaction, session_id: str, service_name: str) -> tuple[StoredContext | None, str | None]:
    """The context, or None and why it was refused; two times None where there is none."""
    row = tx.one(tx.sql.get_context, {"session_id": session_id, "service_name": service_name})
    if row is None:
        return None, None
    *values, seal = row
    context = StoredContext(*values)
    refused = seals.refuse_context(tx.sealer, seal, session_id, service_name, context)
    return (context, None) if refused is None else (None, refused)


def stored_checkpoint(
    tx: Transaction, task_no: int, task_id: str, service_name: str
) -> tuple[Checkpoint | None, str | None]:
    """As `stored_context`, for the checkpoint of a task."""
    row = tx.one(tx.sql.get_checkpoint, {"task_no": task_no})
    if row is None:
        return None, None
    *values, epoch, seal = row
    checkpoint = Checkpoint(*values)
    refused = seals.refuse_checkpoint(tx.sealer, seal, task_id, service_name, epoch, checkpoint)
    return (checkpoint, None) if refused is None else (None, refused)


def put_checkpoint(
    tx: Transaction, task_no: int, task_id: str, service_name: str, epoch: int, checkpoint: Checkpoint
) -> None:
    """Replace a task's checkpoint; `event_count` is stored as it is given here."""
    tx.run(
        tx.sql.put_checkpoint,
        {
            "task_no": task_no,
            "epoch": epoch,
            "inbox_applied": checkpoint.inbox_applied,
            "snapshot": checkpoint.snapshot,
            "fingerprint": checkpoint.fingerprint,
            "event_count": checkpoint.event_count,
            "seal": seals.seal_checkpoint(tx.sealer, task_id, service_name, epoch, checkpoint),
        },
    )


def inbox_events(tx: Transaction, task_no: int, after: int) -> tuple[InboxEvent, ...]:
    """The next ones, `INBOX_PAGE` at most."""
    values = {"task_no": task_no, "after": after, "limit": INBOX_PAGE}
    return tuple(InboxEvent(*row) for row in tx.all(tx.sql.read_inbox, values))


def claim_answer(tx: Transaction, row: Row) -> Claim:
    """The claim that a row of `statements.CLAIM` stands for, with what the run starts from."""
    (
        task_no, task_id, service_name, session_id, implicit_session, epoch, attempts, input_, created_at, deadline,
        event_count, cancel_requested, has_checkpoint, inbox_head,
        retry,
    ) = row  # fmt: skip
    checkpoint: Checkpoint | None = None
    context: StoredContext | None = None
    refused: list[str | None] = []
    if has_checkpoint:
        checkpoint, why = stored_checkpoint(tx, task_no, task_id, service_name)
        refused.append(why)
    if not implicit_session:
        context, why = stored_context(tx, session_id, service_name)
        refused.append(why)
    applied = 0 if checkpoint is None else checkpoint.inbox_applied
    return Claim(
        task_id=task_id,
        service_name=service_name,
        session_id=session_id,
        implicit_session=bool(implicit_session),
        epoch=epoch,
        attempt=attempts + 1,
        input=input_,
        # SQLite returns a whole number of a REAL column as int where the row comes from RETURNING.
        created_at=float(created_at),
        deadline=None if deadline is None else float(deadline),
        context=context,
        checkpoint=checkpoint,
        inbox=inbox_events(tx, task_no, applied) if inbox_head > applied else (),
        next_index=event_count,
        cancel_requested=bool(cancel_requested),
        retry=retry_policy(retry),
        state_error=" ".join(filter(None, refused)) or None,
    )


def session_record(tx: Transaction, row: Row) -> SessionRecord:
    session_id, state, version, policy, created_at = row
    task_ids = tuple(task_id for (task_id,) in tx.all(tx.sql.session_tasks, {"session_id": session_id}))
    return SessionRecord(session_id, state, version, policy, created_at, task_ids)
