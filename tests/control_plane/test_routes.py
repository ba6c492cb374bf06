"""The original's routes with its bodies and answers, and their deliberate differences, over a real server."""

from __future__ import annotations

import json
from typing import Any

import pytest
import trio

from .server import Web, open_web

pytestmark = pytest.mark.trio

ORIGINAL_ROUTES = {
    ("get", "/"),
    ("post", "/process_message"),
    ("get", "/queue_config"),
    ("post", "/services/register"),
    ("post", "/services/deregister"),
    ("get", "/services/{service_name}"),
    ("get", "/services"),
    ("get", "/sessions/{session_id}"),
    ("post", "/sessions/create"),
    ("post", "/sessions/{session_id}/delete"),
    ("post", "/sessions/{session_id}/tasks"),
    ("get", "/sessions"),
    ("get", "/sessions/{session_id}/tasks"),
    ("get", "/sessions/{session_id}/current_task"),
    ("get", "/sessions/{session_id}/tasks/{task_id}/result"),
    ("get", "/sessions/{session_id}/tasks/{task_id}/result_stream"),
    ("post", "/sessions/{session_id}/tasks/{task_id}/send_event"),
    ("get", "/sessions/{session_id}/state"),
    ("post", "/sessions/{session_id}/state"),
}
ORIGINAL_SCHEMAS = {
    "ControlPlaneConfig", "EventDefinition", "QueueMessage", "QueueMessageStats", "ServiceDefinition",
    "SessionDefinition", "TaskDefinition", "TaskResult",
}  # fmt: skip


async def start(web: Web, session_id: str | None = None, **body: Any) -> tuple[str, str]:
    if session_id is None:
        session_id = (await web.client.post("/sessions/create")).json()
    task = {"input": "{}", "agent_id": "svc", **body}
    answer = await web.client.post(f"/sessions/{session_id}/tasks", json=task)
    assert answer.status_code == 200, answer.text
    return session_id, answer.json()


async def test_every_route_and_schema_of_the_original_is_there() -> None:
    async with open_web() as web:
        document = (await web.client.get("/openapi.json")).json()
        routes = {(method, path) for path, methods in document["paths"].items() for method in methods}
        assert routes >= ORIGINAL_ROUTES
        assert document["components"]["schemas"].keys() >= ORIGINAL_SCHEMAS


@pytest.mark.promise("P11")
async def test_the_configuration_is_told_without_credentials() -> None:
    config = {"RabbitMQConfig": {"url": "amqp://user:hunter2@mq:5672/v", "password": "hunter2", "host": "mq"}}
    async with open_web(config, state_store_uri="redis://user:hunter2@db") as web:
        home = (await web.client.get("/")).json()
        assert home == {
            "running": "True", "step_interval": "0.1", "services_store_key": "services",
            "tasks_store_key": "tasks", "session_store_key": "sessions",
        }  # fmt: skip
        assert (await web.client.get("/queue_config")).json() == {
            "RabbitMQConfig": {"url": "amqp://mq:5672/v", "host": "mq"}
        }
        registered = await web.client.post("/services/register", json={"service_name": "other", "host": "h", "port": 1})
        answer = registered.json()
        assert answer["topic_namespace"] == "test"
        assert answer["state_store_uri"] is None
        assert answer.keys() >= {"services_store_key", "step_interval", "host", "port", "running", "use_tls"}
    async with open_web() as web:
        assert (await web.client.get("/queue_config")).json().keys() == {"SimpleMessageQueueConfig"}


@pytest.mark.promise("P11")
async def test_no_route_tells_a_credential() -> None:
    config = {"RedisConfig": {"url": "redis://user:hunter2@mq/0", "options": [{"api_key": "hunter2"}]}}
    async with open_web(config, state_store_uri="redis://user:hunter2@db") as web:
        service = await web.service(slots=1)
        session, task = await start(web)
        await service.complete(await service.wait_claim())
        document = (await web.client.get("/openapi.json")).json()
        asked = 0
        for path, methods in document["paths"].items():
            if "get" not in methods or path.startswith("/messages"):  # the queue's own route waits for a message
                continue
            address = path.replace("{session_id}", session).replace("{task_id}", task).replace("{service_name}", "svc")
            answer = await web.client.get(address)
            assert answer.status_code == 200, address
            assert "hunter2" not in answer.text + repr(answer.headers), address
            asked += 1
        assert asked > 12
        answer = await web.client.post("/services/register", json={"service_name": "other"})
        assert "hunter2" not in answer.text


