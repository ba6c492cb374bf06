"""`POST /services/{service_name}/run`: one request, one task, one answer."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest
import trio

from llama_corral.protocol.lifecycle import TaskStatus
from llama_corral.protocol.messages import ErrorRecord
from llama_corral.protocol.records import Claim, Terminal

from .corral import FakeService
from .server import open_web

pytestmark = pytest.mark.trio
RUN = "/services/svc/run"


@asynccontextmanager
async def posted(client: httpx.AsyncClient, path: str = RUN, **options: object) -> AsyncIterator[list[httpx.Response]]:
    """The answer to a request under way, there when the block is left."""
    answers: list[httpx.Response] = []
    async with trio.open_nursery() as nursery:

        async def post() -> None:
            answers.append(await client.post(path, **{"json": {}, **options}))  # type: ignore[arg-type]

        nursery.start_soon(post)
        yield answers


@pytest.mark.promise("P1")
async def test_the_result_comes_back_as_json() -> None:
    async with open_web() as web:
        service = await web.service(slots=1)
        async with posted(web.client, json={"topic": "llamas"}) as answers:
            claim = await service.wait_claim()
            assert json.loads(claim.input) == {"topic": "llamas"}
            assert claim.implicit_session
            await service.complete(claim, {"text": "ü", "n": [1, 2.5, None]})
        assert answers[0].status_code == 200
        assert answers[0].json() == {
            "task_id": claim.task_id, "session_id": claim.session_id, "status": "completed",
            "result": {"text": "ü", "n": [1, 2.5, None]},
        }  # fmt: skip


async def test_it_works_through_a_ticket_and_in_a_session_too() -> None:
    async with open_web() as web:
        service = await web.service()
        await web.client.put("/sessions/s")
        async with posted(web.client, f"{RUN}?session_id=s&task_id=mine") as answers:
            claim = await service.take_ticket(web.queue)
            assert claim is not None
            await service.complete(claim, None)
        assert answers[0].json() == {"task_id": "mine", "session_id": "s", "status": "completed", "result": None}


async def fail(service: FakeService, claim: Claim) -> None:
    await service.fail(claim, "boom")


async def cancel(service: FakeService, claim: Claim) -> None:
    await service.plane.cancel(claim.task_id)
    await service.end_cancelled(claim)


async def time_out(service: FakeService, claim: Claim) -> None:
    error = ErrorRecord(type="timed_out", message="too slow")
    await service.report(claim, terminal=Terminal(TaskStatus.TIMED_OUT, result_text="too slow", error=error))


@pytest.mark.promise("P1", "P9")
@pytest.mark.parametrize(
    ("end", "status", "code", "message"),
    [
        (fail, 424, "task_failed", "boom"),
        (cancel, 409, "task_cancelled", "cancelled"),
        (time_out, 504, "task_timed_out", "too slow"),
    ],
)
async def test_another_ending_says_which(end: object, status: int, code: str, message: str) -> None:
    async with open_web() as web:
        service = await web.service(slots=1)
        async with posted(web.client) as answers:
            claim = await service.wait_claim()
            await end(service, claim)  # type: ignore[operator]
        body = answers[0].json()
        assert answers[0].status_code == status
        assert (body["task_id"], body["result"], body["detail"]) == (claim.task_id, None, message)
        assert (body["error"]["code"], body["error"]["message"]) == (code, message)


@pytest.mark.promise("P1", "P9")
async def test_a_timeout_ends_a_task_that_nobody_takes() -> None:
    async with open_web() as web:
        await web.service()
        answer = await web.client.post(RUN, params={"timeout": 0.1}, json={})
        assert answer.status_code == 504
        assert answer.json()["status"] == "timed_out"
        assert (await web.client.get(f"/tasks/{answer.json()['task_id']}")).json()["status"] == "timed_out"


async def test_detached_runs_are_answered_at_once() -> None:
    async with open_web() as web:
        service = await web.service(slots=1)
        answer = await web.client.post(RUN, params={"detach": True}, json={})
        claim = await service.wait_claim()
        assert answer.status_code == 202
        assert answer.json() == {"task_id": claim.task_id, "session_id": claim.session_id, "status": "running"}
        await service.complete(claim)
        assert (await web.client.get(f"/tasks/{claim.task_id}/result")).json()["value"] == "done"


@pytest.mark.promise("P6")
async def test_a_client_that_leaves_takes_its_task_with_it() -> None:
    async with open_web() as web:
        service = await web.service(slots=1)
        async with web.wakeups(service) as heard, posted(web.client):
            claim = await service.wait_claim()
            async with httpx.AsyncClient(base_url=web.client.base_url, timeout=0.5) as other:
                await service.complete(claim)
                service.free = 1
                with pytest.raises(httpx.ReadTimeout):
                    await other.post(RUN, json={})
            claim = await service.wait_claim()
            assert (await heard.receive()).data == {"task_id": claim.task_id, "kind": "cancel"}
        await service.end_cancelled(claim)
        assert (await web.client.get(f"/tasks/{claim.task_id}")).json()["status"] == "cancelled"


@pytest.mark.promise("P2")
async def test_a_repeated_request_joins_the_first_one() -> None:
    async with open_web() as web:
        service = await web.service(slots=2)
        headers = {"Idempotency-Key": "order 7"}
        async with posted(web.client, headers=headers) as first, posted(web.client, headers=headers) as second:
            await service.complete(await service.wait_claim(), 1)
        third = await web.client.post(RUN, json={}, headers=headers)
        assert first[0].json() == second[0].json() == third.json()
        assert third.json()["result"] == 1
        assert service.claims == []
        other = await web.client.post(RUN, json={"a": 1}, headers=headers)
        assert other.status_code == 409
        both = await web.client.post(RUN, params={"task_id": "x"}, json={}, headers=headers)
        assert both.status_code == 422


@pytest.mark.promise("P7")
async def test_a_stopping_server_answers_who_waits_and_the_task_goes_on() -> None:
    async with open_web() as web:
        service = await web.service(slots=2)
        async with posted(web.client) as idle:
            claim = await service.wait_claim()
            await service.report(claim, waiting=True)
            web.stop.set()
        assert idle[0].status_code == 503
        assert idle[0].json()["error"]["code"] == "draining"
        assert claim.task_id in idle[0].json()["error"]["hint"]
        record = await web.plane.get_task(claim.task_id)
        assert (record.status, record.cancel_requested) == (TaskStatus.WAITING, False)


@pytest.mark.promise("P7")
async def test_a_stopping_server_ends_streams_properly() -> None:
    async with open_web() as web:
        service = await web.service(slots=1)
        answer = await web.client.post(RUN, params={"detach": True}, json={})
        claim = await service.wait_claim()
        await service.report(claim, {"n": 0})
        async with web.client.stream("GET", f"/tasks/{claim.task_id}/events") as response:
            lines = response.aiter_lines()
            assert await anext(lines) == "id: 0"
            web.stop.set()
            rest = [line async for line in lines if line]
        assert rest == ["event: app.Progress", 'data: {"n": 0}', "event: drain", 'data: {"from": 1}']
        assert answer.status_code == 202


@pytest.mark.promise("P3", "P7")
async def test_a_stopping_server_leaves_lines_visibly_incomplete() -> None:
    """The original's stream has no last line that could say so: its body breaks off, and goes on by `?from=`."""
    async with open_web() as web:
        service = await web.service(slots=1)
        ids = (await web.client.post(RUN, params={"detach": True}, json={})).json()
        claim = await service.wait_claim()
        await service.report(claim, {"n": 0}, {"n": 1})
        path = f"/sessions/{ids['session_id']}/tasks/{ids['task_id']}/result_stream"
        lines: list[str] = []

        async def read() -> None:
            async with web.client.stream("GET", path) as response:
                async for line in response.aiter_lines():
                    lines.append(line)
                    web.stop.set()

        with pytest.raises(httpx.RemoteProtocolError, match="incomplete"):
            await read()
        assert lines == ['{"n": 0}', '{"n": 1}']
        page = await web.plane.read_events(ids["task_id"])
        assert not page.record.status.is_terminal


