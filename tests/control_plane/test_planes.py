"""Several control planes on one store: any of them does any half of the work, and whatever was not heard is found."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import anyio
import pytest

from llama_corral.control_plane import ControlPlane, upkeep
from llama_corral.control_plane.admission import Admission
from llama_corral.control_plane.peers import ANSWER_TIME, Peers
from llama_corral.exceptions import NotFound
from llama_corral.protocol import topics
from llama_corral.protocol.lifecycle import TaskStatus
from llama_corral.protocol.messages import ServiceDefinition, TaskDefinition
from llama_corral.protocol.records import Claim
from llama_corral.queues.memory import MemoryMessageQueue
from llama_corral.stores import SqlStore
from llama_corral.testing import FaultyMessageQueue

from ..services.rig import until
from .corral import Corral, FakeService, open_planes
from .test_messages import completed as completed_message
from .test_messages import stream

pytestmark = pytest.mark.anyio

OWN_TOPIC = topics.instance("test", topics.CONTROL_PLANE_NAME)


async def worker(corral: Corral, name: str = "svc") -> FakeService:
    """A service in another process, registered with one of the control planes."""
    service = await corral.service(name, register=False)
    service.instance_id = f"{name}-far"
    await corral.plane.register(service.info())
    return service


async def beat(corral: Corral, service: FakeService) -> None:
    while True:
        await corral.plane.heartbeat(service.instance_id, ())
        await anyio.sleep(0.02)


async def waits(wait: Callable[[], Awaitable[Any]], found: list[Any]) -> None:
    found.append(await wait())


async def read_log(corral: Corral, task_id: str) -> list[Any]:
    events: list[Any] = []
    with corral.plane.open_log(task_id) as log:
        async for page in log:
            events += [json.loads(event.payload)["n"] for event in page.events]
    return events


# Any of them does any half


@pytest.mark.promise("P1", "P3", "P5")
async def test_each_step_of_a_task_at_another_one() -> None:
    async with open_planes() as planes:
        a, b = planes.a, planes.b
        service = await worker(a)
        await a.plane.register(replace(service.info(), events='[{"qualified_name": "app.Any"}]'))
        answers: list[Any] = []
        async with anyio.create_task_group() as tasks:
            accepted = await b.plane.submit("svc", {"name": "Ada"})
            assert accepted.status is TaskStatus.QUEUED
            tasks.start_soon(waits, lambda: a.plane.wait_result(accepted.task_id), answers)
            tasks.start_soon(waits, lambda: read_log(b, accepted.task_id), answers)
            service.plane = b.plane
            claim = await service.take_ticket(a.queue)
            assert claim is not None
            for number, corral in enumerate((a, b, a)):
                service.plane = corral.plane
                assert (await service.report(claim, {"n": number})).status == "ok"
            await a.plane.send_event(accepted.task_id, '{"type": "app.Any"}')
            page = await b.plane.pull(claim.task_id, claim.epoch, 0)
            assert [event.seq for event in page.events] == [1]
            service.plane = a.plane
            await service.complete(claim)
        assert [0, 1, 2] in answers
        (record,) = [each for each in answers if not isinstance(each, list)]
        assert (record.status, record.result) == (TaskStatus.COMPLETED, '"done"')


@pytest.mark.promise("P1", "P10")
@pytest.mark.parametrize("reader", ["run", "result", "stream"])
async def test_whoever_waits_at_one_hears_of_what_another_one_stores(reader: str) -> None:
    async with open_planes() as planes:
        service = await worker(planes.b)
        found: list[Any] = []

        async def run() -> Any:
            return (await planes.a.plane.run("svc", {}, task_id="t"))[1]

        async def stream() -> Any:
            return await read_log(planes.a, "t")

        async def result() -> Any:
            return await planes.a.plane.wait_result("t")

        async with anyio.create_task_group() as tasks:
            if reader == "run":
                tasks.start_soon(waits, run, found)
            else:
                await planes.a.plane.submit("svc", {}, task_id="t")
                tasks.start_soon(waits, stream if reader == "stream" else result, found)
            claim = await service.take_ticket(planes.b.queue)
            assert claim is not None
            await service.report(claim, {"n": 0})
            await anyio.wait_all_tasks_blocked()
            assert not found
            await service.complete(claim)
        assert found[0] == [0] if reader == "stream" else found[0].status is TaskStatus.COMPLETED


@pytest.mark.promise("P2")
async def test_a_service_beside_one_of_them_works_for_all_and_is_cancelled_by_all() -> None:
    async with open_planes() as planes:
        service = await planes.a.service(slots=1)
        at_once = await planes.a.plane.submit("svc", {})
        assert at_once.status is TaskStatus.RUNNING
        queued = await planes.b.plane.submit("svc", {})
        assert queued.status is TaskStatus.QUEUED
        claim = await service.take_ticket(planes.a.queue)
        assert claim is not None
        assert claim.task_id == queued.task_id
        async with planes.a.wakeups(service) as heard:
            await planes.b.plane.cancel(queued.task_id)
            assert (await heard.receive()).data == {"task_id": queued.task_id, "kind": "cancel"}
        await service.end_cancelled(claim)
        assert (await planes.b.plane.get_task(queued.task_id)).status is TaskStatus.CANCELLED


@pytest.mark.promise("P3")
async def test_a_reader_elsewhere_is_told_that_its_session_was_deleted() -> None:
    async with open_planes() as planes:
        await worker(planes.b)
        await planes.b.plane.sessions.create("s")
        accepted = await planes.b.plane.submit("svc", {}, session_id="s")

        async def read() -> None:
            with pytest.raises(NotFound):
                await read_log(planes.a, accepted.task_id)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(read)
            await anyio.wait_all_tasks_blocked()
            await planes.b.plane.sessions.delete("s")


# What is not heard


@pytest.mark.promise("P1", "P10")
@pytest.mark.parametrize("reader", ["run", "result", "stream"])
async def test_a_lost_broadcast_costs_one_backstop_interval(reader: str) -> None:
    async with open_planes(backstop_interval=0.2) as planes:
        service = await worker(planes.b)
        planes.links[1].drop("broadcast", times=float("inf"))
        found: list[Any] = []

        async def read() -> Any:
            if reader == "run":
                return (await planes.a.plane.run("svc", {}, task_id="t"))[1]
            if reader == "stream":
                return await read_log(planes.a, "t")
            return await planes.a.plane.wait_result("t")

        async with anyio.create_task_group() as tasks:
            if reader != "run":
                await planes.a.plane.submit("svc", {}, task_id="t")
            tasks.start_soon(waits, read, found)
            claim = await service.take_ticket(planes.b.queue)
            assert claim is not None
            await service.report(claim, {"n": 0})
            await service.complete(claim)
        assert len(found) == 1


@pytest.mark.promise("P1", "P10")
async def test_who_hears_again_looks_again_at_once() -> None:
    async with open_planes() as planes:
        service = await worker(planes.b)
        found: list[Any] = []
        async with anyio.create_task_group() as tasks:
            await planes.a.plane.submit("svc", {}, task_id="t")
            tasks.start_soon(waits, lambda: planes.a.plane.wait_result("t"), found)
            claim = await service.take_ticket(planes.b.queue)
            assert claim is not None
            await planes.links[0].disconnect()
            await service.complete(claim)
            await anyio.wait_all_tasks_blocked()
            assert not found
            planes.links[0].reconnect()
        assert found[0].status is TaskStatus.COMPLETED


@pytest.mark.promise("P1", "P10")
async def test_who_could_not_say_it_says_that_something_was_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upkeep, "FIRST_RETRY", 0.01)
    async with open_planes() as planes:
        service = await worker(planes.b)
        found: list[Any] = []
        async with anyio.create_task_group() as tasks:
            await planes.a.plane.submit("svc", {}, task_id="t")
            tasks.start_soon(waits, lambda: planes.a.plane.wait_result("t"), found)
            claim = await service.take_ticket(planes.b.queue)
            assert claim is not None
            planes.links[1].refuse("broadcast", topic=OWN_TOPIC)
            await service.complete(claim)
        assert found[0].status is TaskStatus.COMPLETED


@pytest.mark.promise("P2", "P5")
async def test_one_that_dies_after_it_has_stored_a_task_leaves_it_to_the_others() -> None:
    async with open_planes(backstop_interval=0.1) as planes:
        service = await worker(planes.b)
        planes.links[0].drop("publish")  # it dies before it has published the ticket
        accepted = await planes.a.plane.submit("svc", {})
        claim = await service.take_ticket(planes.b.queue)
        assert claim is not None
        assert claim.task_id == accepted.task_id


@pytest.mark.promise("P1", "P2")
async def test_deadlines_and_later_starts_of_one_that_died_come_with_the_backstop() -> None:
    async with open_planes(backstop_interval=0.1) as planes:
        b = planes.b
        service = await worker(b)
        async with b.another_plane() as dying:
            late = await dying.submit("svc", {}, delay=1.0, timeout=100)
            over = await dying.submit("svc", {}, delay=50, timeout=51)
            idle = await dying.submit("svc", {})
            assert dying._effects.alarm.next < float("inf")
        claim = await service.take_ticket(b.queue)
        assert claim is not None
        assert claim.task_id == idle.task_id
        claim = await service.take_ticket(b.queue)
        while claim is None:  # a second ticket of a task is free
            claim = await service.take_ticket(b.queue)
        assert claim.task_id == late.task_id
        await b.plane.cancel(over.task_id)


@pytest.mark.promise("P2", "P5")
@pytest.mark.parametrize("durable", [False, True])
async def test_a_broker_that_forgets_gets_every_ticket_again(durable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where no slot is free: nothing but these tickets brings the tasks to whoever is free first."""
    monkeypatch.setattr(upkeep, "FIRST_RETRY", 0.01)
    async with open_planes() as planes:
        service = await worker(planes.a)
        for link in planes.links:
            link.durable = durable
        accepted = {(await corral.plane.submit("svc", {})).task_id for corral in (planes.a, planes.b) for _ in range(5)}
        await anyio.wait_all_tasks_blocked()
        async with MemoryMessageQueue() as fresh:
            await planes.restart_broker(fresh)
            got: set[str] = set()
            with anyio.move_on_after(0.5 if durable else None):
                while got < accepted:
                    claim = await service.take_ticket(fresh)
                    if claim is not None:
                        got.add(claim.task_id)
            assert got == (set() if durable else accepted)  # one that is durable has forgotten nothing
            for link in planes.links:
                await link.disconnect()