async def test_services_are_registered_listed_and_deregistered() -> None:
    async with open_web() as web:
        definition = {"service_name": "other", "description": "d", "prompt": [], "host": "h", "port": 1}
        for _ in range(2):
            assert (await web.client.post("/services/register", json=definition)).status_code == 200
        assert (await web.client.get("/services")).json() == {"other": definition}
        assert (await web.client.get("/services/other")).json() == definition
        gone = await web.client.post("/services/deregister", params={"service_name": "other"})
        assert (gone.status_code, gone.json()) == (200, None)
        assert (await web.client.get("/services")).json() == {}
        assert (await web.client.get("/services/other")).status_code == 404
        assert (await web.client.post("/services/deregister", params={"service_name": "other"})).status_code == 404
        assert (await web.client.post("/services/deregister")).status_code == 422


async def test_sessions_and_their_state() -> None:
    async with open_web() as web:
        fresh = (await web.client.post("/sessions/create")).json()
        assert (await web.client.post("/sessions/create", json={"session_id": "mine"})).json() == "mine"
        assert (await web.client.post("/sessions/create", json={"session_id": "mine"})).status_code == 409
        assert (await web.client.put("/sessions/mine")).status_code == 200
        made = await web.client.put("/sessions/user-42")
        assert (made.status_code, made.json()) == (201, {"session_id": "user-42", "task_ids": [], "state": {}})
        listed = (await web.client.get("/sessions")).json()
        assert listed.keys() == {fresh, "mine", "user-42"}
        assert listed["mine"] == (await web.client.get("/sessions/mine")).json()
        page = await web.client.get("/sessions", params={"limit": 2})
        rest = await web.client.get("/sessions", params={"after": page.headers["x-next-after"]})
        assert sorted([*page.json(), *rest.json()]) == sorted(listed)
        assert "x-next-after" not in rest.headers
        assert (await web.client.post("/sessions/mine/state", json={"a": 1})).json() is None
        await web.client.post("/sessions/mine/state", json={"b": None})
        assert (await web.client.get("/sessions/mine/state")).json() == {"a": 1, "b": None}
        assert (await web.client.get("/sessions/mine/current_task")).json() is None
        assert (await web.client.post("/sessions/mine/delete")).json() is None
        for path in ("", "/state", "/tasks", "/current_task", "/tasks/t/result"):
            answer = await web.client.get(f"/sessions/mine{path}")
            assert answer.status_code == 404
            assert answer.json()["detail"] == answer.json()["error"]["message"]
        assert (await web.client.post("/sessions/mine/delete")).status_code == 404
        assert (
            await web.client.post("/sessions/mine/tasks", json={"input": "{}", "agent_id": "svc"})
        ).status_code == 404


async def test_the_tasks_of_a_session_are_listed_in_order() -> None:
    async with open_web() as web:
        await web.service()
        session, first = await start(web)
        second = (await start(web, session, input='{"n": 2}'))[1]
        third = (await start(web, session, task_id="third", input="{}"))[1]
        tasks = (await web.client.get(f"/sessions/{session}/tasks")).json()
        assert [task["task_id"] for task in tasks] == [first, second, third] == [first, second, "third"]
        assert tasks[1] == {"input": '{"n": 2}', "task_id": second, "session_id": session, "agent_id": "svc"}
        assert (await web.client.get(f"/sessions/{session}/current_task")).json() == tasks[2]
        assert (await web.client.get(f"/sessions/{session}")).json()["task_ids"] == [first, second, third]
        newest = await web.client.get(f"/sessions/{session}/tasks", params={"limit": 2})
        assert newest.json() == tasks[1:]
        older = {"before": newest.headers["x-next-before"]}
        assert (await web.client.get(f"/sessions/{session}/tasks", params=older)).json() == tasks[:1]


