"""A service on a bare queue behaves as the original did: its messages in, its messages out."""

from __future__ import annotations

import json
import logging

import anyio
import pytest

from llama_corral.exceptions import QueueUnavailable
from llama_corral.protocol import topics
from llama_corral.protocol.messages import ActionTypes, QueueMessage
from llama_corral.queues.memory import MemoryMessageQueue
from llama_corral.services import WorkflowService, WorkflowServiceConfig, queue_coordinator
from llama_corral.testing import FaultyMessageQueue

from .flows import Asks, Counter, Echo, Fails, Probed, WaitsFor
from .rig import PATIENCE, Probe, open_bare, response

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("nothing_left")]


@pytest.mark.promise("P3")
async def test_a_task_streams_and_completes(flavour):
    async with open_bare(Echo(), flavour) as bare:
        await bare.new_task("t1", session="s1", count=3, value={"a": [1]})
        result = await bare.result("t1")
        assert [(each["index"], each["data"].get("n"), each["session_id"]) for each in bare.streamed("t1")] == [
            (0, 0, "s1"),
            (1, 1, "s1"),
            (2, 2, "s1"),
            (3, None, "s1"),  # the stop event
        ]
        assert result["result"] == "{'a': [1]}"
        assert result["value"] == {"a": [1]}
        assert result["status"] == "completed"
        assert bare.messages[-1].action is ActionTypes.COMPLETED_TASK
        assert {each.type for each in bare.messages} == {topics.CONTROL_PLANE_NAME}


@pytest.mark.promise("P1")
async def test_a_failure_says_so(flavour):
    async with open_bare(Fails(), flavour) as bare:
        await bare.new_task("t1")
        result = await bare.result("t1")
        assert result["result"] == "no such llama"
        assert result["status"] == "failed"
        assert result["error"]["type"] == "ValueError"
        assert result["error"]["step"] == "work"


@pytest.mark.parametrize("workflow", [Asks, WaitsFor])
async def test_an_event_may_come_before_and_after_the_workflow_asks(flavour, workflow):
    async with open_bare(workflow(), flavour) as bare:
        await bare.new_task("before")
        await bare.send_event("before", response("early"))
        assert "early" in (await bare.result("before"))["value"]
        await bare.new_task("after")
        while not any("InputRequired" in (each["type"] or "") for each in bare.streamed("after")):
            await bare.receive()
        await bare.send_event("after", response("late"))
        assert "late" in (await bare.result("after"))["value"]


@pytest.mark.promise("P2")
async def test_a_message_that_comes_twice_starts_one_run(flavour):
    probe = Probe()
    async with open_bare(Probed(probe), flavour) as bare:
        await bare.new_task("t1", name="t1")
        await probe.wait_entered(1)
        await bare.new_task("t1", name="t1")
        await bare.new_task("t2", name="t2")
        await probe.wait_entered(2)
        probe.open("all")
        await bare.result("t1")
        await bare.result("t2")
        await bare.new_task("t1", name="t1")
        await bare.new_task("t3", name="t3")
        await bare.result("t3")
        assert sorted(bare.results()) == ["t1", "t2", "t3"]
        assert probe.entered == ["t1", "t2", "t3"]


@pytest.mark.promise("P4")
async def test_tasks_of_a_session_run_in_order_and_keep_its_context(flavour):
    async with open_bare(Counter(), flavour, cap=4) as bare:
        for n in range(5):
            await bare.new_task(f"t{n}", session="s", fail=n == 2)
        await bare.new_task("other", session="other")
        values = [(await bare.result(f"t{n}"))["value"] for n in range(5)]
        assert values == [1, 2, None, 3, 4]
        assert [each for each in bare.results() if each != "other"] == [f"t{n}" for n in range(5)]
        assert (await bare.result("other"))["value"] == 1


async def test_sessions_run_side_by_side(flavour):
    probe = Probe()
    async with open_bare(Probed(probe), flavour, cap=4) as bare:
        for n in range(4):
            await bare.new_task(f"a{n}", session="a", name="a")
            await bare.new_task(f"b{n}", session="b", name="b")
        await probe.wait_entered(2)
        await anyio.wait_all_tasks_blocked()
        assert sorted(probe.entered) == ["a", "b"]
        probe.open("all")
        for n in range(4):
            await bare.result(f"a{n}")
            await bare.result(f"b{n}")
        assert probe.peak == 2