# Instances


@pytest.mark.promise("P1", "P2", "P8")
async def test_services_beside_another_one_are_not_taken_for_dead() -> None:
    async with open_planes(lease=0.3) as planes:
        a, b = planes.a, planes.b
        local = await a.service(slots=1)
        mine = await a.plane.submit("svc", {})
        far = await worker(b)
        accepted = await b.plane.submit("svc", {}, max_attempts=1)
        claim = await far.take_ticket(b.queue)
        assert claim is not None
        async with a.another_plane():
            assert (await a.plane.get_task(mine.task_id)).owner == local.instance_id
            # The worker says nothing: one of them misses it, all of them know.
            for corral in (a, b):
                record = await corral.plane.wait_result(accepted.task_id)
                assert record is not None
                assert record.error is not None
                assert record.error.type == "worker_lost"
            assert (await a.plane.get_task(mine.task_id)).owner == local.instance_id


@pytest.mark.promise("P2")
async def test_what_died_with_one_is_missed_by_the_others() -> None:
    async with open_planes(lease=0.3) as planes:
        b = planes.b
        async with b.another_plane() as dying:
            local = FakeService(dying, slots=1)
            await dying.register(local.info(), local)
            accepted = await dying.submit("svc", {})
        service = await worker(b)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(beat, b, service)
            claim = await service.take_ticket(b.queue)
            assert claim is not None
            assert (claim.task_id, claim.attempt) == (accepted.task_id, 2)
            tasks.cancel_scope.cancel()


