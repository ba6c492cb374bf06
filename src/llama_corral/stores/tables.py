"""The tables, as SQLAlchemy Core: the same for every database.

Rules of this file: nothing relies on a default or a type conversion of SQLAlchemy, because the statements run on the
DBAPI cursor; booleans are 0 and 1, JSON is text, times are seconds. There are no foreign keys: whoever deletes a task
deletes what belongs to it in the same unit, and the hot path does not pay for checks.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement

from ..protocol.lifecycle import OPEN, TaskStatus

SCHEMA_VERSION: Final = 2

metadata = sa.MetaData()

# SQLite makes an INTEGER PRIMARY KEY its row id, and only that spelling.
_ROW_NUMBER = sa.BigInteger().with_variant(sa.Integer, "sqlite")
# Ordered by its bytes, as in SQLite: also cheaper, and no index breaks when the server's system gets other rules.
_TEXT = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")


class of_row(FunctionElement[str]):  # noqa: N801 - as a function of SQL is written
    """The status of a task that something else has found: its id, its number, its place in a line.

    To PostgreSQL it looks like a value of its own, so that no index by status is taken instead: most of the time hardly any
    task is open, its planner knows that, and does not know when very many are. The index of the lines has it as such."""

    inherit_cache = True
    type = sa.Text()


@compiles(of_row)
def _plain(element: of_row, compiler: Any, **options: Any) -> str:
    return str(compiler.process(next(iter(element.clauses)), **options))


@compiles(of_row, "postgresql")
def _hidden(element: of_row, compiler: Any, **options: Any) -> str:
    return f"({_plain(element, compiler, **options)} || '')"


def status_literal(status: TaskStatus) -> sa.ColumnElement[str]:
    """A status as SQL text, not as a parameter: a partial index serves only statements that spell its condition."""
    return sa.literal_column(f"'{status.value}'", sa.Text)


def status_in(statuses: Iterable[TaskStatus], status: sa.ColumnElement[str] | None = None) -> sa.ColumnElement[bool]:
    """The condition that a task has one of these statuses, always in the same order."""
    chosen = set(statuses)
    literals = [status_literal(status) for status in TaskStatus if status in chosen]
    return (tasks.c.status if status is None else status).in_(literals)


def is_in(statuses: Iterable[TaskStatus]) -> sa.ColumnElement[bool]:
    """The same of a task that something else has found."""
    return status_in(statuses, of_row(tasks.c.status))


def _text(name: str, *, nullable: bool = False, **options: Any) -> sa.Column[Any]:
    return sa.Column(name, _TEXT, nullable=nullable, **options)


def _number(name: str, *, default: int | None = 0) -> sa.Column[Any]:
    return sa.Column(name, sa.BigInteger, nullable=False, server_default=None if default is None else str(default))


def _time(name: str, *, nullable: bool = True) -> sa.Column[Any]:
    return sa.Column(name, sa.Double, nullable=nullable)


meta = sa.Table("corral_meta", metadata, _text("key", primary_key=True), _text("value"))

services = sa.Table(
    "corral_services",
    metadata,
    _text("service_name", primary_key=True),
    _text("definition"),
    _text("events", nullable=True),
    _text("start_schema", nullable=True),
    _time("registered_at", nullable=False),
)

instances = sa.Table(
    "corral_instances",
    metadata,
    _text("instance_id", primary_key=True),
    _text("service_name"),
    _number("capacity"),
    _number("heartbeat"),
    _time("started_at", nullable=False),
    _number("embedded"),
)

sessions = sa.Table(
    "corral_sessions",
    metadata,
    _text("session_id", primary_key=True),
    _text("state"),
    _number("version"),
    _text("policy"),
    _time("created_at", nullable=False),
)

contexts = sa.Table(
    "corral_contexts",
    metadata,
    _text("session_id", primary_key=True),
    _text("service_name", primary_key=True),
    _number("version", default=None),
    _text("payload"),
    _text("fingerprint", nullable=True),
    _text("seal", nullable=True),
)

tasks = sa.Table(
    "corral_tasks",
    metadata,
    # The order of acceptance. Children refer to it: short keys that only grow, so their rows are appended.
    sa.Column("no", _ROW_NUMBER, primary_key=True),
    _text("task_id"),
    _text("session_id"),
    _number("implicit_session"),
    _text("service_name"),
    _text("status"),
    _number("epoch"),
    _number("attempts"),
    _number("max_attempts", default=None),
    _text("owner", nullable=True),
    _text("nonce", nullable=True),
    _number("report_seq"),
    _number("event_count"),
    _number("inbox_head"),
    _number("has_checkpoint"),
    _number("cancel_requested"),
    _text("digest", nullable=True),
    _time("created_at", nullable=False),
    _time("started_at"),
    _time("finished_at"),
    _time("deadline"),
    _time("not_before"),
    sa.Column("context_saved", sa.BigInteger, nullable=True),
    _text("context_error", nullable=True),
    _text("input"),
    _text("result", nullable=True),
    _text("result_text", server_default=""),
    _text("error", nullable=True),
    _text("retry", nullable=True),
    _time("wake_at"),
    _text("retry_of", nullable=True),
)

task_events = sa.Table(
    "corral_task_events",
    metadata,
    sa.Column("task_no", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("idx", sa.BigInteger, primary_key=True, autoincrement=False),
    _number("epoch", default=None),
    _text("type"),
    _text("payload"),
    sqlite_with_rowid=False,
)

task_inbox = sa.Table(
    "corral_task_inbox",
    metadata,
    sa.Column("task_no", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("seq", sa.BigInteger, primary_key=True, autoincrement=False),
    _text("payload"),
    _time("sent_at", nullable=False),
    sqlite_with_rowid=False,
)

checkpoints = sa.Table(
    "corral_checkpoints",
    metadata,
    sa.Column("task_no", _ROW_NUMBER, primary_key=True, autoincrement=False),
    _number("epoch", default=None),
    _number("inbox_applied", default=None),
    _text("snapshot"),
    _text("fingerprint", nullable=True),
    _number("event_count"),
    _text("seal", nullable=True),
)

dead_letters = sa.Table(
    "corral_dead_letters",
    metadata,
    sa.Column("no", _ROW_NUMBER, primary_key=True),
    _text("topic"),
    _text("reason"),
    _text("message"),
    _time("at", nullable=False),
    # A page ends at a number, which must not come again once the newest letters are gone.
    sqlite_autoincrement=True,
)

EXPLICIT: Final = tasks.c.implicit_session == sa.literal_column("0", sa.BigInteger)
IS_OPEN: Final = status_in(OPEN)


def _index(
    name: str, *columns: sa.ColumnElement[Any], where: sa.ColumnElement[bool] | None = None, unique: bool = False
) -> None:
    sa.Index(name, *columns, unique=unique, sqlite_where=where, postgresql_where=where)


_t = tasks.c
_index("corral_tasks_id", _t.task_id, unique=True)
# Lists by status newest first; what is queued oldest first.
_index("corral_tasks_status", _t.status, _t.no)
# Lists by service and status; counts of the open tasks without touching a row.
_index("corral_tasks_status_service", _t.status, _t.service_name, _t.no)
# The tasks of a session in order. An implicit session is found by the id of its task.
_index("corral_tasks_session", _t.session_id, _t.no, where=EXPLICIT)
# The line in front of (session, service): who is open, who is held next.
_index("corral_tasks_line", _t.session_id, _t.service_name, of_row(_t.status), _t.no, where=EXPLICIT)
# What the reaper takes from a lost instance. Only open tasks, so it stays small.
_index("corral_tasks_owner", _t.owner, where=sa.and_(_t.owner.is_not(None), IS_OPEN))
# By status first: without it SQLite would rather look at every open task than at those with a deadline. Owners end their
# own, so a task that is claimed as it is accepted never comes in here.
_index("corral_tasks_deadline", _t.status, _t.deadline, where=sa.and_(_t.deadline.is_not(None), _t.owner.is_(None)))
# What sleeps until a time: runs that left memory with a timer, tasks that start later or are tried again.
_index("corral_tasks_wake", _t.status, _t.wake_at, where=_t.wake_at.is_not(None))
_QUEUED: Final = _t.status == status_literal(TaskStatus.QUEUED)
_index("corral_tasks_start", _t.status, _t.not_before, where=sa.and_(_t.not_before.is_not(None), _QUEUED))
# What retention takes first. Endings come in the order of their times, so their entries are appended.
_index("corral_tasks_finished", _t.finished_at, where=_t.finished_at.is_not(None))
_index("corral_dead_letters_at", dead_letters.c.at)
_index("corral_instances_service", instances.c.service_name)
