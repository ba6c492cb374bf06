"""Accepting tasks: what is refused at the door, which way starts a task, and that nothing leaks in between."""

from __future__ import annotations

from pathlib import Path

import anyio
import pytest
from anyio.lowlevel import checkpoint

from llama_corral.abc import MessageQueue
from llama_corral.control_plane import upkeep
from llama_corral.exceptions import BadInput, Conflict, Draining, NotFound, QueueUnavailable, StoreUnavailable
from llama_corral.protocol.lifecycle import TaskStatus
from llama_corral.protocol.messages import ActionTypes, QueueMessage
from llama_corral.queues.memory import MemoryMessageQueue

from .corral import Corral, open_corral

pytestmark = pytest.mark.anyio


async def test_a_free_slot_takes_the_task_in_the_same_unit(corral: Corral) -> None:
    service = await corral.service(slots=2)
    await anyio.wait_all_tasks_blocked()  # the reaper's first look
    await corral.plane.submit("svc", {})  # the first one counts what waits
    await service.wait_claim()
    before = corral.store.statistics()["units"]
    accepted = await corral.plane.submit("svc", {"topic": "llamas"})
    assert corral.store.statistics()["units"] == before + 1
    assert accepted.status is TaskStatus.RUNNING
    claim = await service.wait_claim()
    assert (claim.task_id, claim.input, claim.epoch) == (accepted.task_id, '{"topic":"llamas"}', 1)
    assert service.free == 0


async def test_without_a_free_slot_a_ticket_goes_out(corral: Corral) -> None:
    await corral.service()
    accepted = await corral.plane.submit("svc", '{"topic": "llamas"}')
    assert accepted.status is TaskStatus.QUEUED
    message = await corral.message("svc")
    assert message.action == ActionTypes.NEW_TASK
    assert message.type == "svc"
    assert message.data["task_id"] == accepted.task_id
    assert message.data["agent_id"] == "svc"


@pytest.mark.promise("P4", "P5")
async def test_a_held_task_gives_the_slot_back_and_is_ticketed_when_the_session_is_free(corral: Corral) -> None:
    service = await corral.service(slots=2)
    session = await corral.plane.sessions.create()
    first = await corral.plane.submit("svc", {}, session_id=session.session_id)
    second = await corral.plane.submit("svc", {}, session_id=session.session_id)
    assert (first.status, second.status) == (TaskStatus.RUNNING, TaskStatus.HELD)
    assert service.free == 1
    assert corral.queue.statistics()["published"] == 0
    await service.complete(await service.wait_claim())
    claim = await service.take_ticket(corral.queue)
    assert claim is not None
    assert claim.task_id == second.task_id


@pytest.mark.promise("P9")
@pytest.mark.parametrize("arguments", ["", "nonsense", "[1]", '"text"', "null", "3", '{"a": NaN}', {"a": {1, 2}}])
async def test_arguments_that_are_no_json_object_are_refused(corral: Corral, arguments: str) -> None:
    service = await corral.service(slots=1)
    with pytest.raises(BadInput):
        await corral.plane.submit("svc", arguments)
    assert service.free == 1
    assert await corral.plane.services.status() == {
        "svc": {
            "held": 0,
            "queued": 0,
            "running": 0,
            "waiting": 0,
            "oldest_queued": None,
            "instances": 1,
            "capacity": 2,
        }
    }


@pytest.mark.promise("P9")
async def test_what_does_not_exist_or_does_not_fit_is_refused_at_the_door(corral: Corral) -> None:
    service = await corral.service(slots=1)
    with pytest.raises(NotFound, match="nobody"):
        await corral.plane.submit("nobody", {})
    with pytest.raises(NotFound, match="session"):
        await corral.plane.submit("svc", {}, session_id="nowhere")
    with pytest.raises(BadInput, match="refuses"):
        await corral.plane.submit("svc", {"bad": 1})
    for timeout in (0, -1, float("nan"), float("inf")):
        with pytest.raises(BadInput, match="timeout"):
            await corral.plane.submit("svc", {}, timeout=timeout)
    for task_id in ("a/b", " a", "x" * 256, "a\nb"):
        with pytest.raises(BadInput, match="task_id"):
            await corral.plane.submit("svc", {}, task_id=task_id)
    assert service.free == 1
    assert all(reservation.used == "cancelled" for reservation in service.reservations)


@pytest.mark.promise("P9")
async def test_a_service_elsewhere_is_checked_by_what_it_said(corral: Corral) -> None:
    service = await corral.service(register=False)
    info = service.info()
    schema = '{"type": "object", "required": ["topic"], "properties": {"topic": {"type": "string"}}}'
    known = '[{"name": "Yes", "qualified_name": "app.Yes", "schema": {}}]'
    await corral.plane.register(
        type(info)(info.definition, "svc", "elsewhere", capacity=1, events=known, start_schema=schema)
    )
    with pytest.raises(BadInput, match="topic"):
        await corral.plane.submit("svc", {"other": 1})
    accepted = await corral.plane.submit("svc", {"topic": "llamas"})
    yes = '{"__is_pydantic": true, "value": {}, "qualified_name": "app.Yes"}'
    same = ('{"type": "Yes", "value": {}}', '{"__is_pydantic": true, "value": {}, "qualified_name": "old.path.Yes"}')
    for seq, right in enumerate((yes, *same), 1):
        assert (await corral.plane.send_event(accepted.task_id, right)).seq == seq
    for wrong in ("x", "[]", "{}", '{"qualified_name": "os.system"}'):
        with pytest.raises(BadInput):
            await corral.plane.send_event(accepted.task_id, wrong)


