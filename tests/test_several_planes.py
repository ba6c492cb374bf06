"""Workers and clients that know several control planes: one of them dies, stops or is away, and nothing is lost."""

from __future__ import annotations

import json
import socket
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import anyio
import pytest
from workflows import Context, Workflow, step
from workflows.events import HumanResponseEvent, InputRequiredEvent, StartEvent, StopEvent

from llama_corral.client import Client
from llama_corral.deploy import Worker, WorkerOptions, deploy_worker
from llama_corral.exceptions import BadInput, QueueUnavailable, Unavailable
from llama_corral.http_link import HttpLink
from llama_corral.http_targets import FIRST_PAUSE, LONGEST_PAUSE, Targets
from llama_corral.http_urls import check_urls
from llama_corral.queues import http as http_queue
from llama_corral.queues.http import HttpMessageQueue
from llama_corral.testing.queues import numbered

from .threaded import Threaded, open_core

pytestmark = pytest.mark.anyio


@pytest.fixture
async def core(anyio_backend: str) -> AsyncIterator[Threaded]:
    async with open_core(count=2, heartbeat_interval=0.2, lease=5.0) as core:
        yield core


def free_url() -> str:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return f"http://127.0.0.1:{free.getsockname()[1]}"


def test_lists_of_urls() -> None:
    assert check_urls("http://a:1/, http://b:2 ,http://a:1") == ("http://a:1", "http://b:2")
    assert check_urls(["http://a:1"]) == ("http://a:1",)
    for wrong in ("", " , ", "http://a:1,nonsense", []):
        with pytest.raises(BadInput):
            check_urls(wrong)


def test_who_is_asked() -> None:
    one = Targets(["a"])
    one.failed("a", 0.0)
    assert one.choose(0.0) == "a"
    targets = Targets(["a", "b", "c"])
    assert targets.choose(0.0) == "a"
    targets.failed("a", 0.0)
    targets.failed("a", 0.0)  # another request of the same moment
    assert targets.choose(0.0) == "b"
    assert targets.choose(FIRST_PAUSE) == "b"  # it stays there
    targets.answered("a")
    targets.failed("b", 1.0, stops=True)
    assert targets.choose(1.0) == "c"
    targets.failed("c", 1.0)
    assert targets.choose(1.0) == "a"
    targets.failed("a", 1.0)
    assert targets.choose(1.0) in ("a", "c")  # all have failed: the one whose pause ends first
    assert targets.choose(1.0 + FIRST_PAUSE) in ("a", "c")
    for moment in range(20):
        targets.failed("a", 100.0 * moment)
    assert targets._states["a"].paused_until == 1900 + LONGEST_PAUSE


def test_each_is_asked_once_also_where_all_have_failed_lately() -> None:
    """As after an outage of the database that they share: one of them may be back, whichever has to wait longer."""
    targets = Targets(["a", "b", "c"])
    for url in "abc":
        targets.failed(url, 0.0, stops=url == "b")
    asked: list[str] = []
    while (url := targets.choose_after(asked, 0.1)) is not None:
        asked.append(url)
        assert targets.current == url
    assert sorted(asked) == ["a", "b", "c"]
    assert asked[-1] == "b"
    assert targets.choose_after(["b", "c"], 0.1) == "a"


@pytest.mark.promise("P2")
async def test_a_link_goes_on_at_the_next_one(core: Threaded) -> None:
    async with HttpLink([free_url(), *core.urls]) as link:
        assert await link.ask("GET", "/ready", json.loads) == {"status": "ready"}
        assert link.url == core.urls[0]
        await core.ones[0].kill()
        assert await link.ask("GET", "/ready", json.loads) == {"status": "ready"}
        assert link.url == core.urls[1]
        assert link.statistics() == {"requests": 4, "failed": 2}
        with pytest.raises(Unavailable):
            await link.ask("GET", "/ready", json.loads, at=core.urls[0])
        await core.ones[1].kill()
        with pytest.raises(Unavailable):
            await link.ask("GET", "/ready", json.loads)


@pytest.mark.promise("P2")
async def test_a_link_finds_the_one_that_is_back(core: Threaded) -> None:
    """All have failed a moment ago, and the one that may be asked first has died meanwhile."""
    async with HttpLink(core.urls) as link:
        link.avoid(core.urls[1])
        link._choice.failed(core.urls[0], anyio.current_time())
        await core.ones[0].kill()
        assert await link.ask("GET", "/ready", json.loads) == {"status": "ready"}
        assert link.url == core.urls[1]