@pytest.mark.promise("P9")
@pytest.mark.parametrize(
    ("action", "data"),
    [
        (ActionTypes.COMPLETED_TASK, {"task_id": "t", "result": "x"}),
        (ActionTypes.REQUEST_FOR_HELP, {}),
        (None, {"input": "{}"}),
        (ActionTypes.NEW_TASK, {"no": "definition"}),
        (ActionTypes.NEW_TASK, {"input": 7}),
        (ActionTypes.SEND_EVENT, {}),
    ],
)
async def test_garbage_goes_to_the_dead_letters_and_is_acked(flavour, action, data):
    async with open_bare(Echo(), flavour) as bare:
        await bare.send(action, data)
        await bare.new_task("t1", value=1)
        assert (await bare.result("t1"))["value"] == 1
        async with bare.queue.consumer(topics.dead_letter(topics.DEFAULT_NAMESPACE)) as dead:
            with anyio.fail_after(PATIENCE):
                (delivery,) = await dead.receive(10)
        assert delivery.message.data["message"]["data"] == data
        await anyio.wait_all_tasks_blocked()
        statistics = bare.queue.statistics()
        assert statistics["topics"]["llama_deploy.svc"] == 0
        assert statistics["open"]["llama_deploy.svc"] == 0


@pytest.mark.promise("P9")
@pytest.mark.parametrize("text", ["[1]", "7", "not JSON", '"text"', ""])
async def test_an_input_that_is_no_object_fails_its_task(flavour, text):
    async with open_bare(Echo(), flavour) as bare:
        await bare.send(ActionTypes.NEW_TASK, {"input": text, "task_id": "t1"})
        assert (await bare.result("t1"))["status"] == "failed"


@pytest.mark.promise("P12")
async def test_events_for_unknown_and_ended_tasks_leave_nothing(flavour, caplog):
    caplog.set_level(logging.WARNING)
    async with open_bare(Asks(), flavour) as bare:
        for n in range(50):
            await bare.send_event(f"ghost{n}", response())
        await bare.new_task("t1")
        await bare.send_event("t1", response("one"))
        await bare.result("t1")
        await bare.send_event("t1", response("two"))
        await bare.new_task("t2")
        await bare.send_event("t2", response("three"))
        assert (await bare.result("t2"))["value"][1] == "three"
        coordinator = bare.service.coordinator
        assert not coordinator._tasks
        assert not coordinator._sessions
        assert not bare.service.executions
        assert topics.dead_letter(topics.DEFAULT_NAMESPACE) not in bare.queue.statistics()["topics"]
    assert "ghost0" in caplog.text


@pytest.mark.promise("P9")
async def test_an_event_of_an_unknown_type_is_buried_and_the_run_goes_on(flavour):
    async with open_bare(Asks(), flavour) as bare:
        await bare.new_task("t1")
        await bare.send_event("t1", json.dumps({"type": "Nobody", "value": {}}))
        await bare.send_event("t1", "no JSON")
        await bare.send_event("t1", response("good"))
        assert (await bare.result("t1"))["value"][1] == "good"
        assert bare.queue.statistics()["topics"][topics.dead_letter(topics.DEFAULT_NAMESPACE)] == 2


@pytest.mark.parametrize("kind", ["sync", "async", "raising"])
async def test_the_publish_callback_hears_of_every_message(flavour, kind):
    heard: list[QueueMessage] = []

    async def hear_later(message):
        await anyio.lowlevel.checkpoint()
        heard.append(message)

    def hear(message):
        heard.append(message)
        if kind == "raising":
            raise RuntimeError("a callback's own fault")

    callback = hear_later if kind == "async" else hear
    async with open_bare(Echo(), flavour, publish_callback=callback) as bare:
        await bare.new_task("t1", count=2)
        await bare.result("t1")
        await anyio.wait_all_tasks_blocked()
        assert [each.id_ for each in heard] == [each.id_ for each in bare.messages]
        assert bare.service.publish_callback is callback
        assert {each.publisher_id for each in heard} == {bare.service.publisher_id}


async def test_home_has_the_originals_keys(flavour):
    probe = Probe()
    async with open_bare(Probed(probe), flavour, cap=1) as bare:
        for n in range(3):
            await bare.new_task(f"t{n}", name=n)
        await probe.wait_entered(1)
        await anyio.wait_all_tasks_blocked()
        assert await bare.service.home() == {
            "service_name": "svc",
            "description": "A service that wraps a llama-index workflow.",
            "running": "True",
            "step_interval": "0.1",
            "num_outstanding_calls": "3",
            "type": "workflow_service",
        }


