"""The queue in NATS: the contract of every broker against real servers, and what is peculiar to it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from typing import Any
from uuid import uuid4

import anyio
import pytest

from llama_corral.exceptions import BadInput, QueueUnavailable, TooLarge
from llama_corral.protocol import topics
from llama_corral.protocol.messages import QueueMessage
from llama_corral.queues import nats_connection
from llama_corral.queues.nats_connection import Pending
from llama_corral.queues.nats_stream import token_of
from llama_corral.testing.brokers import BrokerContract
from llama_corral.testing.children import Child
from llama_corral.testing.servers import NatsServer

from .nats_tools import client, nats_queue, nats_server, numbered, shared, take, take_nothing

pytestmark = pytest.mark.anyio


class TestContract(BrokerContract):
    @pytest.fixture(autouse=True)
    async def stream_of_its_own(self, anyio_backend: str) -> AsyncIterator[None]:
        """So that nothing is left behind in a server that others use."""
        server, self.stream = shared(), f"test-{uuid4().hex}"
        self.url = self.with_options(server)
        yield
        async with client(server) as raw:
            await raw.call(f"$JS.API.STREAM.DELETE.{self.stream}")

    def with_options(self, url: str) -> str:
        return f"{url}?lease=2&patience=3&stream={self.stream}"

    def open_server(self) -> AbstractAsyncContextManager[Child]:
        return nats_server()

    def _url_of(self, server: Child) -> str:
        return self.with_options(super()._url_of(server))

    async def publish_raw(self, topic: str, body: bytes) -> bool:
        async with client(shared()) as raw:
            await raw.call(f"{self.stream}.q.{token_of(topic)}", body)
        return True


@pytest.fixture
async def server(anyio_backend: str) -> AsyncIterator[NatsServer]:
    async with nats_server() as found:
        yield found


# Groups


@pytest.mark.promise("P2")
async def test_the_first_group_inherits_what_was_there(server: NatsServer) -> None:
    """Whatever its name; others get what is published from then on."""
    async with nats_queue(server.url) as queue:
        await queue.publish(numbered(1), "t")
        async with queue.consumer("t", "ünusual, name.>") as first, queue.consumer("t", "default") as second:
            await queue.publish(numbered(2), "t")
            assert await take(first, 2) == [1, 2]
            assert await take(second, 1) == [2]


@pytest.mark.promise("P2")
async def test_a_publisher_hears_of_a_new_group(server: NatsServer) -> None:
    """Also one that has published before, in another process; and one that comes later."""
    async with nats_queue(server.url) as queue, nats_queue(server.url) as other:
        async with queue.consumer("t", "a") as a:
            for number in range(20):
                await other.publish(numbered(number), "t")
                async with queue.consumer("t", f"b{number}"):
                    pass
            await other.publish(numbered(20), "t")
            assert await take(a, 21) == list(range(21))
            for number in range(20):
                async with queue.consumer("t", f"b{number}") as b:
                    assert await take(b, 20 - number) == list(range(number + 1, 21))
        async with nats_queue(server.url) as late:
            await late.publish(numbered(30), "t")
        async with queue.consumer("t", "b7") as b:
            assert await take(b, 1) == [30]


async def test_topics_are_any_text(server: NatsServer) -> None:
    names = ["a.b", "a b", "a", "A", "ä🦙", "a.>", "*", "%", "=25", "", " ", "x" * 1000, "x" * 1001, "a+b", "a+", "\n"]
    assert len({token_of(name) for name in names}) == len(names)
    async with nats_queue(server.url) as queue:
        for number, name in enumerate(names):
            async with queue.subscribe(name) as listener:
                await queue.publish(numbered(number), name)
                await queue.broadcast(numbered(number), name)
                with anyio.fail_after(5):
                    assert (await listener.receive()).data == {"number": number}
        for number, name in enumerate(names):
            async with queue.consumer(name, name) as consumer:
                assert await take(consumer, 1) == [number]


# Publishing


@pytest.mark.promise("P2")
async def test_a_repeated_publish_is_one_message(server: NatsServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server took it, and its answer was lost."""
    monkeypatch.setattr(nats_connection, "ANSWER_TIME", 0.3)
    async with nats_queue(server.url) as queue, queue.consumer("t") as consumer:
        await queue.publish(numbered(0), "t")
        connection = queue.link.connection
        assert connection is not None
        ask, sent = connection.ask, 0

        async def lossy(*request: Any) -> Pending:
            nonlocal sent
            sent += 1
            pending = await ask(*request)
            if sent == 1:
                pending.forget()
            return pending

        monkeypatch.setattr(connection, "ask", lossy)
        await queue.publish(numbered(1), "t")
        assert sent == 2
        await queue.publish(numbered(2), "t")
        assert await take(consumer, 3) == [0, 1, 2]
        await take_nothing(consumer)


