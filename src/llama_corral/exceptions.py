"""Every error that llama-corral raises on purpose: one base, families by what the caller does next.

* `UsageError`: the request is wrong; change it. `NotFound`, `Conflict`, `BadInput`, ... say how.
* `Unavailable`: nothing is wrong with the request; try again later, or elsewhere.
* `TaskEnded`: a task ended otherwise than with a result; the record says why.
* `Fenced`: another owner holds the task now; stop working on it and forget it.
* `SetupError`: the operator must change something (a store, a port, a target) before the program can run.
* `RunError`: what a run inside this process can raise besides the workflow's own errors.

The context of an error is in its fields; `str()` is one line. `hint` says what to do next and is shown on its own line by
the command line and in the `hint` member of an HTTP error. Nothing below `web/` knows an HTTP status.
"""

from __future__ import annotations

from typing import Any


class CorralError(Exception):
    """Base of every error raised on purpose.

    Args:
        message: One line that names what is wrong.
        hint: What to do next, or None where the message says it all.
        fields: Context (ids, names, limits), kept as `fields` and never containing a credential.
    """

    code = "error"

    def __init__(self, message: str, *, hint: str | None = None, **fields: Any) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.fields = fields

    def __str__(self) -> str:
        return self.message


class UsageError(CorralError):
    """The caller's request is wrong and will stay wrong until it is changed."""

    code = "bad_request"


class BadInput(UsageError):
    """A value is malformed, of the wrong type or refused by the workflow."""

    code = "bad_input"


class NotFound(UsageError):
    """The named service, session or task does not exist."""

    code = "not_found"


class Conflict(UsageError):
    """The request contradicts what is stored: an id that exists, a task that has ended, a busy session."""

    code = "conflict"


class TooLarge(UsageError):
    """A body, an event or a snapshot is larger than its limit."""

    code = "too_large"


class TooSlow(UsageError):
    """The client did not send its request within the time limit."""

    code = "too_slow"


class Unauthorized(UsageError):
    """No token, or a wrong one."""

    code = "unauthorized"


class Incompatible(UsageError):
    """The two sides have no version of the protocol in common: upgrade the older one. The hint says which that is."""

    code = "incompatible"


class Unavailable(CorralError):
    """Try again later: nothing is wrong with the request, and nothing of it was done."""

    code = "unavailable"


class Draining(Unavailable):
    """This process is stopping and takes nothing new."""

    code = "draining"


class StoreUnavailable(Unavailable):
    """The store is away, closed or failed to write."""

    code = "store_unavailable"


class QueueUnavailable(Unavailable):
    """The message queue is away or closed."""

    code = "queue_unavailable"


class TooManyTasks(Unavailable):
    """A limit on stored work is reached."""

    code = "too_many_tasks"


class TaskEnded(CorralError):
    """A task ended without a result. `task_id`, `session_id` and the stored `error` record are fields."""

    code = "task_ended"


class TaskFailed(TaskEnded):
    """The workflow raised. `error` holds type, message and step of what it raised."""

    code = "task_failed"


class TaskCancelled(TaskEnded):
    """Somebody cancelled the task."""

    code = "task_cancelled"


class TaskTimedOut(TaskEnded):
    """The task's deadline passed."""

    code = "task_timed_out"


class Fenced(CorralError):
    """A newer epoch owns the task, or it is gone: stop working on it, write nothing more."""

    code = "fenced"


class SetupError(CorralError):
    """The program cannot run until its operator changes something."""

    code = "setup"


class StoreError(SetupError):
    """The store cannot be used: not ours, newer, locked by another process, not writable."""

    code = "store"


class TargetError(SetupError):
    """A TARGET on the command line cannot be imported or is no workflow."""

    code = "target"


class AddressError(SetupError):
    """An address cannot be bound."""

    code = "address"


class RunError(CorralError):
    """Raised by a run inside this process, besides what the workflow itself raises."""

    code = "run"


class MailboxFull(RunError):
    """More events were sent to a run than its mailbox holds; send again when it has taken some."""

    code = "mailbox_full"


class EventsLost(RunError):
    """A reader came too late: `lost` events fell out of the ring before it read them."""

    code = "events_lost"


class FlavourError(RunError):
    """A step called a library of the other flavour, or is known to before the run. Fields: `step`, `flavour`."""

    code = "flavour"


class RunClosed(RunError):
    """The block that owned the run was left before the run ended."""

    code = "run_closed"


class WorkflowChanged(RunError):
    """What is stored of a task or its session does not fit the workflow's code as it is now. Run it with the code that
    stored it, or start it from the beginning."""

    code = "workflow_changed"


class StateRefused(RunError):
    """What is stored of a task or its session was changed by somebody else, or belongs elsewhere."""

    code = "state_refused"
