"""`SyncClient`: the same verbs without an event loop."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from llama_corral.client import SyncClient
from llama_corral.exceptions import NotFound, TaskCancelled, TaskFailed
from llama_corral.protocol.messages import new_id


@pytest.fixture(params=["trio", "asyncio"])
def client(request: pytest.FixtureRequest, url: str) -> Iterator[SyncClient]:
    with SyncClient(url, backend=request.param) as client:
        yield client


def test_verbs(client: SyncClient) -> None:
    assert "hello" in [service.service_name for service in client.services.list()]
    assert client.services.get("hello").service_name == "hello"
    assert client.run("hello", name="Ada") == "Hello, Ada!"
    assert "hello" in client.status()["services"]
    session = client.sessions.create()
    assert client.sessions.get(session.id).id == client.sessions.get_or_create(session.id).id == session.id
    assert session.id in [each.id for each in client.sessions.list()]
    session.update_state(a=1)
    assert session.state() == {"a": 1}
    assert session.run("counter", by=2) == {"count": 2, "history": [2]}
    assert client.run("counter", session=session, by=2)["count"] == 4
    task = session.start("counter")
    assert task.result()["count"] == 5
    assert task.status().session_id == session.id
    assert [each.task_id for each in client.tasks(session=session, limit=1)] == [task.id]
    assert len(session.tasks()) == 3
    session.delete()
    with pytest.raises(NotFound):
        client.sessions.delete(session.id)


def test_events_come_one_by_one(client: SyncClient) -> None:
    task = client.start("ticking", events=2, hold=True)
    with task.events() as events:
        first = [next(events).type for _ in range(3)]  # the run waits for us: these cannot have been collected first
        assert first == ["Tick", "Tick", "InputRequiredEvent"]
        assert events.record is None
        task.send_event("HumanResponseEvent", {"response": "go"})
        *_, last = events
        assert last.type == "StopEvent"
        assert events.record is not None
    assert task.wait().value == task.result() == {"events": 2, "answer": "go"}


def test_errors(client: SyncClient) -> None:
    with pytest.raises(TaskFailed):
        client.run("ticking", fail=True)
    task = client.start("stuck")
    task.cancel()
    with pytest.raises(TaskCancelled):
        client.task(task.id).result(timeout=10)


def test_options_keys_and_replay(client: SyncClient) -> None:
    key = new_id()
    assert client.run("flaky", name=key, failures=0, retry_on="*", backoff=0.01, idempotency_key=key) == 1
    assert client.start("flaky", name=key, failures=0, retry_on="*", backoff=0.01, idempotency_key=key).result() == 1
    task = client.start("flaky", name=new_id(), failures=1)
    with pytest.raises(TaskFailed):
        task.result()
    assert task.retry().id == client.retry(task.id).id
    assert client.retry(task.id).result() == 2


def test_many_threads(client: SyncClient) -> None:
    results: list[str] = []

    def run(name: str) -> None:
        results.append(client.run("hello", name=name))

    threads = [threading.Thread(target=run, args=(str(number),)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == [f"Hello, {number}!" for number in range(8)]


INTERRUPTED = """
import os, signal, sys
from llama_corral.client import SyncClient
with SyncClient(sys.argv[1]) as client:
    try:
        client.run("stuck", session="interrupted", on_event=lambda event: os.kill(os.getpid(), signal.SIGINT))
    except KeyboardInterrupt:
        print("interrupted")
"""


@pytest.mark.process
@pytest.mark.promise("P6")
def test_ctrl_c_cancels_the_task(url: str) -> None:
    with SyncClient(url) as client:
        session = client.sessions.get_or_create("interrupted")
        ended = subprocess.run(
            [sys.executable, "-c", INTERRUPTED, url], capture_output=True, text=True, timeout=50, check=False
        )
        assert (ended.returncode, ended.stdout, ended.stderr) == (0, "interrupted\n", "")
        (info,) = session.tasks()
        assert client.task(info.task_id).wait(10).status == "cancelled"