# What a service is, behind one's back


async def failed(corral: Corral) -> str:
    """A task that a service of the original took out of a message, and failed."""
    accepted = await corral.plane.submit("old", {"topic": "llamas"})
    await corral.message("old")
    await corral.plane.process_message(completed_message(accepted.task_id, "boom", status="failed"))
    return accepted.task_id


@pytest.mark.promise("P1")
@pytest.mark.parametrize("heard", [True, False])
async def test_a_service_that_claims_from_now_on(heard: bool) -> None:
    """Who does not know would claim its tasks for it, and they would never end."""
    async with open_planes() as planes:
        a, b = planes.a, planes.b
        await a.plane.services.define(ServiceDefinition(service_name="old"))
        task_id = await failed(a)
        if not heard:
            planes.links[1].drop("broadcast", times=float("inf"))
        service = await worker(b, "old")
        again = await a.plane.retry(task_id)
        assert (await a.plane.get_task(again.task_id)).status is TaskStatus.QUEUED
        claim = await service.take_ticket(a.queue)
        assert claim is not None
        assert claim.task_id == again.task_id


@pytest.mark.promise("P1")
async def test_a_service_that_claims_from_this_moment_on() -> None:
    async with open_planes() as planes:
        a, b = planes.a, planes.b
        await a.plane.services.define(ServiceDefinition(service_name="old"))
        with planes.links[0].hang("publish") as hang:
            accepted = await a.plane.submit("old", {})
            await hang.reached.wait()
            service = await worker(b, "old")
        claims: list[Claim] = []
        while not claims:
            claim = await service.take_ticket(a.queue)
            claims += [claim] if claim is not None else []
        assert claims[0].task_id == accepted.task_id


