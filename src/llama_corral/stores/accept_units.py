"""What changes a task: each function is one all-or-nothing unit of the writer.

Rules of this file: a unit is synchronous, decides by what its statements returned, and can be run again from the start
(a batch in which another unit failed is rolled back and redone). A refusal is *returned* as a `UsageError` before
anything was written, and raised to the caller; a unit that *raises* has failed, and its batch pays for it.
"""

from __future__ import annotations

from ..exceptions import Conflict, NotFound, UsageError
from ..protocol.lifecycle import TaskStatus
from ..protocol.records import Accepted, Claim, ClaimRequest, NewTask
from .endings import GONE, used_epochs
from .rows import claim_answer, retry_text, stored_context
from .transaction import Transaction


def accept(tx: Transaction, task: NewTask, claim: ClaimRequest | None) -> Accepted | UsageError:
    status = TaskStatus.QUEUED
    if task.session_id is not None:
        tx.hold_lines((task.session_id,))
        line = tx.one(tx.sql.session_policy, {"session_id": task.session_id, "service_name": task.service_name})
        if line is None:
            return NotFound(f"There is no session {task.session_id!r}.", hint=GONE, session_id=task.session_id)
        policy, busy = line
        if busy and policy == "reject":
            return accepted_before(tx, task, claim) or Conflict(
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
    # A fresh id was never there before, so nobody can have an epoch of it.
    before = 0 if task.digest is None else tx.used_epochs
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
            "epoch": before if taken is None else before + 1,
            "max_attempts": task.max_attempts,
            "owner": None if taken is None else taken.instance_id,
            "nonce": None if taken is None else taken.nonce,
            "digest": task.digest,
            "created_at": task.created_at,
            "started_at": None if taken is None else taken.now,
            "deadline": task.deadline,
            "not_before": task.not_before if taken is None else None,  # as with a claim: it has had its effect
            "input": task.input,
            "retry": retry_text(task.retry),
            "retry_of": task.retry_of,
        },
    )
    if not inserted:
        # None: it was there, and somebody has removed it since.
        return accepted_before(tx, task, claim) or accept(tx, task, claim)
    if task.digest is not None and before != (used := used_epochs(tx)):
        # Asked behind the insertion, which may have waited for somebody who was just removing a task of this id.
        before = used
        tx.run(tx.sql.set_epoch, {"task_id": task.task_id, "new_epoch": before if taken is None else before + 1})
    return Accepted(
        task.task_id,
        session_id,
        status,
        created=True,
        claim=None if taken is None else _first_claim(tx, task, session_id, before + 1),
    )


def _first_claim(tx: Transaction, task: NewTask, session_id: str, epoch: int) -> Claim:
    explicit = task.session_id is not None
    context, state_error = stored_context(tx, session_id, task.service_name) if explicit else (None, None)
    return Claim(
        task_id=task.task_id,
        service_name=task.service_name,
        session_id=session_id,
        implicit_session=not explicit,
        epoch=epoch,
        attempt=1,
        input=task.input,
        created_at=task.created_at,
        deadline=task.deadline,
        context=context,
        retry=task.retry,
        state_error=state_error,
    )


def accepted_before(tx: Transaction, task: NewTask, claim: ClaimRequest | None) -> Accepted | Conflict | None:
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
