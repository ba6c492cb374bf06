"""Tasks and sessions after their acceptance: endings, cancelling, outside events, readers."""

from __future__ import annotations

import json

import anyio
import pytest

from llama_corral.exceptions import BadInput, Conflict, NotFound
from llama_corral.protocol.lifecycle import TaskStatus
from llama_corral.protocol.messages import ActionTypes, ServiceDefinition

from .corral import Corral

pytestmark = pytest.mark.anyio


@pytest.mark.promise("P1")
async def test_a_result_reaches_whoever_waits(corral: Corral) -> None:
    service = await corral.service(slots=1)
    accepted = await corral.plane.submit("svc", {})
    results = []

    async def wait() -> None:
        results.append(await corral.plane.wait_result(accepted.task_id, 10))

    async with anyio.create_task_group() as group:
        group.start_soon(wait)
        group.start_soon(wait)
        await service.complete(await service.wait_claim(), {"n": 1})
    assert [record.result for record in results] == ['{"n": 1}'] * 2
    assert await corral.plane.wait_result(accepted.task_id, 0) == results[0]
    with pytest.raises(NotFound):
        await corral.plane.wait_result("nothing", 1)


async def test_run_answers_the_ending_without_reading_the_store(
    corral: Corral, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = await corral.service(slots=1)

    async def never(task_id: str) -> None:
        pytest.fail("the store was read")

    monkeypatch.setattr(corral.store, "get_task", never)
    async with anyio.create_task_group() as group:

        async def work() -> None:
            await service.complete(await service.wait_claim(), 42)

        group.start_soon(work)
        accepted, terminal = await corral.plane.run("svc", {}, task_id="t")
    assert accepted.task_id == "t"
    assert terminal is not None
    assert terminal.result == "42"


@pytest.mark.promise("P6")
async def test_a_cancelled_run_cancels_its_task(corral: Corral) -> None:
    service = await corral.service(slots=1)
    async with corral.wakeups(service) as heard, anyio.create_task_group() as group:

        async def run() -> None:
            await corral.plane.run("svc", {}, task_id="t")

        group.start_soon(run)
        claim = await service.wait_claim()
        group.cancel_scope.cancel()
        with anyio.CancelScope(shield=True):
            message = await heard.receive()
    assert message.data == {"task_id": "t", "kind": "cancel"}
    page = await corral.plane.pull("t", claim.epoch, 0)
    assert page.cancel_requested
    await service.end_cancelled(claim)
    assert (await corral.plane.get_task("t")).status is TaskStatus.CANCELLED


async def test_a_cancelled_run_leaves_alone_what_another_request_had_started(corral: Corral) -> None:
    await corral.service(slots=1)
    await corral.plane.submit("svc", {}, task_id="t")
    with anyio.move_on_after(0.05):
        await corral.plane.run("svc", {}, task_id="t", client_id=True)
    assert not (await corral.plane.get_task("t")).cancel_requested


@pytest.mark.promise("P7")
async def test_run_is_answered_at_drain_when_nobody_works_on_its_task(corral: Corral) -> None:
    service = await corral.service(slots=2)
    answers = {}
    async with anyio.create_task_group() as group:

        async def run(task_id: str) -> None:
            answers[task_id] = (await corral.plane.run("svc", {}, task_id=task_id))[1]

        group.start_soon(run, "idle")
        idle = await service.wait_claim()
        group.start_soon(run, "working")
        working = await service.wait_claim()
        await service.report(idle, waiting=True)
        corral.plane.refuse_new()
        await anyio.wait_all_tasks_blocked()
        assert answers == {"idle": None}
        await service.complete(working)
    assert answers["working"] is not None
    assert not (await corral.plane.get_task("idle")).cancel_requested


@pytest.mark.promise("P1", "P6")
@pytest.mark.parametrize("state", ["held", "queued", "running", "waiting"])
async def test_cancelling_in_each_state(corral: Corral, state: str) -> None:
    service = await corral.service(slots=0 if state == "queued" else 1)
    session = (await corral.plane.sessions.create()).session_id
    if state == "held":
        await corral.plane.submit("svc", {}, session_id=session)
    accepted = await corral.plane.submit("svc", {}, session_id=session)
    async with corral.wakeups(service) as heard:
        if state == "waiting":
            await service.report(await service.wait_claim(), waiting=True)
        answer = await corral.plane.cancel(accepted.task_id)
        if state in ("held", "queued"):
            assert answer.ended
        else:
            assert (answer.ended, answer.owner, answer.status) == (False, service.instance_id, TaskStatus(state))
            message = await heard.receive()
            assert message.action == ActionTypes.WAKE_UP
            assert message.data["task_id"] == accepted.task_id
            await service.end_cancelled((service.claims or [await corral.reclaim(accepted.task_id, service)])[0])
    record = await corral.plane.wait_result(accepted.task_id, 5)
    assert record is not None
    assert record.status is TaskStatus.CANCELLED
    with pytest.raises(Conflict) as caught:
        await corral.plane.cancel(accepted.task_id)
    assert caught.value.fields["status"] == "cancelled"
    with pytest.raises(NotFound):
        await corral.plane.cancel("nothing")


async def test_cancelling_the_held_one_keeps_the_line_going(corral: Corral) -> None:
    service = await corral.service(slots=1)
    session = (await corral.plane.sessions.create()).session_id
    tasks = [(await corral.plane.submit("svc", {}, session_id=session)).task_id for _ in range(3)]
    await corral.plane.cancel(tasks[1])
    await service.complete(await service.wait_claim())
    claim = await service.take_ticket(corral.queue)
    assert claim is not None
    assert claim.task_id == tasks[2]


@pytest.mark.promise("P3")
async def test_a_reader_from_before_the_first_event_gets_all_to_the_end(corral: Corral) -> None:
    service = await corral.service(slots=1)
    accepted = await corral.plane.submit("svc", {})
    claim = await service.wait_claim()
    got: list[int] = []
    async with anyio.create_task_group() as group:

        async def read() -> None:
            async for page in corral.plane.open_log(accepted.task_id):
                got.extend(json.loads(event.payload)["n"] for event in page.events)

        group.start_soon(read)
        await anyio.wait_all_tasks_blocked()
        for n in range(5):
            await service.report(claim, {"n": n})
        await service.complete(claim)
    assert got == [0, 1, 2, 3, 4]


async def test_outside_events_wait_in_the_inbox_and_wake_the_owner(corral: Corral) -> None:
    service = await corral.service()
    accepted = await corral.plane.submit("svc", {})
    early = await corral.plane.send_event(accepted.task_id, '{"answer":   42}', service_name="svc")
    assert (early.seq, early.owner) == (1, None)
    claim = await service.take_ticket(corral.queue)
    assert claim is not None
    assert [event.payload for event in claim.inbox] == ['{"answer": 42}']
    async with corral.wakeups(service) as heard:
        await corral.plane.send_event(accepted.task_id, "{}")
        assert (await heard.receive()).data == {"task_id": accepted.task_id, "kind": "event"}
    with pytest.raises(BadInput):
        await corral.plane.send_event(accepted.task_id, "nonsense")
    with pytest.raises(BadInput, match="svc"):
        await corral.plane.send_event(accepted.task_id, "{}", service_name="other")
    await service.complete(claim)
    with pytest.raises(Conflict):
        await corral.plane.send_event(accepted.task_id, "{}")
    with pytest.raises(NotFound):
        await corral.plane.send_event("nothing", "{}")


async def test_release_tickets_the_task_again(corral: Corral) -> None:
    service = await corral.service(slots=1)
    accepted = await corral.plane.submit("svc", {})
    claim = await service.wait_claim()
    assert (await corral.plane.release(claim.task_id, claim.epoch, None)).status == "ok"
    again = await service.take_ticket(corral.queue)
    assert again is not None
    assert (again.task_id, again.epoch) == (accepted.task_id, 2)
    assert (await service.complete(claim)).status == "fenced"
    assert (await service.complete(again)).status == "ok"


async def test_sessions(corral: Corral) -> None:
    sessions = corral.plane.sessions
    made = await sessions.create()
    named, created = await sessions.get_or_create("user-42")
    assert (named.session_id, created) == ("user-42", True)
    assert (await sessions.get_or_create("user-42"))[1] is False
    with pytest.raises(Conflict):
        await sessions.create("user-42")
    with pytest.raises(BadInput):
        await sessions.create("a/b")
    assert {each.session_id for each in await sessions.list()} == {made.session_id, "user-42"}
    assert await sessions.merge_state("user-42", {"a": 1}) == {"a": 1}
    assert await sessions.merge_state("user-42", {"b": [2]}) == {"a": 1, "b": [2]}
    assert await sessions.state("user-42") == {"a": 1, "b": [2]}
    await sessions.delete("user-42")
    for call in (sessions.get, sessions.delete, sessions.state):
        with pytest.raises(NotFound):
            await call("user-42")
    with pytest.raises(NotFound):
        await sessions.merge_state("user-42", {})


async def test_deleting_a_session_stops_runs_and_readers(corral: Corral) -> None:
    service = await corral.service(slots=1)
    session = (await corral.plane.sessions.create()).session_id
    running = (await corral.plane.submit("svc", {}, session_id=session)).task_id
    held = (await corral.plane.submit("svc", {}, session_id=session)).task_id
    claim = await service.wait_claim()
    ended = []
    async with corral.wakeups(service) as heard, anyio.create_task_group() as group:

        async def read(task_id: str) -> None:
            with pytest.raises(NotFound):
                async for _ in corral.plane.open_log(task_id):
                    pass
            ended.append(task_id)

        group.start_soon(read, running)
        group.start_soon(read, held)
        await anyio.wait_all_tasks_blocked()
        await corral.plane.sessions.delete(session)
        assert (await heard.receive()).data == {"task_id": running, "kind": "deleted"}
    assert sorted(ended) == sorted([running, held])
    assert (await service.complete(claim)).status == "deleted"


async def test_services(corral: Corral) -> None:
    await corral.service("b")
    definition = ServiceDefinition(service_name="a", description="old")
    await corral.plane.services.define(definition)
    await corral.plane.services.define(definition.model_copy(update={"description": "new"}))
    assert [each.service_name for each in await corral.plane.services.list()] == ["a", "b"]
    assert json.loads((await corral.plane.services.get("a")).definition)["description"] == "new"
    # A service with instances does not begin to speak by messages because somebody repeats its definition.
    await corral.plane.services.define(ServiceDefinition(service_name="b"))
    assert (await corral.plane.services.get("b")).events == "[]"
    assert await corral.plane.services.remove("b")
    assert not await corral.plane.services.remove("b")
    with pytest.raises(NotFound):
        await corral.plane.submit("b", {})
    for name in ("control_plane", "register", "", "a/b"):
        with pytest.raises(BadInput):
            await corral.plane.services.define(ServiceDefinition(service_name=name))
