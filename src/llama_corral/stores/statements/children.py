"""What belongs to a task: events, inbox, checkpoint; and the contexts of sessions."""

from __future__ import annotations

import sqlalchemy as sa

from ..tables import checkpoints, contexts, task_events, task_inbox
from .base import ONE, ZERO, Base

_b = sa.bindparam


class Children(Base):
    def _define_children(self) -> None:
        self.insert_event = self._sql(self._insert_into(task_events, "task_no", "idx", "epoch", "type", "payload"))
        e = task_events.c
        self.read_events = self._sql(
            sa.select(e.idx, e.epoch, e.type, e.payload)
            .where(e.task_no == _b("task_no"), e.idx >= _b("start"))
            .order_by(e.idx)
            .limit(_b("limit"))
            .offset(ZERO)
        )
        self.insert_inbox = self._sql(self._insert_into(task_inbox, "task_no", "seq", "payload", "sent_at"))
        i = task_inbox.c
        self.read_inbox = self._sql(
            sa.select(i.seq, i.payload)
            .where(i.task_no == _b("task_no"), i.seq > _b("after"))
            .order_by(i.seq)
            .limit(_b("limit"))
            .offset(ZERO)
        )
        self.delete_inbox = self._sql(sa.delete(task_inbox).where(i.task_no == _b("task_no")))
        self.copy_inbox = self._sql(
            self._insert(task_inbox)
            .from_select(
                ["task_no", "seq", "payload", "sent_at"],
                sa.select(sa.cast(_b("new_no"), sa.BigInteger), i.seq, i.payload, i.sent_at).where(
                    i.task_no == _b("task_no")
                ),
            )
            .inline()
        )
        c = checkpoints.c
        self.put_checkpoint = self._upsert(checkpoints)
        self.get_checkpoint = self._sql(
            sa.select(c.snapshot, c.inbox_applied, c.fingerprint, c.event_count, c.epoch, c.seal).where(
                c.task_no == _b("task_no")
            )
        )
        self.delete_checkpoint = self._sql(sa.delete(checkpoints).where(c.task_no == _b("task_no")))
        x = contexts.c
        this = sa.and_(x.session_id == _b("session_id"), x.service_name == _b("service_name"))
        self.get_context = self._sql(sa.select(x.version, x.payload, x.fingerprint, x.seal).where(this))
        self.insert_context = self._sql(
            self._insert_into(
                contexts, "session_id", "service_name", "version", "payload", "fingerprint", "seal"
            ).on_conflict_do_nothing(index_elements=["session_id", "service_name"])
        )
        self.update_context = self._sql(
            sa.update(contexts)
            .where(this, x.version == _b("based_on"))
            .values(
                version=x.version + ONE,
                payload=_b("new_payload"),
                fingerprint=_b("new_fingerprint"),
                seal=_b("new_seal"),
            )
        )