async def test_a_client_finds_the_one_that_is_back(core: Threaded) -> None:
    async with Client(core.urls, retry_for=0) as client:
        now = anyio.current_time()
        client.http._choice.failed(core.urls[1], now, stops=True)
        client.http._choice.failed(core.urls[0], now)
        await core.ones[0].kill()
        assert (await client.status())["services"] == {}


async def test_a_late_answer_is_no_news(caplog: pytest.LogCaptureFixture) -> None:
    one, other = "http://a:1", "http://b:2"
    async with HttpLink([one, other]) as link:
        link._note_answer(one, None)
        link._note(one, Unavailable("too slow"))
        assert link._choice.choose(anyio.current_time()) == other
        for url in (other, one, other, one):
            link._note_answer(url, None)
    assert [record.getMessage() for record in caplog.records] == [f"asking {other} from now on: too slow"]


async def take(consumer: Any) -> int:
    (delivery,) = await consumer.receive()
    await delivery.ack()
    return int(delivery.message.data["number"])


@pytest.mark.promise("P2")
@pytest.mark.parametrize("how", ["kill", "drain"])
async def test_a_lease_moves_and_what_was_open_comes_again(
    core: Threaded, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_queue, "MOVE_AFTER", 0.2)
    one, other = core.ones
    async with HttpMessageQueue(core.urls) as queue:
        async with queue.consumer("t") as consumer, queue.subscribe("b") as subscription:
            for number in range(2):
                await queue.publish(numbered(number), "t")
            (delivery,) = await consumer.receive()
            assert consumer.server == one.url
            await (one.kill() if how == "kill" else one.drain())
            with anyio.fail_after(20):
                got = {await take(consumer) for _ in range(2)}
                assert got == {0, 1}
                assert consumer.server == other.url
                await delivery.ack()  # of the first lease: it is not counted twice, and does no harm
                with pytest.raises(QueueUnavailable):
                    await subscription.receive()
                await queue.publish(numbered(2), "t")
                assert await take(consumer) == 2
        statistics: Any = await core.run(_statistics, core)
        assert sum(statistics["open"].values()) == 0


async def _statistics(core: Threaded) -> Any:
    return core.queue.statistics()


class Ask(Workflow):
    @step
    async def ask(self, ctx: Context, ev: StartEvent) -> StopEvent:
        answer = await ctx.wait_for_event(HumanResponseEvent, waiter_event=InputRequiredEvent(), timeout=None)
        return StopEvent(result=answer.response)


@pytest.mark.promise("P1", "P2", "P3")
@pytest.mark.parametrize("how", ["kill", "drain"])
async def test_workers_and_clients_survive_the_end_of_one(
    core: Threaded, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_queue, "MOVE_AFTER", 0.2)
    options = WorkerOptions(control_plane_url=",".join(core.urls), step_flavour="anyio", idle_timeout=None)
    stop = anyio.Event()
    async with Client(core.urls) as client, anyio.create_task_group() as tasks:
        worker: Worker = await tasks.start(partial(deploy_worker, {"ask": Ask()}, options, stop=stop))
        assert worker.url == core.urls[0]
        before = [await client.start("ask") for _ in range(3)]
        waiting = anyio.Event()
        seen: list[list[int]] = []

        async def follow(task: Any) -> None:
            indices = []
            async with task.events() as events:
                async for event in events:
                    indices.append(event.index)
                    if event.type.endswith("InputRequiredEvent"):
                        waiting.set()
            seen.append(indices)

        async with anyio.create_task_group() as readers:
            for task in before:
                readers.start_soon(follow, task)
            await waiting.wait()
            await (core.ones[0].kill() if how == "kill" else core.ones[0].drain())
            after = await client.start("ask")
            for number, task in enumerate([*before, after]):
                await task.send_event("HumanResponseEvent", {"response": str(number)})
            for number, task in enumerate([*before, after]):
                assert await task.result(timeout=30) == str(number)
        assert len(seen) == 3
        assert all(indices == list(range(len(indices))) for indices in seen)
        assert client.url == core.urls[1]
        stop.set()
    assert await core.run(core.store.list_instances) == []


async def test_a_client_of_several_that_are_all_away(anyio_backend: str) -> None:
    async with Client(f"{free_url()},{free_url()}") as client:
        with pytest.raises(Unavailable), anyio.fail_after(5):
            await client.status()