@pytest.mark.promise("P1", "P2")
async def test_the_same_again_under_one_id_is_one_task(corral: Corral) -> None:
    service = await corral.service(slots=2)
    first = await corral.plane.submit("svc", {"a": 1, "b": 2}, task_id="mine")
    again = await corral.plane.submit("svc", '{"b": 2, "a": 1}', task_id="mine")
    assert (first.created, again.created) == (True, False)
    assert again.claim is None
    assert service.free == 1
    assert len(service.claims) == 1
    with pytest.raises(Conflict):
        await corral.plane.submit("svc", {"a": 2}, task_id="mine")
    assert service.free == 1


@pytest.mark.promise("P7")
async def test_a_draining_plane_takes_nothing_new(corral: Corral) -> None:
    service = await corral.service(slots=1)
    await corral.plane.submit("svc", {})
    corral.plane.refuse_new()
    with pytest.raises(Draining):
        await corral.plane.submit("svc", {})
    assert (await service.complete(await service.wait_claim())).status == "ok"


@pytest.mark.promise("P2", "P6")
@pytest.mark.parametrize("slots", [0, 1])
async def test_a_cancelled_submit_loses_neither_the_slot_nor_the_task(tmp_path: Path, slots: int) -> None:
    async with open_corral(f"sqlite:///{tmp_path}/corral.db") as corral:
        service = await corral.service(slots=slots)
        await corral.plane.submit("svc", {}, delay=1000)  # the first one counts what waits
        for patience in range(12):
            service.free = slots
            service.claims.clear()
            service.reservations.clear()
            task_id = f"task-{patience}"
            async with anyio.create_task_group() as group:

                async def submit(task_id: str = task_id) -> None:
                    await corral.plane.submit("svc", {}, task_id=task_id)

                group.start_soon(submit)
                for _ in range(patience):
                    await checkpoint()
                group.cancel_scope.cancel()
            record = await corral.store.get_task(task_id)
            if record is None:
                assert service.free == slots
            elif slots:
                assert record.status is TaskStatus.RUNNING
                assert [claim.task_id for claim in service.claims] == [task_id]
            else:
                claim = await service.take_ticket(corral.queue)
                assert claim is not None
                assert claim.task_id == task_id
        assert await corral.store.get_task("task-11") is not None


async def test_a_store_that_fails_gives_the_slot_back(corral: Corral, monkeypatch: pytest.MonkeyPatch) -> None:
    service = await corral.service(slots=1)

    async def fail(*arguments: object) -> None:
        await checkpoint()
        raise StoreUnavailable("The disk is full.")

    monkeypatch.setattr(corral.store, "accept", fail)
    with pytest.raises(StoreUnavailable):
        await corral.plane.submit("svc", {})
    assert service.free == 1


class DeafQueue(MemoryMessageQueue):
    """Takes nothing while `deaf`."""

    deaf = False

    def __init__(self) -> None:
        super().__init__()
        self.asked = anyio.Event()

    async def publish(self, message: QueueMessage, topic: str) -> None:
        if self.deaf:
            self.asked.set()
            await checkpoint()
            raise QueueUnavailable("The broker is away.")
        await super().publish(message, topic)


@pytest.mark.promise("P5")
async def test_a_broker_that_is_away_is_nobodys_error(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(upkeep, "FIRST_RETRY", 0.01)
    async with open_corral(queue=DeafQueue()) as corral:
        queue: MessageQueue = corral.queue
        assert isinstance(queue, DeafQueue)
        service = await corral.service()
        queue.deaf = True
        accepted = await corral.plane.submit("svc", {})
        assert accepted.status is TaskStatus.QUEUED
        await queue.asked.wait()
        queue.deaf = False
        claim = await service.take_ticket(corral.queue)
        assert claim is not None
        assert claim.task_id == accepted.task_id
    assert "the store keeps the ticket" in caplog.text


async def test_registering_again_changes_nothing(corral: Corral) -> None:
    service = await corral.service(slots=1)
    await corral.plane.register(service.info(), service)
    assert (await corral.plane.services.status())["svc"]["instances"] == 1
    assert (await corral.plane.submit("svc", {})).status is TaskStatus.RUNNING


async def test_who_gave_a_slot_is_asked_last(corral: Corral) -> None:
    first = await corral.service(slots=5)
    second = await corral.service(slots=5, register=False)
    second.instance_id = "second"
    await corral.plane.register(second.info(), second)
    for _ in range(4):
        await corral.plane.submit("svc", {})
    assert (len(first.claims), len(second.claims)) == (2, 2)


@pytest.mark.promise("P8")
async def test_an_instance_that_deregisters_leaves_its_service_and_what_it_held(corral: Corral) -> None:
    service = await corral.service(slots=1)
    accepted = await corral.plane.submit("svc", {})
    await corral.plane.deregister(service.instance_id)
    await corral.plane.deregister(service.instance_id)
    assert (await corral.plane.get_task(accepted.task_id)).status is TaskStatus.QUEUED
    assert (await corral.plane.submit("svc", {})).status is TaskStatus.QUEUED
    status = (await corral.plane.services.status())["svc"]
    assert 0 <= status.pop("oldest_queued") < 60
    assert status == {"held": 0, "queued": 2, "running": 0, "waiting": 0, "instances": 0, "capacity": 0}
