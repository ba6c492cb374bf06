"""The disk is full: what does not fit is refused whole, what is stored stays, and all goes on once there is room."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import anyio
import pytest

from llama_corral.exceptions import StoreUnavailable
from llama_corral.protocol.lifecycle import TaskStatus
from llama_corral.protocol.records import ClaimRequest, EventRecord, NewTask, Report, Terminal
from llama_corral.stores import SqlStore

from .holding import CHILDREN, rows

pytestmark = [pytest.mark.promise("P1", "P3")]

LARGE = '"' + "x" * 20_000 + '"'
BATCH = 40


@contextmanager
def no_room(store: SqlStore) -> Iterator[None]:
    """The file may not grow by a page, as if the disk were full."""
    connection = store._writer._connection._connection  # type: ignore[union-attr]
    (pages,) = connection.execute("PRAGMA page_count").fetchone()
    (limit,) = connection.execute("PRAGMA max_page_count").fetchone()
    connection.execute(f"PRAGMA max_page_count = {pages}")
    try:
        yield
    finally:
        connection.execute(f"PRAGMA max_page_count = {limit}")


@pytest.fixture(params=["trio", "asyncio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=["memory", "file"])
async def store(request, anyio_backend, tmp_path):
    url = "sqlite://" if request.param == "memory" else f"sqlite:///{tmp_path}/corral.db"
    async with SqlStore(url) as opened:
        yield opened


def task(number: int, text: str = "{}") -> NewTask:
    return NewTask(f"t{number}", "svc", text, 1.0)


@pytest.mark.anyio
async def test_nothing_is_half_applied_and_all_goes_on_with_room(store):
    await store.accept(task(0), ClaimRequest("t0", "i", "n", 1.0))
    await store.report(Report("t0", 1, 1, 2.0, (EventRecord("E", '{"n":0}'),)))
    report = Report("t0", 1, 2, 2.0, tuple(EventRecord("E", LARGE) for _ in range(5)))
    with no_room(store):
        with pytest.raises(StoreUnavailable) as caught:
            await store.report(report)
        assert caught.value.hint == "Free some space on its disk."
        page = await store.read_events("t0", 0)
        assert (page.record.event_count, len(page.events)) == (1, 1)
        with pytest.raises(StoreUnavailable):
            await store.accept(task(1, LARGE))
        assert await store.get_task("t1") is None
    assert (await store.report(report)).next_index == 6
    assert (await store.accept(task(1, LARGE))).created
    ending = Report("t0", 1, 3, 3.0, terminal=Terminal(TaskStatus.COMPLETED, "1", "1"))
    assert (await store.report(ending)).status == "ok"
    page = await store.read_events("t0", 0)
    assert [event.index for event in page.events] == list(range(6))


@pytest.mark.anyio
async def test_of_a_batch_each_unit_is_stored_or_refused(store):
    """What is answered is stored, what is refused is not there, whoever shared a transaction with whom."""
    outcomes: dict[str, bool] = {}

    async def accept(number: int) -> None:
        try:
            await store.accept(task(number, LARGE if number % 2 else "{}"))
            outcomes[f"t{number}"] = True
        except StoreUnavailable:
            outcomes[f"t{number}"] = False

    with no_room(store):
        async with anyio.create_task_group() as tasks:
            for number in range(BATCH):
                tasks.start_soon(accept, number)
    assert len(outcomes) == BATCH
    assert not all(outcomes.values())
    for task_id, is_stored in outcomes.items():
        assert (await store.get_task(task_id) is not None) == is_stored
    for number in range(BATCH):
        if not outcomes[f"t{number}"]:
            assert (await store.accept(task(number))).created
    assert len(await store.due_tickets()) == BATCH
    for child in CHILDREN:
        assert rows(store, f"SELECT count(*) FROM corral_{child}") == [(0,)]


PROGRAM = """
    import resource, sys, anyio
    from llama_corral.exceptions import StoreUnavailable
    from llama_corral.protocol.records import NewTask
    from llama_corral.stores import SqlStore

    async def main():
        async with SqlStore(sys.argv[1]) as store:
            soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard))
            stored, refused = [], []
            for number in range(60):
                try:
                    await store.accept(NewTask(f"t{number}", "svc", "x" * 20_000, 1.0))
                    stored.append(f"t{number}")
                except StoreUnavailable:
                    refused.append(f"t{number}")
            assert stored and refused, (stored, refused)
            due = [ticket.task_id for ticket in await store.due_tickets()]
            assert due == stored, (due, stored)
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            for task_id in refused:
                assert (await store.accept(NewTask(task_id, "svc", "x" * 20_000, 1.0))).created
        async with SqlStore(sys.argv[1]) as store:
            assert len(await store.due_tickets()) == 60
        print("went on", len(stored), len(refused))

    anyio.run(main, backend="trio")
"""


@pytest.mark.process
def test_a_file_that_the_system_lets_not_grow(tmp_path: Path) -> None:
    """The write itself fails, as on a full disk or at a quota: in a process of its own, whose limit it is."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROGRAM), f"sqlite:///{tmp_path}/corral.db"],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("went on")
