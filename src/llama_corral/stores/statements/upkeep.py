"""Retention, and the messages that nobody can use."""

from __future__ import annotations

import sqlalchemy as sa

from ..tables import dead_letters, task_events, tasks
from .base import ZERO, Base

_t = tasks.c
_b = sa.bindparam


class Upkeep(Base):
    def _define_retention(self) -> None:
        self.ended_before = self._taking(
            sa.select(_t.no, _t.event_count, _t.inbox_head, _t.has_checkpoint, _t.epoch, _t.digest)
            .where(_t.finished_at.is_not(None), _t.finished_at < _b("before"))
            .order_by(_t.finished_at)
            .limit(_b("limit"))
            .offset(ZERO)
        )
        self.delete_events = self._sql(sa.delete(task_events).where(task_events.c.task_no == _b("task_no")))
        self.delete_task = self._sql(sa.delete(tasks).where(_t.no == _b("task_no")))

    def _define_dead_letters(self) -> None:
        d = dead_letters.c
        names = ("topic", "reason", "message", "at")
        insert = self._insert(dead_letters).values({name: _b(name) for name in names})
        self.insert_dead_letter = self._sql(insert.returning(d.no))
        self.delete_dead_letters = self._sql(sa.delete(dead_letters).where(d.no <= _b("last")))
        self.delete_dead_letter = self._sql(sa.delete(dead_letters).where(d.no == _b("no")))
        self.dead_letters_before = self._taking(
            sa.select(d.no).where(d.at < _b("before")).order_by(d.at).limit(_b("limit")).offset(ZERO)
        )
        self.list_dead_letters = self._sql(
            sa.select(d.topic, d.reason, d.message, d.at, d.no)
            .where(d.no < _b("before"))
            .order_by(d.no.desc())
            .limit(_b("limit"))
            .offset(ZERO)
        )
