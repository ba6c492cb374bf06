"""What only a database with several writers needs: locks, and many rows in one step instead of many steps."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY

from ..tables import EXPLICIT, sessions, task_events, tasks
from .base import ONE, Base

_t = tasks.c
_b = sa.bindparam


def _many(name: str) -> Any:
    texts: Any = ARRAY(sa.Text)
    return _b(name, type_=texts)


class Shared(Base):
    def _define_shared(self) -> None:
        of_tasks = sa.select(_t.session_id).where(_t.task_id == sa.any_(_many("tasks")), EXPLICIT)
        named = sa.select(sa.func.unnest(_many("sessions")))
        self.lock_lines = self._sql(self._locking_lines(sessions.c.session_id.in_(of_tasks.union_all(named))))
        by_id = sessions.c.session_id == _b("session_id")
        self.lock_line = self._sql(self._locking_lines(by_id))
        every = sa.select(_t.no).where(_t.session_id == _b("session_id"), EXPLICIT).order_by(_t.no).with_for_update()
        self.lock_tasks = self._sql(sa.select(sa.func.count()).select_from(every.subquery()))

        rows = sa.func.unnest(_many("types"), _many("payloads")).table_valued("type", "payload", with_ordinality="n")
        rows = rows.render_derived("event")
        number = sa.cast(_b("task_no"), sa.BigInteger)
        index = sa.cast(_b("first"), sa.BigInteger) + rows.c.n - ONE
        epoch = sa.cast(_b("epoch"), sa.BigInteger)
        self.insert_events = self._sql(
            self._insert(task_events)
            .from_select(
                ["task_no", "idx", "epoch", "type", "payload"],
                sa.select(number, index, epoch, rows.c.type, rows.c.payload),
            )
            .inline()
        )
