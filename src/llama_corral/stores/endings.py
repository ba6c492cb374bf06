"""What several units share: how a task ends that no instance holds, what goes with it, who is next in its line."""

from __future__ import annotations

from ..exceptions import Conflict, NotFound
from ..protocol.lifecycle import TaskStatus
from ..protocol.messages import ErrorRecord
from ..protocol.records import SendAnswer, Ticket
from .rows import TaskState
from .transaction import Transaction

CANCELLED_ERROR = ErrorRecord(type="cancelled", message="The task was cancelled while no worker held it.")
TIMED_OUT_ERROR = ErrorRecord(type="timed_out", message="The task's deadline passed while no worker held it.")

GONE = "It may have been deleted."
_USED_EPOCHS = "used_epochs"


def no_such_task(task_id: str) -> NotFound:
    return NotFound(f"There is no task {task_id!r}.", hint=GONE, task_id=task_id)


def has_ended(state: TaskState) -> Conflict:
    return Conflict(
        f"The task {state.task_id!r} has ended: {state.status}.", task_id=state.task_id, status=TaskStatus(state.status)
    )


def end_unowned(tx: Transaction, state: TaskState, status: TaskStatus, error: ErrorRecord, now: float) -> SendAnswer:
    """End a task that no instance holds, and free its line. With a retryable error it keeps what `retry` goes on from."""
    tx.run(
        tx.sql.end_unowned[status],
        {
            "task_no": state.no,
            "now": now,
            "new_error": error.model_dump_json(),
            "new_result_text": error.message,
        },
    )
    if not error.retryable:
        delete_leftovers(tx, state.no, state.inbox_head, state.has_checkpoint)
    tickets = () if state.implicit_session else free_next(tx, state.session_id, state.service_name)
    return state.answer(status, tickets=tickets, ended=True)


def delete_leftovers(tx: Transaction, task_no: int, inbox_head: int, has_checkpoint: int) -> None:
    """What only a task that goes on needs. The counters of its row spare a short task two statements."""
    if inbox_head:
        tx.run(tx.sql.delete_inbox, {"task_no": task_no})
    if has_checkpoint:
        tx.run(tx.sql.delete_checkpoint, {"task_no": task_no})


def free_next(tx: Transaction, session_id: str, service_name: str) -> tuple[Ticket, ...]:
    """Queue the first held task of the line, if nothing stands before it."""
    tx.hold_lines((session_id,))
    row = tx.one(tx.sql.free_next, {"session_id": session_id, "service_name": service_name})
    return () if row is None else (Ticket(row[0], service_name),)


def used_epochs(tx: Transaction) -> int:
    """An epoch behind all those of deleted tasks whose ids clients chose. An id that is accepted again begins with it: who
    still works on the deleted task is fenced from the new one, claimed or not."""
    row = tx.one(tx.sql.get_meta, {"key": _USED_EPOCHS})
    tx.used_epochs = 0 if row is None else int(row[0])
    return tx.used_epochs


def forget_epochs(tx: Transaction, highest: int) -> None:
    """Tasks are deleted, with epochs up to this one."""
    if highest and highest >= used_epochs(tx):
        tx.run(tx.sql.raise_meta, {"key": _USED_EPOCHS, "value": str(highest + 1)})
