"""What the ending of a run means for its task."""

from __future__ import annotations

import logging
import traceback
from dataclasses import dataclass

from workflows.errors import WorkflowCancelledByUser, WorkflowTimeoutError
from workflows.events import StopEvent

from ..exceptions import RunClosed
from ..protocol.lifecycle import TaskStatus
from ..protocol.messages import ErrorRecord
from ..protocol.records import Claim, ContextUpdate, Terminal
from ..runtime import Run
from .codec import WorkflowCodec, printable

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended, and what it raised if it did."""

    terminal: Terminal
    context: ContextUpdate | None = None
    error: BaseException | None = None


@dataclass(frozen=True, slots=True)
class Judge:
    """Turns endings into outcomes, for one claim.

    Args:
        debug: Keep tracebacks in the records.
    """

    claim: Claim
    codec: WorkflowCodec
    fingerprint: str
    debug: bool

    def ended_run(self, run: Run, *, failed_step: str | None, timed_out: bool) -> Outcome:
        """The outcome of a run that is over. `timed_out`: its scope was cancelled because the task's deadline passed."""
        try:
            stop = run.stop_event
        except Exception as exc:  # whatever a step raised is the task's failure
            # A step may raise these three itself, having awaited a run of its own: then it failed as by any other error.
            if failed_step is None and isinstance(exc, RunClosed):
                return self.timed_out() if timed_out else self.cancelled()
            if failed_step is None and isinstance(exc, WorkflowCancelledByUser):
                return self.cancelled()
            if failed_step is None and isinstance(exc, WorkflowTimeoutError):
                return self._without_result(TaskStatus.TIMED_OUT, exc)
            return self.failed(exc, failed_step)
        assert stop is not None
        return self._completed(run, stop)

    def _completed(self, run: Run, stop: StopEvent) -> Outcome:
        claim = self.claim
        try:
            result, text = self.codec.encode_result(stop)
        except Exception as exc:  # a result that cannot even be shown as text
            return self.failed(exc)
        context, context_error = None, None
        if not claim.implicit_session:
            try:
                based_on = claim.context.version if claim.context is not None else 0
                context = ContextUpdate(based_on, self.codec.encode_context(run.context), self.fingerprint)
            except Exception as exc:  # state that is not JSON never refuses the ending (P4)
                context_error = f"{type(exc).__name__}: {text_of(exc)}"
                logger.warning("the context of task %s cannot be stored: %s", claim.task_id, context_error)
        return Outcome(Terminal(TaskStatus.COMPLETED, result, text, context_error=context_error), context)

    def failed(self, exc: BaseException, step: str | None = None) -> Outcome:
        logger.error("task %s failed: %s: %s", self.claim.task_id, type(exc).__name__, text_of(exc))
        return self._without_result(TaskStatus.FAILED, exc, step)

    def timed_out(self) -> Outcome:
        error = TimeoutError(f"task {self.claim.task_id} did not end before its deadline")
        return self._without_result(TaskStatus.TIMED_OUT, error)

    def cancelled(self) -> Outcome:
        record = ErrorRecord(type="TaskCancelled", message="the task was cancelled")
        return Outcome(Terminal(TaskStatus.CANCELLED, error=record, result_text=record.message))

    def _without_result(self, status: TaskStatus, exc: BaseException, step: str | None = None) -> Outcome:
        shown = printable("".join(traceback.format_exception(exc))) if self.debug else None
        record = ErrorRecord(type=type(exc).__name__, message=text_of(exc), step=step, traceback=shown)
        return Outcome(Terminal(status, error=record, result_text=record.message), error=exc)


def text_of(exc: BaseException) -> str:
    """`str(exc)`, whatever the exception's author made of it."""
    try:
        return printable(str(exc))
    except Exception:  # a broken __str__ must not cost the task its ending
        return f"the message of this {type(exc).__name__} cannot be shown"