async def test_a_message_published_twice_comes_twice(server: NatsServer) -> None:
    """As from the dead letters, by a person: the server must not take it for a repetition."""
    async with nats_queue(server.url) as queue, queue.consumer("t") as consumer:
        message = numbered(1)
        for _ in range(2):
            await queue.publish(message, "t")
            assert await take(consumer, 1) == [1]


@pytest.mark.promise("P12")
async def test_a_full_stream(server: NatsServer) -> None:
    async with nats_queue(server.url, max_messages=3) as queue, queue.consumer("t") as consumer:
        for number in range(3):
            await queue.publish(numbered(number), "t")
        with anyio.fail_after(1), pytest.raises(QueueUnavailable, match="full") as caught:
            await queue.publish(numbered(3), "t")
        assert caught.value.hint
        assert await take(consumer, 3) == [0, 1, 2]
        refused = 1
        while True:  # until the server has worked on the acks
            try:
                await queue.publish(numbered(4), "t")
            except QueueUnavailable:
                refused += 1
            else:
                break
        assert await take(consumer, 1) == [4]
        assert queue.statistics()["refused"] == refused
        assert queue.statistics()["published"] == 4


@pytest.mark.promise("P9")
async def test_a_message_that_is_too_large(server: NatsServer) -> None:
    async with nats_queue(server.url) as queue, queue.consumer("t") as consumer:
        for size in (2**20 - 1000, 2**20, 2**21):
            message = QueueMessage(data={"number": size, "text": "x" * size})
            for send in (queue.publish, queue.broadcast):
                if size < 2**20:
                    await send(message, "t")
                else:
                    with pytest.raises(TooLarge) as caught:
                        await send(message, "t")
                    assert caught.value.fields["limit"] == 2**20
        assert await take(consumer, 1) == [2**20 - 1000]
        with pytest.raises(BadInput):
            await queue.publish(QueueMessage(data={"text": "\ud800"}), "t")
        assert queue.statistics()["reconnects"] == 0


async def test_the_largest_message(server: NatsServer) -> None:
    """To the byte: one more, and the server would end the connection."""
    async with nats_queue(server.url) as queue, queue.consumer("t") as consumer:
        taken, refused = 2**20 - 1000, 2**20
        while refused - taken > 1:
            size = (taken + refused) // 2
            try:
                await queue.publish(QueueMessage(id_="i", data={"number": 1, "text": "x" * size}), "t")
            except TooLarge:
                refused = size
            else:
                taken = size
                assert await take(consumer, 1) == [1]
        assert queue.statistics()["reconnects"] == 0


# Receiving


async def test_an_open_delivery_outlives_its_lease(server: NatsServer) -> None:
    """As long as its consumer lives."""
    async with nats_queue(server.url, lease=0.5) as queue, nats_queue(server.url) as other:
        async with queue.consumer("t") as first, other.consumer("t") as second:
            await queue.publish(numbered(1), "t")
            [delivery] = await first.receive()
            await take_nothing(second, seconds=1.5)
            await delivery.ack()
            await take_nothing(second, seconds=0.6)


