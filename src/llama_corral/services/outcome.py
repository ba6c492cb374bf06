"""What the ending of a run means for its task."""

from __future__ import annotations

import logging
import traceback
from dataclasses import dataclass

from workflows.errors import WorkflowCancelledByUser, WorkflowTimeoutError
from workflows.events import StopEvent

from ..exceptions import FlavourError, RunClosed, StateRefused, TooLarge, WorkflowChanged
from ..protocol.lifecycle import TaskStatus
from ..protocol.messages import ErrorRecord
from ..protocol.records import Claim, ContextUpdate, RetryPolicy, Terminal
from ..runtime import Run
from .codec import WorkflowCodec, printable
from .sizes import CONTEXT_LIMIT, MESSAGE_LIMIT, RESULT_LIMIT, shortened, size_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended, and what it raised if it did."""

    terminal: Terminal
    context: ContextUpdate | None = None
    error: BaseException | None = None

    @property
    def retryable(self) -> bool:
        """Whether the task's own policy asks for another attempt."""
        record = self.terminal.error
        return record is not None and record.retryable and not isinstance(self.error, WorkflowChanged)


@dataclass(frozen=True, slots=True)
class Judge:
    """Turns endings into outcomes, for one claim.

    Args:
        debug: Keep tracebacks in the records.
        based_on: The version of the session's context that the run's state was made of; 0: none was stored.
    """

    claim: Claim
    codec: WorkflowCodec
    fingerprint: str
    debug: bool
    based_on: int = 0

    def ended_run(self, run: Run, *, failed_step: str | None, timed_out: bool) -> Outcome:
        """The outcome of a run that is over, or that was closed and has steps which do not end. `timed_out`: its scope was
        cancelled because the task's deadline passed."""
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
            return self.failed(exc, failed_step, retryable=may_retry(exc, self.claim.retry))
        if stop is None:
            return self.timed_out() if timed_out else self.cancelled()
        return self._completed(run, stop)

    def _completed(self, run: Run, stop: StopEvent) -> Outcome:
        try:
            result, text = self.codec.encode_result(stop)
        except Exception as exc:  # a result that cannot even be shown as text
            return self.failed(exc)
        if (size := max(size_of(result), size_of(text))) > RESULT_LIMIT:
            return self.too_large(f"the result takes {size} bytes, and may take {RESULT_LIMIT}")
        context, context_error = None, None
        if not self.claim.implicit_session:
            try:
                context = self._update(run)
            except Exception as exc:  # state that is not JSON, or too much of it, never refuses the ending (P4)
                context_error = f"{type(exc).__name__}: {text_of(exc)}"
                logger.warning("the context of task %s cannot be stored: %s", self.claim.task_id, context_error)
        return Outcome(Terminal(TaskStatus.COMPLETED, result, text, context_error=context_error), context)

    def _update(self, run: Run) -> ContextUpdate:
        payload = self.codec.encode_context(run.context)
        if (size := size_of(payload)) > CONTEXT_LIMIT:
            raise TooLarge(f"the context takes {size} bytes, and may take {CONTEXT_LIMIT}")
        return ContextUpdate(self.based_on, payload, self.fingerprint)

    def failed(self, exc: BaseException, step: str | None = None, *, retryable: bool = False) -> Outcome:
        # What may be tried again has not failed yet: the store decides, and its answer is logged.
        level, what = (logging.WARNING, "an attempt at task") if retryable else (logging.ERROR, "task")
        logger.log(level, "%s %s failed: %s: %s", what, self.claim.task_id, type(exc).__name__, text_of(exc))
        return self._without_result(TaskStatus.FAILED, exc, step, retryable=retryable)

    def refused(self, exc: WorkflowChanged | StateRefused) -> Outcome:
        """A task that cannot start from what is stored of it."""
        logger.error("task %s cannot go on: %s", self.claim.task_id, exc)
        # Another instance may still have the code that fits; and whoever changes it back may have the task repeated.
        return self._without_result(
            TaskStatus.FAILED, exc, kind=exc.code, retryable=isinstance(exc, WorkflowChanged), hint=exc.hint
        )

    def too_large(self, message: str) -> Outcome:
        logger.error("task %s failed: %s", self.claim.task_id, message)
        return self._without_result(TaskStatus.FAILED, TooLarge(message), kind=TooLarge.code)

    def timed_out(self) -> Outcome:
        error = TimeoutError(f"task {self.claim.task_id} did not end before its deadline")
        return self._without_result(TaskStatus.TIMED_OUT, error)

    def cancelled(self) -> Outcome:
        record = ErrorRecord(type="TaskCancelled", message="the task was cancelled")
        return Outcome(Terminal(TaskStatus.CANCELLED, error=record, result_text=record.message))

    def _without_result(
        self,
        status: TaskStatus,
        exc: BaseException,
        step: str | None = None,
        *,
        kind: str | None = None,
        retryable: bool = False,
        hint: str | None = None,
    ) -> Outcome:
        shown = None
        if self.debug:
            shown = shortened(printable("".join(traceback.format_exception(exc))), 4 * MESSAGE_LIMIT)
        message = text_of(exc) if hint is None else f"{text_of(exc)}; {hint}"
        record = ErrorRecord(
            type=kind or type(exc).__name__, message=message, step=step, retryable=retryable, traceback=shown
        )
        return Outcome(Terminal(status, error=record, result_text=message), error=exc)


def may_retry(exc: BaseException, policy: RetryPolicy | None) -> bool:
    """Whether a task whose workflow raised this asks to be tried again."""
    if policy is None or isinstance(exc, FlavourError):  # no retry makes a step speak the other library
        return False
    if policy.errors is None:
        return True
    names = {
        name
        for cls in type(exc).__mro__
        for name in (
            cls.__name__,
            cls.__qualname__,
            f"{cls.__module__}.{cls.__name__}",
            f"{cls.__module__}.{cls.__qualname__}",
        )
    }
    if not names.isdisjoint(policy.errors):
        return True
    return isinstance(exc, BaseExceptionGroup) and all(may_retry(member, policy) for member in exc.exceptions)


def text_of(exc: BaseException) -> str:
    """`str(exc)`, whatever the exception's author made of it; not more of it than a record should have."""
    try:
        return shortened(printable(str(exc)))
    except Exception:  # a broken __str__ must not cost the task its ending
        return f"the message of this {type(exc).__name__} cannot be shown"
