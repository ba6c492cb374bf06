"""The promises as invariants: each function looks at the whole store and compares it with what was promised."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from llama_corral.protocol.lifecycle import TaskStatus
from llama_corral.protocol.records import TaskFilter, TaskRecord
from llama_corral.stores import SqlStore

from .promised import PAST_HELD, Promised
from .world import World

CHILDREN = ("task_events", "task_inbox", "checkpoints")


def rows(store: SqlStore, sql: str) -> list[tuple[Any, ...]]:
    """What a statement finds, past the store's own queries, while its writer has nothing to do."""
    return store._writer._connection.tx.all(sql, {})  # type: ignore[union-attr]


async def check_everything(world: World) -> None:
    listed = await world.store.list_tasks(TaskFilter(limit=100_000))
    records = {record.task_id: record for record in listed}
    assert list(records) == list(world.promised.lives)[::-1], "P1: every accepted task is there, and no other"
    one_ending(world.promised, records)
    one_owner(world.promised, records)
    gap_free(world.store, world.promised)
    safe_contexts(world.store, world.promised)
    one_at_a_time(world.promised, records)
    await due_is_a_column(world)
    await nothing_is_stuck(world)
    nothing_is_orphaned(world.store, world.promised)


def one_ending(promised: Promised, records: dict[str, TaskRecord]) -> None:
    """P1: the ending that was stored first, for ever."""
    for task_id, life in promised.lives.items():
        record = records[task_id]
        assert record.status == life.stored_status, task_id
        assert record.status.is_terminal == (record.finished_at is not None)
        if life.status is not None:
            life.record = life.record or record
            assert record == life.record


def one_owner(promised: Promised, records: dict[str, TaskRecord]) -> None:
    """P2: one epoch, which only grows, one owner, and a bounded number of failures."""
    for task_id, life in promised.lives.items():
        record = records[task_id]
        assert (record.epoch, record.attempts) == (life.epoch, life.failures), task_id
        assert record.attempts <= record.max_attempts or not life.is_open
        assert not life.is_open or record.attempts < record.max_attempts
        if life.is_open:
            assert (record.owner, record.cancel_requested) == (life.owner, life.cancel)
            assert record.not_before == life.not_before
        assert record.retry_of == life.task.retry_of


def gap_free(store: SqlStore, promised: Promised) -> None:
    """P3: what was reported, once, in its order, from 0 on. And the inbox likewise, from 1 on."""
    logs: dict[str, list[tuple[int, int, str]]] = defaultdict(list)
    for task_id, index, epoch, payload in rows(
        store,
        "SELECT t.task_id, e.idx, e.epoch, e.payload FROM corral_task_events e JOIN corral_tasks t ON t.no = e.task_no"
        " ORDER BY e.task_no, e.idx",
    ):
        logs[task_id].append((index, epoch, payload))
    inboxes: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for task_id, seq, payload in rows(
        store,
        "SELECT t.task_id, i.seq, i.payload FROM corral_task_inbox i JOIN corral_tasks t ON t.no = i.task_no"
        " ORDER BY i.task_no, i.seq",
    ):
        inboxes[task_id].append((seq, payload))
    for task_id, life in promised.lives.items():
        assert logs[task_id] == [(index, *entry) for index, entry in enumerate(life.log)], task_id
        assert inboxes[task_id] == list(enumerate(life.inbox, 1)), task_id


def safe_contexts(store: SqlStore, promised: Promised) -> None:
    """P4: the context of the last completed run that started from the one before; an ending says if it was saved."""
    stored = rows(store, "SELECT session_id, service_name, version, payload FROM corral_contexts")
    assert {(session, service): (version, payload) for session, service, version, payload in stored} == (
        promised.contexts
    )
    for life in promised.lives.values():
        assert life.record is None or life.record.context_saved == life.context_saved


def one_at_a_time(promised: Promised, records: dict[str, TaskRecord]) -> None:
    """P4: of a line with `enqueue`, the first task is past `held` and no other."""
    for line in {life.line for life in promised.lives.values() if life.line is not None}:
        if promised.policies[line[0]] == "enqueue":
            statuses = [records[life.task.task_id].status for life in promised.line(line)]
            assert [status is TaskStatus.HELD for status in statuses] == [place > 0 for place in range(len(statuses))]


async def due_is_a_column(world: World) -> None:
    """P5: the store knows what is to be published, whatever happened to the messages, and when to look again."""
    lives = world.promised.lives.values()
    due = [ticket.task_id for ticket in await world.store.due_tickets(now=world.now)]
    assert due == [life.task.task_id for life in lives if life.is_due(world.now)]
    ever = [ticket.task_id for ticket in await world.store.due_tickets()]
    assert ever == [life.task.task_id for life in lives if life.place == "queued"]
    expected = world.promised.next_due(world.now)
    found = await world.store.next_due(world.now)
    assert (found is None) == (expected is None)
    assert found is None or world.now < found <= (expected or 0), "a timer would be late"


async def nothing_is_stuck(world: World) -> None:
    """P1, P2: something will go on with every open task."""
    missed = await world.missed_when_silent()
    for task_id, life in world.promised.lives.items():
        if life.place == "owned":
            assert life.owner in missed, f"{task_id}: nobody would ever miss its owner {life.owner}"
        if life.place == "held":
            assert any(each.place in PAST_HELD for each in world.promised.line(life.line)), task_id
    # `queued` is due, now or at its not_before; `idle` waits for an event, a cancel, its timer or its deadline.


def nothing_is_orphaned(store: SqlStore, promised: Promised) -> None:
    """What belongs to a task goes with it; what only an open task needs goes with its ending."""
    for child in CHILDREN:
        orphans = rows(store, f"SELECT count(*) FROM corral_{child} WHERE task_no NOT IN (SELECT no FROM corral_tasks)")
        assert orphans == [(0,)], child
    kept = {task_id for (task_id,) in rows(
        store, "SELECT t.task_id FROM corral_checkpoints c JOIN corral_tasks t ON t.no = c.task_no"
    )}  # fmt: skip
    assert kept == {task_id for task_id, life in promised.lives.items() if life.checkpoint is not None}
    sessions = {session for (session,) in rows(store, "SELECT session_id FROM corral_sessions")}
    assert sessions == promised.policies.keys()
