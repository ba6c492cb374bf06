"""What a task may ask for: bounds, the identity of a request, and the same request over HTTP."""

from __future__ import annotations

from typing import Any

import pytest

from llama_corral.control_plane.options import TaskOptions, digest, retry_policy
from llama_corral.exceptions import BadInput
from llama_corral.protocol.lifecycle import TaskStatus
from llama_corral.protocol.records import RetryPolicy

from .corral import Corral
from .server import open_web

RUN = "/services/svc/run"


def test_a_request_is_identified_by_all_of_it() -> None:
    base: TaskOptions = {"timeout": 5.0, "max_attempts": 2, "retry": RetryPolicy(("A",))}
    whole = digest("svc", "s", '{"a": 1, "b": [2]}', base)
    same: list[tuple[Any, ...]] = [
        ("svc", "s", '{"b":[2],"a":1}', {**base, "delay": None}),
        ("svc", "s", '{"a": 1, "b": [2]}', {**base, "timeout": 5, "retry": RetryPolicy(("A",), backoff=1, factor=2)}),
    ]
    others: list[tuple[Any, ...]] = [
        ("other", "s", '{"a": 1, "b": [2]}', base),
        ("svc", None, '{"a": 1, "b": [2]}', base),
        ("svc", "s", '{"a": "1", "b": [2]}', base),
        ("svc", "s", '{"a": 1, "b": [2]}', {**base, "timeout": 6.0}),
        ("svc", "s", '{"a": 1, "b": [2]}', {**base, "delay": 1.0}),
        ("svc", "s", '{"a": 1, "b": [2]}', {**base, "not_before": 1.0}),
        ("svc", "s", '{"a": 1, "b": [2]}', {**base, "max_attempts": 3}),
        ("svc", "s", '{"a": 1, "b": [2]}', {**base, "retry": None}),
        ("svc", "s", '{"a": 1, "b": [2]}', {**base, "retry": RetryPolicy(("B",))}),
        ("svc", "s", '{"a": 1, "b": [2]}', {**base, "retry": RetryPolicy(None)}),
        ("svc", "s", '{"a": 1, "b": [2]}', {**base, "retry": RetryPolicy(("A",), backoff=3.0)}),
        ("svc", "s", '{"a": 1, "b": [2]}', {**base, "retry": RetryPolicy(("A",), factor=3.0)}),
        ("svc", "s", '{"a": 1, "b": [2]}', {**base, "retry": RetryPolicy(("A",), max_backoff=3.0)}),
    ]
    assert {digest(*each) for each in same} == {whole}
    assert len({whole, *(digest(*each) for each in others)}) == 1 + len(others)


def test_policies_in_words() -> None:
    assert retry_policy(()) is None
    assert retry_policy(("A", "*")) == RetryPolicy(None)
    assert retry_policy(("A", "b.C"), backoff=0.5, max_backoff=9) == RetryPolicy(("A", "b.C"), 0.5, 2.0, 9)
    with pytest.raises(BadInput, match="no error"):
        retry_policy((), backoff=1)


@pytest.mark.anyio
@pytest.mark.promise("P9")
@pytest.mark.parametrize(
    "options",
    [
        {"max_attempts": 0},
        {"max_attempts": 1001},
        {"delay": -1.0},
        {"delay": float("nan")},
        {"not_before": float("inf")},
        {"retry": RetryPolicy(())},
        {"retry": RetryPolicy(("",))},
        {"retry": RetryPolicy(("x" * 256,))},
        {"retry": RetryPolicy(("A",) * 101)},
        {"retry": RetryPolicy(backoff=-1)},
        {"retry": RetryPolicy(factor=0.5)},
        {"retry": RetryPolicy(max_backoff=float("inf"))},
    ],
)
async def test_options_have_bounds(corral: Corral, options: TaskOptions) -> None:
    await corral.service(slots=1)
    with pytest.raises(BadInput):
        await corral.plane.submit("svc", {}, **options)


