"""Services, instances, sessions, and what says which schema this is."""

from __future__ import annotations

import sqlalchemy as sa

from ..tables import (
    EXPLICIT,
    checkpoints,
    contexts,
    instances,
    is_in,
    meta,
    services,
    sessions,
    task_events,
    task_inbox,
    tasks,
)
from .base import ONE, OWNED, ZERO, Base

_t = tasks.c
_b = sa.bindparam

CHILDREN = (task_events, task_inbox, checkpoints)


class Registry(Base):
    def _define_registry(self) -> None:
        self.get_meta = self._sql(sa.select(meta.c.value).where(meta.c.key == _b("key")))
        self.put_meta = self._upsert(meta)
        # Never backwards: whoever else deletes tasks at this moment may have written a higher one.
        highest = self._insert_into(meta, "key", "value")
        higher = sa.cast(highest.excluded.value, sa.BigInteger) > sa.cast(meta.c.value, sa.BigInteger)
        self.raise_meta = self._sql(
            highest.on_conflict_do_update(index_elements=["key"], set_={"value": highest.excluded.value}, where=higher)
        )
        self.put_service = self._upsert(services)
        self.put_instance = self._upsert(instances)
        by_name = services.c.service_name == _b("service_name")
        columns = [
            services.c[name] for name in ("service_name", "definition", "registered_at", "events", "start_schema")
        ]
        self.delete_service = self._sql(sa.delete(services).where(by_name))
        self.get_service = self._sql(sa.select(*columns).where(by_name))
        self.list_services = self._sql(sa.select(*columns).order_by(services.c.service_name))
        c = instances.c
        by_id = c.instance_id == _b("instance_id")
        self.delete_instances_of = self._sql(sa.delete(instances).where(c.service_name == _b("service_name")))
        self.delete_instance = self._sql(sa.delete(instances).where(by_id))
        self.count_heartbeat = self._sql(sa.update(instances).where(by_id).values(heartbeat=c.heartbeat + ONE))
        self.list_instances = self._sql(
            sa.select(c.instance_id, c.service_name, c.capacity, c.started_at, c.heartbeat, c.embedded).order_by(
                c.instance_id
            )
        )

    def _define_sessions(self) -> None:
        c = sessions.c
        by_id = c.session_id == _b("session_id")
        columns = (c.session_id, c.state, c.version, c.policy, c.created_at)
        self.insert_session = self._sql(
            self._insert_into(sessions, *(column.name for column in columns)).on_conflict_do_nothing(
                index_elements=["session_id"]
            )
        )
        self.get_session = self._sql(sa.select(*columns).where(by_id))
        self.lock_session = self._sql(sa.select(*columns).where(by_id).with_for_update())
        self.list_sessions = self._sql(
            sa.select(*columns).where(c.session_id > _b("after")).order_by(c.session_id).limit(_b("limit")).offset(ZERO)
        )
        self.set_state = self._sql(
            sa.update(sessions).where(by_id).values(state=_b("new_state"), version=c.version + ONE)
        )
        self.delete_session = self._sql(sa.delete(sessions).where(by_id))

        of_session = sa.and_(_t.session_id == _b("session_id"), EXPLICIT)
        self.session_tasks = self._sql(sa.select(_t.task_id).where(of_session).order_by(_t.no))
        self.session_owned = self._sql(
            sa.select(_t.task_id, _t.owner).where(of_session, is_in(OWNED), _t.owner.is_not(None)).order_by(_t.no)
        )
        self.session_epochs = self._sql(sa.select(sa.func.max(_t.epoch)).where(of_session, _t.digest.is_not(None)))
        numbers = sa.select(_t.no).where(of_session).scalar_subquery()
        self.delete_session_rows = tuple(
            self._sql(statement)
            for statement in (
                *(sa.delete(child).where(child.c.task_no.in_(numbers)) for child in CHILDREN),
                sa.delete(tasks).where(of_session),
                sa.delete(contexts).where(contexts.c.session_id == _b("session_id")),
            )
        )
