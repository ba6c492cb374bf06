"""The promises from the outside: real processes, real sockets, real signals."""

from __future__ import annotations

import json
import random
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from .conftest import Corral

Serve = Callable[..., Corral]
flavours = pytest.mark.parametrize("flavour", ["asyncio", "anyio"])
pytestmark = pytest.mark.process


@pytest.mark.promise("P1", "P6")
@pytest.mark.parametrize("cap", [1, 2])
def test_who_waits_for_a_person_holds_no_slot(serve: Serve, cap: int) -> None:
    chance = random.Random(cap)
    corral = serve("--max-concurrent-tasks", str(cap))
    tasks = [corral.begin("person") for _ in range(100)]
    hasty = [corral.begin("person", {"patience": 0.2}) for _ in range(5)]
    for task in tasks:
        corral.wait_event(task)
    assert corral.run("hello", timeout=5).json()["result"] == "hello"
    newcomer = corral.begin("person")
    assert corral.answer(newcomer).status_code == 200
    assert corral.result(newcomer)["status"] == "completed"

    cancelled = set(chance.sample(tasks, 15))
    for task in chance.sample(tasks, len(tasks)):
        assert (corral.cancel if task in cancelled else corral.answer)(task).is_success
    for task in tasks:
        record = corral.result(task)
        assert record["status"] == ("cancelled" if task in cancelled else "completed")
        if task not in cancelled:
            assert record["value"][0] == "yes"
            assert record["value"][1] <= cap
    assert {corral.result(task)["error"]["type"] for task in hasty} == {"TimeoutError"}
    assert corral.busy() == {}
    assert corral.stop() == 0


@flavours
@pytest.mark.promise("P1")
def test_the_cap_is_reached_and_never_exceeded(serve: Serve, flavour: str) -> None:
    corral = serve("--max-concurrent-tasks", "4", "--step-flavour", flavour)
    tasks = [corral.begin("work") for _ in range(150)]
    records = [corral.result(task) for task in tasks]
    assert {record["status"] for record in records} == {"completed"}
    assert max(record["value"] for record in records) == 4


def vanish(corral: Corral, service: str, name: str, how: str) -> socket.socket:
    """A request whose client is gone as soon as the task has published an event."""
    client = socket.create_connection(("127.0.0.1", int(corral.url.rpartition(":")[2])))
    body = json.dumps({"name": name}).encode()
    head = f"POST /services/{service}/run?task_id={name} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    give_up = time.monotonic() + 10
    while corral.http.get(f"/tasks/{name}").status_code == 404:
        assert time.monotonic() < give_up
    corral.wait_event(name, 2)
    if how == "half-close":
        client.shutdown(socket.SHUT_WR)
        return client
    if how == "reset":
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()
    return client


@flavours
@pytest.mark.promise("P6")
def test_cancellation_reaches_the_step(serve: Serve, flavour: str) -> None:
    corral = serve("--step-flavour", flavour, "--max-concurrent-tasks", "2")
    started: dict[str, float] = {}
    for service in ("stuck", "thread"):
        for how in ("route", "close", "reset", "half-close"):
            name = f"{service}-{how}"
            if how == "route":
                task = corral.run(service, {"name": name}, detach=True, task_id=name).json()["task_id"]
                corral.wait_event(task, 2)
                started[name] = time.time()
                assert corral.cancel(task).status_code == 202
            else:
                client = vanish(corral, service, name, how)
                started[name] = time.time()
            record = corral.result(name)
            client_left = how != "route" and client.close()
            assert (record["status"], client_left or None) == ("cancelled", None)
            assert corral.read(name)[0][:3] == [0, 1, 2]
            if service == "stuck":  # its clean-up ran before the record was written
                print(f"{flavour} {name}: {1000 * (corral.cleaned[name] - started[name]):.1f} ms")

    session = corral.http.post("/sessions/create").json()
    task = corral.add(session, "stuck", {"name": "deleted"})
    held = corral.add(session, "stuck", {"name": "held"})
    corral.wait_event(task, 2)
    assert corral.http.post(f"/sessions/{session}/delete").status_code == 200
    assert [corral.http.get(f"/tasks/{each}").status_code for each in (task, held)] == [404, 404]
    assert corral.run("hello", timeout=5).status_code == 200
    assert corral.stop() == 0  # and a sync step in its thread holds nothing up
    assert {"deleted"} < corral.cleaned.keys()
    assert "held" not in corral.cleaned
    assert "Traceback" not in corral.log


