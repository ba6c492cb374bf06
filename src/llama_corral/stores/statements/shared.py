"""What only a database with several writers needs: locks."""

from __future__ import annotations

import sqlalchemy as sa

from ..tables import EXPLICIT, sessions, tasks
from .base import ONE, TEXTS, Base, many

_t = tasks.c
_b = sa.bindparam


class Shared(Base):
    def _define_shared(self) -> None:
        c = sessions.c
        self.lock_lines = self._sql(self._locking_lines(c.session_id == sa.any_(many("sessions"))))
        # Not spelled as EXPLICIT: while the tables are small, an index of those alone would look as good as that of the ids.
        of_tasks = sa.select(_t.session_id).where(_t.task_id == sa.any_(many("tasks")), _t.implicit_session < ONE)
        # As an array, which is planned once and in a third of the time of a join.
        either = sa.func.array_cat(
            sa.func.array(of_tasks.scalar_subquery(), type_=TEXTS), many("sessions"), type_=TEXTS
        )
        self.lock_lines_of = self._sql(self._locking_lines(c.session_id == sa.any_(either)))
        by_id = c.session_id == _b("session_id")
        self.lock_line = self._sql(self._locking_lines(by_id))
        every = sa.select(_t.no).where(_t.session_id == _b("session_id"), EXPLICIT).order_by(_t.no).with_for_update()
        self.lock_tasks = self._sql(sa.select(sa.func.count()).select_from(every.subquery()))
