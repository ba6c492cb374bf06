"""The coordinator over HTTP: what it answers is what the control plane answers, and what goes wrong has its family."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter
from pydantic_core import to_json

from llama_corral.abc import Coordinator
from llama_corral.exceptions import (
    BadInput,
    CorralError,
    Incompatible,
    NotFound,
    QueueUnavailable,
    TooLarge,
    Unauthorized,
    Unavailable,
)
from llama_corral.http_link import HttpLink
from llama_corral.protocol import calls
from llama_corral.protocol.lifecycle import TaskStatus
from llama_corral.protocol.messages import ServiceDefinition
from llama_corral.protocol.records import (
    Checkpoint,
    Claim,
    EventRecord,
    HeartbeatAnswer,
    HeldTask,
    InboxPage,
    Registration,
    Report,
    ReportAnswer,
    ServiceInfo,
    Terminal,
    Ticket,
)
from llama_corral.queues.http import HttpMessageQueue
from llama_corral.services import WorkflowService, WorkflowServiceConfig
from llama_corral.services.http_coordinator import HttpCoordinator

from ..threaded import Threaded, open_core
from .flows import Echo

pytestmark = pytest.mark.anyio

TOKEN = "hunter2"
INSTANCE = "instance-1"
DEFINITION = ServiceDefinition(service_name="svc", description="a fake").model_dump_json()
INFO = ServiceInfo(DEFINITION, "svc", INSTANCE, capacity=2, start_schema="{}")


@pytest.fixture(params=["trio", "asyncio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
async def core(anyio_backend: str) -> AsyncIterator[Threaded]:
    async with open_core(token=TOKEN, heartbeat_interval=7.0) as core:
        yield core


@pytest.fixture
async def coordinator(core: Threaded) -> AsyncIterator[HttpCoordinator]:
    async with HttpCoordinator(core.url, token=TOKEN) as coordinator:
        yield coordinator


async def accepted(core: Threaded, coordinator: Coordinator, **arguments: Any) -> Claim:
    await coordinator.register(INFO)
    task = await core.run(core.plane.submit, "svc", arguments)
    claim = await coordinator.claim(Ticket(task.task_id, "svc"), INSTANCE, "nonce")
    assert claim is not None
    return claim


def completed(value: Any) -> Terminal:
    return Terminal(TaskStatus.COMPLETED, result=json.dumps(value), result_text=str(value))


# What it answers


@pytest.mark.promise("P1", "P2")
async def test_the_life_of_a_task(core: Threaded, coordinator: HttpCoordinator) -> None:
    registration = await coordinator.register(INFO)
    assert (registration.topic_namespace, registration.heartbeat_interval) == ("llama_deploy", 7.0)
    assert registration.protocol_version == 1

    claim = await accepted(core, coordinator, text="ü\n\x00")
    assert json.loads(claim.input) == {"text": "ü\n\x00"}
    assert await coordinator.claim(Ticket(claim.task_id, "svc"), INSTANCE, "nonce") == claim
    assert await coordinator.claim(Ticket(claim.task_id, "svc"), INSTANCE, "another") is None

    events = (EventRecord("Progress", '{"step": 1}'), EventRecord("Progress", '{"text": "\\ud800"}'))
    report = Report(claim.task_id, claim.epoch, 1, 0.0, events, waiting=True, checkpoint=Checkpoint("{}", 0))
    assert await coordinator.report(report) == await coordinator.report(report)
    await core.run(core.plane.send_event, claim.task_id, '{"answer": 42}')
    assert await coordinator.heartbeat(INSTANCE, [HeldTask(claim.task_id, claim.epoch)]) == HeartbeatAnswer(
        news=(claim.task_id,)
    )
    page = await coordinator.pull(claim.task_id, claim.epoch, 0)
    assert (page.status, page.head, json.loads(page.events[0].payload)) == ("ok", 1, {"answer": 42})

    end = Report(claim.task_id, claim.epoch, 2, 0.0, terminal=completed("done"))
    assert (await coordinator.report(end)).status == "ok"
    assert (await coordinator.report(end)).status == "ok"
    record = await core.run(core.plane.get_task, claim.task_id)
    assert (record.status, record.event_count, record.result) == (TaskStatus.COMPLETED, 2, '"done"')
    # The times are the control plane's, not those of the worker's clock.
    assert record.finished_at is not None
    assert record.finished_at >= record.created_at > 0

    await coordinator.deregister(INSTANCE)
    assert not (await coordinator.heartbeat(INSTANCE, [])).known


@pytest.mark.promise("P2")
async def test_a_task_is_handed_back(core: Threaded, coordinator: HttpCoordinator) -> None:
    claim = await accepted(core, coordinator)
    snapshot = Checkpoint('{"state": 1}', 0, fingerprint="f")
    assert (await coordinator.release(claim.task_id, claim.epoch, snapshot)).status == "ok"
    again = await coordinator.claim(Ticket(claim.task_id, "svc"), INSTANCE, "second")
    assert again is not None
    assert again.epoch == claim.epoch + 1
    assert again.checkpoint is not None
    assert again.checkpoint.snapshot == '{"state": 1}'
    late = Report(claim.task_id, claim.epoch, 1, 0.0, terminal=completed("late"))
    assert (await coordinator.report(late)).status == "fenced"
    assert (await coordinator.release(again.task_id, again.epoch, None, idle=True, wake_at=1e10)).status == "ok"


async def test_what_is_not_there(coordinator: HttpCoordinator) -> None:
    assert await coordinator.claim(Ticket("none", "svc"), INSTANCE, "n") is None
    assert (await coordinator.report(Report("none", 1, 1, 0.0))).status == "deleted"
    assert (await coordinator.release("none", 1, None)).status == "deleted"
    assert (await coordinator.pull("none", 1, 0)).status == "deleted"
    assert not (await coordinator.heartbeat("unknown", [])).known
    await coordinator.deregister("unknown")


# What goes wrong


@asynccontextmanager
async def listener(answer: bytes | None) -> AsyncIterator[str]:
    """A server that answers every connection with the same bytes; with None it never answers."""

    async def handle(stream: anyio.abc.SocketStream) -> None:
        async with stream:
            await stream.receive()
            if answer is None:
                await anyio.sleep_forever()
            await stream.send(answer)

    async with await anyio.create_tcp_listener(local_host="127.0.0.1") as server, anyio.create_task_group() as tasks:
        tasks.start_soon(server.serve, handle)
        yield f"http://127.0.0.1:{server.extra(anyio.abc.SocketAttribute.local_port)}"
        tasks.cancel_scope.cancel()


def answer(status: str, body: bytes = b"", *headers: str) -> bytes:
    head = [f"HTTP/1.1 {status}", f"content-length: {len(body)}", "connection: close", *headers, "", ""]
    return "\r\n".join(head).encode() + body


def shape(code: str) -> bytes:
    return to_json({"error": {"code": code, "message": "no", "hint": "do"}, "detail": "no"})


@pytest.mark.parametrize(
    ("raw", "kind"),
    [
        (answer("401 Unauthorized", shape("unauthorized")), Unauthorized),
        (answer("403 Forbidden", shape("foreign_origin")), Unauthorized),
        (answer("404 Not Found", shape("not_found")), NotFound),
        (answer("404 Not Found", b"<html>"), NotFound),
        (answer("413 Payload Too Large", b"<html>"), TooLarge),
        (answer("422 Unprocessable", shape("bad_input")), BadInput),
        (answer("400 Bad Request", shape("incompatible")), Incompatible),
        (answer("408 Request Timeout", shape("too_slow")), Unavailable),
        (answer("429 Too Many", shape("too_many_tasks"), "retry-after: 3"), Unavailable),
        (answer("500 Internal", shape("internal")), Unavailable),
        (answer("502 Bad Gateway", b"<html>"), Unavailable),
        (answer("503 Away", shape("store_unavailable")), Unavailable),
        (answer("200 OK", b"<html>"), CorralError),
        (answer("302 Found", b"", "location: http://elsewhere/"), CorralError),
        (b"nonsense\r\n\r\n", Unavailable),
        (b"", Unavailable),
        (answer("200 OK", b"{}")[:-1], Unavailable),
    ],
)
@pytest.mark.promise("P9")
async def test_what_an_answer_means(raw: bytes, kind: type[CorralError]) -> None:
    async with listener(raw) as url, HttpCoordinator(url, token=TOKEN) as coordinator:
        with pytest.raises(kind) as caught:
            await coordinator.heartbeat(INSTANCE, [])
    assert isinstance(caught.value, Unavailable) == issubclass(kind, Unavailable)
    assert (
        TOKEN not in f"{caught.value!r} {caught.value.hint} {caught.value.fields} {coordinator!r} {coordinator.link!r}"
    )


async def test_a_server_that_does_not_answer() -> None:
    async with listener(None) as url, HttpLink(url, timeout=0.4) as link:
        with pytest.raises(Unavailable, match=r"within 0\.4 s") as caught:
            await HttpCoordinator(url, link=link).claim(Ticket("t", "svc"), INSTANCE, "n")
        assert caught.value.fields["sent"]
        with pytest.raises(QueueUnavailable):
            await link.ask("GET", "/", json.loads, away=QueueUnavailable)
    with pytest.raises(Unavailable) as caught:
        async with HttpCoordinator(url) as coordinator:
            await coordinator.register(INFO)
    assert not caught.value.fields["sent"]
    assert link.statistics() == {"requests": 2, "failed": 2}


async def test_a_proxy_that_lost_its_server(core: Threaded) -> None:
    """What nobody of ours says is no verdict, once the URL has proved right."""
    raw = answer("404 Not Found", b"<html>")
    good = answer("200 OK", b"{}")
    answers = [good, raw, raw.replace(b"404 Not Found", b"413 Too Large"), answer("200 OK", b"<html>")]

    async def handle(stream: anyio.abc.SocketStream) -> None:
        async with stream:
            await stream.receive()
            await stream.send(answers.pop(0))

    async with await anyio.create_tcp_listener(local_host="127.0.0.1") as server, anyio.create_task_group() as tasks:
        tasks.start_soon(server.serve, handle)
        url = f"http://127.0.0.1:{server.extra(anyio.abc.SocketAttribute.local_port)}"
        async with HttpCoordinator(url) as coordinator:
            assert (await coordinator.heartbeat(INSTANCE, [])).known
            for kind in (Unavailable, TooLarge, Unavailable):
                with pytest.raises(kind):
                    await coordinator.heartbeat(INSTANCE, [])
        tasks.cancel_scope.cancel()


@pytest.mark.promise("P11")
async def test_the_token_is_checked(core: Threaded) -> None:
    for token in (None, "wrong"):
        async with HttpCoordinator(core.url, token=token) as coordinator:
            with pytest.raises(Unauthorized):
                await coordinator.register(INFO)
    with pytest.raises(BadInput) as caught:
        HttpCoordinator("http://user:hunter2@host")
    assert TOKEN not in f"{caught.value!r} {caught.value.hint} {caught.value.fields}"


async def test_a_report_that_is_too_large_is_said_to_be(anyio_backend: str) -> None:
    async with open_core() as core, HttpCoordinator(core.url) as coordinator:
        claim = await accepted(core, coordinator)
        large = EventRecord("Large", json.dumps({"text": "x" * 33_000_000}))
        with pytest.raises(TooLarge):
            await coordinator.report(Report(claim.task_id, claim.epoch, 1, 0.0, (large,)))
        small = EventRecord("Small", "{}")
        assert (await coordinator.report(Report(claim.task_id, claim.epoch, 1, 0.0, (small,)))).status == "ok"


async def test_what_is_no_text_is_not_sent(coordinator: HttpCoordinator) -> None:
    with pytest.raises(BadInput):
        await coordinator.claim(Ticket("\ud800", "svc"), INSTANCE, "n")


@pytest.mark.promise("P7")
async def test_a_report_is_taken_while_the_server_drains(core: Threaded, coordinator: HttpCoordinator) -> None:
    claim = await accepted(core, coordinator)

    async def drain() -> None:
        core.app.drain.set()
        core.plane.refuse_new()

    await core.run(drain)
    answer = await coordinator.report(Report(claim.task_id, claim.epoch, 1, 0.0, terminal=completed(1)))
    assert answer.status == "ok"
    assert (await core.run(core.plane.get_task, claim.task_id)).status is TaskStatus.COMPLETED


# Versions


@pytest.mark.parametrize(
    ("theirs", "ours", "found"),
    [((1,), (1,), 1), ((1, 2), (1,), 1), ((1, 2, 3), (2, 3, 4), 3), ((4, 3), (3, 4), 4)],
)
def test_the_newest_common_version(theirs: tuple[int, ...], ours: tuple[int, ...], found: int) -> None:
    assert calls.common_version(theirs, ours) == found


@pytest.mark.parametrize(
    ("theirs", "ours", "where"),
    [
        ((1, 2), (3, 4), "where the worker runs"),
        ((), (1,), "where the worker runs"),
        ((3, 4), (1, 2), "where the control plane runs"),
        ((1, 5), (2, 3), "where the control plane runs"),
    ],
)
def test_no_common_version_says_which_side_to_upgrade(
    theirs: tuple[int, ...], ours: tuple[int, ...], where: str
) -> None:
    with pytest.raises(Incompatible) as caught:
        calls.common_version(theirs, ours)
    assert where in str(caught.value.hint)


async def test_versions_are_negotiated(coordinator: HttpCoordinator) -> None:
    newer = replace(INFO, protocol_versions=(1, 2))
    assert (await coordinator.register(newer)).protocol_version == 1
    with pytest.raises(Incompatible) as caught:
        await coordinator.register(replace(INFO, protocol_versions=(2, 3)))
    assert "where the control plane runs" in str(caught.value.hint)
    with pytest.raises(Incompatible, match="the instance is too old"):
        await coordinator.register(replace(INFO, protocol_versions=(0,)))


async def test_a_control_plane_that_ignores_our_versions() -> None:
    body = to_json(Registration("ns", 5.0, protocol_version=7, lease=20.0))
    async with listener(answer("200 OK", body)) as url, HttpCoordinator(url) as coordinator:
        with pytest.raises(Incompatible, match="version 7"):
            await coordinator.register(INFO)


# The records on their way

RECORDS = [
    ServiceInfo,
    Registration,
    Claim,
    Report,
    ReportAnswer,
    HeartbeatAnswer,
    InboxPage,
    calls.ClaimCall,
    calls.ReleaseCall,
    calls.HeartbeatCall,
    calls.PullCall,
]
st.register_type_strategy(str, st.text(st.characters(exclude_categories=["Cs"])))
st.register_type_strategy(float, st.floats(allow_nan=False, allow_infinity=False))


@pytest.mark.parametrize("kind", RECORDS)
@given(data=st.data())
def test_records_survive_the_way(kind: type[Any], data: st.DataObject) -> None:
    record = data.draw(st.from_type(kind))
    adapter = TypeAdapter(kind)
    sent = json.loads(to_json(record, inf_nan_mode="null"))
    assert adapter.validate_python(json.loads(json.dumps(sent))) == adapter.validate_json(json.dumps(sent)) == record
    sent["of_a_later_release"] = {"a": [1]}
    assert adapter.validate_json(json.dumps(sent)) == record


# A service on it


@asynccontextmanager
async def served_by(url: str) -> AsyncIterator[WorkflowService]:
    async with HttpLink(url) as link, HttpMessageQueue(url, link=link) as queue:
        config = WorkflowServiceConfig(service_name="svc")
        coordinator = HttpCoordinator(url, link=link)
        service = WorkflowService(Echo(), queue, config, coordinator=coordinator, step_flavour="anyio")
        async with anyio.create_task_group() as tasks:
            await tasks.start(service.processing_loop)
            yield service
            service.stop()


async def outcome(core: Threaded, **arguments: Any) -> Any:
    task = await core.run(core.plane.submit, "svc", arguments)
    record = await core.run(core.plane.wait_result, task.task_id, 20)
    assert record is not None
    assert record.status is TaskStatus.COMPLETED
    return json.loads(record.result), record.event_count


@pytest.mark.promise("P1", "P2")
async def test_a_service_outlives_its_core(anyio_backend: str) -> None:
    """A core that comes back with an empty store knows nobody: the instance registers again by its heartbeat."""
    with anyio.fail_after(30):
        async with open_core(heartbeat_interval=0.1) as first:
            port = first.port
            async with served_by(first.url) as service:
                assert await outcome(first, value="hello", count=3) == ("hello", 4)
                await first.end()
                async with open_core(port=port, heartbeat_interval=0.1) as second:
                    while service.instance_id not in await second.run(instances, second):
                        await anyio.wait_all_tasks_blocked()
                    assert await outcome(second, value="again") == ("again", 1)
                    service.stop()
                    while await second.run(instances, second):
                        await anyio.wait_all_tasks_blocked()


async def instances(core: Threaded) -> list[str]:
    return [instance.instance_id for instance in await core.store.list_instances()]


async def test_a_service_whose_core_is_not_there_says_so(anyio_backend: str) -> None:
    async with open_core() as core:
        url = core.url
    async with HttpLink(url) as link, HttpMessageQueue(url, link=link, patience=0.1) as queue:
        config = WorkflowServiceConfig(service_name="svc")
        coordinator = HttpCoordinator(url, link=link)
        service = WorkflowService(Echo(), queue, config, coordinator=coordinator, step_flavour="anyio")
        with pytest.raises(Unavailable, match=url):
            await service.processing_loop()
