"""The routes of instances: what a worker sends is checked at the door, and nothing of it fails anybody else's request."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic_core import to_json

from llama_corral.protocol import calls
from llama_corral.protocol.messages import ServiceDefinition
from llama_corral.protocol.records import Report

from .server import Web, open_web

pytestmark = pytest.mark.trio

DEFINITION = ServiceDefinition(service_name="svc").model_dump_json()
INFO = {
    "definition": DEFINITION,
    "service_name": "svc",
    "instance_id": "i",
    "capacity": 1,
    "events": '[{"name": "E", "qualified_name": "m.E", "schema": {}}]',
    "start_schema": '{"required": ["topic"]}',
}
HUGE = 10**30
DEEP = "[" * 100_000 + "]" * 100_000


async def post(web: Web, path: str, body: Any) -> int:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"content-type": "application/json"}
    return (await web.client.post(path, content=content, headers=headers)).status_code


async def claimed(web: Web) -> dict[str, Any]:
    """A task in the hands of the instance `i`, as far as a report of it needs to know."""
    assert await post(web, calls.REGISTER, INFO) == 200
    accepted = await web.plane.submit("svc", {"topic": "x"})
    claim = {"ticket": {"task_id": accepted.task_id, "service_name": "svc"}, "instance_id": "i", "nonce": "n"}
    assert await post(web, calls.CLAIM, claim) == 200
    return {"task_id": accepted.task_id, "epoch": 1, "seq": 1, "now": 0.0}


async def assert_others_are_served(web: Web) -> None:
    for path in ("/services", "/services/svc", "/status", "/tasks", "/sessions", "/openapi.json"):
        assert (await web.client.get(path)).status_code == 200, path
    for task in (await web.client.get("/tasks")).json()["tasks"]:
        for path in (f"/tasks/{task['task_id']}", f"/tasks/{task['task_id']}/result"):
            assert (await web.client.get(path)).status_code == 200, path


@pytest.mark.parametrize(
    "change",
    [
        {"definition": "no json"},
        {"definition": "[]"},
        {"definition": ServiceDefinition(service_name="other").model_dump_json()},
        {"service_name": ""},
        {"service_name": "a/b"},
        {"instance_id": ""},
        {"instance_id": "x" * 300},
        {"instance_id": "messages"},
        {"instance_id": "with\nnewline"},
        {"capacity": -1},
        {"capacity": HUGE},
        {"capacity": "many"},
        {"events": "no json"},
        {"events": '["m.E"]'},
        {"events": DEEP},
        {"start_schema": "[]"},
        {"start_schema": '{"required": "topic"}'},
        {"protocol_versions": []},
        {"protocol_versions": [HUGE]},
        {"protocol_versions": [99]},
        {"protocol_versions": "new"},
    ],
)
@pytest.mark.promise("P9")
async def test_a_registration_that_would_harm_others(change: dict[str, Any]) -> None:
    async with open_web() as web:
        assert await post(web, calls.REGISTER, INFO | change) in (400, 422)
        assert (await web.client.get("/services")).json() == {}


@pytest.mark.parametrize(
    "change",
    [
        {"events": [{"type": "E", "payload": "no json"}]},
        {"events": [{"type": "E", "payload": "[]"}]},
        {"events": [{"type": "E", "payload": '{"a":\n1}'}]},
        {"events": [{"type": "E", "payload": '{"a": NaN}'}]},
        {"events": [{"type": "E", "payload": DEEP}]},
        {"events": [{"type": "E"}]},
        {"epoch": HUGE},
        {"epoch": -1},
        {"seq": HUGE},
        {"task_id": 3},
        {"checkpoint": {"snapshot": "{}", "inbox_applied": HUGE}},
        {"checkpoint": {"snapshot": "{}", "inbox_applied": 0, "event_count": -1}},
        {"terminal": {"status": "running"}},
        {"terminal": {"status": "gone"}},
        {"terminal": {"status": "completed", "result": "no json"}},
        {"terminal": {"status": "completed", "result": '"\\ud800"'}},
        {"terminal": {"status": "completed", "result": DEEP}},
        {"terminal": {"status": "completed"}, "context": {"based_on": HUGE, "payload": "{}"}},
    ],
)
@pytest.mark.promise("P9")
async def test_a_report_that_would_harm_others(change: dict[str, Any]) -> None:
    async with open_web() as web:
        report = await claimed(web)
        assert await post(web, calls.REPORT, report | change) == 422
        await assert_others_are_served(web)
        assert await post(web, calls.REPORT, report | {"terminal": {"status": "completed", "result": "1"}}) == 200
        await assert_others_are_served(web)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (calls.DEREGISTER, {"instance_id": "messages"}),
        (calls.CLAIM, {"ticket": {"task_id": "t", "service_name": "s"}, "instance_id": "i", "nonce": ""}),
        (calls.CLAIM, {"ticket": {"task_id": "t", "service_name": "s"}, "instance_id": "messages", "nonce": "n"}),
        (calls.CLAIM, {"ticket": "t", "instance_id": "i", "nonce": "n"}),
        (calls.RELEASE, {"task_id": "t", "epoch": HUGE}),
        (calls.RELEASE, {"task_id": "t", "epoch": 1, "wake_at": 1e300}),
        (calls.RELEASE, {"task_id": "t", "epoch": 1, "wake_at": -1}),
        (calls.HEARTBEAT, {"instance_id": "i", "held": [{"task_id": "t", "epoch": HUGE}]}),
        (calls.HEARTBEAT, {"instance_id": "i", "held": {}}),
        (calls.PULL, {"task_id": "t", "epoch": 1, "after": HUGE}),
        (calls.PULL, b"{"),
        (calls.PULL, b""),
        (calls.PULL, DEEP.encode()),
        (calls.PULL, b"\xff"),
    ],
)
@pytest.mark.promise("P9")
async def test_calls_that_make_no_sense(path: str, body: Any) -> None:
    async with open_web() as web:
        assert await post(web, path, body) in (400, 422)


@pytest.mark.promise("P9")
async def test_an_ending_without_what_belongs_to_it() -> None:
    """A worker that says less than it should is no reason to fail whoever asks for the outcome."""
    for terminal in ({"status": "failed"}, {"status": "completed"}, {"status": "timed_out", "result": "3"}):
        async with open_web() as web:
            report = await claimed(web)
            assert await post(web, calls.REPORT, report | {"terminal": terminal}) == 200
            await assert_others_are_served(web)


async def test_the_document_describes_the_calls() -> None:
    async with open_web() as web:
        paths = (await web.client.get("/openapi.json")).json()["paths"]
        for path in (calls.REGISTER, calls.CLAIM, calls.REPORT, calls.RELEASE, calls.HEARTBEAT, calls.PULL):
            assert paths[path]["post"]["tags"] == ["Instances"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
MEMBERS = [*sorted(Report.__dataclass_fields__), "instance_id", "ticket", "nonce", "held", "after", "idle", "wake_at"]


@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(bodies=st.lists(st.dictionaries(st.sampled_from(MEMBERS), JSON), min_size=10, max_size=10))
@pytest.mark.promise("P9")
async def test_no_content_is_an_error_of_the_server(bodies: list[dict[str, Any]]) -> None:
    async with open_web() as web:
        report = await claimed(web)
        valid = report | {"instance_id": "i", "nonce": "n", "after": 0, "ticket": {"task_id": "", "service_name": ""}}
        for body in bodies:
            for path in (calls.CLAIM, calls.REPORT, calls.RELEASE, calls.HEARTBEAT, calls.PULL, calls.DEREGISTER):
                content = to_json(valid | body, inf_nan_mode="null")
                assert await post(web, path, content) in (200, 400, 422)
        await assert_others_are_served(web)
