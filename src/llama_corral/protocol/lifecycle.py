"""The life of a task as one table.

Rules of this file: every status that a task can have and every change of it stands here and nowhere else. Stores turn
`sources(trigger)` into the condition of a write, so that a change which the table does not list can not be stored.

    held --free--> queued --claim--> running <--idle/busy--> waiting --> one of the terminal statuses
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final


class TaskStatus(StrEnum):
    """`held`: its session is busy. `queued`: a ticket is due. `running`: owned, working. `waiting`: idle until an event.

    The other four are terminal: exactly one of them is stored for every accepted task (P1).
    """

    HELD = "held"
    QUEUED = "queued"
    RUNNING = "running"
    WAITING = "waiting"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    TIMED_OUT = "timed_out"

    @property
    def is_terminal(self) -> bool:
        return self in TERMINAL


class Trigger(StrEnum):
    """What can happen to a task."""

    FREE = "free"  # the session's earlier task ended
    CLAIM = "claim"  # an instance takes the task; epoch + 1
    IDLE = "idle"  # the run waits for an outside event or a timer
    BUSY = "busy"  # the run works again
    RELEASE = "release"  # handed back at drain: to be claimed again
    REQUEUE = "requeue"  # its owner is lost, it is tried again, or what a waiting task without an owner waits for came
    COMPLETE = "complete"
    FAIL = "fail"
    CANCEL = "cancel"
    TIME_OUT = "time_out"


_S = TaskStatus
_T = Trigger

TERMINAL: Final = frozenset({_S.COMPLETED, _S.FAILED, _S.CANCELLED, _S.TIMED_OUT})
OPEN: Final = frozenset(_S) - TERMINAL

TRANSITIONS: Final[dict[tuple[TaskStatus, Trigger], TaskStatus]] = {
    (_S.HELD, _T.FREE): _S.QUEUED,
    (_S.QUEUED, _T.CLAIM): _S.RUNNING,
    (_S.RUNNING, _T.IDLE): _S.WAITING,
    (_S.WAITING, _T.IDLE): _S.WAITING,
    (_S.WAITING, _T.BUSY): _S.RUNNING,
    (_S.RUNNING, _T.BUSY): _S.RUNNING,
    (_S.RUNNING, _T.RELEASE): _S.QUEUED,
    (_S.WAITING, _T.RELEASE): _S.QUEUED,
    (_S.RUNNING, _T.REQUEUE): _S.QUEUED,
    (_S.WAITING, _T.REQUEUE): _S.QUEUED,
    **{(status, _T.CANCEL): _S.CANCELLED for status in OPEN},
    **{(status, _T.TIME_OUT): _S.TIMED_OUT for status in OPEN},
    # A task that was never claimed can fail too: attempts used up, a workflow that changed.
    **{(status, _T.FAIL): _S.FAILED for status in OPEN},
    **{(status, _T.COMPLETE): _S.COMPLETED for status in (_S.RUNNING, _S.WAITING)},
}

ENDINGS: Final[dict[TaskStatus, Trigger]] = {
    _S.COMPLETED: _T.COMPLETE,
    _S.FAILED: _T.FAIL,
    _S.CANCELLED: _T.CANCEL,
    _S.TIMED_OUT: _T.TIME_OUT,
}


def after(status: TaskStatus, trigger: Trigger) -> TaskStatus | None:
    """The status that follows, or None where the trigger does not apply (a terminal status admits none)."""
    return TRANSITIONS.get((status, trigger))


def sources(trigger: Trigger) -> tuple[TaskStatus, ...]:
    """The statuses to which a trigger applies, in the order of the enumeration."""
    return tuple(status for status in TaskStatus if (status, trigger) in TRANSITIONS)
