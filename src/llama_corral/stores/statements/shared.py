"""What only a database with several writers needs: locks."""

from __future__ import annotations

import sqlalchemy as sa

from ..tables import EXPLICIT, sessions, tasks
from .base import Base, many

_t = tasks.c
_b = sa.bindparam


class Shared(Base):
    def _define_shared(self) -> None:
        of_tasks = sa.select(_t.session_id).where(_t.task_id == sa.any_(many("tasks")), EXPLICIT)
        named = sa.select(sa.func.unnest(many("sessions")))
        self.lock_lines = self._sql(self._locking_lines(sessions.c.session_id.in_(of_tasks.union_all(named))))
        by_id = sessions.c.session_id == _b("session_id")
        self.lock_line = self._sql(self._locking_lines(by_id))
        every = sa.select(_t.no).where(_t.session_id == _b("session_id"), EXPLICIT).order_by(_t.no).with_for_update()
        self.lock_tasks = self._sql(sa.select(sa.func.count()).select_from(every.subquery()))
