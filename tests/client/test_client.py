"""The client against a whole corral over real HTTP, on both backends."""

from __future__ import annotations

from collections.abc import AsyncIterator

import anyio
import httpx
import pytest
from anyio.abc import TaskStatus as Status
from pydantic import SecretStr
from workflows.events import HumanResponseEvent

from llama_corral.client import Client, Task, TaskEvent
from llama_corral.exceptions import (
    BadInput,
    Conflict,
    NotFound,
    TaskCancelled,
    TaskFailed,
    TaskTimedOut,
    Unauthorized,
    Unavailable,
)
from llama_corral.protocol.lifecycle import TaskStatus
from llama_corral.protocol.messages import new_id

pytestmark = pytest.mark.anyio


@pytest.fixture
async def client(url: str, anyio_backend: str) -> AsyncIterator[Client]:
    async with Client(url) as client:
        yield client


async def test_services(client: Client) -> None:
    names = [service.service_name for service in await client.services.list()]
    assert names == ["counter", "flaky", "form", "hello", "stuck", "ticking"]
    assert (await client.services.get("hello")).description.startswith("Takes `name`")
    with pytest.raises(NotFound, match="no service 'nobody'"):
        await client.services.get("nobody")
    status = await client.status()
    assert set(names) <= set(status["services"])


async def test_sessions(client: Client) -> None:
    name = f"ada/{new_id()[:8]}".replace("/", " & ")
    session = await client.sessions.get_or_create(name)
    assert session.id == name
    assert (await client.sessions.get_or_create(name)).id == name
    assert (await client.sessions.get(name)).id == name
    with pytest.raises(Conflict):
        await client.sessions.create(name)
    assert name in [each.id for each in await client.sessions.list()]
    await session.update_state({"a": 1}, b=[2])
    await session.update_state(a=3)
    assert await session.state() == {"a": 3, "b": [2]}
    await session.delete()
    with pytest.raises(NotFound):
        await session.state()
    with pytest.raises(NotFound):
        await client.sessions.get(name)


async def test_a_session_keeps_the_context_of_its_runs(client: Client) -> None:
    session = await client.sessions.create()
    assert await session.run("counter", by=2) == {"count": 2, "history": [2]}
    assert await client.run("counter", session=session.id, by=3) == {"count": 5, "history": [2, 3]}
    task = await session.start("counter")
    assert task.session_id == session.id
    assert await task.result() == {"count": 6, "history": [2, 3, 1]}
    assert [each.task_id for each in await session.tasks(limit=1)] == [task.id]


async def test_events_and_result(client: Client) -> None:
    task = await client.start("ticking", events=3)
    events = task.events()
    seen = [(event.index, event.type, event.data) async for event in events]
    assert seen[:-1] == [(index, "Tick", {"number": index}) for index in range(3)]
    assert seen[-1][:2] == (3, "StopEvent")
    assert events.record is not None
    assert events.record.status == "completed"
    assert events.record.value == await task.result() == {"events": 3, "answer": None}
    assert [event.index async for event in task.events(2)] == [2, 3]
    assert [event async for event in task.events(99)] == []


async def test_run_hands_over_events(client: Client) -> None:
    seen: list[int] = []

    async def take(event: object) -> None:
        seen.append(event.index)  # type: ignore[attr-defined]

    assert await client.run("ticking", {"events": 2}, on_event=take) == {"events": 2, "answer": None}
    assert await client.run("ticking", events=1, on_event=lambda event: seen.append(event.index)) is not None
    assert seen == [0, 1, 2, 0, 1]
    assert await client.run("hello") == "Hello, world!"


@pytest.mark.parametrize("event", ["object", "name"])
async def test_an_event_answers_the_workflow(client: Client, event: str) -> None:
    task = await client.start("ticking", hold=True)
    if event == "object":
        await task.send_event(HumanResponseEvent(response="yes"))
    else:
        await task.send_event("HumanResponseEvent", {"response": "yes"})
    assert (await task.result(timeout=10))["answer"] == "yes"
    with pytest.raises(Conflict):
        await task.send_event("HumanResponseEvent", {"response": "again"})


