"""What a control plane does by itself: at its start, when something died, when time is over, and nothing otherwise."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import anyio
import pytest

from llama_corral.control_plane import ControlPlane, ControlPlaneConfig, upkeep
from llama_corral.control_plane.alarm import Alarm
from llama_corral.control_plane.leases import Leases
from llama_corral.exceptions import Conflict, StoreUnavailable
from llama_corral.protocol.lifecycle import TaskStatus
from llama_corral.protocol.messages import ServiceDefinition
from llama_corral.protocol.records import HeldTask, InstanceRecord
from llama_corral.queues.memory import MemoryMessageQueue
from llama_corral.stores import SqlStore
from llama_corral.testing import FaultyStore

from .corral import Corral, open_corral

pytestmark = pytest.mark.anyio


@pytest.mark.promise("P2", "P5", "P8")
async def test_the_next_process_takes_over_at_once(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/corral.db"
    async with open_corral(url) as corral:
        await corral.service(slots=1)
        running = await corral.plane.submit("svc", {})
        queued = await corral.plane.submit("svc", {})
        assert (running.status, queued.status) == (TaskStatus.RUNNING, TaskStatus.QUEUED)
        # The process dies: the service says nothing, the memory queue is gone.
    async with open_corral(url) as corral:
        service = await corral.service()
        claims = [await service.take_ticket(corral.queue), await service.take_ticket(corral.queue)]
        found = {claim.task_id: claim.attempt for claim in claims if claim is not None}
        assert found == {running.task_id: 2, queued.task_id: 1}


@pytest.mark.promise("P2", "P12")
async def test_a_long_queue_is_published_in_portions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upkeep, "PORTION", 3)
    monkeypatch.setattr(upkeep, "BACKLOG_INTERVAL", 0.01)
    url = f"sqlite:///{tmp_path}/corral.db"
    async with open_corral(url) as corral:
        await corral.service()
        accepted = [(await corral.plane.submit("svc", {})).task_id for _ in range(10)]
    async with open_corral(url) as corral:
        await anyio.wait_all_tasks_blocked()
        assert corral.queue.statistics()["topics"]["test.svc"] == 3
        service = await corral.service()
        done = []
        while len(done) < 10:
            claim = await service.take_ticket(corral.queue)
            if claim is not None:
                await service.complete(claim)
                done.append(claim.task_id)
        assert sorted(done) == sorted(accepted)


@pytest.mark.promise("P2", "P8")
async def test_workers_live_on_when_their_control_plane_is_restarted(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/corral.db"
    async with open_corral(url) as corral:
        worker = await corral.service(register=False)
        worker.instance_id = "far"
        claim = await corral.elsewhere("svc", worker)
    async with open_corral(url) as corral:
        held = HeldTask(claim.task_id, claim.epoch)
        answer = await corral.plane.heartbeat("far", [held])
        assert (answer.known, answer.fenced) == (True, ())
        worker.plane = corral.plane
        assert (await worker.complete(claim)).status == "ok"
        assert (await corral.plane.get_task(claim.task_id)).attempts == 0


@pytest.mark.promise("P2")
async def test_a_worker_that_died_with_its_control_plane_is_judged_by_its_lease(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/corral.db"
    async with open_corral(url) as corral:
        worker = await corral.service(register=False)
        worker.instance_id = "far"
        claim = await corral.elsewhere("svc", worker)
    async with open_corral(url, lease=0.6) as corral:
        assert (await corral.plane.get_task(claim.task_id)).owner == "far"
        assert (await corral.message("svc")).data["task_id"] == claim.task_id


@pytest.mark.promise("P2")
async def test_a_store_shared_with_others_is_not_taken_over(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/corral.db"
    async with open_corral(url) as corral:
        await corral.service(slots=1)
        running = await corral.plane.submit("svc", {})
    async with open_corral(url, alone=False) as corral:
        assert (await corral.plane.get_task(running.task_id)).status is TaskStatus.RUNNING


def test_leases_judge_by_movement_on_one_clock() -> None:
    leases = Leases(10)

    def instance(name: str, heartbeat: int) -> InstanceRecord:
        return InstanceRecord(name, "svc", 1, started_at=5.0, heartbeat=heartbeat)

    assert leases.dead([instance("a", 7), instance("b", 3)], now=100) == []
    for now in (103, 106, 109):
        assert leases.dead([instance("a", 7), instance("b", 3)], now=now) == []
    assert leases.dead([instance("a", 7), instance("b", 4)], now=110) == []
    assert leases.dead([instance("a", 7), instance("b", 4)], now=110.1) == ["a"]
    assert leases.dead([instance("b", 4), instance("c", 0)], now=113) == []
    assert leases.dead([instance("a", 7)], now=116) == []  # back again: looked at for the first time


@pytest.mark.promise("P2")
def test_who_stood_still_itself_does_not_take_others_for_dead() -> None:
    """A stopped process, a machine that slept: the heartbeats of that time wait in its sockets."""
    leases = Leases(20)
    worker = InstanceRecord("w", "svc", 1, started_at=5.0, heartbeat=7)
    for now in (100, 105, 109, 300, 304):
        assert leases.dead([worker], now=now) == []
    assert leases.dead([worker], now=309) == ["w"]  # nothing has come since


@pytest.mark.promise("P2")
def test_a_heartbeat_that_could_not_be_stored_is_a_sign_of_life() -> None:
    leases = Leases(10)
    worker = InstanceRecord("w", "svc", 1, started_at=5.0, heartbeat=7)
    for now in (100, 103, 106, 109):
        assert leases.dead([worker], now=now) == []
    leases.heard("w", 110)
    leases.heard("stranger", 110)
    for now in (112, 115, 118, 120):
        assert leases.dead([worker], now=now) == []
    assert leases.dead([worker], now=120.1) == ["w"]


@pytest.mark.promise("P2")
async def test_workers_do_not_lose_their_tasks_to_a_full_disk() -> None:
    """They beat all the time, and nothing that they say can be stored."""
    store = FaultyStore(SqlStore("sqlite://"))
    config = ControlPlaneConfig(topic_namespace="test", lease=0.6)
    async with store, MemoryMessageQueue() as queue, ControlPlane(store, queue, config=config, alone=True) as plane:
        corral = Corral(store.inner, queue, plane)  # type: ignore[arg-type]
        claim = await corral.elsewhere("far", await corral.service(register=False))
        store.disk_full = True
        over = anyio.current_time() + 2 * config.lease
        while anyio.current_time() < over:
            with pytest.raises(StoreUnavailable):
                await plane.heartbeat("svc-instance", [HeldTask(claim.task_id, claim.epoch)])
            await anyio.sleep(config.lease / 20)
        store.disk_full = False
        await anyio.sleep(config.lease / 2)  # the reaper has looked again, and no heartbeat has come yet
        assert (await plane.get_task(claim.task_id)).owner == "svc-instance"


@pytest.mark.promise("P2")
async def test_a_silent_instance_is_reaped_and_one_that_beats_is_not() -> None:
    async with open_corral(lease=0.6) as corral:
        local = await corral.service(slots=1)
        kept = await corral.plane.submit("svc", {})
        silent, beating = await corral.service(register=False), await corral.service(register=False)
        silent.instance_id, beating.instance_id = "silent", "beating"
        lost = await corral.elsewhere("far", silent)
        alive = await corral.elsewhere("near", beating)
        async with anyio.create_task_group() as group:

            async def beat() -> None:
                while True:
                    await corral.plane.heartbeat("beating", [HeldTask(alive.task_id, alive.epoch)])
                    await anyio.sleep(0.03)

            group.start_soon(beat)
            async with corral.queue.consumer(corral.topic("far")) as consumer:
                (delivery,) = await consumer.receive()
                assert delivery.message.data["task_id"] == lost.task_id
            group.cancel_scope.cancel()
        assert (await corral.plane.get_task(alive.task_id)).owner == "beating"
        assert (await corral.plane.get_task(kept.task_id)).owner == local.instance_id
        assert (await corral.plane.get_task(lost.task_id)).attempts == 1
        assert not (await corral.plane.heartbeat("silent", ())).known


@pytest.mark.promise("P1", "P2")
async def test_an_owner_that_is_not_registered_is_missed_too() -> None:
    """It was given up too early, claimed once more before it knew, and died. Or its claim was late."""
    async with open_corral(lease=0.05) as corral:
        service = await corral.service(register=False)
        claim = await corral.elsewhere("far", service)
        await corral.store.delete_instance(service.instance_id)
        async with corral.queue.consumer(corral.topic("far")) as consumer:
            (delivery,) = await consumer.receive()
        assert delivery.message.data["task_id"] == claim.task_id
        assert (await corral.plane.get_task(claim.task_id)).attempts == 1


@pytest.mark.promise("P1")
async def test_a_task_that_loses_its_worker_too_often_fails_and_its_reader_hears_it() -> None:
    async with open_corral(lease=0.05, max_attempts=1) as corral:
        service = await corral.service(register=False)
        claim = await corral.elsewhere("far", service)
        record = await corral.plane.wait_result(claim.task_id, 5)
        assert record is not None
        assert record.status is TaskStatus.FAILED
        assert record.error is not None
        assert record.error.type == "worker_lost"


@pytest.mark.promise("P1")
async def test_a_deadline_ends_what_nobody_holds_in_time(corral: Corral) -> None:
    await corral.service()
    session = (await corral.plane.sessions.create()).session_id
    first = await corral.plane.submit("svc", {}, session_id=session, timeout=0.5)
    second = await corral.plane.submit("svc", {}, session_id=session)
    assert second.status is TaskStatus.HELD
    record = await corral.plane.wait_result(first.task_id, 5)
    assert record is not None
    assert record.status is TaskStatus.TIMED_OUT
    assert (await corral.message("svc")).data["task_id"] == first.task_id
    assert (await corral.message("svc")).data["task_id"] == second.task_id
    with pytest.raises(Conflict):
        await corral.plane.cancel(first.task_id)


async def test_an_alarm_knows_the_next_moment_only(anyio_backend: str) -> None:
    alarm, now = Alarm(), [1000.0]
    for moment in (1070.0, None, 1060.0, 1080.0):
        alarm.add(moment)
    assert alarm.next == 1060.0
    with anyio.move_on_after(0.01) as early:
        await alarm.wait_due(lambda: now[0])
    assert early.cancelled_caught
    now[0] = 1061.0
    assert await alarm.wait_due(lambda: now[0]) == 1060.0
    assert alarm.next == math.inf
    async with anyio.create_task_group() as group:
        group.start_soon(alarm.wait_due, lambda: now[0])
        await anyio.wait_all_tasks_blocked()
        alarm.add(2000.0)
        await anyio.wait_all_tasks_blocked()
        now[0] = 1500.0
        alarm.add(1400.0)


@pytest.mark.promise("P5")
async def test_the_backstop_brings_a_ticket_that_was_lost() -> None:
    async with open_corral(backstop_interval=0.05) as corral:
        service = await corral.service()
        accepted = await corral.plane.submit("svc", {})
        assert (await corral.message("svc")).data["task_id"] == accepted.task_id  # taken, and forgotten
        claim = await service.take_ticket(corral.queue)
        assert claim is not None
        assert claim.task_id == accepted.task_id


async def count_looks(corral: Corral, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Return when the backstop has looked so often."""
    looks = 0
    enough = anyio.Event()
    look = corral.store.next_due  # the last thing that it asks

    async def count(now: float) -> float | None:
        nonlocal looks
        looks += 1
        if looks == number:
            enough.set()
        return await look(now)

    monkeypatch.setattr(corral.store, "next_due", count)
    await enough.wait()