@flavours
@pytest.mark.promise("P1")
def test_no_step_ends_the_service(serve: Serve, flavour: str) -> None:
    corral = serve("--step-flavour", flavour)
    waiting = corral.begin("person")
    for kind in ("exit", "base", "group"):
        answer = corral.run("poison", {"kind": kind})
        assert answer.status_code == 424
        assert "step 'take' raised" in answer.json()["error"]["message"]
    task = corral.begin("poison", {"kind": "clean-up"})
    corral.wait_event(task)
    corral.cancel(task)
    assert corral.result(task)["status"] == "cancelled"
    corral.answer(waiting)
    assert corral.result(waiting)["status"] == "completed"
    assert corral.stop() == 0


@pytest.mark.promise("P1", "P2", "P3", "P4", "P7")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_restart_in_the_middle(serve: Serve, how: signal.Signals) -> None:
    corral = serve("--max-concurrent-tasks", "2", "--drain-timeout", "0.2")
    session = corral.http.post("/sessions/create").json()
    long = corral.begin("ticking", {"events": 150})
    queued = [corral.begin("ticking", {"events": 20}) for _ in range(5)]
    waiting = [corral.begin("person") for _ in range(3)]
    for task in waiting:
        corral.wait_event(task)
    in_line = [corral.add(session, "counter", {"number": n, "fail": n == 2}) for n in range(5)]
    got: list[Any] = []
    reader = threading.Thread(target=lambda: got.append(corral.read(long)))
    reader.start()
    corral.wait_event(long, 10)
    assert corral.stop(how) == (0 if how is signal.SIGTERM else -signal.SIGKILL)
    reader.join()
    seen, ending = got[0]
    assert ending == ("drain" if how is signal.SIGTERM else "broken")

    corral.start()
    for task in waiting:
        assert corral.answer(task).status_code == 200
    rest, ending = corral.read(long, len(seen))
    assert ending == "end"
    assert seen + rest == list(range(len(seen) + len(rest)))
    statuses = [corral.result(task)["status"] for task in [long, *queued, *waiting, *in_line]]
    assert statuses == ["completed"] * 11 + ["failed"] + ["completed"] * 2
    assert corral.get(in_line[-1])["value"] == [0, 1, 3, 4]
    for task in [*queued, *waiting]:
        indices, ending = corral.read(task)
        assert (indices, ending) == (list(range(len(indices))), "end")
    assert corral.busy() == {}
    assert corral.stop() == 0


BAD: dict[str, tuple[str, str, Any]] = {
    "unknown service": ("POST", "/services/nobody/run", b"{}"),
    "unknown session": ("POST", "/sessions/nowhere/tasks", b'{"agent_id": "hello", "input": "{}"}'),
    "unknown task": ("GET", "/tasks/nothing/events", None),
    "no JSON": ("POST", "/services/hello/run", b"{nope"),
    "no object": ("POST", "/services/hello/run", b"[]"),
    "NaN": ("POST", "/services/hello/run", b'{"a": NaN}'),
    "too deep": ("POST", "/services/hello/run", b'{"a":' + b"[" * 100_000),
    "half a letter": ("POST", "/services/hello/run", b'{"a": "\\ud800"}'),
    "too large": ("POST", "/services/hello/run", b'"' + b"x" * 11_000_000 + b'"'),
    "negative timeout": ("POST", "/services/hello/run?timeout=-1", b"{}"),
    "endless wait": ("GET", "/tasks/nothing/result?wait=inf", None),
    "no such option": ("POST", "/services/hello/run?time=3", b"{}"),
    "an id that is a path": ("POST", "/sessions/create", b'{"session_id": "a/b"}'),
    "an id of dots": ("POST", "/services/hello/run?task_id=..", b"{}"),
    "an id too long": ("POST", "/services/hello/run?task_id=" + "x" * 300, b"{}"),
    "wrong method": ("DELETE", "/services/hello/run", None),
    "NUL": ("GET", "/tasks/%00", None),
}


@pytest.mark.promise("P9")
def test_bad_input_is_refused_and_leaves_nothing(serve: Serve) -> None:
    corral = serve()
    for name, (method, path, content) in BAD.items():
        headers = {"Content-Type": "application/json"} if content is not None else {}
        answer = corral.http.request(method, path, content=content, headers=headers)
        assert 400 <= answer.status_code < 500, name
        assert answer.json()["error"]["message"], name
        assert answer.elapsed.total_seconds() < 5, name
    assert corral.busy() == {}
    assert corral.http.get("/tasks").json()["tasks"] == []
    assert corral.stop() == 0
    assert "ERROR" not in corral.log
