"""What the store has promised, as a small description in Python: no SQL, no I/O, no clock.

Every call that reached the store is told here too, and answers what the store must have answered. `Promised` holds what
must be stored then.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

from llama_corral.protocol.lifecycle import TaskStatus
from llama_corral.protocol.records import Checkpoint, ClaimRequest, NewTask, Report, TaskRecord

Place = Literal["held", "queued", "owned", "idle", "ended"]
"""Where a task is: behind another of its line, ready to be claimed, in an instance's hands, out of memory until something
comes for it, or at its end."""
Line = tuple[str, str]
"""A session and a service: tasks of one line come one after the other (`enqueue`)."""
PAST_HELD = ("queued", "owned", "idle")


@dataclass(eq=False)
class Life:
    """One task. `log` and `inbox` hold payloads; every payload of a test is unique."""

    task: NewTask
    line: Line | None
    place: Place = "queued"
    waiting: bool = False
    status: TaskStatus | None = None
    """The ending."""
    record: TaskRecord | None = None
    """The ending as it was first seen; it never changes."""
    epoch: int = 0
    owner: str | None = None
    nonce: str | None = None
    seq: int = 0
    failures: int = 0
    not_before: float | None = None
    wake_at: float | None = None
    cancel: bool = False
    log: list[tuple[int, str]] = field(default_factory=list)
    inbox: list[str] = field(default_factory=list)
    checkpoint: Checkpoint | None = None
    context_saved: bool | None = None
    kept: bool = False
    """An ended task that a person may retry keeps checkpoint and inbox."""

    @property
    def finished_at(self) -> float | None:
        return None if self.record is None else self.record.finished_at

    @property
    def is_open(self) -> bool:
        return self.place != "ended"

    @property
    def stored_status(self) -> TaskStatus:
        if self.status is not None:
            return self.status
        if self.place == "owned":
            return TaskStatus.WAITING if self.waiting else TaskStatus.RUNNING
        return TaskStatus.WAITING if self.place == "idle" else TaskStatus(self.place)

    def is_due(self, now: float) -> bool:
        return self.place == "queued" and (self.not_before is None or self.not_before <= now)


class Promised:
    """The store as its callers may rely on it."""

    def __init__(self) -> None:
        self.lives: dict[str, Life] = {}
        self.policies: dict[str, str] = {}
        self.contexts: dict[Line, tuple[int, str]] = {}
        self.used_epochs = 0
        """Of deleted tasks: an id that comes again begins with this one, which nobody had."""
        self._queued: set[str] = set()

    def line(self, line: Line | None) -> Iterator[Life]:
        """The open tasks of a line in the order of their acceptance."""
        return (life for life in self.lives.values() if life.is_open and line is not None and life.line == line)

    def owned_by(self, instance_id: str) -> list[Life]:
        return [life for life in self.lives.values() if life.place == "owned" and life.owner == instance_id]

    def newly_queued(self) -> set[str]:
        """The tasks to be published by whoever has just been answered."""
        queued, self._queued = self._queued, set()
        return {task_id for task_id in queued if (life := self.lives.get(task_id)) and life.place == "queued"}

    # Calls

    def accept(
        self, task: NewTask, request: ClaimRequest | None
    ) -> Literal["created", "known", "no session", "other content", "busy"]:
        line = None if task.session_id is None else (task.session_id, task.service_name)
        if line is not None and line[0] not in self.policies:
            return "no session"
        known = self.lives.get(task.task_id)
        if known is not None:
            return "known" if known.task.digest == task.digest else "other content"
        busy = any(self.line(line))
        policy = None if line is None else self.policies[line[0]]
        if busy and policy == "reject":
            return "busy"
        life = self.lives[task.task_id] = Life(task, line, epoch=self.used_epochs, not_before=task.not_before)
        if busy and policy == "enqueue":
            life.place = "held"
        elif request is not None:
            self.claim(request)
        return "created"

    def claim(self, request: ClaimRequest) -> Literal["new", "again"] | None:
        life = self.lives.get(request.task_id)
        if life is None:
            return None
        if life.is_due(request.now):
            life.place, life.epoch, life.seq = "owned", life.epoch + 1, 0
            life.waiting, life.wake_at, life.not_before = False, None, None
            life.owner, life.nonce = request.instance_id, request.nonce
            return "new"
        is_same = life.place == "owned" and (life.owner, life.nonce) == (request.instance_id, request.nonce)
        return "again" if is_same else None

    def report(self, report: Report) -> Literal["new", "again", "fenced", "deleted"]:
        life = self.lives.get(report.task_id)
        if life is None:
            return "deleted"
        if life.epoch == report.epoch and report.seq <= life.seq:
            # It let the task be tried again, and before anybody did so it ended otherwise.
            in_vain = report.terminal is not None and life.place == "ended" and life.owner is None
            return "fenced" if in_vain else "again"
        if life.epoch != report.epoch or life.place != "owned":
            return "fenced"
        life.seq = report.seq
        life.log += [(report.epoch, event.payload) for event in report.events]
        if report.waiting is not None:
            life.waiting = report.waiting
        if report.checkpoint is not None:
            self._snapshot(life, report.checkpoint)
        if report.terminal is not None:
            self._end_by(life, report)
        return "new"

    def _end_by(self, life: Life, report: Report) -> None:
        terminal, context = report.terminal, report.context
        assert terminal is not None
        if terminal.status is TaskStatus.FAILED and terminal.error is not None and terminal.error.retryable:
            again = self._retry_at(life, report.now)
            if again is not None:
                life.failures += 1
                self._leave(life, "queued")
                self._queued.discard(report.task_id)  # not yet
                life.not_before = again
                return
        if life.line is not None and terminal.context_error is not None:
            life.context_saved = False
        elif life.line is not None and terminal.status is TaskStatus.COMPLETED and context is not None:
            version, _ = self.contexts.get(life.line, (0, ""))
            life.context_saved = version == context.based_on
            if life.context_saved:
                self.contexts[life.line] = (version + 1, context.payload)
        self._end(life, terminal.status, kept=terminal.error is not None and terminal.error.retryable)

    @staticmethod
    def _retry_at(life: Life, now: float) -> float | None:
        if life.task.retry is None or life.cancel or life.failures + 1 >= life.task.max_attempts:
            return None
        again = now + life.task.retry.delay(life.failures + 1)
        in_time = life.task.deadline is None or again < life.task.deadline
        return again if in_time else None

    def release(
        self, task_id: str, epoch: int, checkpoint: Checkpoint | None, now: float, idle: bool, wake_at: float | None
    ) -> Literal["new", "again", "fenced", "deleted"]:
        life = self.lives.get(task_id)
        if life is None:
            return "deleted"
        if life.epoch != epoch or not life.is_open:
            return "fenced"
        if life.place != "owned":
            return "again"
        if life.cancel:
            self._leave(life, "queued")
            self._end(life, TaskStatus.CANCELLED)
            return "new"
        if checkpoint is not None:
            self._snapshot(life, checkpoint)
        nothing_came = checkpoint is not None and checkpoint.inbox_applied >= len(life.inbox)
        if idle and nothing_came and (wake_at is None or wake_at > now):
            self._leave(life, "idle")
            life.wake_at = wake_at
        else:
            self._leave(life, "queued")
        return "new"

    def cancel(self, task_id: str) -> Literal["flagged", "ended", "too late", "unknown"]:
        life = self.lives.get(task_id)
        if life is None:
            return "unknown"
        if not life.is_open:
            return "too late"
        if life.place == "owned":
            life.cancel = True
            return "flagged"
        self._end(life, TaskStatus.CANCELLED)
        return "ended"

    def send(self, task_id: str, payload: str) -> Literal["kept", "too late", "unknown"]:
        life = self.lives.get(task_id)
        if life is None:
            return "unknown"
        if not life.is_open:
            return "too late"
        life.inbox.append(payload)
        if life.place == "idle":
            self._leave(life, "queued")
        return "kept"

    def expire(self, now: float) -> set[str]:
        ended = [
            life
            for life in self.lives.values()
            if life.place in ("held", "queued", "idle") and life.task.deadline is not None and life.task.deadline <= now
        ]
        for life in ended:
            self._end(life, TaskStatus.TIMED_OUT)
        return {life.task.task_id for life in ended}

    def wake(self, now: float) -> set[str]:
        due = [life for life in self.lives.values() if life.place == "idle" and (life.wake_at or now + 1) <= now]
        for life in due:
            self._leave(life, "queued")
        return {life.task.task_id for life in due}

    def lose(self, lives: Iterable[Life]) -> None:
        """Their owner is dead, or does not hold them."""
        for life in lives:
            life.failures += 1
            self._leave(life, "queued")
            if life.cancel:
                self._end(life, TaskStatus.CANCELLED)
            elif life.failures >= life.task.max_attempts:
                self._end(life, TaskStatus.FAILED, kept=True)

    def retry(
        self, task_id: str, new_id: str, now: float, fresh: bool
    ) -> Literal["created", "known", "unknown", "refused"]:
        old = self.lives.get(task_id)
        if old is None:
            return "unknown"
        if old.is_open or old.status is TaskStatus.COMPLETED:
            return "refused"
        digest = f"retry of {task_id}"
        task = replace(
            old.task, task_id=new_id, created_at=now, deadline=None, not_before=None, digest=digest, retry_of=task_id
        )
        accepted = self.accept(task, None)
        if accepted in ("created", "known"):
            new = self.lives[new_id]
            if accepted == "created" and not fresh:
                new.inbox = list(old.inbox)
                new.checkpoint = None if old.checkpoint is None else replace(old.checkpoint, event_count=0)
            return "created" if accepted == "created" else "known"
        return "refused"

    def ended_before(self, before: float) -> list[Life]:
        """What `purge` may remove, oldest first."""
        ended = [life for life in self.lives.values() if life.finished_at is not None and life.finished_at < before]
        return sorted(ended, key=lambda life: life.finished_at or 0)

    def forget(self, life: Life) -> None:
        del self.lives[life.task.task_id]
        if life.epoch:
            self.used_epochs = max(self.used_epochs, life.epoch + 1)

    def delete_session(self, session_id: str) -> set[tuple[str, str]] | None:
        if self.policies.pop(session_id, None) is None:
            return None
        gone = [life for life in self.lives.values() if life.line is not None and life.line[0] == session_id]
        for life in gone:
            self.forget(life)
        self.contexts = {line: context for line, context in self.contexts.items() if line[0] != session_id}
        return {(life.task.task_id, life.owner or "") for life in gone if life.place == "owned"}

    # What is due

    def next_due(self, now: float) -> float | None:
        times: list[float | None] = []
        for life in self.lives.values():
            if life.place in ("held", "queued", "idle"):
                times.append(life.task.deadline)
            times.append(life.wake_at if life.place == "idle" else None)
            times.append(life.not_before if life.place == "queued" else None)
        return min((time for time in times if time is not None and time > now), default=None)

    # Changes

    @staticmethod
    def _snapshot(life: Life, checkpoint: Checkpoint) -> None:
        life.checkpoint = replace(checkpoint, event_count=len(life.log))
        if checkpoint.progress:
            life.failures = 0

    def _leave(self, life: Life, place: Place) -> None:
        if place == "queued":
            self._queued.add(life.task.task_id)
        life.place, life.owner, life.nonce, life.waiting, life.wake_at = place, None, None, False, None

    def _end(self, life: Life, status: TaskStatus, *, kept: bool = False) -> None:
        life.place, life.status, life.kept = "ended", status, kept
        if not kept:
            life.inbox, life.checkpoint = [], None
        # Its line goes on with the first that is held, once nobody is ahead of that one.
        line = list(self.line(life.line))
        if line and all(each.place == "held" for each in line):
            self._leave(line[0], "queued")