@pytest.mark.promise("P9")
async def test_bad_input(client: Client) -> None:
    with pytest.raises(NotFound, match="no service 'nobody'"):
        await client.run("nobody")
    with pytest.raises(NotFound, match="no session"):
        await client.start("hello", session="nowhere")
    with pytest.raises(NotFound, match="no task"):
        await client.task("nothing").result()
    with pytest.raises(NotFound, match=r"(?i)no task"):
        await anext(client.task("nothing").events())
    with pytest.raises(BadInput):
        await client.start("hello", name=object())
    with pytest.raises(BadInput, match="given twice"):
        await client.start("hello", {"name": "a"}, name="b")
    with pytest.raises(BadInput, match="by"):
        await client.start("counter", by="many")
    task = await client.start("ticking", hold=True)
    with pytest.raises(BadInput, match="Unknown"):
        await task.send_event("Unknown", {})
    with pytest.raises(BadInput, match="not an event"):
        await task.send_event(17)
    await task.cancel()


@pytest.mark.promise("P1")
async def test_other_endings_than_completed(client: Client) -> None:
    task = await client.start("ticking", events=1, fail=True)
    with pytest.raises(TaskFailed, match="ValueError: as you wish") as failed:
        await task.result()
    assert failed.value.fields["error"].type.endswith("ValueError")
    assert failed.value.fields["task_id"] == task.id
    assert (await task.status()).status is TaskStatus.FAILED
    with pytest.raises(TaskFailed):
        await client.run("ticking", fail=True)

    with pytest.raises(TaskTimedOut):
        await client.run("ticking", hold=True, timeout=0.05)

    task = await client.start("ticking", hold=True)
    await task.cancel()
    with pytest.raises(TaskCancelled):
        await task.result()
    with pytest.raises(Conflict):
        await task.cancel()


async def test_a_limit_on_waiting_leaves_the_task_alone(client: Client) -> None:
    task = await client.start("ticking", hold=True)
    with pytest.raises(TimeoutError):
        await task.result(timeout=0.05)
    assert not (await task.status()).status.is_terminal
    await task.cancel()


async def test_the_same_id_is_the_same_task(client: Client) -> None:
    chosen = new_id()
    first = await client.start("hello", task_id=chosen, name="a")
    again = await client.start("hello", task_id=chosen, name="a")
    assert first.id == again.id == chosen
    with pytest.raises(Conflict):
        await client.start("hello", task_id=chosen, name="b")


async def test_a_key_of_the_callers_own(client: Client) -> None:
    key = new_id()
    first = await client.start("hello", idempotency_key=key, name="a")
    again = await client.start("hello", idempotency_key=key, name="a")
    assert first.id == again.id
    assert await client.run("hello", idempotency_key=key, name="a") == "Hello, a!"
    async with httpx.AsyncClient(base_url=client.url) as plain:
        raw = await plain.post("/services/hello/run", json={"name": "a"}, headers={"Idempotency-Key": key})
        assert raw.json()["task_id"] == first.id
    with pytest.raises(Conflict):
        await client.start("hello", idempotency_key=key, name="b")
    for wrong in ({"idempotency_key": ""}, {"idempotency_key": "x" * 256}, {"idempotency_key": "x", "task_id": "y"}):
        with pytest.raises(BadInput):
            await client.start("hello", **wrong)


@pytest.mark.promise("P1", "P2")
async def test_a_failed_task_is_done_again(client: Client) -> None:
    task = await client.start("flaky", name=new_id(), failures=1)
    with pytest.raises(TaskFailed):
        await task.result()
    again = await client.retry(task.id)
    assert await again.result() == 2
    assert (await task.retry(fresh=True)).id == again.id
    info = await again.status()
    assert (info.retry_of, info.max_attempts) == (task.id, 3)
    assert (await task.status()).status is TaskStatus.FAILED
    with pytest.raises(Conflict):
        await again.retry()
    with pytest.raises(NotFound):
        await client.retry("nothing")


async def test_a_later_start(client: Client) -> None:
    task = await client.start("hello", delay=0.1)
    info = await task.status()
    assert info.not_before is not None
    assert info.not_before > info.created_at
    assert await task.result(timeout=10) == "Hello, world!"


async def test_tasks_by_filter(client: Client) -> None:
    session = await client.sessions.create()
    tasks = [await session.start("hello", name=str(number)) for number in range(3)]
    for task in tasks:
        await task.result()
    ids = [task.id for task in reversed(tasks)]
    assert [each.task_id for each in await client.tasks(session=session)] == ids
    assert [each.task_id for each in await client.tasks(session=session, before=ids[0], limit=1)] == [ids[1]]
    assert await client.tasks(session=session, status="failed") == []
    assert len(await client.tasks(session=session, status=["completed", "failed"], service="hello")) == 3
    with pytest.raises(BadInput):
        await client.tasks(status="lost")


