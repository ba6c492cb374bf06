"""From where a claimed task goes on: from its checkpoint, from its session's context, or from its beginning."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from workflows import Context
from workflows.errors import WorkflowValidationError
from workflows.events import StartEvent

from ..exceptions import FlavourError, StateRefused, WorkflowChanged
from ..protocol.records import Checkpoint, Claim, EventRecord
from ..runtime import Run, misfits
from .codec import WorkflowCodec
from .outcome import text_of

logger = logging.getLogger(__name__)

T = TypeVar("T")

OnChange = Literal["resume", "restart", "fail"]
"""What becomes of a stored run, or of a session's context, whose workflow has changed since. "resume": it goes on if it
still fits, else the task fails with `workflow_changed`. "restart": the task starts from its beginning, and without a context
that does not fit. "fail": the task fails."""

RESUMED = "RunResumed"
"""The type of the event that marks where a stream goes on."""

_HINT = (
    "run it with the code that stored it, start it from its beginning (corral retry --fresh), or serve it with "
    "--on-change restart"
)


@dataclass(slots=True)
class Beginning:
    """A run that is made and not yet driven, and what goes with it.

    `inbox_read`: the seq up to which outside events are part of it. `based_on`: the version of the session's context that
    its state was made of. `from_start`: it begins where the task did although a checkpoint is stored, so that the claim
    lacks outside events that were part of that one.
    """

    run: Run
    inbox_read: int = 0
    based_on: int = 0
    from_start: bool = False
    from_index: int = 0
    dropped: list[str] = field(default_factory=list)
    reason: str | None = None


class _Misfit(Exception):
    """What is stored cannot be used."""


@dataclass(frozen=True, slots=True)
class Beginner:
    """Makes the runs of claimed tasks.

    Args:
        start: Makes the start event; raises where the workflow refuses it. A run that goes on needs none.
        make: Makes the run, with a start event and a context to start with, or a context to go on with.
        now: Seconds since the epoch.
    """

    codec: WorkflowCodec
    fingerprint: str
    on_change: OnChange
    start: Callable[[], StartEvent]
    make: Callable[[StartEvent | None, Context[Any] | None], Run]
    now: float

    def begin(self, claim: Claim) -> Beginning:
        """The run of a claim.

        Raises:
            StateRefused: the store found that what it has of the task is not what was put there.
            WorkflowChanged: it does not fit the workflow any more, and is not to be dropped.
            What making a start event or a run raises.
        """
        if claim.state_error is not None:
            raise StateRefused(claim.state_error)
        dropped: list[str] = []
        reason = None
        based_on = 0 if claim.context is None else claim.context.version
        if claim.checkpoint is not None:
            try:
                return self._from_checkpoint(claim.checkpoint, based_on)
            except _Misfit as misfit:
                reason = self._drop(claim, "checkpoint", misfit)
                dropped.append("checkpoint")
        run, start = None, self.start()
        if claim.context is not None:
            try:
                run = self._from_context(start, claim.context.payload, claim.context.fingerprint)
            except _Misfit as misfit:
                reason = self._drop(claim, "context", misfit)
                dropped.append("context")
        return Beginning(
            self.make(start, None) if run is None else run,
            based_on=based_on,
            from_start=claim.checkpoint is not None,
            dropped=dropped,
            reason=reason,
        )

    def _from_checkpoint(self, checkpoint: Checkpoint, stored_version: int) -> Beginning:
        changed = self._has_changed(checkpoint.fingerprint)
        if changed and self.on_change != "resume":
            raise _Misfit("its steps, their events or its state have other names")
        snapshot = self._decoded(lambda: json.loads(checkpoint.snapshot))
        context, held = self._decoded(lambda: (snapshot["context"], snapshot["held"]))
        if snapshot.get("left_idle"):
            self._decoded(lambda: self._count_absence(context))
        # Others of the session may have saved theirs since.
        based_on = self._decoded(lambda: int(snapshot.get("based_on", stored_version)))
        run = self._decoded(lambda: self.make(None, self.codec.context_of(context)))
        if changed and (found := misfits(run, context)):
            raise _Misfit("; ".join(found))
        for event in self._decoded(lambda: [self.codec.decode_event(payload) for payload in held]):
            run.send_event(event)
        return Beginning(run, checkpoint.inbox_applied, based_on, from_index=checkpoint.event_count)

    def _count_absence(self, context: dict[str, Any]) -> None:
        """For its workflow's timeout a run that left memory only because it waited has been waiting all the time."""
        if context["last_alive_stamp"] is not None:
            context["elapsed_alive"] += max(0.0, self.now - context["last_alive_stamp"])

    def _from_context(self, start: StartEvent, payload: str, fingerprint: str | None) -> Run:
        if self.on_change == "fail" and self._has_changed(fingerprint):
            raise _Misfit("its steps, their events or its state have other names")
        return self._decoded(lambda: self.make(start, self.codec.decode_context(payload)))

    def _has_changed(self, fingerprint: str | None) -> bool:
        return fingerprint is not None and fingerprint != self.fingerprint

    def _decoded(self, decode: Callable[[], T]) -> T:
        try:
            return decode()
        except (FlavourError, WorkflowValidationError):  # the workflow's own faults
            raise
        except Exception as exc:  # what is stored may be anything, and the user's validators raise what they like
            raise _Misfit(text_of(exc)) from exc

    def _drop(self, claim: Claim, what: str, misfit: _Misfit) -> str:
        reason = f"the workflow has changed since the {what} was stored: {misfit}"
        if self.on_change != "restart":
            raise WorkflowChanged(reason, hint=_HINT) from misfit
        logger.warning("task %s starts without its %s: %s", claim.task_id, what, reason)
        return reason


def marker_of(claim: Claim, beginning: Beginning) -> EventRecord | None:
    """What tells the readers of a stream that it goes on in another epoch, or that something stored was dropped; None
    where the task begins."""
    goes_on = claim.epoch > 1 and (claim.next_index > 0 or claim.checkpoint is not None)
    if not goes_on and not beginning.dropped:
        return None
    fields: dict[str, Any] = {
        "epoch": claim.epoch,
        "attempt": claim.attempt,
        "from_index": min(beginning.from_index, claim.next_index),
    }
    if beginning.dropped:
        fields |= {"dropped": beginning.dropped, "reason": beginning.reason}
    return EventRecord(RESUMED, json.dumps(fields))