@pytest.mark.trio
@pytest.mark.promise("P9")
async def test_options_over_http() -> None:
    async with open_web() as web:
        service = await web.service(slots=2)
        await web.client.put("/sessions/s")
        query = {
            "detach": True, "max_attempts": 7, "retry_on": ["A", "b.C"], "backoff": 0.5, "backoff_factor": 3,
            "max_backoff": 9,
        }  # fmt: skip
        await web.client.post(RUN, params=query, json={})
        claim = await service.wait_claim()
        assert claim.retry == RetryPolicy(("A", "b.C"), 0.5, 3.0, 9.0)
        shown = (await web.client.get(f"/tasks/{claim.task_id}")).json()
        assert (shown["max_attempts"], shown["attempts"], shown["retry_of"]) == (7, 0, None)
        body = {"agent_id": "svc", "input": "{}"}
        later = await web.client.post("/sessions/s/tasks", params={"delay": 1000, "retry_on": "*"}, json=body)
        shown = (await web.client.get(f"/tasks/{later.json()}")).json()
        assert (shown["status"], shown["not_before"]) == ("queued", shown["created_at"] + 1000)
        bad = [
            "delay=-1", "delay=NaN", "delay=1&not_before=2", "not_before=x", "max_attempts=0", "max_attempts=1.5",
            "backoff=1", "retry_on=", "retry_on=A&backoff=-1", "retry_on=A&backoff_factor=0.5", "retry_on=A&max_backoff=inf",
            "retry=A", "delay=5&timeout=2", "not_before=1e300",
        ]  # fmt: skip
        for each in bad:
            for path in (RUN, "/sessions/s/tasks"):
                refused = await web.client.post(f"{path}?{each}", json=body if path != RUN else {})
                assert refused.status_code == 422, (path, each, refused.text)


@pytest.mark.trio
@pytest.mark.promise("P2")
async def test_a_key_makes_a_start_repeatable_whichever_way_it_comes() -> None:
    async with open_web() as web:
        await web.service()
        await web.client.put("/sessions/s")
        headers = {"Idempotency-Key": "order 7"}
        body = {"agent_id": "svc", "input": '{"a": 1}'}
        first = await web.client.post("/sessions/s/tasks", json=body, headers=headers)
        again = await web.client.post("/sessions/s/tasks", json=body, headers=headers)
        assert first.json() == again.json()
        run = await web.client.post(RUN, params={"session_id": "s", "detach": True}, json={"a": 1}, headers=headers)
        assert run.json()["task_id"] == first.json()
        assert len((await web.client.get("/sessions/s/tasks")).json()) == 1
        for path, other in (
            ("/sessions/s/tasks", {**body, "input": '{"a": 2}'}),
            ("/sessions/s/tasks?max_attempts=5", body),
            (f"{RUN}?detach=true", {"a": 1}),
        ):
            assert (await web.client.post(path, json=other, headers=headers)).status_code == 409
        both = await web.client.post("/sessions/s/tasks", json={**body, "task_id": "x"}, headers=headers)
        assert both.status_code == 422
        for key in ("", "x" * 256):
            refused = await web.client.post("/sessions/s/tasks", json=body, headers={"Idempotency-Key": key})
            assert refused.status_code == 422


@pytest.mark.trio
@pytest.mark.promise("P1", "P2")
async def test_a_failed_task_is_done_again_as_a_new_one() -> None:
    async with open_web() as web:
        service = await web.service(slots=1)
        await web.client.put("/sessions/s")
        task = (await web.client.post("/sessions/s/tasks", json={"agent_id": "svc", "input": '{"a": 1}'})).json()
        assert (await web.client.post(f"/tasks/{task}/retry")).status_code == 409
        await service.fail(await service.wait_claim())
        answer = await web.client.post(f"/sessions/s/tasks/{task}/retry")
        assert answer.status_code == 202
        new = answer.json()
        assert (new["retry_of"], new["session_id"], new["status"], new["created"]) == (task, "s", "queued", True)
        repeated = await web.client.post(f"/tasks/{task}/retry", params={"fresh": True})
        assert (repeated.json()["task_id"], repeated.json()["created"]) == (new["task_id"], False)
        claim = await service.take_ticket(web.queue)
        assert claim is not None
        assert (claim.task_id, claim.input) == (new["task_id"], '{"a": 1}')
        await service.complete(claim)
        assert (await web.client.get(f"/tasks/{task}")).json()["status"] == "failed"
        assert (await web.client.get(f"/tasks/{new['task_id']}")).json()["retry_of"] == task
        assert (await web.client.post(f"/tasks/{new['task_id']}/retry")).status_code == 409
        for path in ("/tasks/nothing/retry", f"/sessions/other/tasks/{task}/retry"):
            assert (await web.client.post(path)).status_code == 404
        assert (await web.client.post(f"/tasks/{task}/retry?frsh=1")).status_code == 422
        web.plane.refuse_new()
        assert (await web.client.post(f"/tasks/{task}/retry")).status_code == 503


@pytest.mark.anyio
async def test_registration_answers_the_lease_and_marks_what_is_embedded(corral: Corral) -> None:
    service = await corral.service()
    answer = await corral.plane.register(service.info(), service)
    assert (answer.lease, answer.protocol_version) == (corral.plane.config.lease, 1)
    far = await corral.service("far", register=False)
    await corral.plane.register(far.info())
    found = {each.instance_id: each.embedded for each in await corral.store.list_instances()}
    assert found == {"svc-instance": True, "far-instance": False}
    assert (await corral.plane.submit("svc", {})).status is TaskStatus.QUEUED