async def test_a_token(locked_url: str, anyio_backend: str) -> None:
    async with Client(locked_url, token=SecretStr("sesame")) as client:
        assert await client.run("hello") == "Hello, world!"
    for token in (None, "wrong"):
        async with Client(locked_url, token=token) as client:
            with pytest.raises(Unauthorized) as refused:
                await client.run("hello")
            with pytest.raises(Unauthorized):
                await anext(client.task("any").events())
            assert "wrong" not in repr(refused.value.fields)


async def test_no_server(free_port: int, anyio_backend: str) -> None:
    async with Client(f"http://127.0.0.1:{free_port}", token="sesame") as client:
        with pytest.raises(Unavailable, match=f"no answer from http://127.0.0.1:{free_port}") as error:
            await client.status()
    assert error.value.fields["url"] == f"http://127.0.0.1:{free_port}"
    assert "sesame" not in f"{error.value!r} {error.value.fields} {client!r}"


@pytest.mark.parametrize("wrong", ["", "127.0.0.1:8000", "ftp://host", "http://", "http://a:b", "http://u:secret@host"])
def test_a_wrong_url(wrong: str) -> None:
    with pytest.raises(BadInput) as error:
        Client(wrong)
    assert "secret" not in str(error.value)


@pytest.mark.promise("P6")
async def test_cancelling_run_cancels_the_task(client: Client) -> None:
    task = await _cancelled_run(client)
    with pytest.raises(TaskCancelled):
        await task.result(timeout=10)


async def test_a_cancelled_run_may_leave_its_task(client: Client) -> None:
    task = await _cancelled_run(client, keep_on_cancel=True)
    assert not (await task.status()).status.is_terminal
    await task.cancel()


async def test_an_error_in_on_event_cancels_the_task(client: Client) -> None:
    session = await client.sessions.create()

    def fail(event: object) -> None:
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        await session.run("stuck", on_event=fail)
    (info,) = await session.tasks()
    assert (await client.task(info.task_id).wait(10)).status == "cancelled"


async def _cancelled_run(client: Client, **options: bool) -> Task:
    """Run a task, cancel the call when the first event is there, and return a handle on the task."""
    session = await client.sessions.create()

    async def run(*, task_status: Status[None]) -> None:
        await session.run("stuck", on_event=lambda event: task_status.started(), **options)

    async with anyio.create_task_group() as group:
        await group.start(run)
        group.cancel_scope.cancel()
    (info,) = await session.tasks()
    return client.task(info.task_id)


async def test_an_abandoned_stream_gives_its_connection_back(client: Client) -> None:
    task = await client.start("ticking", events=2, hold=True)
    async for event in task.events():
        assert event.index == 0
        break
    async with task.events() as events:
        assert (await anext(events)).index == 0
    await task.cancel()
    await task.wait()


async def test_undeclared_fields_are_fields(client: Client) -> None:
    task = await client.start("ticking", hold=True)
    async with task.events() as events:
        assert (await anext(events)).data == {"prefix": "Go on?"}
    await task.cancel()


async def test_a_cancelled_read_goes_on_where_it_was(client: Client) -> None:
    task = await client.start("ticking", events=2, hold=True)
    async with task.events() as events:
        seen = [(await anext(events)).index for _ in range(3)]
        with anyio.move_on_after(0.02) as scope:
            await anext(events)
        assert scope.cancelled_caught
        await task.send_event("HumanResponseEvent", {"response": "x"})
        seen += [event.index async for event in events]
    assert seen == list(range(len(seen)))
    assert events.record is not None
    assert events.record.status == "completed"


async def test_the_status_comes_among_the_events_where_it_is_asked_for(client: Client) -> None:
    task = await client.start("ticking", events=2, hold=True)
    told: list[object] = []
    async with task.events(follow_status=True) as events:
        while (item := await events.receive()) is not None:
            told.append(item if isinstance(item, TaskStatus) else item.type)
            if item is TaskStatus.WAITING:
                await task.send_event(HumanResponseEvent(response="yes"))
    assert events.record is not None
    asked = told.index("InputRequiredEvent")
    assert told.index(TaskStatus.WAITING) == asked + 1
    assert told[-1] == "StopEvent"
    assert [each for each in told if not isinstance(each, TaskStatus)] == [event.type for event in await seen(task)]


async def seen(task: Task) -> list[TaskEvent]:
    async with task.events() as events:
        return [event async for event in events]
