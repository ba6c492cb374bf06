"""Services that take tasks out of messages and report by messages, as the original's do."""

from __future__ import annotations

import json
from typing import Any

import anyio
import pytest

from llama_corral.control_plane import upkeep
from llama_corral.exceptions import BadInput, Conflict, NotFound
from llama_corral.protocol.lifecycle import TaskStatus
from llama_corral.protocol.messages import ActionTypes, QueueMessage, ServiceDefinition, TaskDefinition, TaskResult

from .corral import Corral, open_corral

pytestmark = pytest.mark.anyio


def stream(task_id: str, index: int, **fields: Any) -> QueueMessage:
    data = {"task_id": task_id, "session_id": "any", "index": index, "data": {"n": index}, **fields}
    return QueueMessage(action=ActionTypes.TASK_STREAM, type="control_plane", data=data)


def completed(task_id: str, result: str = "done", **fields: Any) -> QueueMessage:
    data = {"task_id": task_id, "history": [], "result": result, "data": {}, **fields}
    return QueueMessage(action=ActionTypes.COMPLETED_TASK, type="control_plane", data=data)


def new_task(task_id: str, service_name: str) -> QueueMessage:
    definition = TaskDefinition(input="{}", task_id=task_id, agent_id=service_name)
    return QueueMessage(action=ActionTypes.NEW_TASK, type="control_plane", data=definition.model_dump())


async def start(corral: Corral, **options: Any) -> str:
    """A task that a service of the original has taken out of its message."""
    await corral.plane.services.define(ServiceDefinition(service_name="old"))
    accepted = await corral.plane.submit("old", {"topic": "llamas"}, **options)
    message = await corral.message("old")
    definition = TaskDefinition.model_validate(message.data)
    assert (definition.task_id, definition.agent_id) == (accepted.task_id, "old")
    assert definition.session_id == accepted.session_id
    assert json.loads(definition.input) == {"topic": "llamas"}
    return accepted.task_id


async def indices(corral: Corral, task_id: str) -> list[int]:
    return [json.loads(event.payload)["n"] for event in (await corral.plane.read_events(task_id)).events]


@pytest.mark.promise("P1")
async def test_who_registers_to_claim_takes_over_what_was_claimed_for_messages(corral: Corral) -> None:
    task_id = await start(corral)
    await corral.plane.process_message(stream(task_id, 0))
    assert (await corral.plane.get_task(task_id)).status is TaskStatus.RUNNING
    service = await corral.service("old", slots=1)
    claim = await service.take_ticket(corral.queue)
    assert claim is not None
    assert (claim.task_id, claim.epoch, claim.next_index) == (task_id, 2, 1)
    await corral.service("old")  # again, or another one: nothing is taken from an instance
    assert (await corral.plane.get_task(task_id)).owner == service.instance_id


@pytest.mark.promise("P1", "P3")
async def test_events_and_the_result_are_written(corral: Corral) -> None:
    task_id = await start(corral)
    for index in range(3):
        await corral.plane.process_message(stream(task_id, index))
    assert (await corral.plane.get_task(task_id)).status is TaskStatus.RUNNING
    await corral.plane.process_message(completed(task_id, "the text"))
    record = await corral.plane.wait_result(task_id, 1)
    assert record is not None
    assert (record.status, record.result, record.result_text) == (TaskStatus.COMPLETED, '"the text"', "the text")
    assert await indices(corral, task_id) == [0, 1, 2]


@pytest.mark.promise("P1", "P2")
async def test_messages_may_come_twice_late_and_out_of_order(corral: Corral) -> None:
    task_id = await start(corral)
    for index in (1, 0, 0, 1, 3, 2, 3, 5):
        await corral.plane.process_message(stream(task_id, index))
    assert await indices(corral, task_id) == [0, 1, 2, 3]
    await corral.plane.process_message(completed(task_id, "first"))
    await corral.plane.process_message(completed(task_id, "second"))
    await corral.plane.process_message(stream(task_id, 4))
    assert await indices(corral, task_id) == [0, 1, 2, 3, 5]
    assert (await corral.plane.get_task(task_id)).result_text == "first"


async def test_what_our_services_say_beyond_the_original_is_kept(corral: Corral) -> None:
    failed = await start(corral)
    await corral.plane.process_message(stream(failed, 0, type="app.Progress"))
    error = {"type": "ValueError", "message": "boom", "step": "work"}
    await corral.plane.process_message(completed(failed, "boom", status="failed", error=error))
    record = await corral.plane.get_task(failed)
    assert record.status is TaskStatus.FAILED
    assert record.error is not None
    assert record.error.step == "work"
    assert (await corral.plane.read_events(failed)).events[0].type == "app.Progress"
    task_id = await start(corral)
    await corral.plane.process_message(completed(task_id, "{'a': 1}", status="completed", value={"a": 1}))
    assert (await corral.plane.get_task(task_id)).result == '{"a": 1}'
    odd = await start(corral)
    await corral.plane.process_message(completed(odd, status="running"))
    assert (await corral.plane.get_task(odd)).status is TaskStatus.COMPLETED


async def test_the_plane_finds_the_claim_again_after_a_restart(tmp_path: Any) -> None:
    url = f"sqlite:///{tmp_path}/corral.db"
    async with open_corral(url) as corral:
        task_id = await start(corral)
        await corral.plane.process_message(stream(task_id, 0))
    async with open_corral(url) as corral:
        assert (await corral.plane.get_task(task_id)).status is TaskStatus.RUNNING
        await corral.plane.process_message(stream(task_id, 0))
        await corral.plane.process_message(stream(task_id, 1))
        await corral.plane.process_message(completed(task_id))
        assert await indices(corral, task_id) == [0, 1]
        assert corral.queue.statistics()["published"] == 0