async def test_a_consumer_that_does_not_wait_any_more_keeps_nothing(server: NatsServer) -> None:
    """What was asked for and not waited for goes to another consumer, at once, however much it was."""
    async with nats_queue(server.url, lease=60) as queue, queue.consumer("t") as first:
        with anyio.move_on_after(0.1):
            await first.receive(50)
        async with queue.consumer("t") as second:
            for number in range(10):
                await queue.publish(numbered(number), "t")
            assert sorted(await take(second, 10)) == list(range(10))
        with anyio.move_on_after(0.1):
            await first.receive()
        async with nats_queue(server.url) as other, other.consumer("t") as third:
            with anyio.move_on_after(0.1):
                await third.receive()
        await queue.publish(numbered(10), "t")
        assert await take(first, 1) == [10]


async def test_several_tasks_receive_from_one_consumer(server: NatsServer) -> None:
    got: list[int] = []
    async with nats_queue(server.url) as queue, queue.consumer("t") as consumer:

        async def work() -> None:
            while len(got) < 30:
                for delivery in await consumer.receive(3):
                    got.append(delivery.message.data["number"])
                    await delivery.ack()
            tasks.cancel_scope.cancel()

        with anyio.fail_after(10):
            async with anyio.create_task_group() as tasks:
                for _ in range(3):
                    tasks.start_soon(work)
                for number in range(30):
                    await queue.publish(numbered(number), "t")
        assert sorted(got) == list(range(30))
        with pytest.raises(ValueError, match="at least 1"):
            await consumer.receive(0)


@pytest.mark.promise("P2")
async def test_dead_letters_that_are_full(server: NatsServer, caplog: pytest.LogCaptureFixture) -> None:
    """What nobody can read stays where it is, and what can be read is worked on."""
    async with nats_queue(server.url, lease=0.5, max_messages=2) as queue, queue.consumer("t") as consumer:
        async with client(server.url) as raw:
            await raw.call("corral.q.t", b"{no message")
        await queue.publish(numbered(1), "t")
        assert await take(consumer, 1) == [1]
        assert "dead letters take nothing" in caplog.text
        async with queue.consumer(topics.dead_letter(topics.DEFAULT_NAMESPACE)) as letters:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(consumer.receive)
                with anyio.fail_after(5):
                    [letter] = await letters.receive()
                tasks.cancel_scope.cancel()
        assert letter.message.data["topic"] == "t"


# Broadcasts


@pytest.mark.promise("P12")
async def test_a_slow_listener_loses_the_oldest(server: NatsServer) -> None:
    async with nats_queue(server.url, broadcast_buffer=3) as queue, queue.subscribe("t") as listener:
        async with queue.subscribe("t") as last, client(server.url) as raw:
            await raw.side.call(raw.client.publish, "corral.b.t", b"{no message")
            await raw.side.call(raw.client.flush)
            for number in range(10):
                await queue.broadcast(numbered(number), "t")
            while (await last.receive()).data["number"] != 9:
                pass
        assert [(await listener.receive()).data["number"] for _ in range(3)] == [7, 8, 9]
        assert queue.statistics()["lost_broadcasts"] == 7
        assert queue.statistics()["broadcasts"] == 10


async def test_a_consumer_that_is_left_while_it_buries(server: NatsServer, monkeypatch: pytest.MonkeyPatch) -> None:
    async with nats_queue(server.url) as queue, client(server.url) as raw, queue.consumer("t") as consumer:

        async def bury(*_: Any) -> None:
            await consumer.leave()

        monkeypatch.setattr(queue, "bury", bury)
        await raw.call(f"corral.q.{token_of('t')}", b"{")
        with pytest.raises(QueueUnavailable), anyio.fail_after(5):
            await consumer.receive()