@pytest.mark.promise("P1", "P3")
@pytest.mark.parametrize("lose", ["refuse", "lose_answer"])
async def test_a_queue_that_is_away_delays_and_repeats_under_the_same_index(flavour, lose):
    queue = FaultyMessageQueue(MemoryMessageQueue())
    async with open_bare(Echo(), flavour, queue=queue) as bare:
        topic = topics.topic(topics.DEFAULT_NAMESPACE, topics.CONTROL_PLANE_NAME)
        await bare.new_task("warm-up")
        await bare.result("warm-up")
        fault = getattr(queue, lose)("publish", topic=topic, times=2)
        await bare.new_task("t1", count=5)
        result = await bare.result("t1")
        assert fault.applied == 2
        indices = [each["index"] for each in bare.streamed("t1")]
        assert sorted(set(indices)) == list(range(6))
        numbers = {each["index"]: each["data"].get("n") for each in bare.streamed("t1")}
        assert numbers == {0: 0, 1: 1, 2: 2, 3: 3, 4: 4, 5: None}
        assert result["status"] == "completed"


@pytest.mark.promise("P12")
async def test_too_many_open_tasks_end_at_once_as_failed(flavour, monkeypatch):
    monkeypatch.setattr(queue_coordinator, "MAX_OPEN", 3)
    async with open_bare(Asks(), flavour) as bare:
        for n in range(4):
            await bare.new_task(f"t{n}")
        refused = await bare.result("t3")
        assert refused["error"]["type"] == "TooManyTasks"
        assert refused["error"]["retryable"]
        for n in range(3):
            await bare.send_event(f"t{n}", response())
            assert (await bare.result(f"t{n}"))["status"] == "completed"


@pytest.mark.promise("P12")
async def test_a_task_may_take_more_events_than_are_kept(flavour, monkeypatch):
    monkeypatch.setattr(queue_coordinator, "MAX_INBOX", 3)
    async with open_bare(WaitsFor(), flavour) as bare:
        await bare.new_task("t1", times=10)
        for n in range(10):
            while not any(each["data"].get("_data") == {"prefix": str(n)} for each in bare.streamed("t1")):
                await bare.receive()
            await bare.send_event("t1", response(f"a{n}"))
        assert (await bare.result("t1"))["value"] == [f"a{n}" for n in range(10)]


@pytest.mark.promise("P7", "P8")
async def test_what_was_not_finished_goes_back_to_the_queue(flavour):
    """Working, waiting with an answer on its way, held behind its session, not yet started: nothing is lost."""
    probe = Probe()
    async with open_bare(Probed(probe), flavour, cap=1, drain_timeout=0) as bare:
        await bare.new_task("working", session="s", name="w")
        await probe.wait_entered(1)
        await bare.new_task("held", session="s", name="h")
        await bare.new_task("ready", name="r")
        await bare.send_event("ready", response())
        await anyio.wait_all_tasks_blocked()
        bare.service.stop()
        with anyio.fail_after(PATIENCE):
            await bare.ended.wait()
        async with bare.queue.consumer("llama_deploy.svc") as back:
            deliveries = await back.receive(10)
        assert [(each.message.action, each.message.data["task_id"]) for each in deliveries] == [
            (ActionTypes.NEW_TASK, "working"),
            (ActionTypes.NEW_TASK, "held"),
            (ActionTypes.NEW_TASK, "ready"),
            (ActionTypes.SEND_EVENT, "ready"),
        ]
        assert bare.results() == []


async def test_it_takes_over_the_namespace_of_a_control_plane(flavour, monkeypatch):
    async def answer(self, method, path, **request):
        return {"topic_namespace": "mine"}

    monkeypatch.setattr("llama_corral.services.base.BaseService._ask", answer)

    async with MemoryMessageQueue() as queue, anyio.create_task_group() as tasks:
        service = WorkflowService(Echo(), queue, WorkflowServiceConfig(service_name="svc"), step_flavour=flavour)
        await service.register_to_control_plane("http://127.0.0.1:1/")
        await tasks.start(service.processing_loop)
        assert service.get_topic("svc") == "mine.svc"
        message = QueueMessage(action=ActionTypes.NEW_TASK, data={"input": "{}", "task_id": "t"}, type="svc")
        await queue.publish(message, "mine.svc")
        async with queue.consumer("mine.control_plane") as out:
            with anyio.fail_after(PATIENCE):
                (first,) = await out.receive()
        assert first.message.data["task_id"] == "t"
        tasks.cancel_scope.cancel()


async def test_a_queue_that_is_not_open_is_said_at_the_start(flavour):
    service = WorkflowService(
        Echo(), MemoryMessageQueue(), WorkflowServiceConfig(service_name="svc"), step_flavour=flavour
    )
    with pytest.raises(QueueUnavailable):
        await service.processing_loop()
