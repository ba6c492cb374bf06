"""The queue in Redis: the contract of every broker against real servers, and what it promises beyond that."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import Any
from uuid import uuid4

import anyio
import pytest

from llama_corral.abc import Consumer, Delivery, MessageQueue
from llama_corral.exceptions import QueueUnavailable, SetupError
from llama_corral.protocol import topics
from llama_corral.queues import open_queue
from llama_corral.queues.redis import RedisMessageQueue
from llama_corral.queues.redis_connection import Connection, RedisAddress, run_connection
from llama_corral.queues.redis_scripts import FIELD, Keys, prefix_of
from llama_corral.testing.brokers import BrokerContract
from llama_corral.testing.queues import numbered, numbers
from llama_corral.testing.servers import RedisServer

from .servers import own_server, shared_url

pytestmark = pytest.mark.anyio

VARIABLE = "CORRAL_TEST_REDIS_URL"


def redis_server(**options: Any) -> AbstractAsyncContextManager[RedisServer]:
    return own_server(RedisServer, VARIABLE, **options)


@asynccontextmanager
async def connect(url: str) -> AsyncIterator[Connection]:
    """A connection past the adapter."""
    async with anyio.create_task_group() as tasks:
        yield await tasks.start(run_connection, RedisAddress.from_url(url))
        tasks.cancel_scope.cancel()


async def forget(server: Connection, topic: str) -> None:
    for key in await server.create_request(b"KEYS", prefix_of(topic) + b"*"):
        await server.create_request(b"DEL", key)


@pytest.fixture
async def url(anyio_backend: str) -> str:
    return shared_url("Redis", VARIABLE, "redis://127.0.0.1:6379")


@pytest.fixture
async def server(url: str) -> AsyncIterator[Connection]:
    async with connect(url) as server:
        yield server


@pytest.fixture
async def topic(server: Connection) -> AsyncIterator[str]:
    topic = f"test-{uuid4().hex}.tickets"
    yield topic
    await forget(server, topic)


async def take(consumer: Consumer, count: int) -> list[Delivery]:
    taken: list[Delivery] = []
    with anyio.fail_after(10):
        while len(taken) < count:
            taken += await consumer.receive(count - len(taken))
    return taken


async def take_raw(consumer: Consumer, count: int) -> list[str]:
    """What letters are about, acked one by one: their topic may be full."""
    raw: list[str] = []
    with anyio.fail_after(20):
        while len(raw) < count:
            [letter] = await consumer.receive()
            raw.append(letter.message.data["raw"])
            await letter.ack()
    return raw


async def take_and_ack(consumer: Consumer, count: int) -> list[int]:
    taken = await take(consumer, count)
    for delivery in taken:
        await delivery.ack()
    return numbers(taken)


@pytest.mark.promise("P2", "P6", "P8", "P12")
class TestContract(BrokerContract):
    @pytest.fixture(autouse=True)
    async def _use(self, url: str, server: Connection) -> AsyncIterator[None]:
        self.url = f"{url}?lease=2"
        self.topics: list[str] = []
        yield
        for topic in self.topics:
            await forget(server, topic)

    def topic(self, name: str = "numbered") -> str:
        topic = super().topic(name)
        self.topics += [topic, f"{topic.removesuffix('.numbered')}.dead_letter"]
        return topic

    def make_queue(self, url: str) -> MessageQueue:
        return open_queue(f"{url.partition('?')[0]}?lease=2&patience=3")

    def open_server(self) -> AbstractAsyncContextManager[RedisServer]:
        return redis_server()

    async def publish_raw(self, topic: str, body: bytes) -> bool:
        async with connect(self.url.partition("?")[0]) as server:
            await server.create_request(b"XADD", Keys.of(topic, "default").fresh, b"*", FIELD, body)
        return True


# What is kept in the server


async def lengths(server: Connection, keys: Keys) -> tuple[Any, Any]:
    return await server.create_request(b"XLEN", keys.fresh), await server.create_request(b"XLEN", keys.returned)


async def names(server: Connection, keys: Keys) -> set[bytes]:
    found: set[bytes] = set()
    for key in (keys.fresh, keys.returned):
        for consumer in await server.create_request(b"XINFO CONSUMERS", key, b"default"):
            found.add(consumer[b"name"])
    return found


@pytest.mark.promise("P12")
async def test_a_stream_is_as_long_as_what_is_open(url: str, server: Connection, topic: str) -> None:
    keys = Keys.of(topic, "default")
    async with open_queue(url) as queue:
        async with queue.consumer(topic) as consumer:
            for number in range(5):
                await queue.publish(numbered(number), topic)
            deliveries = await take(consumer, 5)
            for delivery in deliveries[:3]:
                await delivery.ack()
            await deliveries[3].nack()
            [again] = await take(consumer, 1)
            assert (again.message.data["number"], again.redelivered) == (3, True)
            assert await lengths(server, keys) == (1, 1)
            assert len(await names(server, keys)) == 1
        assert await lengths(server, keys) == (0, 2)
        assert await names(server, keys) == set()


async def test_what_came_back_comes_first(url: str, topic: str) -> None:
    async with open_queue(url) as queue:
        async with queue.consumer(topic) as consumer:
            for number in range(10):
                await queue.publish(numbered(number), topic)
            for delivery in reversed(await take(consumer, 2)):
                await delivery.nack()
        async with queue.consumer(topic) as consumer:
            # Four of each stream are read; the surplus goes back and comes soon.
            first = await take(consumer, 4)
            assert numbers(first) == [0, 1, 2, 3]
            assert [delivery.redelivered for delivery in first] == [True, True, False, False]
            assert sorted(numbers(await take(consumer, 6))) == [4, 5, 6, 7, 8, 9]


@pytest.mark.promise("P12")
async def test_what_cannot_be_read_waits_in_the_server(
    url: str, server: Connection, topic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the dead letters take nothing. Whoever receives comes behind it."""
    monkeypatch.setattr("llama_corral.queues.redis_consumer.MOST_LETTERS", 3)
    namespace = topic.removesuffix(".tickets")
    dead = topics.dead_letter(namespace)
    got: list[int] = []
    async with open_queue(f"{url}?max_messages=2&lease=1", namespace=namespace) as queue:
        async with queue.consumer(topic) as consumer, anyio.create_task_group() as tasks:

            async def receive() -> None:
                got.extend(await take_and_ack(consumer, 1))

            for _ in range(10):
                await server.create_request(b"XADD", Keys.of(topic, "default").fresh, b"*", FIELD, b"{no message")
            tasks.start_soon(receive)
            with anyio.fail_after(10):
                while not queue.statistics()["refused"]:
                    await queue.broadcast(numbered(0), topic)  # gives the others their time
            assert queue.statistics()["open"] <= 5
            async with queue.consumer(dead) as letters:
                assert len(await take_raw(letters, 10)) == 10
            with anyio.fail_after(10):
                while True:
                    with suppress(QueueUnavailable):  # full until the acks have come
                        await queue.publish(numbered(1), topic)
                        break
    assert got == [1]
    await forget(server, dead)