@pytest.mark.parametrize("heard", [True, False])
async def test_a_service_that_takes_messages_from_now_on(heard: bool) -> None:
    async with open_planes(backstop_interval=60 if heard else 0.05) as planes:
        a, b = planes.a, planes.b
        service = await worker(a, "old")
        accepted = await a.plane.submit("old", {"topic": "llamas"})
        claim = await service.take_ticket(a.queue)
        assert claim is not None
        await service.fail(claim)
        await a.plane.deregister(service.instance_id)
        if not heard:
            planes.links[1].drop("broadcast", times=float("inf"))
        await b.plane.services.define(ServiceDefinition(service_name="old"))
        await until(lambda: a.plane._registry.is_messages_only("old") is not False)
        await a.plane.retry(accepted.task_id)
        given = ""
        while not given:  # the backstop may have published a second ticket before
            given = TaskDefinition.model_validate((await a.message("old")).data).input
        assert json.loads(given) == {"topic": "llamas"}


async def test_a_service_removed_elsewhere_is_not_remembered() -> None:
    async with open_planes() as planes:
        await planes.a.plane.services.define(ServiceDefinition(service_name="old"))
        await planes.b.plane.services.remove("old")
        await until(lambda: planes.a.plane._registry.is_messages_only("old") is None)
        with pytest.raises(NotFound):
            await planes.a.plane.submit("old", {})


# Messages of services


async def wait_turn(plane: ControlPlane) -> None:
    await plane._effects.peers.wait_turn()
    await anyio.wait_all_tasks_blocked()


@pytest.mark.promise("P3")
async def test_messages_of_a_task_are_taken_by_one_of_them_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llama_corral.control_plane.peers.ANSWER_TIME", 0.2)
    async with open_planes() as planes:
        a, b = planes.a, planes.b
        await a.plane.services.define(ServiceDefinition(service_name="old"))
        tasks = [(await b.plane.submit("old", {})).task_id for _ in range(3)]
        for _ in tasks:
            await a.message("old")
        await wait_turn(a.plane)
        for index in range(20):
            for task_id in tasks:
                await a.queue.publish(stream(task_id, index), a.topic("control_plane"))
        for task_id in tasks:
            await a.queue.publish(completed_message(task_id), a.topic("control_plane"))
        for task_id in tasks:
            assert await read_log(b, task_id) == list(range(20))
        assert b.plane._reports._progress == {}
        assert {corral.plane.statistics()["control_planes"] for corral in (a, b)} == {2}