async def test_lines_go_on_from_where_the_client_is() -> None:
    async with open_web() as web:
        service = await web.service(slots=1)
        ids = (await web.client.post(RUN, params={"detach": True}, json={})).json()
        claim = await service.wait_claim()
        await service.report(claim, {"n": 0}, {"n": 1}, {"n": 2})
        await service.complete(claim)
        path = f"/sessions/{ids['session_id']}/tasks/{ids['task_id']}/result_stream"
        for start in range(5):
            rest = (await web.client.get(path, params={"from": start})).text.splitlines()
            assert [json.loads(line)["n"] for line in rest] == list(range(start, 3))
        assert (await web.client.get(path, params={"from": "x"})).status_code == 422


@pytest.mark.promise("P9")
async def test_a_draining_plane_refuses_runs_but_answers_questions() -> None:
    async with open_web() as web:
        await web.service(slots=1)
        web.plane.refuse_new()
        refused = await web.client.post(RUN, json={})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        assert (await web.client.get("/ready")).status_code == 503
        assert (await web.client.get("/status")).json()["draining"] is True
        assert (await web.client.get("/")).json()["running"] == "False"


async def test_many_runs_at_once() -> None:
    async with open_web() as web:
        service = await web.service(slots=50)
        answers: list[int] = []
        async with trio.open_nursery() as nursery:

            async def work() -> None:
                for _ in range(50):
                    claim = await service.wait_claim()
                    nursery.start_soon(service.complete, claim, json.loads(claim.input)["n"])

            async def ask(n: int) -> None:
                answers.append((await web.client.post(RUN, json={"n": n})).json()["result"])

            nursery.start_soon(work)
            for n in range(50):
                nursery.start_soon(ask, n)
        assert sorted(answers) == list(range(50))