@pytest.mark.promise("P12")
@pytest.mark.parametrize("known", [True, False])
async def test_a_full_topic_refuses(url: str, topic: str, known: bool) -> None:
    async with open_queue(f"{url}?max_messages=3") as queue:
        if known:
            async with queue.consumer(topic):
                pass
        for number in range(3):
            await queue.publish(numbered(number), topic)
        with pytest.raises(QueueUnavailable) as caught:
            await queue.publish(numbered(3), topic)
        assert caught.value.fields == {"topic": topic, "limit": 3}
        async with queue.consumer(topic) as consumer:
            [delivery, _] = await take(consumer, 2)
            with pytest.raises(QueueUnavailable):  # what is open counts too
                await queue.publish(numbered(3), topic)
            await delivery.ack()
        await queue.publish(numbered(4), topic)
        assert queue.statistics()["refused"] == 2


async def test_the_names_of_the_dead_are_removed(
    url: str, server: Connection, topic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llama_corral.queues.redis_consumer.FORGET_AFTER", -1.0)
    keys = Keys.of(topic, "default")
    async with open_queue(url) as queue, queue.consumer(topic):
        await queue.publish(numbered(1), topic)
        await server.create_request(b"XGROUP CREATECONSUMER", keys.fresh, b"default", b"idle:30000")
        await server.create_request(
            *(b"XREADGROUP", b"GROUP", b"default", b"holds:30000", b"STREAMS", keys.fresh, b">")
        )
        async with queue.consumer(topic):
            assert {name for name in await names(server, keys) if name.endswith(b"s:30000")} == {b"holds:30000"}
            assert b"idle:30000" not in await names(server, keys)


@pytest.mark.promise("P2")
async def test_each_consumer_has_its_own_lease(url: str, server: Connection, topic: str) -> None:
    """Five seconds of silence are too long for one, whoever notices, and not for the other."""
    keys = Keys.of(topic, "default")
    async with open_queue(f"{url}?lease=2") as queue:
        async with queue.consumer(topic):
            pass
        for number, name in enumerate((b"patient:60000", b"dead:4000")):
            await queue.publish(numbered(number), topic)
            read = await server.create_request(
                *(b"XREADGROUP", b"GROUP", b"default", name, b"STREAMS", keys.fresh, b">")
            )
            [[entry_id, _]] = read[keys.fresh]
            idle = (b"IDLE", 5000, b"JUSTID")
            await server.create_request(b"XCLAIM", keys.fresh, b"default", name, 0, entry_id, *idle)
        async with queue.consumer(topic) as consumer:
            assert await take_and_ack(consumer, 1) == [1]
        assert await names(server, keys) == {b"patient:60000", b"dead:4000"}
        assert await lengths(server, keys) == (1, 0)


@pytest.mark.promise("P2")
async def test_a_living_consumer_keeps_what_it_has(url: str, topic: str) -> None:
    async with open_queue(f"{url}?lease=0.3") as queue:
        async with queue.consumer(topic) as busy, queue.consumer(topic) as other:
            await queue.publish(numbered(1), topic)
            [delivery] = await take(busy, 1)
            with anyio.move_on_after(1):
                await other.receive()
                pytest.fail("it was delivered twice")
            await delivery.ack()


@pytest.mark.promise("P2")
async def test_what_a_lost_answer_brought_comes_back_at_once(url: str, server: Connection, topic: str) -> None:
    """The server handed it out, the connection broke, the consumer lives: long before its lease is over."""
    keys = Keys.of(topic, "default")
    async with RedisMessageQueue.from_url(url) as queue, queue.consumer(topic) as consumer:
        for number in range(2):
            await queue.publish(numbered(number), topic)
        [kept] = await take(consumer, 1)
        [name] = await names(server, keys)
        await server.create_request(*(b"XREADGROUP", b"GROUP", b"default", name, b"STREAMS", keys.fresh, b">"))
        assert consumer.link.connection is not None
        await server.create_request(b"CLIENT KILL", b"ID", consumer.link.connection.client_id or 0)
        assert await take_and_ack(consumer, 1) == [1]
        assert queue.statistics()["reconnects"] == 1
        await kept.ack()
    assert await lengths(server, keys) == (0, 0)


# Broadcasts


async def test_a_slow_listener_loses_the_oldest(url: str) -> None:
    one, other = (f"test-{uuid4().hex}.news" for _ in range(2))
    async with open_queue(f"{url}?broadcast_buffer=2") as queue:
        async with queue.subscribe(one) as slow, queue.subscribe(other) as fence:
            for number in range(4):
                await queue.broadcast(numbered(number), one)
            await queue.broadcast(numbered(9), other)
            with anyio.fail_after(10):
                await fence.receive()  # on the same connection, so they have all come
                assert [(await slow.receive()).data["number"] for _ in range(2)] == [2, 3]
            assert queue.statistics()["lost_broadcasts"] == 2
            assert queue.statistics()["subscriptions"] == 2
        assert queue.statistics()["subscriptions"] == 0


async def test_databases_and_what_nobody_can_read(url: str, server: Connection) -> None:
    topic = f"test-{uuid4().hex}.news"
    async with open_queue(url) as queue, open_queue(f"{url}/1") as elsewhere, queue.subscribe(topic) as listener:
        await elsewhere.broadcast(numbered(1), topic)
        await server.create_request(b"PUBLISH", b"corral:0:" + topic.encode(), b"{no message")
        await queue.broadcast(numbered(2), topic)
        with anyio.fail_after(10):
            assert (await listener.receive()).data == {"number": 2}


# Cancellation


@pytest.mark.promise("P6")
async def test_cancelled_anywhere(url: str, topic: str) -> None:
    """Nothing is left behind, which warnings would tell; what was published is there."""
    async with open_queue(url) as queue:
        await queue.publish(numbered(1), topic)
        for step in range(40):
            with anyio.move_on_after(step * 0.0005):
                async with open_queue(f"{url}?patience=0.1") as other:
                    async with other.subscribe(topic), other.consumer(topic) as consumer:
                        await consumer.receive()
                        await consumer.receive()
        async with queue.consumer(topic) as consumer:
            assert await take_and_ack(consumer, 1) == [1]


# URLs: queues are made outside of event loops too


def test_urls() -> None:
    address = RedisAddress.from_url("redis://us%40er:p%2Fss%3A@example.org:7000/3")
    assert address.password is not None
    assert (address.host, address.port, address.db, address.user) == ("example.org", 7000, 3, "us@er")
    assert address.password.get_secret_value() == "p/ss:"
    assert "p/ss:" not in f"{address} {address!r}"
    bare = RedisAddress.from_url("redis://:word@h")
    assert (bare.user, bare.port, bare.db) == (None, 6379, 0)
    assert RedisAddress.from_url("unix:///run/redis.sock?db=2") == RedisAddress(path="/run/redis.sock", db=2)
    assert RedisAddress.from_url("rediss://h").tls is not None
    queue = open_queue("redis://:hunter2@h?lease=3&max_messages=5&patience=2&broadcast_buffer=7")
    assert isinstance(queue, RedisMessageQueue)
    assert (queue.lease, queue.patience, queue.address.host) == (3.0, 2.0, "h")


@pytest.mark.promise("P11")
@pytest.mark.parametrize(
    "url",
    [
        "redis://:hunter2@h/none",
        "redis://:hunter2@h?db=-1",
        "redis://:hunter2@h?lease=nan",
        "redis://:hunter2@h?lease=0",
        "redis://:hunter2@h?max_messages=0",
        "redis://:hunter2@h?patience=soon",
        "redis://:hunter2@h?colour=red",
        "redis://:hunter2@h:port",
        "redis://:hunter2@h?ssl_ca_certs=/nowhere",
        "rediss://:hunter2@h?ssl_ca_certs=/nowhere",
        "rediss://:hunter2@h?ssl_cert_reqs=optional",
        f"redis://:hunter2@{'h' * 70}",
        "unix://:hunter2@",
    ],
)
def test_what_cannot_be_opened_says_why_and_tells_no_secret(url: str) -> None:
    with pytest.raises(SetupError) as caught:
        open_queue(url)
    assert "hunter2" not in f"{caught.value} {caught.value.hint} {caught.value.fields}"


@pytest.mark.promise("P2")
async def test_receivers_that_are_cancelled_together_keep_nothing(url: str, topic: str) -> None:
    """Neither the one that read nor the one whose turn it would have been."""
    async with open_queue(url) as queue, queue.consumer(topic) as consumer, queue.consumer(topic) as other:
        for number in range(3):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(consumer.receive)
                tasks.start_soon(consumer.receive)
                await anyio.wait_all_tasks_blocked()
                tasks.cancel_scope.cancel()
            await queue.publish(numbered(number), topic)
            assert await take_and_ack(other, 1) == [number]


async def test_a_group_that_cannot_be_made_again() -> None:
    async with redis_server() as own, connect(own.url) as server, open_queue(own.url) as queue:
        async with queue.consumer("t") as consumer:
            await server.create_request(b"CONFIG", b"SET", b"maxmemory", b"1")
            await server.create_request(b"DEL", *Keys.of("t", "default"))
            with pytest.raises(QueueUnavailable, match="memory"), anyio.fail_after(10):
                await consumer.receive()