@pytest.mark.promise("P1")
async def test_a_result_is_null_then_there() -> None:
    async with open_web() as web:
        service = await web.service(slots=1)
        session, task = await start(web)
        for path in (f"/sessions/{session}/tasks/{task}/result", f"/tasks/{task}/result"):
            pending = await web.client.get(path)
            assert (pending.status_code, pending.json()) == (200, None)
        assert (await web.client.get(f"/tasks/{task}/result", params={"wait": 0.01})).json() is None
        claim = await service.wait_claim()
        answers = []
        async with trio.open_nursery() as nursery:

            async def wait(path: str) -> None:
                answers.append((await web.client.get(path, params={"wait": 10})).json())

            nursery.start_soon(wait, f"/sessions/{session}/tasks/{task}/result")
            nursery.start_soon(wait, f"/tasks/{task}/result")
            await service.complete(claim, {"n": 1})
        assert answers[0] == answers[1]
        assert answers[0] == {
            "task_id": task, "history": [], "result": "{'n': 1}", "data": {}, "status": "completed",
            "value": {"n": 1}, "error": None,
        }  # fmt: skip


@pytest.mark.promise("P1")
async def test_failures_and_cancellations_say_so() -> None:
    async with open_web() as web:
        service = await web.service(slots=2)
        session, failing = await start(web)
        await service.fail(await service.wait_claim(), "boom")
        failed = (await web.client.get(f"/sessions/{session}/tasks/{failing}/result")).json()
        assert (failed["result"], failed["status"], failed["value"]) == ("boom", "failed", None)
        assert (failed["error"]["type"], failed["error"]["step"]) == ("ValueError", "work")
        session, task = await start(web)
        answer = await web.client.post(f"/sessions/{session}/tasks/{task}/cancel")
        assert answer.status_code == 202
        assert answer.json() == {"task_id": task, "session_id": session, "status": "running", "ended": False}
        await service.end_cancelled(await service.wait_claim())
        assert (await web.client.get(f"/tasks/{task}/result")).json()["status"] == "cancelled"
        again = await web.client.post(f"/tasks/{task}/cancel")
        assert (again.status_code, again.json()["error"]["code"]) == (409, "conflict")


@pytest.mark.promise("P3")
async def test_the_stream_opens_before_the_first_event_and_ends() -> None:
    async with open_web() as web:
        service = await web.service(slots=1)
        session, task = await start(web)
        claim = await service.wait_claim()
        path = f"/sessions/{session}/tasks/{task}/result_stream"
        async with web.client.stream("GET", path) as response:
            assert response.status_code == 200
            assert response.headers["content-type"] == "application/x-ndjson"
            lines = response.aiter_lines()
            await service.report(claim, {"text": "a\u2028b"})
            assert json.loads(await anext(lines)) == {"text": "a\u2028b"}
            await service.report(claim, {"n": 1}, {"n": 2})
            await service.complete(claim)
            assert [json.loads(line) async for line in lines] == [{"n": 1}, {"n": 2}]
        whole = await web.client.get(path)
        assert len(whole.text.splitlines()) == 3
        session, silent = await start(web)
        await web.client.post(f"/tasks/{silent}/cancel")
        assert (await web.client.get(f"/sessions/{session}/tasks/{silent}/result_stream")).text == ""


@pytest.mark.promise("P3")
async def test_server_sent_events_resume_and_end_with_the_record() -> None:
    async with open_web() as web:
        service = await web.service(slots=1)
        session, task = await start(web)
        claim = await service.wait_claim()
        await service.report(claim, {"n": 0}, {"n": 1})
        path = f"/sessions/{session}/tasks/{task}/events"
        async with trio.open_nursery() as nursery:
            whole = []

            async def read() -> None:
                response = await web.client.get(path)
                assert response.headers["content-type"] == "text/event-stream"
                whole.append(response.text)

            nursery.start_soon(read)
            await service.report(claim, {"n": 2})
            await service.complete(claim)
        assert whole[0].startswith('id: 0\nevent: app.Progress\ndata: {"n": 0}\n\nid: 1\n')
        for address in (path, f"/tasks/{task}/events"):
            rest = (await web.client.get(address, headers={"Last-Event-ID": "0"})).text
            frames = rest.strip().split("\n\n")
            assert [frame.splitlines()[0] for frame in frames] == ["id: 1", "id: 2", "event: end"]
            assert json.loads(frames[-1].splitlines()[1][6:])["status"] == "completed"
        assert (await web.client.get(path, params={"from": 2})).text.startswith("id: 2\n")
        for header in ("x", "-1", "1.5", "1 1", "1_0"):
            assert (await web.client.get(path, headers={"Last-Event-ID": header})).status_code == 422


