"""What the store held right after a worker was killed, and what must follow from it: no step that it had is begun again."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import anyio
import sqlalchemy as sa

from llama_corral.client import TaskEvent
from llama_corral.testing.children import START_TIME

from .support import Mark

_CHECKPOINTS = (
    "SELECT t.task_id, t.epoch, c.event_count FROM corral_checkpoints c JOIN corral_tasks t ON t.no = c.task_no"
)
PAUSE = 0.2


@dataclass
class Kill:
    """A worker was killed, and what the store held right after."""

    pid: int
    at: float
    looked_at: float
    stored: dict[str, tuple[int, int]]
    """Of each task with a checkpoint: its epoch, and how many events the checkpoint has."""


async def look_after_kill(store_url: str, pid: int, at: float) -> Kill:
    """To be called when the worker has ended."""
    rows = await read_rows(store_url, _CHECKPOINTS)
    # Not the time before: others work on, and what they begin and store meanwhile is in it too.
    return Kill(pid, at, time.time(), {task_id: (epoch, count) for task_id, epoch, count in rows})


async def read_rows(store_url: str, statement: str) -> list[Any]:
    """Ask the database of a store itself, while others use it; as soon as it can be asked."""
    with anyio.fail_after(START_TIME):
        while True:
            try:
                return await anyio.to_thread.run_sync(_read, store_url, statement)
            except sa.exc.OperationalError:  # it is being started
                await anyio.sleep(PAUSE)
    raise AssertionError("unreachable")


def _read(store_url: str, statement: str) -> list[Any]:
    url = sa.make_url(store_url)
    if url.get_backend_name() == "sqlite":
        url = url.set(database=f"file:{url.database}", query={"mode": "ro", "uri": "true"})
    else:
        url = url.set(drivername="postgresql+psycopg")
    engine = sa.create_engine(url, poolclass=sa.NullPool)
    with engine.connect() as connection:
        return list(connection.execute(sa.text(statement)))


def done_before(events: Sequence[TaskEvent], index: int) -> set[int]:
    """The steps that had said that they were done when the log had so many events."""
    return {event.data["n"] for event in events[:index] if event.type == "Done"}


def check_stream(events: Sequence[TaskEvent], steps: set[int]) -> None:
    """An attempt goes on behind what its checkpoint has, and in the end all steps are done."""
    stored: set[int] = set()
    for event in events:
        if event.type == "RunResumed":
            stored = done_before(events, event.data["from_index"])
        elif event.type in ("Tick", "Done"):
            assert event.data["n"] not in stored, [(each.type, json.dumps(each.data)) for each in events]
    assert done_before(events, len(events)) == steps


def check_against_kills(
    task_id: str, events: Sequence[TaskEvent], marks: Sequence[Mark], kills: Sequence[Kill]
) -> None:
    """What a checkpoint in the table had as done was not begun again, and was not forgotten."""
    for kill in kills:
        if task_id not in kill.stored:
            continue
        epoch, count = kill.stored[task_id]
        done = {str(n) for n in done_before(events, count)}
        again = [mark for mark in marks if mark.step in done and mark.at > kill.looked_at]
        assert not again, (task_id, again, kill)
        for event in events:
            if event.type == "RunResumed" and event.data["epoch"] > epoch:
                assert event.data["from_index"] >= count, (task_id, event, kill)


def times_to_next_attempt(marks: Sequence[Mark], kills: Sequence[Kill]) -> Iterator[float]:
    """Of each task that a killed worker was at, the time until its next step began elsewhere."""
    for kill in kills:
        last = {mark.name: mark for mark in marks if mark.at < kill.at}
        for mark in last.values():
            later = [each.at for each in marks if each.name == mark.name and each.at > kill.at]
            if mark.pid == kill.pid and later:
                yield min(later) - kill.at
