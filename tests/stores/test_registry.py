"""Services, instances, sessions, and the lists and counts of tasks."""

from __future__ import annotations

import json

import anyio
import pytest

from llama_corral.exceptions import BadInput, NotFound
from llama_corral.protocol.lifecycle import TaskStatus
from llama_corral.protocol.records import InstanceRecord, ServiceRecord, SessionRecord, TaskFilter

S = TaskStatus
pytestmark = pytest.mark.anyio


async def test_services_and_instances_are_replaced(driver) -> None:
    store = driver.store
    service = ServiceRecord("svc", '{"a":1}', 1.0, events="[]", start_schema="{}")
    instance = InstanceRecord("i", "svc", 4, 1.0)
    await store.put_service(service, instance)
    await store.heartbeat("i", [])
    await store.put_service(ServiceRecord("svc", '{"a":2}', 2.0))
    await store.put_service(ServiceRecord("abc", "{}", 2.0), InstanceRecord("j", "abc", 1, 2.0))
    assert await store.get_service("svc") == ServiceRecord("svc", '{"a":2}', 2.0)
    assert [found.service_name for found in await store.list_services()] == ["abc", "svc"]
    assert [found.heartbeat for found in await store.list_instances()] == [1, 0]
    await store.put_service(service, instance)
    assert (await store.list_instances())[0] == instance
    await driver.accept("t", by="i")
    assert await store.delete_service("svc")
    assert not await store.delete_service("svc")
    assert await store.get_service("svc") is None
    assert [found.instance_id for found in await store.list_instances()] == ["j"]
    assert await driver.status("t") is S.RUNNING
    await store.delete_instance("j")
    await store.delete_instance("j")
    assert await store.list_instances() == []


async def test_sessions_are_created_once_and_listed_in_pages(driver) -> None:
    store = driver.store
    for session_id in "cab":
        await driver.session(session_id, state='{"k":1}', created_at=4.0)
    assert not await store.create_session(SessionRecord("a", policy="reject"))
    await driver.accept("t", "a")
    await driver.accept("u", "a")
    assert await store.get_session("a") == SessionRecord("a", '{"k":1}', 0, "enqueue", 4.0, ("t", "u"))
    assert await store.get_session("z") is None
    assert [session.session_id for session in await store.list_sessions(limit=2)] == ["a", "b"]
    assert [session.session_id for session in await store.list_sessions(after="b")] == ["c"]


async def test_concurrent_merges_of_the_state_all_stand(driver) -> None:
    await driver.session(state='{"old":true}')
    async with anyio.create_task_group() as tasks:
        for number in range(20):
            tasks.start_soon(driver.store.merge_state, "s", {f"k{number}": number})
    record = await driver.store.get_session("s")
    assert json.loads(record.state) == {"old": True, **{f"k{number}": number for number in range(20)}}
    assert record.version == 20
    assert await driver.store.merge_state("s", {"old": "é"}) == await driver.store.get_session("s")
    assert await driver.store.merge_state("z", {}) is None
    await driver.accept("t", "s")
    assert (await driver.store.merge_state("s", {})).task_ids == ()  # a long session costs the writer nothing


@pytest.mark.promise("P9")
@pytest.mark.parametrize("value", [object(), float("nan"), {1, 2}])
async def test_a_state_that_is_no_json_is_refused(driver, value) -> None:
    await driver.session()
    with pytest.raises(BadInput):
        await driver.store.merge_state("s", {"k": value})


@pytest.mark.promise("P9")
async def test_text_that_no_database_stores_is_the_callers_error(driver) -> None:
    with pytest.raises(BadInput):
        await driver.accept("t", input="\ud800")
    with pytest.raises(BadInput):
        await driver.store.get_task("\ud800")


