"""What is sealed of a stored state, and how a state that does not fit its seal is refused."""

from __future__ import annotations

from ..protocol.records import Checkpoint, StoredContext
from ..protocol.sealing import Part, Sealer


def seal_context(sealer: Sealer | None, session_id: str, service_name: str, context: StoredContext) -> str | None:
    """None without a sealer: what is stored then has no seal, and must not keep that of what it replaces."""
    return None if sealer is None else sealer.seal(*_context(session_id, service_name, context))


def refuse_context(
    sealer: Sealer | None, seal: str | None, session_id: str, service_name: str, context: StoredContext
) -> str | None:
    """Why the context may not be used; None if it may."""
    if sealer is None or sealer.verifies(seal, *_context(session_id, service_name, context)):
        return None
    return (
        f"The stored context of the session {session_id!r} on the service {service_name!r} was refused: {_why(seal)}. "
        "Delete the session, or restore the store from a backup."
    )


def seal_checkpoint(
    sealer: Sealer | None, task_id: str, service_name: str, epoch: int, checkpoint: Checkpoint
) -> str | None:
    return None if sealer is None else sealer.seal(*_checkpoint(task_id, service_name, epoch, checkpoint))


def refuse_checkpoint(
    sealer: Sealer | None, seal: str | None, task_id: str, service_name: str, epoch: int, checkpoint: Checkpoint
) -> str | None:
    """Why the checkpoint may not be used; None if it may."""
    if sealer is None or sealer.verifies(seal, *_checkpoint(task_id, service_name, epoch, checkpoint)):
        return None
    return f"The stored checkpoint of the task {task_id!r} was refused: {_why(seal)}."


def _why(seal: str | None) -> str:
    if seal is None:
        return "it has no seal, and a secret is set"
    return "its seal does not fit, so it was changed, moved from elsewhere or sealed with another secret"


# The name first, so that no context is ever taken for a checkpoint.


def _context(session_id: str, service_name: str, context: StoredContext) -> tuple[Part, ...]:
    return "context", session_id, service_name, context.version, context.fingerprint, context.payload


def _checkpoint(task_id: str, service_name: str, epoch: int, checkpoint: Checkpoint) -> tuple[Part, ...]:
    return (
        "checkpoint",
        task_id,
        service_name,
        epoch,
        checkpoint.inbox_applied,
        checkpoint.event_count,
        checkpoint.fingerprint,
        checkpoint.snapshot,
    )
