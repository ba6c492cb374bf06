"""What only reads tasks."""

from __future__ import annotations

import itertools

import sqlalchemy as sa

from ...protocol.lifecycle import TaskStatus
from ..tables import EXPLICIT, IS_OPEN, status_in, status_literal, tasks
from .base import ONE, RECORD, STATE, UNOWNED, ZERO, Base

_t = tasks.c
_b = sa.bindparam


class Reads(Base):
    def _define_reads(self) -> None:
        by_id = _t.task_id == _b("task_id")
        self.get_task = self._sql(sa.select(*RECORD, _t.no).where(by_id))
        self.get_task_by_no = self._sql(sa.select(*RECORD).where(_t.no == _b("task_no")))
        self.get_state = self._sql(sa.select(*STATE).where(by_id))
        self.lock_state = self._sql(sa.select(*STATE).where(by_id).with_for_update())
        self.task_number = self._sql(sa.select(_t.no).where(by_id))
        queued = sa.select(_t.task_id, _t.service_name).where(_t.status == status_literal(TaskStatus.QUEUED))
        due = queued.where(sa.or_(_t.not_before.is_(None), _t.not_before <= _b("now"))).limit(_b("limit")).offset(ZERO)
        self.due_tickets = self._sql(due.order_by(_t.no))
        self.due_of_service = self._sql(due.where(_t.service_name == _b("service_name")).order_by(_t.no))
        self.oldest_queued = self._sql(
            sa.select(_t.created_at, _t.not_before)
            .where(_t.status == status_literal(TaskStatus.QUEUED), _t.service_name == _b("service_name"))
            .where(sa.or_(_t.not_before.is_(None), _t.not_before <= _b("now")))
            .order_by(_t.no)
            .limit(ONE)
            .offset(ZERO)
        )
        self.due_since = self._sql(
            queued.where(_t.not_before.is_not(None), _t.not_before > _b("since"), _t.not_before <= _b("now"))
            .order_by(_t.not_before)
            .limit(_b("limit"))
            .offset(ZERO)
        )
        self.queued_tickets = self._sql(queued.order_by(_t.no).limit(_b("limit")).offset(ZERO))
        self.count_open = self._sql(
            sa.select(_t.service_name, _t.status, sa.func.count()).where(IS_OPEN).group_by(_t.status, _t.service_name)
        )
        newest = sa.select(_t.no).where(_t.no < _b("before")).order_by(_t.no.desc()).limit(_b("limit")).offset(ZERO)
        filters = (
            _t.status == _b("status"),
            _t.service_name == _b("service_name"),
            sa.and_(_t.session_id == _b("session_id"), EXPLICIT),
        )
        self.newest: dict[tuple[bool, bool, bool], str] = {}
        for chosen in itertools.product((False, True), (False, True), (False, True)):
            conditions = [condition for condition, wanted in zip(filters, chosen, strict=True) if wanted]
            if chosen == (True, False, True):
                # As an expression no index fits it: else SQLite looks at every task with the status, not at the session's.
                conditions[0] = sa.func.lower(_t.status) == _b("status")
            self.newest[chosen] = self._sql(newest.where(*conditions))

    def _define_due(self) -> None:
        """One question a status: then each is one step into its index, however many tasks there are."""
        self.next_deadline = {
            status: self._sql(
                sa.select(sa.func.min(_t.deadline)).where(
                    _t.deadline.is_not(None),
                    _t.owner.is_(None),
                    _t.status == status_literal(status),
                    _t.deadline > _b("now"),
                )
            )
            for status in UNOWNED
        }
        self.next_wake = self._sql(
            sa.select(sa.func.min(_t.wake_at)).where(
                _t.wake_at.is_not(None), _t.status == status_literal(TaskStatus.WAITING), _t.wake_at > _b("now")
            )
        )
        self.next_start = self._sql(
            sa.select(sa.func.min(_t.not_before)).where(
                _t.not_before.is_not(None), _t.status == status_literal(TaskStatus.QUEUED), _t.not_before > _b("now")
            )
        )
        self.count_queued = self._sql(
            sa.select(sa.func.count()).where(
                status_in((TaskStatus.HELD, TaskStatus.QUEUED)), _t.service_name == _b("service_name")
            )
        )
