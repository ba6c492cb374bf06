"""What the model has found, each as the smallest example that failed."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from llama_corral.protocol.lifecycle import TaskStatus
from llama_corral.protocol.records import (
    ClaimRequest,
    EventRecord,
    HeldTask,
    InstanceRecord,
    NewTask,
    Report,
    ServiceRecord,
    SessionRecord,
    Terminal,
)
from llama_corral.stores import SqlStore

pytestmark = [pytest.mark.anyio]


@pytest.fixture(params=["trio", "asyncio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
async def store(anyio_backend: str) -> AsyncIterator[SqlStore]:
    async with SqlStore("sqlite://") as opened:
        await opened.put_service(ServiceRecord("svc", "{}", 1.0), InstanceRecord("i", "svc", 8, 1.0))
        yield opened


def task(session: str | None = None) -> NewTask:
    return NewTask("t", "svc", "{}", 1.0, session_id=session, digest="d")


@pytest.mark.promise("P1", "P2")
async def test_an_owner_that_was_removed_is_still_judged(store):
    """Given up too early, it claims before it knows; or its claim was stuck on its way. Then it dies."""
    await store.accept(task())
    await store.reap(["i"], 2.0)
    assert await store.list_strangers() == []
    assert await store.claim(ClaimRequest("t", "i", "n", 2.0)) is not None
    assert await store.list_instances() == []
    assert await store.list_strangers() == ["i"]
    (ticket,) = (await store.reap(["i"], 3.0)).tickets
    assert ticket.task_id == "t"
    assert await store.list_strangers() == []


@pytest.mark.promise("P1", "P2", "P3")
async def test_who_works_on_a_deleted_task_does_not_write_to_the_next_one_of_its_id(store):
    """A client deletes its session in the middle of a task and sends the same request again."""
    claims = []
    for round_ in range(2):
        await store.create_session(SessionRecord("s"))
        accepted = await store.accept(task("s"), ClaimRequest("t", "i", f"n{round_}", 2.0))
        claims.append(accepted.claim)
        if round_ == 0:
            await store.delete_session("s")
    old, new = claims
    event = EventRecord("E", "{}")
    assert (await store.report(Report("t", old.epoch, 1, 3.0, (event,)))).status == "fenced"
    ending = Report("t", old.epoch, 2, 3.0, terminal=Terminal(TaskStatus.COMPLETED, "1", "1"))
    assert (await store.report(ending)).status == "fenced"
    assert (await store.release("t", old.epoch, None, 3.0)).status == "fenced"
    assert (await store.heartbeat("i", [HeldTask("t", old.epoch)])).fenced == ("t",)
    record = await store.get_task("t")
    assert (record.status, record.event_count, record.attempts) == ("running", 0, 0)
    assert (await store.report(Report("t", new.epoch, 1, 3.0, (event,)))).status == "ok"


@pytest.mark.promise("P1", "P2")
async def test_nor_to_the_next_one_after_retention(store):
    for round_ in range(2):
        await store.accept(task(), ClaimRequest("t", "i", f"n{round_}", 2.0))
        if round_ == 0:
            await store.reap(["i"], 3.0)
            await store.request_cancel("t", 3.0)
            assert await store.purge(4.0) == 1
    assert (await store.report(Report("t", 1, 1, 5.0, (EventRecord("E", "{}"),)))).status == "fenced"
    assert (await store.get_task("t")).epoch > 1
