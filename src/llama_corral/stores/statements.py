"""Every statement of the store, defined once in Core and compiled once a dialect to the text that the cursor runs.

Executing Core costs 150-180 us a transaction and 8-22 us an operation on top (measured); its text costs nothing.
Conditions on the status of a task come from `lifecycle.sources(trigger)`, so no statement can make a change that the
table of transitions does not list.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine.interfaces import Dialect

from ..protocol.lifecycle import ENDINGS, TaskStatus, Trigger, after, sources
from .tables import (
    EXPLICIT,
    IS_OPEN,
    checkpoints,
    contexts,
    instances,
    meta,
    services,
    sessions,
    status_in,
    status_literal,
    task_events,
    task_inbox,
    tasks,
)

# Plain numbers would become parameters. (OFFSET 0 is written out because SQLite's compiler adds a parameter for it.)
ZERO = sa.literal_column("0", sa.BigInteger)
ONE = sa.literal_column("1", sa.BigInteger)
CHILDREN = (task_events, task_inbox, checkpoints)

OWNED = sources(Trigger.RELEASE)
"""The statuses of a task that can be in the hands of an instance: those from which it can be handed back."""

DIALECTS: dict[str, Callable[[], Dialect]] = {
    "sqlite": lambda: sqlite.dialect(paramstyle="named"),
    "postgresql": lambda: postgresql.dialect(paramstyle="pyformat"),  # type: ignore[no-untyped-call]
}


@functools.cache
def statements_for(dialect: str) -> Statements:
    """The statements of a dialect, compiled at the first call (some 20 ms)."""
    return Statements(DIALECTS[dialect]())


_INSERT: dict[str, Callable[[sa.Table], Any]] = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}

_t = tasks.c
_b = sa.bindparam

RECORD = (
    _t.task_id,
    _t.session_id,
    _t.implicit_session,
    _t.service_name,
    _t.status,
    _t.input,
    _t.epoch,
    _t.attempts,
    _t.owner,
    _t.cancel_requested,
    _t.created_at,
    _t.started_at,
    _t.finished_at,
    _t.deadline,
    _t.result,
    _t.result_text,
    _t.error,
    _t.event_count,
    _t.context_saved,
    _t.context_error,
)
CLAIM = (
    _t.no,
    _t.task_id,
    _t.service_name,
    _t.session_id,
    _t.implicit_session,
    _t.epoch,
    _t.attempts,
    _t.input,
    _t.created_at,
    _t.deadline,
    _t.event_count,
    _t.cancel_requested,
    _t.has_checkpoint,
    _t.inbox_head,
)
STATE = (
    _t.no,
    _t.task_id,
    _t.session_id,
    _t.implicit_session,
    _t.service_name,
    _t.status,
    _t.epoch,
    _t.owner,
    _t.report_seq,
    _t.event_count,
    _t.inbox_head,
    _t.has_checkpoint,
    _t.cancel_requested,
    _t.attempts,
    _t.max_attempts,
)
"""What the units decide by; read into `rows.TaskState`."""


# With a checkpoint the task has made progress: failures before it do not count any more.
_PROGRESS = {
    "attempts": sa.case((_b("progress", type_=sa.BigInteger) == ONE, ZERO), else_=_t.attempts),
    "has_checkpoint": sa.case((_b("progress", type_=sa.BigInteger) == ONE, ONE), else_=_t.has_checkpoint),
}


def _target(trigger: Trigger) -> sa.ColumnElement[str]:
    """The one status to which a trigger leads, whatever it comes from."""
    targets = {after(status, trigger) for status in sources(trigger)}
    (target,) = targets
    assert target is not None
    return status_literal(target)


class Statements:
    """The statements as SQL text of one dialect."""

    def __init__(self, dialect: Dialect) -> None:
        self._dialect = dialect
        self._insert = _INSERT[dialect.name]
        self._define_registry()
        self._define_sessions()
        self._define_accept_and_claim()
        self._define_line()
        self._define_reports()
        self._define_release()
        self._define_children()
        self._define_unowned()
        self._define_reads()

    def _sql(self, statement: Any) -> str:
        compiled = statement.compile(dialect=self._dialect)
        unnamed = [name for name, bind in compiled.binds.items() if not bind.required]
        assert not unnamed, f"a value became a parameter that nobody passes: {unnamed} in {compiled}"
        return str(compiled)

    def _insert_into(self, table: sa.Table, *names: str) -> Any:
        # inline: no RETURNING of a primary key that nobody reads.
        return self._insert(table).values({name: _b(name) for name in names}).inline()

    def _upsert(self, table: sa.Table) -> str:
        """Insert a row, or replace every column of the one with its key."""
        insert = self._insert_into(table, *(column.name for column in table.columns))
        keys = [column.name for column in table.primary_key]
        others = {column.name: insert.excluded[column.name] for column in table.columns if column.name not in keys}
        return self._sql(insert.on_conflict_do_update(index_elements=keys, set_=others))

    def _define_registry(self) -> None:
        self.get_meta = self._sql(sa.select(meta.c.value).where(meta.c.key == _b("key")))
        self.put_meta = self._upsert(meta)
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
            sa.select(c.instance_id, c.service_name, c.capacity, c.started_at, c.heartbeat).order_by(c.instance_id)
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
            sa.select(_t.task_id, _t.owner).where(of_session, status_in(OWNED), _t.owner.is_not(None)).order_by(_t.no)
        )
        numbers = sa.select(_t.no).where(of_session).scalar_subquery()
        self.delete_session_rows = tuple(
            self._sql(statement)
            for statement in (
                *(sa.delete(child).where(child.c.task_no.in_(numbers)) for child in CHILDREN),
                sa.delete(tasks).where(of_session),
                sa.delete(contexts).where(contexts.c.session_id == _b("session_id")),
            )
        )

    def _define_accept_and_claim(self) -> None:
        names = (
            "task_id", "session_id", "implicit_session", "service_name", "status", "epoch", "max_attempts", "owner",
            "nonce", "digest", "created_at", "started_at", "deadline", "not_before", "input",
        )  # fmt: skip
        self.insert_task = self._sql(
            self._insert_into(tasks, *names).on_conflict_do_nothing(index_elements=["task_id"])
        )
        by_id = _t.task_id == _b("task_id")
        self.accepted_task = self._sql(sa.select(_t.session_id, _t.status, _t.digest).where(by_id))
        self.claim = self._sql(
            sa.update(tasks)
            .where(by_id, status_in(sources(Trigger.CLAIM)))
            .where(sa.or_(_t.not_before.is_(None), _t.not_before <= _b("now")))
            .values(
                status=_target(Trigger.CLAIM),
                epoch=_t.epoch + ONE,
                owner=_b("instance_id"),
                nonce=_b("new_nonce"),
                report_seq=ZERO,
                started_at=sa.func.coalesce(_t.started_at, _b("now")),
            )
            .returning(*CLAIM)
        )
        self.claimed = self._sql(
            sa.select(*CLAIM).where(by_id, _t.owner == _b("instance_id"), _t.nonce == _b("new_nonce"), status_in(OWNED))
        )

    def _define_line(self) -> None:
        """The line of explicit sessions in front of a service."""
        in_line = sa.and_(_t.session_id == _b("session_id"), _t.service_name == _b("service_name"), EXPLICIT)
        busy = sa.exists(sa.select(ONE).where(in_line, IS_OPEN).correlate(None))
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
                waiting.status.in_([status_literal(status) for status in sources(Trigger.FREE)]),
            )
            .scalar_subquery()
        )
        ahead = tasks.alias("ahead").c
        busy_ahead = sa.exists(
            sa.select(ONE).where(
                ahead.session_id == _b("session_id"),
                ahead.service_name == _b("service_name"),
                ahead.implicit_session == ZERO,
                ahead.status.in_([status_literal(status) for status in (TaskStatus.QUEUED, *OWNED)]),
            )
        )
        self.free_next = self._sql(
            sa.update(tasks)
            .where(_t.no == first, ~busy_ahead, status_in(sources(Trigger.FREE)))
            .values(status=_target(Trigger.FREE))
            .returning(_t.task_id)
        )
        self.queued_in_line = self._sql(
            sa.select(_t.task_id).where(in_line, _t.status == status_literal(TaskStatus.QUEUED)).order_by(_t.no)
        )

    def _define_reports(self) -> None:
        """Only the stored epoch may write, only a newer seq, only while an instance holds the task (a run that left memory
        keeps status and epoch)."""
        held = sa.and_(
            _t.task_id == _b("task_id"),
            _t.epoch == _b("epoch"),
            _t.report_seq < _b("seq"),
            _t.owner.is_not(None),
            status_in(OWNED),
        )
        counted = {"report_seq": _b("seq"), "event_count": _t.event_count + _b("added")}
        answer = (_t.no, _t.event_count)
        note = sa.update(tasks).where(held).values(**counted, **_PROGRESS).returning(*answer)
        self.report: dict[bool | None, str] = {None: self._sql(note)}
        for waiting, trigger in ((True, Trigger.IDLE), (False, Trigger.BUSY)):
            change = note.where(status_in(sources(trigger))).values(status=_target(trigger))
            self.report[waiting] = self._sql(change)

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
            status: self._sql(ending.where(status_in(sources(trigger))).values(status=status_literal(status)))
            for status, trigger in ENDINGS.items()
        }
        self.context_not_saved = self._sql(
            sa.update(tasks)
            .where(_t.no == _b("task_no"))
            .values(context_saved=ZERO, context_error=_b("new_context_error"))
        )

    def _define_release(self) -> None:
        """Only used on a task whose state was locked and found in the hands of the right epoch."""
        self.release = self._sql(
            sa.update(tasks)
            .where(_t.no == _b("task_no"), status_in(sources(Trigger.RELEASE)))
            .values(**_PROGRESS, status=_target(Trigger.RELEASE), owner=sa.null(), nonce=sa.null())
        )
        self.leave_idle = self._sql(
            sa.update(tasks)
            .where(_t.no == _b("task_no"), status_in(sources(Trigger.IDLE)))
            .values(**_PROGRESS, status=_target(Trigger.IDLE), owner=sa.null(), nonce=sa.null())
        )

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
            sa.select(i.seq, i.payload).where(i.task_no == _b("task_no"), i.seq > _b("after")).order_by(i.seq)
        )
        self.delete_inbox = self._sql(sa.delete(task_inbox).where(i.task_no == _b("task_no")))
        c = checkpoints.c
        self.put_checkpoint = self._upsert(checkpoints)
        self.get_checkpoint = self._sql(
            sa.select(c.snapshot, c.inbox_applied, c.fingerprint).where(c.task_no == _b("task_no"))
        )
        self.delete_checkpoint = self._sql(sa.delete(checkpoints).where(c.task_no == _b("task_no")))
        x = contexts.c
        this = sa.and_(x.session_id == _b("session_id"), x.service_name == _b("service_name"))
        self.get_context = self._sql(sa.select(x.version, x.payload, x.fingerprint).where(this))
        self.insert_context = self._sql(
            self._insert_into(
                contexts, "session_id", "service_name", "version", "payload", "fingerprint"
            ).on_conflict_do_nothing(index_elements=["session_id", "service_name"])
        )
        self.update_context = self._sql(
            sa.update(contexts)
            .where(this, x.version == _b("based_on"))
            .values(version=x.version + ONE, payload=_b("new_payload"), fingerprint=_b("new_fingerprint"))
        )

    def _define_unowned(self) -> None:
        """What happens to a task from outside: cancel, expire, send, reap."""
        by_no = _t.no == _b("task_no")
        self.end_unowned = {
            status: self._sql(
                sa.update(tasks)
                .where(by_no, _t.owner.is_(None), status_in(sources(trigger)))
                .values(
                    status=status_literal(status),
                    finished_at=_b("now"),
                    error=_b("new_error"),
                    result_text=_b("new_result_text"),
                    cancel_requested=ONE if status is TaskStatus.CANCELLED else _t.cancel_requested,
                )
            )
            for status, trigger in ENDINGS.items()
        }
        self.flag_cancel = self._sql(
            sa.update(tasks).where(by_no, _t.owner.is_not(None), status_in(OWNED)).values(cancel_requested=ONE)
        )
        self.bump_inbox = self._sql(
            sa.update(tasks).where(by_no, IS_OPEN).values(inbox_head=_t.inbox_head + ONE).returning(_t.inbox_head)
        )
        self.requeue_unowned = self._sql(
            sa.update(tasks)
            .where(by_no, _t.owner.is_(None), status_in(sources(Trigger.REQUEUE)))
            .values(status=_target(Trigger.REQUEUE))
        )
        self.orphan = self._sql(
            sa.update(tasks)
            .where(by_no, _t.owner == _b("instance_id"), status_in(OWNED))
            .values(owner=sa.null(), nonce=sa.null(), attempts=_t.attempts + ONE)
        )
        self.owned_by = self._sql(
            sa.select(*STATE)
            .where(_t.owner == _b("instance_id"), _t.owner.is_not(None), IS_OPEN)
            .order_by(_t.no)
            .with_for_update()
        )
        self.overdue = self._sql(
            sa.select(*STATE)
            .where(_t.deadline.is_not(None), _t.deadline <= _b("now"), _t.owner.is_(None), IS_OPEN)
            .order_by(_t.no)
            .with_for_update()
        )

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
