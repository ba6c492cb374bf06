"""The service's own HTTP server: the original's two routes, on a real socket."""

from __future__ import annotations

import json
from functools import partial

import httpx
import pytest
import trio
from pydantic import SecretStr

from llama_corral import http_link
from llama_corral.exceptions import NotFound, Unauthorized, Unavailable
from llama_corral.protocol.messages import ActionTypes, QueueMessage, TaskDefinition
from llama_corral.queues.memory import MemoryMessageQueue
from llama_corral.services import WorkflowService, WorkflowServiceConfig

from .flows import Asks, Echo
from .rig import PATIENCE, response


def message(action: ActionTypes, text: str, task_id: str = "t1") -> dict:
    data = TaskDefinition(input=text, task_id=task_id).model_dump()
    return QueueMessage(action=action, data=data, type="svc").model_dump(mode="json")


@pytest.mark.trio
async def test_a_service_over_http():
    with trio.fail_after(PATIENCE):
        async with MemoryMessageQueue() as queue, trio.open_nursery() as nursery:
            service = WorkflowService(Asks(), queue, WorkflowServiceConfig(service_name="svc"))
            url = await nursery.start(service.launch_server)
            assert url.startswith("http://127.0.0.1:")
            assert service.service_definition.port == int(url.rpartition(":")[2]) != 0
            async with httpx.AsyncClient(base_url=url) as client, queue.consumer("llama_deploy.control_plane") as out:
                home = (await client.get("/")).json()
                assert (home["service_name"], home["running"], home["type"]) == ("svc", "True", "workflow_service")
                assert (await client.get("/ready")).status_code == 200
                taken = await client.post("/process_message", json=message(ActionTypes.NEW_TASK, '{"name": 1}'))
                assert taken.status_code == 200
                (asked,) = await out.receive()
                assert asked.message.action is ActionTypes.TASK_STREAM
                assert (await client.get("/")).json()["num_outstanding_calls"] == "1"
                sent = await client.post("/process_message", json=message(ActionTypes.SEND_EVENT, response("hi")))
                assert sent.status_code == 200
                result = asked.message
                while result.action is not ActionTypes.COMPLETED_TASK:
                    (delivery,) = await out.receive()
                    result = delivery.message
                assert result.data["value"] == [1, "hi", 1]
                late = await client.post("/process_message", json=message(ActionTypes.SEND_EVENT, response("hi")))
                assert late.status_code == 404
                wrong = await client.post("/process_message", json=message(ActionTypes.TASK_STREAM, "{}"))
                assert wrong.status_code == 400 or wrong.status_code == 422
                none = await client.post("/process_message", content=b"no JSON")
                assert 400 <= none.status_code < 500
            service.stop()


@pytest.mark.trio
async def test_the_remote_consumer_feeds_the_server():
    """`register_to_message_queue`, as the original's services consume: another topic, so that nobody competes."""
    with trio.fail_after(PATIENCE):
        async with MemoryMessageQueue() as queue, trio.open_nursery() as nursery:
            service = WorkflowService(Echo(), queue, WorkflowServiceConfig(service_name="svc"))
            await nursery.start(service.launch_server)
            consume = await service.register_to_message_queue()
            consume = partial(consume.func, *consume.args[:2], "elsewhere") if isinstance(consume, partial) else consume
            await nursery.start(consume)
            body = QueueMessage.model_validate(message(ActionTypes.NEW_TASK, '{"value": 7}'))
            await queue.publish(body, "llama_deploy.svc")
            async with queue.consumer("llama_deploy.control_plane") as out:
                result = body
                while result.action is not ActionTypes.COMPLETED_TASK:
                    (delivery,) = await out.receive()
                    result = delivery.message
            assert result.data["value"] == 7
            await service.deregister_from_message_queue()
            nursery.cancel_scope.cancel()


@pytest.mark.promise("P7")
@pytest.mark.trio
async def test_the_server_stays_while_the_service_drains():
    with trio.fail_after(PATIENCE):
        async with MemoryMessageQueue() as queue, trio.open_nursery() as nursery:
            service = WorkflowService(Asks(), queue, WorkflowServiceConfig(service_name="svc"))
            await nursery.start(service.launch_server)
            service.stop()


@pytest.mark.trio
async def test_the_control_plane_is_spoken_to_over_http():
    answers = {
        ("POST", "/services/register"): (200, {"topic_namespace": "mine"}),
        ("POST", "/services/deregister"): (200, None),
        ("GET", "/sessions/s/state"): (200, {"a": 1}),
        ("GET", "/sessions/gone/state"): (404, {"detail": "no"}),
        ("POST", "/sessions/s/state"): (200, {}),
        ("GET", "/sessions/denied/state"): (401, {}),
        ("GET", "/sessions/broken/state"): (500, {}),
    }
    seen: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        status, body = answers[request.method, request.url.path]
        return httpx.Response(status, content=json.dumps(body))

    class Client(httpx.AsyncClient):
        def __init__(self, **options) -> None:
            super().__init__(**options | {"transport": httpx.MockTransport(answer)})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(http_link.httpx, "AsyncClient", Client)
        config = WorkflowServiceConfig(service_name="svc")
        service = WorkflowService(Echo(), MemoryMessageQueue(), config, token=SecretStr("secret"))
        assert await service.get_session_state("s") is None  # no control plane yet
        await service.register_to_control_plane("http://plane:1/")
        assert json.loads(seen[0].content)["service_name"] == "svc"
        assert seen[0].headers["Authorization"] == "Bearer secret"
        assert service.get_topic("svc") == "mine.svc"
        assert await service.get_session_state("s") == {"a": 1}
        assert await service.get_session_state("gone") is None
        await service.update_session_state("s", {"b": 2})
        assert json.loads(seen[-1].content) == {"b": 2}
        with pytest.raises(Unauthorized):
            await service.get_session_state("denied")
        with pytest.raises(Unavailable):
            await service.get_session_state("broken")
        await service.deregister_from_control_plane()
        assert seen[-1].url.params["service_name"] == "svc"
        answers["POST", "/services/deregister"] = (404, {})
        with pytest.raises(NotFound):
            await service.deregister_from_control_plane()


@pytest.mark.trio
async def test_a_control_plane_that_cannot_be_reached():
    service = WorkflowService(Echo(), MemoryMessageQueue(), WorkflowServiceConfig(service_name="svc"))
    with trio.fail_after(PATIENCE), pytest.raises(Unavailable, match=r"no answer from http://127\.0\.0\.1:1"):
        await service.register_to_control_plane("http://127.0.0.1:1")


def test_the_originals_settings(monkeypatch):
    monkeypatch.setenv("LLAMA_DEPLOY_WF_SERVICE_MAX_CONCURRENT_TASKS", "3")
    monkeypatch.setenv("LLAMA_DEPLOY_WF_SERVICE_USE_TLS", "true")
    config = WorkflowServiceConfig(host="h", port=1)
    assert (config.max_concurrent_tasks, config.step_interval, config.raise_exceptions) == (3, 0.1, False)
    assert config.service_name == "default_workflow_service"
    assert config.url == "https://h:1"
