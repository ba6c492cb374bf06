"""What can be said of the statements without running a task."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llama_corral.protocol.lifecycle import ENDINGS, Trigger, sources
from llama_corral.stores import schema
from llama_corral.stores.sqlite import SqliteDatabase
from llama_corral.stores.statements import DIALECTS, Logging, Statements, Taking, statements_for

from .postgres import Place

# Small tables that are read whole on purpose, one entry an instance or a service.
READ_WHOLE = {"list_services", "list_instances"}


def texts(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield name, value
    elif isinstance(value, (Taking, Logging)):
        parts = ("", *(f".{field}" for field in value._fields[1:]))
        yield from ((name + part, text) for part, text in zip(parts, value, strict=True) if text)
    elif isinstance(value, (dict, tuple)):
        entries = value.items() if isinstance(value, dict) else enumerate(value)
        for key, entry in entries:
            yield from texts(entry, f"{name}[{key}]" if name else key)


def plan_of(text: str) -> list[str]:
    connection = SqliteDatabase(None, "normal").connect()
    try:
        values = dict.fromkeys(re.findall(r":(\w+)", text), 1)
        return [row[3] for row in connection.tx.all(f"EXPLAIN QUERY PLAN {text}", values)]
    finally:
        connection.close()


def every_statement(sql: Statements) -> list[tuple[str, str]]:
    return [(name, text) for name, text in texts(vars(sql)) if not name.startswith("_")]


def test_no_statement_walks_over_a_table_or_sorts_one() -> None:
    """Cost stays flat: every condition and every order is an index."""
    statements = every_statement(statements_for("sqlite"))
    assert len(statements) > 60
    for name, text in statements:
        plan = plan_of(text)
        walks = [step for step in plan if step.startswith("SCAN") and step != "SCAN CONSTANT ROW"]
        assert not walks or name in READ_WHOLE, (name, plan)
        assert not [step for step in plan if "TEMP B-TREE" in step], (name, plan)


@pytest.mark.parametrize(
    ("name", "index"),
    [
        ("overdue[queued]", "corral_tasks_deadline (status=? AND deadline>? AND deadline<?)"),
        ("waking", "corral_tasks_wake (status=? AND wake_at>? AND wake_at<?)"),
        ("next_wake", "COVERING INDEX corral_tasks_wake (status=? AND wake_at>?)"),
        ("next_start", "COVERING INDEX corral_tasks_start (status=? AND not_before>?)"),
        ("next_deadline[queued]", "corral_tasks_deadline (status=? AND deadline>?)"),
        ("ended_before", "corral_tasks_finished (finished_at>? AND finished_at<?)"),
        ("count_queued", "COVERING INDEX corral_tasks_status_service"),
        ("dead_letters_before", "corral_dead_letters_at"),
        ("owned_by", "corral_tasks_owner"),
        ("owned_briefly", "corral_tasks_owner"),
        ("list_strangers", "corral_tasks_owner"),
        ("free_next", "corral_tasks_line"),
        ("queued_in_line", "corral_tasks_line"),
        ("session_policy", "corral_tasks_line"),
        ("session_tasks", "corral_tasks_session"),
        ("count_open", "COVERING INDEX corral_tasks_status_service"),
        ("due_tickets", "corral_tasks_status "),
        ("due_of_service", "corral_tasks_status_service "),
        ("due_since", "corral_tasks_start "),
    ],
)
def test_each_question_has_its_index(name: str, index: str) -> None:
    """Any index would do for a plan without a walk; the wrong one looks at every open task."""
    plan = plan_of(dict(every_statement(statements_for("sqlite")))[name])
    assert any(index in step for step in plan), plan
    assert all(index in step for step in plan if "INDEX corral_tasks" in step), plan


@pytest.mark.parametrize("dialect", list(DIALECTS))
def test_every_statement_exists_in_every_dialect(dialect: str) -> None:
    names = {name for name, _ in every_statement(statements_for(dialect))}
    shared = {"lock_line", "lock_lines", "lock_lines_of", "lock_tasks"} if dialect == "postgresql" else set()
    shared |= {name for name in names if name.endswith((".free", ".lines", ".with_events"))}
    assert names - shared == {name for name, _ in every_statement(statements_for("sqlite"))}
    assert any("CREATE UNIQUE INDEX" in statement for statement in schema.creation(DIALECTS[dialect]()))


@pytest.mark.promise("P1")
def test_endings_are_written_only_where_the_table_of_transitions_has_them() -> None:
    sql = statements_for("sqlite")
    for status, trigger in ENDINGS.items():
        for text in (sql.end_held[status].change, sql.end_unowned[status]):
            allowed = ", ".join(f"'{source.value}'" for source in sources(trigger))
            assert f"IN ({allowed})" in text
            assert f"status='{status.value}'" in text
    claimable = ", ".join(f"'{source.value}'" for source in sources(Trigger.CLAIM))
    assert f"IN ({claimable})" in sql.claim


@pytest.mark.parametrize(
    ("chosen", "index"),
    [
        ((True, False, False), "COVERING INDEX corral_tasks_status "),
        ((True, True, False), "COVERING INDEX corral_tasks_status_service "),
        ((False, False, True), "corral_tasks_session"),
        ((True, False, True), "corral_tasks_session"),
        ((False, True, True), "corral_tasks_session"),
        ((True, True, True), "corral_tasks_line"),
    ],
)
def test_each_list_has_its_index(chosen: tuple[bool, bool, bool], index: str) -> None:
    assert all(index in step for step in plan_of(statements_for("sqlite").newest[chosen]))


def test_two_stores_in_memory_are_two(tmp_path: Path) -> None:
    first, second = SqliteDatabase(None, "normal").connect(), SqliteDatabase(None, "normal").connect()
    first.tx.run("INSERT INTO corral_meta VALUES ('k', 'v')", {})
    assert second.tx.one(second.tx.sql.get_meta, {"key": "k"}) is None
    first.close()
    second.close()


def plan_in(place: Place, text: str) -> list[str]:
    """The plan for any values, in a database that would rather not read a whole table."""
    names: list[str] = list(dict.fromkeys(re.findall(r"%\((\w+)\)s", text)))
    numbered = re.sub(r"%\((\w+)\)s", lambda match: f"${names.index(match[1]) + 1}", text)
    values = f"({', '.join(['NULL'] * len(names))})" if names else ""
    place.execute(f"PREPARE question AS {numbered}")
    try:
        return [line for (line,) in place.execute(f"EXPLAIN EXECUTE question{values}")]
    finally:
        place.execute("DEALLOCATE question")


def test_no_statement_walks_over_a_table_in_postgresql_either(new_place: Place) -> None:
    for statement in schema.creation(DIALECTS["postgresql"]()):
        new_place.execute(statement)
    new_place.execute("SET enable_seqscan = off; SET plan_cache_mode = force_generic_plan")
    for name, text in every_statement(statements_for("postgresql")):
        plan = plan_in(new_place, text)
        assert not [line for line in plan if "Seq Scan" in line], (name, plan)
        scans = [number for number, line in enumerate(plan) if "Scan" in line and " on corral_" in line]
        for number in scans:
            # All of an index is as bad, unless the index is as small as the answer.
            found = "Index Cond" in "".join(plan[number + 1 : number + 2]) or "Bitmap Heap Scan" in plan[number]
            if not (found or name in READ_WHOLE):
                print(name, chr(10).join(plan))
