"""The life of a task in the hands of an instance: accept, claim, report, release."""

from __future__ import annotations

import sqlalchemy as sa

from ...protocol.lifecycle import ENDINGS, OPEN, TaskStatus, Trigger, sources
from ..tables import EXPLICIT, is_in, of_row, sessions, status_in, status_literal, tasks
from .base import CLAIM, ONE, OWNED, ZERO, Base, Logging, target_of

_t = tasks.c
_b = sa.bindparam

# With a snapshot that made progress, failures before it do not count any more.
_progress = _b("progress", type_=sa.BigInteger)
_snapshot = _b("snapshot", type_=sa.BigInteger)
_PROGRESS = {
    "attempts": sa.case((_progress == ONE, ZERO), else_=_t.attempts),
    "has_checkpoint": sa.case((_snapshot == ONE, ONE), else_=_t.has_checkpoint),
}


class Lives(Base):
    def _define_accept_and_claim(self) -> None:
        names = (
            "task_id", "session_id", "implicit_session", "service_name", "status", "epoch", "max_attempts", "owner",
            "nonce", "digest", "created_at", "started_at", "deadline", "not_before", "input", "retry", "retry_of",
        )  # fmt: skip
        self.insert_task = self._sql(
            self._insert_into(tasks, *names).on_conflict_do_nothing(index_elements=["task_id"])
        )
        by_id = _t.task_id == _b("task_id")
        self.set_epoch = self._sql(sa.update(tasks).where(by_id).values(epoch=_b("new_epoch")))
        self.accepted_task = self._sql(sa.select(_t.session_id, _t.status, _t.digest).where(by_id))
        self.claim = self._sql(
            sa.update(tasks)
            .where(by_id, is_in(sources(Trigger.CLAIM)))
            .where(sa.or_(_t.not_before.is_(None), _t.not_before <= _b("now")))
            .values(
                status=target_of(Trigger.CLAIM),
                epoch=_t.epoch + ONE,
                owner=_b("instance_id"),
                nonce=_b("new_nonce"),
                report_seq=ZERO,
                # It has had its effect. If the clock is set back, whoever is to claim the task next must not wait again.
                not_before=sa.null(),
                started_at=sa.func.coalesce(_t.started_at, _b("now")),
            )
            .returning(*CLAIM)
        )
        self.claimed = self._sql(
            sa.select(*CLAIM).where(by_id, _t.owner == _b("instance_id"), _t.nonce == _b("new_nonce"), is_in(OWNED))
        )

    def _define_line(self) -> None:
        """The line of explicit sessions in front of a service."""
        in_line = sa.and_(_t.session_id == _b("session_id"), _t.service_name == _b("service_name"), EXPLICIT)
        busy = sa.exists(sa.select(ONE).where(in_line, is_in(OPEN)).correlate(None))
        self.session_policy = self._sql(
            sa.select(sessions.c.policy, busy).where(sessions.c.session_id == _b("session_id"))
        )
        # A task joins the line as held, so at most one of (session, service) is past it: free the first when it ended.
        waiting = tasks.alias("waiting").c
        first = (
            sa.select(sa.func.min(waiting.no))
            .where(
                waiting.session_id == _b("session_id"),
                waiting.service_name == _b("service_name"),
                waiting.implicit_session == ZERO,
                status_in(sources(Trigger.FREE), of_row(waiting.status)),
            )
            .scalar_subquery()
        )
        ahead = tasks.alias("ahead").c
        busy_ahead = sa.exists(
            sa.select(ONE).where(
                ahead.session_id == _b("session_id"),
                ahead.service_name == _b("service_name"),
                ahead.implicit_session == ZERO,
                status_in((TaskStatus.QUEUED, *OWNED), of_row(ahead.status)),
            )
        )
        self.free_next = self._sql(
            sa.update(tasks)
            .where(_t.no == first, ~busy_ahead, is_in(sources(Trigger.FREE)))
            .values(status=target_of(Trigger.FREE))
            .returning(_t.task_id)
        )
        self.queued_in_line = self._sql(
            sa.select(_t.task_id).where(in_line, is_in((TaskStatus.QUEUED,))).order_by(_t.no)
        )

    def _define_reports(self) -> None:
        """Only the stored epoch may write, only a newer seq, only while an instance holds the task (a run that left memory
        keeps status and epoch)."""
        held = sa.and_(
            _t.task_id == _b("task_id"),
            _t.epoch == _b("epoch"),
            _t.report_seq < _b("seq"),
            _t.owner.is_not(None),
            is_in(OWNED),
        )
        counted = {"report_seq": _b("seq"), "event_count": _t.event_count + _b("added")}
        answer = (_t.no, _t.event_count)
        note = sa.update(tasks).where(held).values(**counted, **_PROGRESS).returning(*answer, _t.service_name)
        self.report: dict[bool | None, Logging] = {None: self._logging(note)}
        for waiting, trigger in ((True, Trigger.IDLE), (False, Trigger.BUSY)):
            change = note.where(is_in(sources(trigger))).values(status=target_of(trigger))
            self.report[waiting] = self._logging(change)

        ending = sa.update(tasks).where(held).values(
            **counted,
            finished_at=_b("now"),
            result=_b("new_result"),
            result_text=_b("new_result_text"),
            error=_b("new_error"),
            # No context is kept for an implicit session: neither saved nor refused.
            context_saved=sa.case(
                (sa.and_(~EXPLICIT, _b("new_context_saved", type_=sa.BigInteger) == ONE), sa.null()),
                else_=_b("new_context_saved", type_=sa.BigInteger),
            ),
            context_error=_b("new_context_error"),
        ).returning(
            *answer, _t.session_id, _t.implicit_session, _t.service_name, _t.inbox_head, _t.has_checkpoint
        )  # fmt: skip
        self.end_held = {
            status: self._logging(ending.where(is_in(sources(trigger))).values(status=status_literal(status)))
            for status, trigger in ENDINGS.items()
        }
        self.try_again = self._logging(
            sa.update(tasks)
            .where(held, is_in(sources(Trigger.REQUEUE)))
            .values(
                **counted,
                status=target_of(Trigger.REQUEUE),
                owner=sa.null(),
                nonce=sa.null(),
                attempts=_t.attempts + ONE,
                not_before=_b("retry_at"),
                error=_b("new_error"),
            )
            .returning(*answer)
        )
        self.context_not_saved = self._sql(
            sa.update(tasks)
            .where(_t.no == _b("task_no"))
            .values(context_saved=ZERO, context_error=_b("new_context_error"))
        )

    def _define_release(self) -> None:
        """Only used on a task whose state was locked and found in the hands of the right epoch."""
        self.release = self._sql(
            sa.update(tasks)
            .where(_t.no == _b("task_no"), is_in(sources(Trigger.RELEASE)))
            .values(**_PROGRESS, status=target_of(Trigger.RELEASE), owner=sa.null(), nonce=sa.null())
        )
        self.leave_idle = self._sql(
            sa.update(tasks)
            .where(_t.no == _b("task_no"), is_in(sources(Trigger.IDLE)))
            .values(
                **_PROGRESS, status=target_of(Trigger.IDLE), owner=sa.null(), nonce=sa.null(), wake_at=_b("new_wake_at")
            )
        )