async def test_an_event_may_come_before_the_workflow_asks() -> None:
    async with open_web() as web:
        service = await web.service()
        session, task = await start(web)
        event = {"agent_id": "svc", "event_obj_str": '{"answer": 42}'}
        sent = await web.client.post(f"/sessions/{session}/tasks/{task}/send_event", json=event)
        assert (sent.status_code, sent.json()) == (200, None)
        assert (await web.client.post(f"/tasks/{task}/send_event", json={**event, "agent_id": ""})).status_code == 200
        claim = await service.take_ticket(web.queue)
        assert claim is not None
        assert [event.payload for event in claim.inbox] == ['{"answer": 42}'] * 2
        wrong = await web.client.post(f"/tasks/{task}/send_event", json={**event, "agent_id": "other"})
        assert wrong.status_code == 422
        await service.complete(claim)
        late = await web.client.post(f"/tasks/{task}/send_event", json=event)
        assert late.status_code == 409


async def test_tasks_are_listed_by_filter_and_page() -> None:
    async with open_web() as web:
        service = await web.service(slots=3)
        await web.service("other")
        ids = [(await start(web))[1] for _ in range(3)]
        session, waiting = await start(web, agent_id="other")
        await service.complete(await service.wait_claim(), [1])
        page = (await web.client.get("/tasks", params={"limit": 3})).json()
        assert [task["task_id"] for task in page["tasks"]] == [waiting, ids[2], ids[1]]
        rest = (await web.client.get("/tasks", params={"before": page["next"]})).json()
        assert ([task["task_id"] for task in rest["tasks"]], rest["next"]) == ([ids[0]], None)

        async def listed(**params: Any) -> list[str]:
            return [task["task_id"] for task in (await web.client.get("/tasks", params=params)).json()["tasks"]]

        assert await listed(status="completed") == [ids[0]]
        assert await listed(status=["completed", "queued"]) == [waiting, ids[0]]
        assert await listed(service="other") == [waiting]
        assert await listed(session_id=session) == [waiting]
        one = (await web.client.get(f"/tasks/{ids[0]}")).json()
        assert (one["input"], one["value"], one["result"], one["status"]) == ("{}", [1], "[1]", "completed")
        status = (await web.client.get("/status")).json()["services"]
        assert (status["svc"]["running"], status["svc"]["capacity"], status["other"]["queued"]) == (2, 2, 1)


async def test_messages_of_the_originals_services_are_taken() -> None:
    async with open_web() as web:
        await web.client.post("/services/register", json={"service_name": "old"})
        session, task = await start(web, agent_id="old", input='{"a": 1}')
        assert json.loads((await web.message("old")).data["input"]) == {"a": 1}

        async def send(action: str, **data: Any) -> int:
            message = {"action": action, "type": "control_plane", "data": {"task_id": task, **data}}
            return (await web.client.post("/process_message", json=message)).status_code

        assert await send("task_stream", session_id=session, data={"n": 0}, index=0) == 200
        assert await send("completed_task", history=[], result="fine", data={}) == 200
        assert await send("completed_task", history=[], result="twice", data={}) == 200
        assert (await web.client.get(f"/tasks/{task}/result")).json()["result"] == "fine"
        assert await send("wake_up") == 422
        assert await send("completed_task") == 422
        assert await send("new_task", input="{}", agent_id="nobody") == 404


