"""Ids, cursors, start arguments, outside events and session states that nobody should send."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from .conftest import DEPTH, PATIENCE, Served, thorough
from .documents import NUMBERS, SCALARS, TEXTS, VALUES, nearly, nested
from .raw import exchange, request, statuses

pytestmark = [pytest.mark.promise("P9"), pytest.mark.timeout(120 + 300 * (DEPTH > 1) * DEPTH)]

EVENTS = 13
"""Twelve of the workflow and its StopEvent."""
DOCUMENTED = {200, 201, 202, 400, 404, 405, 409, 413, 415, 422, 424}
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def ended(plane: Served) -> str:
    """A task with events that has ended."""
    with plane.client() as client:
        found = client.post("/services/echo/run", params={"task_id": "ended"}, json={"count": EVENTS - 1})
        assert found.json()["status"] == "completed"
    return "ended"


IDS = st.one_of(
    st.text(min_size=1, max_size=12).map(lambda text: quote(text, safe="")),
    st.sampled_from(
        ["..", ".", "%2e%2e", "%2E", "%2F", "a%2Fb", "%00", "%", "%zz", "%c0%af", "%ff", "%ed%a0%80", "a%0d%0aX:%201"]
    ),
    st.sampled_from(
        ["x" * 256, "x" * 20_000, "%41" * 300, "a;b", "a?b", "a#b", "a//b", "\\", "\xff", "+", "ended", ""]
    ),
)
PLACES = [
    ("GET", "/tasks/{}"),
    ("GET", "/tasks/{}/events"),
    ("GET", "/tasks/{}/result"),
    ("POST", "/tasks/{}/cancel"),
    ("POST", "/tasks/{}/send_event"),
    ("GET", "/sessions/{}"),
    ("PUT", "/sessions/{}"),
    ("POST", "/sessions/{}/delete"),
    ("POST", "/sessions/{}/state"),
    ("GET", "/sessions/{}/tasks/{}/result_stream"),
    ("GET", "/services/{}"),
    ("POST", "/services/{}/run"),
    ("GET", "{}"),
]


def test_ids_in_paths(plane: Served, ended: str) -> None:
    @thorough(150)
    @given(place=st.sampled_from(PLACES), name=IDS, other=IDS, query=st.sampled_from(["", "?", "?a", "?%ff=1", "?a=%"]))
    def check(place: tuple[str, str], name: str, other: str, query: str) -> None:
        method, path = place
        body = b"{}" if method == "POST" else b""
        found = statuses(exchange(plane.url, request(path.format(name, other) + query, method=method, body=body)))
        assert len(found) == 1
        assert found[0] in DOCUMENTED | {308}, (found, name, other)

    check()


CURSORS = st.one_of(
    st.integers(0, EVENTS + 3).map(str),
    st.sampled_from(["-1", "+1", "1.0", " 1", "0x1", "1_0", "٣", "²", "9" * 18, "9" * 19, "9" * 400, "", "null", "\0"]),
    st.text(max_size=8),
)


@pytest.mark.promise("P3")
def test_cursors(plane: Served, ended: str) -> None:
    with plane.client() as client:

        @thorough(120)
        @given(start=CURSORS | st.none(), last=CURSORS | st.none(), in_session=st.booleans())
        def check(start: str | None, last: str | None, in_session: bool) -> None:
            path = f"/sessions/{ended}/tasks/{ended}/events" if in_session else f"/tasks/{ended}/events"
            if in_session:
                path = f"/sessions/{client.get(f'/tasks/{ended}').json()['session_id']}/tasks/{ended}/events"
            try:
                headers = {} if last is None else {"Last-Event-ID": last.encode()}
                found = client.get(path, params={} if start is None else {"from": start}, headers=headers)
            except (httpx.LocalProtocolError, UnicodeEncodeError):
                return  # no header can say that
            good = [_index(text) for text in (start, last) if text is not None]
            if None in good:
                assert found.status_code in (400, 422), (start, last)
                return
            first = good[-1] + 1 if last is not None else good[0] if good else 0
            frames = found.text.split("\n\n")
            ids = [int(frame.split("\n")[0].removeprefix("id: ")) for frame in frames if frame.startswith("id: ")]
            assert ids == list(range(first, EVENTS))
            assert frames[-2].startswith("event: end\n")

        check()


def _index(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 18 else None


ARGUMENTS = st.fixed_dictionaries(
    {},
    optional={
        "count": NUMBERS | VALUES,
        "name": TEXTS | VALUES,
        "ratio": NUMBERS | VALUES,
        "when": st.sampled_from(["2024-01-01T00:00:00Z", 0, 1e300, "9999999-01-01", "-1"]) | VALUES,
        "kind": st.sampled_from(["a", "b", "c"]) | VALUES,
        "place": st.just({"name": "n", "parts": [{"name": "m"}]}) | VALUES,
        "tags": VALUES,
        "raw": TEXTS | VALUES,
        "_private": VALUES,
        "run_id": VALUES,
        "ctx": VALUES,
        "start_event": VALUES,
        "__class__": VALUES,
    },
)


@pytest.mark.promise("P1")
def test_start_arguments(plane: Served) -> None:
    """They are refused, or the task ends: with what it was given, or because the workflow said so."""
    with plane.client() as client:

        @thorough(150)
        @given(arguments=ARGUMENTS, seed=st.integers(0, 80))
        def check(arguments: dict[str, Any], seed: int) -> None:
            body = nearly(arguments, seed=seed) if seed < 14 else json.dumps(arguments).encode()
            found = client.post("/services/echo/run", content=body, headers=JSON)
            assert found.status_code in DOCUMENTED, (found.status_code, found.text[:300], body[:300])
            if found.status_code == 424:
                assert arguments.get("name") == "fail", found.text[:1000]
            if found.status_code == 200 and seed >= 14 and "name" in arguments:
                assert found.json()["result"]["name"] == arguments["name"]

        check()


def test_start_arguments_of_any_depth(plane: Served) -> None:
    with plane.client() as client:
        for depth in (10, 100, 150, 190, 199, 200, 201, 250, 500, 1_000, 10_000, 200_000):
            for text in ('{"tags": ' + nested(depth) + "}", nested(depth, '{"a":', "}")):
                found = client.post("/services/echo/run?detach=true", content=text, headers=JSON)
                assert found.status_code in DOCUMENTED, (depth, found.text[:300])
                if found.status_code == 202:
                    task = found.json()["task_id"]
                    ending = client.get(f"/tasks/{task}/result", params={"wait": PATIENCE / 2}).json()
                    assert ending is not None, (depth, text[:30])


HUMAN = "workflows.events.HumanResponseEvent"
PAYLOADS = st.one_of(
    TEXTS,
    VALUES.map(json.dumps),
    st.builds(
        lambda name, value, flag, more: json.dumps(
            {"__is_pydantic": flag, "value": value, "qualified_name": name, **more}
        ),
        st.sampled_from([HUMAN, "workflows.events.StopEvent", "os.system", "builtins.dict", "", "a.b.c"]) | VALUES,
        st.dictionaries(st.sampled_from(["response", "_data", "user", "__class__"]) | TEXTS, VALUES, max_size=3)
        | VALUES,
        st.just(True) | SCALARS,
        st.dictionaries(st.sampled_from(["__is_component", "class_name"]), VALUES, max_size=1),
    ),
)


@pytest.mark.promise("P11")
def test_outside_events(plane: Served) -> None:
    """Whatever a task is sent, it ends: by an answer that it takes, or in its own time."""
    with plane.client() as client:

        @thorough(60)
        @given(payloads=st.lists(PAYLOADS, min_size=1, max_size=4), agent=st.sampled_from(["ask", ""]) | TEXTS)
        def check(payloads: list[str], agent: str) -> None:
            task = client.post("/services/ask/run", params={"detach": "true"}, json={}).json()["task_id"]
            for payload in payloads:
                body = {"agent_id": agent, "event_obj_str": payload}
                found = client.post(f"/tasks/{task}/send_event", content=json.dumps(body), headers=JSON)
                assert found.status_code in (200, 400, 409, 422), (found.text[:500], payload)
            good = json.dumps({"__is_pydantic": True, "value": {"_data": {"response": "yes"}}, "qualified_name": HUMAN})
            sent = client.post(f"/tasks/{task}/send_event", json={"agent_id": "", "event_obj_str": good})
            assert sent.status_code in (200, 409)
            ending = client.get(f"/tasks/{task}/result", params={"wait": PATIENCE / 2}).json()
            assert ending is not None, payloads

        check()


@pytest.mark.promise("P4")
def test_session_states(plane: Served) -> None:
    with plane.client() as client:
        client.put("/sessions/states").raise_for_status()
        state: dict[str, Any] = {}

        @thorough(100)
        @given(changes=st.dictionaries(TEXTS, VALUES, max_size=3) | VALUES, seed=st.integers(0, 60))
        def check(changes: Any, seed: int) -> None:
            body = nearly(changes, seed=seed) if seed < 14 else json.dumps(changes).encode()
            found = client.post("/sessions/states/state", content=body, headers=JSON)
            assert found.status_code in (200, 400, 413, 422), (found.text[:300], body[:300])
            if found.status_code == 200 and seed >= 14:
                state.update(changes)
                stored = client.get("/sessions/states/state").json()
                assert {name: stored[name] for name in changes} == _as_stored(changes)
            assert client.get("/sessions/states").status_code == 200
            assert client.get("/sessions").status_code == 200

        check()


def _as_stored(value: Any) -> Any:
    return json.loads(json.dumps(value))


def test_session_states_of_any_depth(plane: Served) -> None:
    with plane.client() as client:
        client.put("/sessions/deep").raise_for_status()
        for depth in (100, 150, 198, 199, 200, 201, 255, 500, 1_000, 10_000, 200_000):
            for text in ('{"a": ' + nested(depth) + "}", nested(depth, '{"a":', "}")):
                found = client.post("/sessions/deep/state", content=text, headers=JSON)
                assert found.status_code in (200, 400, 422), (depth, found.text[:300])
                for path in ("/sessions/deep/state", "/sessions/deep", "/sessions"):
                    assert client.get(path).status_code == 200, (depth, path)
        big = {f"k{number}": "x" * 90_000 for number in range(100)}
        for _ in range(3):
            assert client.post("/sessions/deep/state", json=big).status_code == 200
        assert len(client.get("/sessions/deep/state").json()) >= 100
