"""What the groups of statements share: how they are compiled, and the columns that units and queries read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine.interfaces import Dialect

from ...protocol.lifecycle import TaskStatus, Trigger, after, sources
from ..tables import EXPLICIT, sessions, status_literal, task_events, tasks

# Plain numbers would become parameters. (OFFSET 0 is written out because SQLite's compiler adds a parameter for it.)
ZERO = sa.literal_column("0", sa.BigInteger)
ONE = sa.literal_column("1", sa.BigInteger)

OWNED = sources(Trigger.RELEASE)
"""The statuses of a task that can be in the hands of an instance: those from which it can be handed back."""

UNOWNED = (TaskStatus.HELD, TaskStatus.QUEUED, TaskStatus.WAITING)
"""The statuses of an open task that no instance has."""

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
    _t.max_attempts,
    _t.not_before,
    _t.retry_of,
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
    _t.retry,
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
    _t.deadline,
    _t.not_before,
    _t.retry,
)
"""What the units decide by; read into `rows.TaskState`."""


def target_of(trigger: Trigger) -> sa.ColumnElement[str]:
    """The one status to which a trigger leads, whatever it comes from."""
    targets = {after(status, trigger) for status in sources(trigger)}
    (target,) = targets
    assert target is not None
    return status_literal(target)


TEXTS: Any = postgresql.ARRAY(sa.Text)


def many(name: str) -> Any:
    """Texts, as one parameter. PostgreSQL alone has such."""
    return _b(name, type_=TEXTS)


class Taking(NamedTuple):
    """The texts of one question for rows that are to be changed. `rows` waits for those that another transaction is at,
    `free` leaves them out, `lines` locks their sessions; None where the database has one writer."""

    rows: str
    free: str | None = None
    lines: str | None = None


class Logging(NamedTuple):
    """The texts of one change of a task, which answers its number, the new length of its log, and more. `with_events`
    appends the events too, in the same step; None where a step costs nothing."""

    change: str
    with_events: str | None = None


class Base:
    """Compiles to the SQL text of one dialect."""

    def __init__(self, dialect: Dialect) -> None:
        self._dialect = dialect
        self._insert = _INSERT[dialect.name]

    def _sql(self, statement: Any) -> str:
        compiled = statement.compile(dialect=self._dialect)
        unnamed = [name for name, bind in compiled.binds.items() if not bind.required]
        assert not unnamed, f"a value became a parameter that nobody passes: {unnamed} in {compiled}"
        return str(compiled)

    def _insert_into(self, table: sa.Table, *names: str) -> Any:
        # inline: no RETURNING of a primary key that nobody reads.
        return self._insert(table).values({name: _b(name) for name in names}).inline()

    def _taking(self, question: Any, *, lines: bool = False) -> Taking:
        """Args:
        lines: What is done to the tasks may change the lines of their sessions.
        """
        # SQLite's compiler leaves locks out.
        rows = self._sql(question.with_for_update())
        if self._dialect.name == "sqlite":
            return Taking(rows)
        free = self._sql(question.with_for_update(skip_locked=True))
        if not lines:
            return Taking(rows, free)
        theirs = sessions.c.session_id.in_(question.with_only_columns(_t.session_id).where(EXPLICIT))
        return Taking(rows, free, self._sql(self._locking_lines(theirs)))

    def _logging(self, change: Any) -> Logging:
        """Of an update of one task with the parameters `epoch` and `added`, the number of the events."""
        if self._dialect.name == "sqlite":
            return Logging(self._sql(change))
        task = change.cte("task")
        events = sa.func.unnest(many("types"), many("payloads"))
        event = events.table_valued("type", "payload", with_ordinality="place").render_derived("event")
        index = task.c.event_count - _b("added") + event.c.place - ONE
        rows = sa.select(task.c.no, index, sa.cast(_b("epoch"), sa.BigInteger), event.c.type, event.c.payload)
        names = ["task_no", "idx", "epoch", "type", "payload"]
        log = self._insert(task_events).from_select(names, rows.select_from(task, event)).inline().cte("log")
        return Logging(self._sql(change), self._sql(sa.select(task).add_cte(log)))

    def _locking_lines(self, which: sa.ColumnElement[bool]) -> Any:
        """In the order of their ids, so that no two transactions wait for each other."""
        c = sessions.c
        return sa.select(c.session_id).where(which).order_by(c.session_id).with_for_update(key_share=True)

    def _upsert(self, table: sa.Table) -> str:
        """Insert a row, or replace every column of the one with its key."""
        insert = self._insert_into(table, *(column.name for column in table.columns))
        keys = [column.name for column in table.primary_key]
        others = {column.name: insert.excluded[column.name] for column in table.columns if column.name not in keys}
        return self._sql(insert.on_conflict_do_update(index_elements=keys, set_=others))
