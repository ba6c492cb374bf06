"""What happens to a task from outside: cancel, expire, send, wake, reap, repeat."""

from __future__ import annotations

import sqlalchemy as sa

from ...protocol.lifecycle import ENDINGS, OPEN, TaskStatus, Trigger, sources
from ..tables import IS_OPEN, instances, is_in, status_literal, tasks
from .base import ONE, OWNED, STATE, UNOWNED, ZERO, Base, target_of

_t = tasks.c
_b = sa.bindparam


class Outside(Base):
    def _define_unowned(self) -> None:
        """What happens to a task from outside: cancel, expire, send, reap."""
        by_no = _t.no == _b("task_no")
        self.end_unowned = {
            status: self._sql(
                sa.update(tasks)
                .where(by_no, _t.owner.is_(None), is_in(sources(trigger)))
                .values(
                    status=status_literal(status),
                    finished_at=_b("now"),
                    error=_b("new_error"),
                    result_text=_b("new_result_text"),
                    cancel_requested=ONE if status is TaskStatus.CANCELLED else _t.cancel_requested,
                    wake_at=sa.null(),
                )
            )
            for status, trigger in ENDINGS.items()
        }
        self.flag_cancel = self._sql(
            sa.update(tasks).where(by_no, _t.owner.is_not(None), is_in(OWNED)).values(cancel_requested=ONE)
        )
        self.bump_inbox = self._sql(
            sa.update(tasks).where(by_no, is_in(OPEN)).values(inbox_head=_t.inbox_head + ONE).returning(_t.inbox_head)
        )
        self.requeue_unowned = self._sql(
            sa.update(tasks)
            .where(by_no, _t.owner.is_(None), is_in(sources(Trigger.REQUEUE)))
            .values(status=target_of(Trigger.REQUEUE), wake_at=sa.null())
        )
        self.orphan = self._sql(
            sa.update(tasks)
            .where(by_no, _t.owner == _b("instance_id"), is_in(OWNED))
            .values(owner=sa.null(), nonce=sa.null(), attempts=_t.attempts + ONE)
        )
        self.owned_by = self._taking(
            sa.select(*STATE).where(_t.owner == _b("instance_id"), _t.owner.is_not(None), IS_OPEN).order_by(_t.no),
            lines=True,
        )
        # One statement a status: then each walks its index from the first that is due, whatever is due behind it.
        self.overdue = {
            status: self._taking(
                sa.select(*STATE)
                .where(
                    _t.deadline.is_not(None),
                    _t.deadline <= _b("now"),
                    _t.owner.is_(None),
                    _t.status == status_literal(status),
                )
                .order_by(_t.deadline)
                .limit(_b("limit"))
                .offset(ZERO),
                lines=True,
            )
            for status in UNOWNED
        }
        self.waking = self._taking(
            sa.select(*STATE)
            .where(
                _t.wake_at.is_not(None),
                _t.wake_at <= _b("now"),
                _t.owner.is_(None),
                _t.status == status_literal(TaskStatus.WAITING),
            )
            .order_by(_t.wake_at)
            .limit(_b("limit"))
            .offset(ZERO)
        )
        self.owned_briefly = self._sql(
            sa.select(_t.task_id, _t.epoch, _t.cancel_requested, _t.inbox_head)
            .where(_t.owner == _b("instance_id"), _t.owner.is_not(None), IS_OPEN)
            .order_by(_t.no)
        )
        strangers = self._sql(
            sa.select(_t.owner)
            .distinct()
            .where(_t.owner > sa.literal_column("''", sa.Text), _t.owner.is_not(None), IS_OPEN)
            .where(~sa.exists(sa.select(ONE).where(instances.c.instance_id == _t.owner)))
            .order_by(_t.owner)
        )
        if self._dialect.name == "sqlite":
            # It would rather look at every open task than at those that somebody owns.
            strangers = strangers.replace("FROM corral_tasks", "FROM corral_tasks INDEXED BY corral_tasks_owner", 1)
        self.list_strangers = strangers
        self.repeatable = self._sql(sa.select(*STATE, _t.input).where(_t.task_id == _b("task_id")).with_for_update())
        self.take_over = self._sql(
            sa.update(tasks)
            .where(by_no)
            .values(inbox_head=_b("new_inbox_head"), has_checkpoint=_b("new_has_checkpoint"))
        )