async def test_deleting_a_session_deletes_what_belongs_to_it(driver) -> None:
    store = driver.store
    await driver.session("s")
    await driver.session("other")
    await driver.accept("kept", "other", by="i")
    await driver.accept("ended", "s", by="i")
    await driver.end("ended", based_on=0, events=2)
    await driver.accept("running", "s", by="i")
    await driver.accept("held", "s")
    await store.send("running", "e", 2.0)
    deleted = await store.delete_session("s")
    assert (deleted.session_id, deleted.running) == ("s", (("running", "i"),))
    assert await store.delete_session("s") is None
    for task_id in ("ended", "running", "held"):
        assert await store.get_task(task_id) is None
        assert await store.read_events(task_id, 0) is None
    assert (await driver.report("running", events=1)).status == "deleted"
    assert (await driver.end("running")).status == "deleted"
    assert await driver.status("kept") is S.RUNNING
    await driver.session("s")
    assert (await driver.accept("fresh", "s", by="i")).claim.context is None


def ids(records) -> list[str]:
    return [record.task_id for record in records]


async def test_lists_are_newest_first_with_filters_and_pages(driver) -> None:
    store = driver.store
    await driver.session("s", policy="concurrent")
    await driver.accept("a", by="i")
    await driver.end("a")
    await driver.accept("b", "s")
    await driver.accept("c", "s", by="i", service="other")
    await driver.accept("d", service="other")
    await driver.accept("e", by="i")
    await driver.end("e", status=S.FAILED)
    expected = {
        "edcba": TaskFilter(),
        "ea": TaskFilter(status=(S.COMPLETED, S.FAILED)),
        "db": TaskFilter(status=(S.QUEUED,)),
        "eba": TaskFilter(service_name="svc"),
        "d": TaskFilter(service_name="other", status=(S.QUEUED,)),
        "cb": TaskFilter(session_id="s"),
        "c": TaskFilter(session_id="s", status=(S.RUNNING,)),
        "b": TaskFilter(session_id="s", service_name="svc"),
        "": TaskFilter(session_id="s", service_name="svc", status=(S.FAILED,)),
        "ba": TaskFilter(before="c"),
        "dc": TaskFilter(before="e", limit=2),
        "a": TaskFilter(status=(S.COMPLETED, S.FAILED), before="e", limit=2),
    }
    for names, which in expected.items():
        assert "".join(ids(await store.list_tasks(which))) == names, which
    assert await store.list_tasks(TaskFilter(limit=-1)) == []
    with pytest.raises(NotFound):
        await store.list_tasks(TaskFilter(before="unknown"))


async def test_an_implicit_session_lists_its_task(driver) -> None:
    accepted = await driver.accept("t")
    which = TaskFilter(session_id=accepted.session_id)
    assert ids(await driver.store.list_tasks(which)) == ["t"]
    assert await driver.store.list_tasks(TaskFilter(session_id=accepted.session_id, status=(S.FAILED,))) == []


async def test_open_tasks_are_counted_by_service_and_status(driver) -> None:
    await driver.session()
    for task_id in "ab":
        await driver.accept(task_id, "s")
    await driver.accept("c", by="i", service="other")
    await driver.accept("d", by="i", service="other")
    await driver.end("d")
    assert await driver.store.count_tasks() == {"svc": {"queued": 1, "held": 1}, "other": {"running": 1}}


async def test_due_tickets_are_oldest_first(driver) -> None:
    for task_id in "abc":
        await driver.accept(task_id)
    await driver.claim("b")
    assert [ticket.task_id for ticket in await driver.store.due_tickets()] == ["a", "c"]
    assert [ticket.task_id for ticket in await driver.store.due_tickets(limit=1)] == ["a"]


@pytest.mark.promise("P3")
async def test_events_are_read_from_any_index_in_pages(driver) -> None:
    await driver.accept("t", by="i")
    await driver.report("t", 1, events=5)
    page = await driver.store.read_events("t", 2, 2)
    assert [(event.index, event.type, json.loads(event.payload)["n"]) for event in page.events] == [
        (2, "E", 2),
        (3, "E", 3),
    ]
    assert (page.record.event_count, page.record.status) == (5, S.RUNNING)
    assert (await driver.store.read_events("t", 5)).events == ()
    assert await driver.store.read_events("unknown", 0) is None