@pytest.mark.promise("P6")
async def test_cancelling_and_timing_out_do_not_wait_for_the_service(corral: Corral) -> None:
    task_id = await start(corral)
    await corral.plane.process_message(stream(task_id, 0))
    await corral.plane.cancel(task_id)
    assert (await corral.plane.get_task(task_id)).status is TaskStatus.CANCELLED
    await corral.plane.process_message(completed(task_id))
    assert (await corral.plane.get_task(task_id)).status is TaskStatus.CANCELLED
    task_id = await start(corral, timeout=0.1)
    record = await corral.plane.wait_result(task_id, 5)
    assert record is not None
    assert record.status is TaskStatus.TIMED_OUT


@pytest.mark.promise("P1")
async def test_a_deadline_is_seen_behind_any_number_of_newer_tasks(
    corral: Corral, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upkeep, "MESSAGES_PAGE", 2)
    task_id = await start(corral, timeout=0.1)
    for _ in range(4):
        await start(corral)
    record = await corral.plane.wait_result(task_id, 5)
    assert record is not None
    assert record.status is TaskStatus.TIMED_OUT


@pytest.mark.promise("P2", "P5")
async def test_a_task_that_starts_later_is_published_once() -> None:
    async with open_corral() as corral:
        await corral.plane.services.define(ServiceDefinition(service_name="old"))
        accepted = await corral.plane.submit("old", {}, delay=0.05)
        assert (await corral.message("old")).data["task_id"] == accepted.task_id
        await anyio.wait_all_tasks_blocked()
        assert (await corral.plane.get_task(accepted.task_id)).status is TaskStatus.RUNNING


async def test_a_dead_letter_that_is_no_unicode_is_kept_too(corral: Corral) -> None:
    data = {"topic": "a\ud800", "reason": "b\ud800", "message": {"task_id": "c\ud800"}}
    await corral.queue.publish(QueueMessage(type="any", data=data), corral.topic("dead_letter"))
    await corral.queue.publish(QueueMessage(type="any", data={}), corral.topic("control_plane"))
    await anyio.wait_all_tasks_blocked()
    _, letter = await corral.plane.list_dead_letters()
    assert (letter.topic, letter.reason, letter.message) == ("a?", "b?", '{"task_id": "c?"}')


async def test_an_outside_event_is_forwarded_as_a_message(corral: Corral) -> None:
    task_id = await start(corral)
    await corral.plane.send_event(task_id, '{"answer": 42}')
    message = await corral.message("old")
    assert message.action == ActionTypes.SEND_EVENT
    assert message.data["task_id"] == task_id
    assert message.data["input"] == '{"answer": 42}'


async def test_new_task_messages_are_tasks(corral: Corral) -> None:
    service = await corral.service(slots=1)
    definition = TaskDefinition(input='{"a": 1}', task_id="mine", agent_id="svc")
    message = QueueMessage(action=ActionTypes.NEW_TASK, data=definition.model_dump())
    await corral.plane.process_message(message)
    claim = await service.wait_claim()
    assert (claim.task_id, claim.implicit_session) == ("mine", False)
    nameless = message.model_copy(update={"data": {"input": "{}"}})
    with pytest.raises(BadInput, match="agent_id"):
        await corral.plane.process_message(nameless)


@pytest.mark.promise("P9")
async def test_messages_that_make_no_sense_are_the_senders_fault(corral: Corral) -> None:
    service = await corral.service(slots=1)
    accepted = await corral.plane.submit("svc", {})
    await service.wait_claim()
    with pytest.raises(Conflict):
        await corral.plane.process_message(completed(accepted.task_id))
    with pytest.raises(Conflict):
        await corral.plane.process_message(stream(accepted.task_id, 0))
    for message in (stream("nothing", 0), completed("nothing")):
        with pytest.raises(NotFound):
            await corral.plane.process_message(message)
    for action in (None, ActionTypes.WAKE_UP, ActionTypes.SEND_EVENT):
        with pytest.raises(BadInput, match="action"):
            await corral.plane.process_message(QueueMessage(action=action))
    for action in (ActionTypes.NEW_TASK, ActionTypes.TASK_STREAM, ActionTypes.COMPLETED_TASK):
        with pytest.raises(BadInput, match="data"):
            await corral.plane.process_message(QueueMessage(action=action, data={"task_id": 5}))


async def test_the_plane_listens_to_its_own_topic_and_buries_what_it_cannot_use(
    corral: Corral, caplog: pytest.LogCaptureFixture
) -> None:
    task_id = await start(corral)
    own = corral.topic("control_plane")
    await corral.queue.publish(QueueMessage(action=ActionTypes.WAKE_UP, id_="useless"), own)
    await corral.queue.publish(stream("nothing", 0), own)
    await corral.queue.publish(stream(task_id, 0), own)
    await corral.queue.publish(completed(task_id), own)
    record = await corral.plane.wait_result(task_id, 5)
    assert record is not None
    assert TaskResult.model_validate(completed(task_id).data).result == record.result_text
    assert await indices(corral, task_id) == [0]
    assert "refused" in caplog.text
    await anyio.wait_all_tasks_blocked()
    assert corral.queue.statistics()["open"]["test.control_plane"] == 0
    second, first = await corral.plane.list_dead_letters()
    assert json.loads(first.message)["id_"] == "useless"
    assert (first.topic, first.reason) == (own, "The control plane takes no messages with action wake_up.")
    assert "nothing" in second.reason