@pytest.mark.promise("P3")
async def test_the_next_one_goes_on_where_the_first_one_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llama_corral.control_plane.peers.ANSWER_TIME", 0.2)
    async with open_planes() as planes:
        own = planes.a.topic("control_plane")
        await planes.b.plane.services.define(ServiceDefinition(service_name="old"))
        task_id = (await planes.b.plane.submit("old", {})).task_id
        await planes.b.message("old")
        await wait_turn(planes.a.plane)
        # What the second one has seen before does not count: the first one writes in between.
        await planes.b.plane.process_message(stream(task_id, 0))
        for index in (1, 2):
            await planes.a.queue.publish(stream(task_id, index), own)
        with planes.a.plane.open_log(task_id) as log:
            async for page in log:
                if page.record.event_count == 3:
                    break
        await planes.links[0].disconnect()  # it can neither hear nor say anything
        planes.a.plane._effects.tell_others("left")
        planes.b.plane._effects.peers.left(planes.a.plane._effects.publisher_id)
        for message in (stream(task_id, 2), stream(task_id, 3), completed_message(task_id)):
            await planes.b.queue.publish(message, own)
        assert await read_log(planes.b, task_id) == [0, 1, 2, 3]


def test_whose_turn_it_is() -> None:
    alone = Peers("b", 20.0, alone=True)
    assert alone.has_turn(-1e9)
    peers = Peers("b", 20.0, alone=False)
    assert not peers.has_turn(1e9)  # who cannot hear the others does not know
    peers.listening(100.0)
    assert not peers.has_turn(100.0)
    assert peers.has_turn(100.0 + ANSWER_TIME)
    peers.heard("c", 101.0)
    assert peers.has_turn(102.0)  # that one is younger
    peers.heard("a", 102.0)
    assert not peers.has_turn(122.0)
    assert peers.count(121.5) == 2
    assert peers.has_turn(122.1)
    peers.heard("a", 130.0)
    peers.left("a")
    peers.left("never")
    assert peers.has_turn(130.0)
    peers.deaf()
    assert not peers.has_turn(200.0)


async def test_a_turn_is_waited_for() -> None:
    peers = Peers("b", 0.1, alone=False)
    now = anyio.current_time()
    peers.listening(now - ANSWER_TIME)
    peers.heard("a", now)
    with anyio.fail_after(5):
        await peers.wait_turn()
        assert anyio.current_time() >= now + 0.1
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(peers.wait_turn_over)
            await anyio.wait_all_tasks_blocked()
            peers.heard("a", anyio.current_time())
    # Nothing is kept of those that have gone.
    for number in range(100):
        peers.heard(f"c{number}", now + number)
    assert len(peers._heard) == 1


async def test_each_has_a_name_of_its_own_that_says_who_was_first() -> None:
    async with open_planes() as planes:
        names = [corral.plane._effects.publisher_id for corral in (planes.a, planes.b)]
        assert names[0].partition("-")[0] == "control_plane"
        assert len(set(names)) == 2


# The limit on what waits


@pytest.mark.promise("P12")
def test_several_keep_to_the_limit_together() -> None:
    planes = [Admission(1000, alone=False) for _ in range(3)]
    waiting = counts = 0
    for number in range(10_000):
        admission = planes[number % 3]
        taken = admission.take("svc")
        if not taken and admission.may_count("svc", 0.0):
            counts += 1
            taken = admission.counted("svc", waiting, 0.0)
        waiting += taken
    assert 950 <= waiting <= 1000 + 3 * 50
    assert counts < 60


async def test_what_is_said_to_others_is_not_said_alone() -> None:
    async with MemoryMessageQueue() as queue:
        link = FaultyMessageQueue(queue)
        broadcast = link.drop("broadcast", times=float("inf"))
        async with SqlStore("sqlite://") as store, ControlPlane(store, link, alone=True):
            await anyio.wait_all_tasks_blocked()
        assert broadcast.applied == 0
