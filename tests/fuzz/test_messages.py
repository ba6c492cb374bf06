"""`POST /process_message` of both servers under messages that nobody should send.

Whatever comes, the answer is a 2xx or a 4xx, it comes soon, the server works on, and every task that was accepted ends.
"""

from __future__ import annotations

import json
import uuid
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_corral.protocol.messages import ActionTypes

from .conftest import BODY_LIMIT, DEPTH, PATIENCE, Served, thorough
from .documents import NUMBERS, TEXTS, VALUES, nearly

pytestmark = [pytest.mark.promise("P9"), pytest.mark.timeout(120 + 300 * (DEPTH > 1) * DEPTH)]

ACTIONS = [action.value for action in ActionTypes]
TERMINAL = ("completed", "failed", "cancelled", "timed_out")


@pytest.fixture(params=["plane", "service"])
def server(request: pytest.FixtureRequest) -> Served:
    served: Served = request.getfixturevalue(request.param)
    return served


def tell(client: httpx.Client, body: bytes | Any, **headers: str) -> int:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    found = client.post("/process_message", content=content, headers={"Content-Type": "application/json", **headers})
    assert found.status_code < 500, (found.status_code, found.text[:500], content[:500])
    if found.status_code >= 400:
        assert found.json()["error"]["message"]
    return found.status_code


def envelope(action: Any, **data: Any) -> dict[str, Any]:
    return {"action": action, "data": data, "type": "control_plane"}


FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "task_id": TEXTS | VALUES,
        "session_id": st.none() | TEXTS,
        "agent_id": st.sampled_from(["echo", "ask", "nobody", "control_plane", "", None]) | VALUES,
        "input": st.sampled_from(["{}", '{"count": 3}', '{"count": 1e999}', "[]", "null", "{", '{"a": NaN}']) | VALUES,
        "data": VALUES | st.dictionaries(TEXTS, VALUES, max_size=2),
        "index": NUMBERS | VALUES,
        "result": VALUES,
        "status": st.sampled_from([*TERMINAL, "running", "held"]) | VALUES,
        "error": VALUES,
        "value": VALUES,
        "history": VALUES,
        "type": VALUES,
    },
)
ENVELOPES = st.fixed_dictionaries(
    {"action": st.sampled_from(ACTIONS) | VALUES, "data": FIELDS | VALUES},
    optional={"id_": VALUES, "publisher_id": VALUES, "stats": VALUES, "type": VALUES, "more": VALUES},
)


def test_any_message(server: Served) -> None:
    with server.client() as client:

        @thorough(120)
        @given(body=ENVELOPES, seed=st.integers(0, 60))
        def check(body: Any, seed: int) -> None:
            tell(client, nearly(body, seed=seed) if seed < 14 else body)

        check()
        assert client.get("/ready").status_code == 200


@pytest.mark.parametrize("kind", [b"9", b"[", b'{"a":', b'"\\u0000"', b"1,", b'{"a":1},'])
def test_ten_megabytes(server: Served, kind: bytes) -> None:
    head, tail = b'{"action": "new_task", "data": {"input": "{}", "task_id": "big", "x": [', b"0]}}"
    body = head + (kind * BODY_LIMIT)[: BODY_LIMIT - len(head) - len(tail)] + tail
    with server.client() as client:
        tell(client, body)
        assert tell(client, b'"' + b"x" * BODY_LIMIT + b'"') == 413


@pytest.mark.promise("P1")
@pytest.mark.promise("P12")
def test_sequences_about_real_tasks(plane: Served) -> None:
    """Tasks of a service that reports by messages, and of one whose instances claim, reported about in any order."""
    with plane.client() as client:
        client.post("/services/register", json={"service_name": "far"}).raise_for_status()
        client.put("/sessions/shared").raise_for_status()

        @thorough(40)
        @given(data=st.data())
        def check(data: st.DataObject) -> None:
            tasks = [f"t-{uuid.uuid4().hex}" for _ in range(3)]
            service = data.draw(st.sampled_from(["far", "echo", "ask"]), "service")
            session = data.draw(st.sampled_from([None, "shared", "unknown"]), "session")
            for _ in range(data.draw(st.integers(1, 10), "messages")):
                tell(client, data.draw(_report(tasks, service, session), "message"))
            if service == "far":
                for task in tasks * len(tasks):  # one of them may be held by its session until another one has ended
                    tell(client, envelope("completed_task", task_id=task, result="late"))
            for task in tasks:
                _ends(client, task)

        check()
        _still_works(client)
        reports = plane.inner.core.plane._reports
        assert all(not progress.early for progress in reports._progress.values()), "events of ended tasks are kept"


def _report(tasks: list[str], service: str, session: str | None) -> st.SearchStrategy[Any]:
    task = st.sampled_from(tasks)
    index = st.one_of(st.integers(-2, 4), st.sampled_from([2**31, 2**53, 2**63 - 1, 2**63, 10**30, -(10**30)]))
    payload = st.dictionaries(TEXTS.filter(lambda t: len(t) < 100), VALUES, max_size=2)
    inputs = st.sampled_from(['{"count": 2}', "{}", '{"name": "fail"}', '{"count": 1000}'])
    new = st.builds(
        lambda t, i: envelope("new_task", task_id=t, agent_id=service, input=i, session_id=session), task, inputs
    )
    stream = st.builds(lambda t, i, d: envelope("task_stream", task_id=t, index=i, data=d), task, index, payload)
    status = st.sampled_from([*TERMINAL, "running", "nonsense"])
    done = st.builds(
        lambda t, r, s, v: envelope("completed_task", task_id=t, result=r, status=s, value=v),
        task,
        TEXTS,
        status,
        VALUES,
    )
    return st.one_of(new, new, stream, stream, stream, done)


def _ends(client: httpx.Client, task: str) -> None:
    """If it exists, it ends, and its stream is whole."""
    found = client.get(f"/tasks/{task}")
    if found.status_code == 404:
        return
    record = found.json()
    wait = client.get(f"/tasks/{task}/result", params={"wait": PATIENCE / 2})
    assert wait.status_code == 200, wait.text
    assert wait.json() is not None, record
    assert wait.json()["status"] in TERMINAL
    frames = client.get(f"/tasks/{task}/events").text.split("\n\n")
    ids = [int(frame.split("\n")[0].removeprefix("id: ")) for frame in frames if frame.startswith("id: ")]
    assert ids == list(range(len(ids)))
    assert frames[-2].startswith("event: end\n")


def _still_works(client: httpx.Client) -> None:
    found = client.post("/services/echo/run", json={"count": 1})
    assert found.json()["status"] == "completed", found.text
    assert client.get("/ready").status_code == 200


def test_a_flood_of_early_events_is_bounded(plane: Served) -> None:
    with plane.client() as client:
        client.post("/services/register", json={"service_name": "far"}).raise_for_status()
        tell(client, envelope("new_task", task_id="flood", agent_id="far", input="{}"))
        reports = plane.inner.core.plane._reports
        for index in range(1300, 0, -1):
            tell(client, envelope("task_stream", task_id="flood", index=index, data={"n": index}))
            assert len(reports._progress["flood"].early) <= 1001
        tell(client, envelope("completed_task", task_id="flood", result="late"))
        _ends(client, "flood")