BAD_INPUT = [
    ("POST", "/sessions/s/tasks", "{", 400),
    ("POST", "/sessions/s/tasks", "", 400),
    ("POST", "/sessions/s/tasks", "[]", 422),
    ("POST", "/sessions/s/tasks", '{"input": 5, "agent_id": "svc"}', 422),
    ("POST", "/sessions/s/tasks", '{"input": "text", "agent_id": "svc"}', 422),
    ("POST", "/sessions/s/tasks", '{"input": "[]", "agent_id": "svc"}', 422),
    ("POST", "/sessions/s/tasks", '{"input": "{}"}', 422),
    ("POST", "/sessions/s/tasks", '{"input": "{}", "agent_id": "nobody"}', 404),
    ("POST", "/sessions/s/tasks", '{"input": "{}", "agent_id": "svc", "session_id": "other"}', 422),
    ("POST", "/sessions/s/tasks", '{"input": "{\\"bad\\": 1}", "agent_id": "svc"}', 422),
    ("POST", "/sessions/s/tasks", '{"input": "{\\"other\\": 1}", "agent_id": "svc", "task_id": "taken"}', 409),
    ("POST", "/sessions/s/tasks", '{"input": "{}", "agent_id": "svc", "task_id": "a/b"}', 422),
    ("POST", "/sessions/nowhere/tasks", '{"input": "{}", "agent_id": "svc"}', 404),
    ("POST", "/sessions/s/tasks?timeout=0", '{"input": "{}", "agent_id": "svc"}', 422),
    ("POST", "/sessions/s/state", "[1]", 422),
    ("POST", "/sessions/s/state", '{"a": NaN}', 400),
    ("POST", "/sessions/create", '{"sesion_id": "typo"}', 422),
    ("POST", "/sessions/create", '{"session_id": ""}', 422),
    ("POST", "/sessions/s/tasks/taken/send_event", '{"agent_id": "svc", "event_obj_str": "nonsense"}', 422),
    ("POST", "/sessions/s/tasks/nothing/send_event", '{"agent_id": "svc", "event_obj_str": "{}"}', 404),
    ("POST", "/sessions/other/tasks/taken/send_event", '{"agent_id": "svc", "event_obj_str": "{}"}', 404),
    ("POST", "/tasks/nothing/cancel", "", 404),
    ("POST", "/sessions/other/tasks/taken/cancel", "", 404),
    ("GET", "/tasks/nothing", "", 404),
    ("GET", "/tasks/nothing/events", "", 404),
    ("GET", "/sessions/s/tasks/nothing/result", "", 404),
    ("GET", "/sessions/s/tasks/nothing/result_stream", "", 404),
    ("GET", "/tasks/taken/result?wait=x", "", 422),
    ("GET", "/tasks/taken/result?wait=NaN", "", 422),
    ("GET", "/tasks?limit=0", "", 422),
    ("GET", "/tasks?status=odd", "", 422),
    ("GET", "/tasks?before=nothing", "", 404),
    ("GET", "/tasks?sttaus=queued", "", 422),
    ("POST", "/services/register", '{"service_name": "a/b"}', 422),
    ("POST", "/services/nobody/run", "{}", 404),
    ("POST", "/services/svc/run", "[]", 422),
    ("POST", "/services/svc/run", "{", 400),
    ("POST", "/services/svc/run", '{"bad": 1}', 422),
    ("POST", "/services/svc/run?session_id=nowhere", "{}", 404),
    ("POST", "/services/svc/run?timeout=-1", "{}", 422),
    ("POST", "/services/svc/run?task_id=taken", "{}", 409),
    ("POST", "/services/svc/run?detach=maybe", "{}", 422),
    ("POST", "/process_message", '{"action": "odd"}', 422),
]


async def counts(web: Web) -> dict[str, Any]:
    """What `/status` says, but for what changes by itself."""
    found: dict[str, Any] = (await web.client.get("/status")).json()["services"]
    for numbers in found.values():
        numbers.pop("oldest_queued")
    return found


@pytest.mark.promise("P9")
async def test_bad_input_is_refused_with_a_reason_and_changes_nothing() -> None:
    async with open_web() as web:
        await web.service()
        await web.client.put("/sessions/s")
        await start(web, "s", task_id="taken")
        before = await counts(web)
        for method, path, content, status in BAD_INPUT:
            headers = {"content-type": "application/json"} if method == "POST" else {}
            answer = await web.client.request(method, path, content=content or None, headers=headers)
            assert answer.status_code == status, (method, path, content, answer.text)
            body = answer.json()
            assert body["error"]["message"] == body["detail"] != ""
        assert await counts(web) == before
