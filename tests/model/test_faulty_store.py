"""`FaultyStore`: faults strike where they were planned, and the store behind it is what it was or what it became."""

from __future__ import annotations

from collections.abc import AsyncIterator

import anyio
import pytest

from llama_corral.abc import Store
from llama_corral.exceptions import Conflict, StoreUnavailable
from llama_corral.protocol.records import ClaimRequest, EventRecord, NewTask, Report
from llama_corral.stores import SqlStore
from llama_corral.testing import FaultyStore
from llama_corral.testing.store_faults import WRITES

pytestmark = [pytest.mark.anyio]


@pytest.fixture(params=["trio", "asyncio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    """No service here, so no step flavours."""
    return request.param


@pytest.fixture
async def store(anyio_backend: str) -> AsyncIterator[FaultyStore]:
    async with FaultyStore(SqlStore("sqlite://")) as opened:
        yield opened


def task(task_id: str = "t") -> NewTask:
    return NewTask(task_id, "svc", "{}", 1.0, digest=task_id)


async def test_without_a_fault_it_is_the_store(store):
    await store.accept(task())
    assert (await store.get_task("t")).status == "queued"
    assert store.statistics()["faults"] == {}
    assert store.statistics()["units"] == 2


async def test_the_nth_write_is_not_applied(store):
    store.refuse(nth=3)
    await store.accept(task("a"))
    assert await store.get_task("a")  # a read is no write
    await store.accept(task("b"))
    with pytest.raises(StoreUnavailable):
        await store.accept(task("c"))
    assert await store.get_task("c") is None
    await store.accept(task("c"))
    assert store.statistics()["faults"] == {"refuse accept": 1}


async def test_a_lost_answer_was_applied_and_can_be_asked_for_again(store):
    await store.accept(task())
    request = ClaimRequest("t", "i", "n", 2.0)
    store.lose_answer("claim", times=2)
    for _ in range(2):
        with pytest.raises(StoreUnavailable):
            await store.claim(request)
        assert (await store.get_task("t")).epoch == 1
    claim = await store.claim(request)
    assert claim is not None
    assert claim.epoch == 1


async def test_a_lost_refusal_is_no_refusal(store):
    await store.accept(task())
    other = NewTask("t", "svc", "{}", 1.0, digest="other")
    store.lose_answer("accept")
    with pytest.raises(StoreUnavailable):
        await store.accept(other)
    with pytest.raises(Conflict):
        await store.accept(other)


async def test_twice_is_once(store):
    await store.accept(task(), ClaimRequest("t", "i", "n", 2.0))
    store.duplicate("report")
    answer = await store.report(Report("t", 1, 1, 3.0, (EventRecord("E", "{}"),)))
    assert (answer.status, answer.next_index) == ("ok", 1)
    assert (await store.get_task("t")).event_count == 1


async def test_a_delayed_call_comes_late(store):
    await store.accept(task(), ClaimRequest("t", "i", "n", 2.0))
    store.delay("report")
    report = Report("t", 1, 1, 3.0, (EventRecord("E", "{}"),))
    with pytest.raises(StoreUnavailable):
        await store.report(report)
    assert (await store.get_task("t")).event_count == 0
    await store.report(report)
    (late,) = await store.deliver_held()
    assert late.status == "ok"
    assert (await store.get_task("t")).event_count == 1
    assert await store.deliver_held() == []


@pytest.mark.parametrize(("when", "applied"), [("before", 0), ("after", 1)])
async def test_a_call_hangs_until_the_block_is_left(store, when, applied):
    async with anyio.create_task_group() as tasks:
        with store.hang("accept", when=when) as hung:
            tasks.start_soon(store.accept, task())
            await hung.reached.wait()
            assert hung.caught == 1
            assert len(await store.due_tickets()) == applied
    assert len(await store.due_tickets()) == 1


async def test_who_is_cancelled_in_a_hanging_call_was_not_heard(store):
    with store.hang() as hung:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(store.accept, task())
            await hung.reached.wait()
            tasks.cancel_scope.cancel()
    assert await store.get_task("t") is None


async def test_a_full_disk_takes_nothing_and_is_read(store):
    await store.accept(task())
    store.disk_full = True
    with pytest.raises(StoreUnavailable) as caught:
        await store.accept(task("u"))
    assert caught.value.hint == "Free some space on its disk."
    assert len(await store.due_tickets()) == 1
    store.disk_full = False
    assert (await store.accept(task("u"))).created


async def test_chance_is_the_same_for_the_same_seed(store):
    async def fates(seed: int) -> list[bool]:
        store.at_random(seed, refuse=0.5)
        found = []
        for _ in range(20):
            try:
                await store.expire(0.0)
                found.append(True)
            except StoreUnavailable:
                found.append(False)
        store.heal()
        return found

    first = await fates(1)
    assert len(set(first)) == 2
    assert first == await fates(1) != await fates(2)
    assert await store.expire(0.0) == []


def test_every_method_of_the_seam_can_be_struck():
    seam = {name for name in vars(Store) if not name.startswith("_") and name != "statistics"}
    assert seam <= vars(FaultyStore).keys()
    assert set(WRITES) <= seam
