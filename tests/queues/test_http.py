"""The queue over HTTP: the contract of every queue, against a real server, and what it promises beyond that."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest
from pydantic_core import from_json, to_json

from llama_corral.abc import Consumer, MessageQueue
from llama_corral.exceptions import BadInput, NotFound, QueueUnavailable, SetupError, Unauthorized
from llama_corral.http_link import HttpLink
from llama_corral.protocol import queue_calls as calls
from llama_corral.protocol.messages import QueueMessage
from llama_corral.queues import open_queue
from llama_corral.queues.http import HttpMessageQueue
from llama_corral.testing.queues import MessageQueueContract, numbered

from ..threaded import Threaded, open_core

pytestmark = pytest.mark.anyio


@pytest.fixture
async def core(anyio_backend: str) -> AsyncIterator[Threaded]:
    async with open_core(token="secret") as core:
        yield core


@pytest.mark.promise("P2", "P6", "P8", "P12")
class TestContract(MessageQueueContract):
    quiet = 0.1
    core: Threaded

    @pytest.fixture(autouse=True)
    def _use(self, core: Threaded) -> None:
        self.core = core

    @asynccontextmanager
    async def open_queue(self) -> AsyncIterator[MessageQueue]:
        async with HttpMessageQueue(self.core.url, token="secret") as queue:
            yield queue

    def open_peer(self, queue: MessageQueue) -> Any:
        return self.open_queue()


async def take(consumer: Consumer, count: int) -> list[int]:
    """Receive and ack."""
    got: list[int] = []
    while len(got) < count:
        for delivery in await consumer.receive(count - len(got)):
            got.append(delivery.message.data["number"])
            await delivery.ack()
    return got


# Losses on the way


class LossyLink(HttpLink):
    """Loses requests and answers, the same ones in every run."""

    def __init__(self, url: str, token: str) -> None:
        super().__init__(url, token)
        self.random = random.Random(4)
        self.lost = 0

    async def ask(self, method: str, path: str, read: Any, **options: Any) -> Any:
        fate = self.random.random() if path != calls.CLOSE else 1.0
        if fate < 0.2:
            self.lost += 1
            raise options["away"]("the request was lost")
        answer = await super().ask(method, path, read, **options)
        if fate < 0.4:
            self.lost += 1
            raise options["away"]("the answer was lost")
        return answer


@pytest.mark.promise("P2")
async def test_lost_answers_lose_no_message(core: Threaded) -> None:
    async with LossyLink(core.url, "secret") as link, HttpMessageQueue(core.url, link=link) as queue:
        got: list[int] = []
        with anyio.fail_after(30):
            async with queue.consumer("t") as one, queue.consumer("t") as other, anyio.create_task_group() as tasks:

                async def work(consumer: Consumer) -> None:
                    while set(got) < set(range(15)):
                        got.extend(await take(consumer, 1))
                    tasks.cancel_scope.cancel()

                tasks.start_soon(work, one)
                tasks.start_soon(work, other)
                for number in range(15):
                    await queue.publish(numbered(number), "t")
        assert link.lost > 5
    assert sum((await core.run(statistics, core))["open"].values()) == 0


async def statistics(core: Threaded) -> Any:
    return core.queue.statistics()


@pytest.mark.promise("P2")
async def test_a_lost_answer_of_a_receive_is_no_redelivery(core: Threaded) -> None:
    class ForgetfulLink(HttpLink):
        lost = 0

        async def ask(self, method: str, path: str, read: Any, **options: Any) -> Any:
            answer = await super().ask(method, path, read, **options)
            if path == calls.RECEIVE and self.lost < 3:
                self.lost += 1
                raise QueueUnavailable("the answer was lost")
            return answer

    async with ForgetfulLink(core.url, "secret") as link, HttpMessageQueue(core.url, link=link) as queue:
        async with queue.consumer("t") as consumer:
            await queue.publish(numbered(1), "t")
            with anyio.fail_after(10):
                (delivery,) = await consumer.receive()
            assert not delivery.redelivered
            assert link.lost == 3


@pytest.mark.promise("P2", "P8")
async def test_what_a_dead_client_had_open_comes_back(core: Threaded) -> None:
    async with HttpLink(core.url, "secret") as dead, HttpMessageQueue(core.url, token="secret") as queue:

        async def ask(path: str, call: Any) -> Any:
            return await dead.ask("POST", path, from_json, body=to_json(call))

        lease = await ask(calls.CONSUME, calls.OpenCall("t", lease=0.3))
        await queue.publish(numbered(1), "t")
        answer = await ask(calls.RECEIVE, calls.ReceiveCall(lease["lease_id"], 1))
        assert len(answer["messages"]) == 1
        async with queue.consumer("t") as consumer:
            with anyio.fail_after(10):
                (delivery,) = await consumer.receive()
            assert delivery.redelivered
            await delivery.ack()


async def test_a_consumer_that_is_busy_for_longer_than_its_lease_keeps_what_it_has(core: Threaded) -> None:
    async with HttpMessageQueue(core.url, token="secret", lease=0.3) as queue:
        async with queue.consumer("t") as consumer, queue.subscribe("b") as subscription:
            await queue.publish(numbered(1), "t")
            (delivery,) = await consumer.receive()
            await anyio.sleep(1)  # three leases
            await delivery.ack()
            await queue.broadcast(numbered(2), "b")
            with anyio.fail_after(5):
                assert (await subscription.receive()).data == {"number": 2}
        async with queue.consumer("t") as consumer:
            await queue.publish(numbered(3), "t")
            assert await take(consumer, 1) == [3]


# The server goes and comes back


@pytest.mark.promise("P2", "P8")
async def test_a_restart_of_the_server(anyio_backend: str) -> None:
    got: list[int] = []
    lost = anyio.Event()

    async def work(consumer: Consumer) -> None:
        while True:
            got.extend(await take(consumer, 1))

    async def listen(queue: HttpMessageQueue, started: anyio.Event) -> None:
        async with queue.subscribe("b") as subscription:
            started.set()
            with pytest.raises(QueueUnavailable) as caught:
                await subscription.receive()
            assert "Subscribe again" in str(caught.value.hint)
            with pytest.raises(QueueUnavailable):
                await subscription.receive()
        lost.set()

    async with open_core() as first:
        port = first.port
        async with HttpMessageQueue(first.url) as queue, anyio.create_task_group() as tasks:
            async with queue.consumer("t") as consumer, queue.consumer("other") as idle:
                started = anyio.Event()
                tasks.start_soon(work, consumer)  # noqa: ASYNC111 -- it ends before the consumer does
                tasks.start_soon(listen, queue, started)
                await started.wait()
                await queue.publish(numbered(1), "t")
                await queue.publish(numbered(10), "other")
                (held,) = await idle.receive()
                with anyio.fail_after(20):
                    await first.end()
                    tasks.start_soon(queue.publish, numbered(2), "t")  # waits
                    await anyio.wait_all_tasks_blocked()
                    async with open_core(port=port):
                        await lost.wait()
                        await held.ack()  # of a delivery that nobody knows any more
                        await queue.publish(numbered(3), "t")
                        await queue.publish(numbered(11), "other")
                        assert await take(idle, 1) == [11]
                        while not {1, 2, 3} <= set(got):
                            await anyio.wait_all_tasks_blocked()
                tasks.cancel_scope.cancel()


async def test_a_server_that_is_not_there() -> None:
    async with open_core() as core:
        url = core.url
    async with HttpMessageQueue(url, patience=0.2) as queue:
        for attempt in (queue.publish(numbered(1), "t"), queue.broadcast(numbered(1), "t")):
            with pytest.raises(QueueUnavailable) as caught:
                await attempt
            assert not caught.value.fields["sent"]
        for block in (queue.consumer("t"), queue.subscribe("t")):
            with pytest.raises(QueueUnavailable):
                async with block:
                    raise AssertionError("nobody is there")
        assert queue.statistics()["leases"] == 0


@pytest.mark.promise("P6", "P8")
async def test_a_wait_ends_with_the_block(core: Threaded) -> None:
    """And nothing is opened again behind it."""
    async with HttpMessageQueue(core.url, token="secret") as queue, anyio.create_task_group() as tasks:

        async def wait(source: Any) -> None:
            with pytest.raises(QueueUnavailable):
                await source.receive()

        with anyio.fail_after(10):
            async with queue.consumer("t") as consumer, queue.subscribe("b") as subscription:
                for source in (consumer, subscription):
                    tasks.start_soon(wait, source)
                    await anyio.wait_all_tasks_blocked()
            for source in (consumer, subscription):
                await wait(source)
        found = await core.run(statistics, core)
        assert (found["consumers"].get("t"), found["subscriptions"].get("t")) == (0, None)


@pytest.mark.promise("P6")
async def test_leaving_is_quick_when_the_server_is_gone(anyio_backend: str) -> None:
    async with open_core() as core, HttpMessageQueue(core.url) as queue:
        async with queue.consumer("t") as consumer, queue.subscribe("b"):
            await queue.publish(numbered(1), "t")
            (delivery,) = await consumer.receive()
            await core.end()
            await delivery.ack()
            with anyio.fail_after(5), anyio.CancelScope() as scope:
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(consumer.receive)
                    await anyio.wait_all_tasks_blocked()
                    scope.cancel()


# What is refused


@pytest.mark.promise("P9", "P11")
async def test_what_the_server_refuses_is_not_repeated(core: Threaded) -> None:
    async with HttpMessageQueue(core.url, token="wrong") as queue:
        with pytest.raises(Unauthorized) as caught:
            await queue.publish(numbered(1), "t")
        assert "wrong" not in f"{caught.value.hint} {caught.value.fields} {queue!r}"
        with pytest.raises(Unauthorized):
            async with queue.consumer("t"):
                pass
    async with HttpMessageQueue(core.url, token="secret") as queue:
        for message, topic in ((numbered(1), "a/b"), (QueueMessage(data={"text": "\ud800"}), "t")):
            with pytest.raises(BadInput):
                await queue.publish(message, topic)
        with pytest.raises(ValueError, match="at least 1"):
            async with queue.consumer("t") as consumer:
                await consumer.receive(0)
    async with HttpMessageQueue(f"{core.url}/elsewhere", token="secret") as queue:
        with pytest.raises(NotFound):
            await queue.publish(numbered(1), "t")


async def test_it_is_used_inside_its_block(core: Threaded) -> None:
    queue = HttpMessageQueue(core.url, token="secret")
    with pytest.raises(QueueUnavailable):
        await queue.publish(numbered(1), "t")
    async with queue:
        pass
    with pytest.raises(QueueUnavailable):
        await queue.publish(numbered(1), "t")
    with pytest.raises(RuntimeError):
        async with queue:
            pass


async def test_urls() -> None:
    async with open_queue("http://127.0.0.1:1") as queue:
        assert isinstance(queue, HttpMessageQueue)
        assert not queue.durable
    for url in ("http://", "http://user:hunter2@host", "https://host?token=hunter2", "http://host:nonsense"):
        with pytest.raises(SetupError) as caught:
            open_queue(url)
        assert "hunter2" not in f"{caught.value} {caught.value.hint} {caught.value.fields}"