async def test_the_backstop_does_not_repeat_what_still_waits_in_the_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_corral(backstop_interval=0.2) as corral:
        await corral.service()
        await corral.plane.submit("svc", {})
        await count_looks(corral, monkeypatch, 3)
        assert corral.queue.statistics()["topics"]["test.svc"] == 1


class UncountedQueue(MemoryMessageQueue):
    """Does not know how many messages wait, as most brokers."""

    def statistics(self) -> Mapping[str, Any]:
        return {**super().statistics(), "topics": {}}


@pytest.mark.promise("P12")
async def test_the_backstop_does_not_fill_a_queue_that_cannot_count(monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_corral(backstop_interval=0.2, queue=UncountedQueue()) as corral:
        service = await corral.service(slots=2)  # its capacity
        for _ in range(2):
            await corral.plane.submit("svc", {})
        lost = await corral.plane.submit("svc", {})
        assert (await corral.message("svc")).data["task_id"] == lost.task_id
        before = corral.queue.statistics()["published"]
        await count_looks(corral, monkeypatch, 3)
        assert corral.queue.statistics()["published"] == before
        # A slot is free, and nobody takes the task: its ticket is lost.
        await service.complete(await service.wait_claim())
        assert (await corral.message("svc")).data["task_id"] == lost.task_id


@pytest.mark.promise("P10")
async def test_an_idle_plane_asks_the_store_nothing(corral: Corral) -> None:
    await corral.service(slots=1)
    await corral.plane.services.define(ServiceDefinition(service_name="other"))
    await anyio.wait_all_tasks_blocked()
    before, started = corral.store.statistics(), time.process_time()
    await anyio.sleep(0.5)  # the length of the observation, not a wait for something
    assert corral.store.statistics() == before
    assert time.process_time() - started < 0.05


@pytest.mark.promise("P3")
async def test_several_planes_on_one_store_wake_each_other() -> None:
    async with open_corral(alone=False) as corral:
        async with corral.another_plane() as other:
            service = await corral.service(slots=1)
            accepted = await corral.plane.submit("svc", {})
            claim = await service.wait_claim()
            indices = []
            async with anyio.create_task_group() as group:

                async def read() -> None:
                    async for page in other.open_log(accepted.task_id):
                        indices.extend(event.index for event in page.events)

                group.start_soon(read)
                await anyio.wait_all_tasks_blocked()
                await service.report(claim, {"n": 0})
                await service.report(claim, {"n": 1})
                await service.complete(claim)
            assert indices == [0, 1]
