"""The original's consumers: acked after the handler, never silent, nothing counted as done that was not."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import anyio
import httpx
import pytest

from llama_corral.exceptions import BadInput, QueueUnavailable, Unavailable
from llama_corral.protocol.messages import QueueMessage
from llama_corral.queues import MemoryMessageQueue
from llama_corral.queues.consumers import (
    CallableMessageConsumer,
    RemoteMessageConsumer,
    RetryPolicy,
    register_consumer,
    start_consuming,
)
from llama_corral.queues.dead_letter import dead_letter
from llama_corral.testing import FaultyMessageQueue

TOPIC, DEAD = "ns.news", "ns.dead_letter"
QUICK = RetryPolicy(max_failures=3, first_pause=0.001, longest_pause=0.002)


def news(text: str = "hello", type_: str = "news") -> QueueMessage:
    return QueueMessage(data={"text": text}, type=type_)


@pytest.fixture
async def queue() -> AsyncIterator[FaultyMessageQueue]:
    async with FaultyMessageQueue(MemoryMessageQueue(max_messages=10)) as queue:
        yield queue


@pytest.mark.anyio
@pytest.mark.promise("P2", "P6")
async def test_a_message_is_acked_only_after_its_handler(queue: FaultyMessageQueue) -> None:
    handled: list[str] = []
    entered, leave = anyio.Event(), anyio.Event()

    async def handle(message: QueueMessage) -> None:
        entered.set()
        await leave.wait()
        handled.append(message.data["text"])

    consumer = CallableMessageConsumer(id_="c", message_type="news", handler=handle)
    await queue.publish(news(), TOPIC)
    async with anyio.create_task_group() as tasks:
        await tasks.start(register_consumer(queue, consumer, TOPIC))
        await entered.wait()
        tasks.cancel_scope.cancel()  # killed in the middle
    assert handled == []
    assert queue.statistics()["topics"][TOPIC] == 1
    leave.set()
    async with anyio.create_task_group() as tasks:
        await tasks.start(register_consumer(queue, consumer, TOPIC))
        await anyio.wait_all_tasks_blocked()
        tasks.cancel_scope.cancel()
    assert handled == ["hello"]
    assert queue.statistics()["topics"][TOPIC] == 0


@pytest.mark.anyio
async def test_the_topic_of_the_message_type_is_the_default(queue: FaultyMessageQueue) -> None:
    handled: list[QueueMessage] = []
    consumer = CallableMessageConsumer(message_type="news", handler=handled.append)
    async with anyio.create_task_group() as tasks:
        await tasks.start(start_consuming, queue, consumer)
        await queue.publish(news(), "llama_deploy.news")
        await anyio.wait_all_tasks_blocked()
        tasks.cancel_scope.cancel()
    assert [message.data for message in handled] == [{"text": "hello"}]
    with pytest.raises(ValueError, match="handler"):
        CallableMessageConsumer()
    with pytest.raises(ValueError, match="url"):
        RemoteMessageConsumer()


@pytest.mark.anyio
@pytest.mark.promise("P2")
async def test_a_handler_that_fails_gets_the_message_again(queue: FaultyMessageQueue) -> None:
    attempts = 0
    done = anyio.Event()

    def handle(message: QueueMessage) -> None:
        nonlocal attempts
        attempts += 1
        if attempts < 3:
            raise OSError("not yet")
        done.set()

    consumer = CallableMessageConsumer(message_type="news", handler=handle)
    async with queue.consumer(DEAD) as letters, anyio.create_task_group() as tasks:
        await tasks.start(register_consumer(queue, consumer, TOPIC, retry=QUICK))
        await queue.publish(news(), TOPIC)
        await done.wait()
        await anyio.wait_all_tasks_blocked()
        assert queue.statistics()["topics"] == {TOPIC: 0, DEAD: 0}
        assert queue.statistics()["open"][TOPIC] == 0
        tasks.cancel_scope.cancel()
        del letters


@pytest.mark.anyio
@pytest.mark.promise("P2")
async def test_what_is_refused_goes_to_the_dead_letters_at_once(queue: FaultyMessageQueue) -> None:
    def handle(message: QueueMessage) -> None:
        raise BadInput("I cannot read this")

    consumer = CallableMessageConsumer(id_="reader", message_type="news", handler=handle)
    async with queue.consumer(DEAD) as letters, anyio.create_task_group() as tasks:
        await tasks.start(register_consumer(queue, consumer, TOPIC, retry=RetryPolicy(first_pause=3600)))
        message = news()
        await queue.publish(message, TOPIC)
        [delivery] = await letters.receive()
        letter = delivery.message
        tasks.cancel_scope.cancel()
    assert letter.publisher_id == "reader"
    assert letter.data["topic"] == TOPIC
    assert letter.data["reason"] == "BadInput: I cannot read this"
    assert QueueMessage.model_validate(letter.data["message"]) == message


@pytest.mark.anyio
@pytest.mark.promise("P2", "P9")
async def test_a_message_stays_while_the_dead_letters_are_away(queue: FaultyMessageQueue) -> None:
    consumer = CallableMessageConsumer(message_type="news", handler=lambda _: None)
    refused = queue.refuse("publish", topic=DEAD, times=2)
    async with queue.consumer(DEAD) as letters, anyio.create_task_group() as tasks:
        await tasks.start(register_consumer(queue, consumer, TOPIC, retry=QUICK))
        await queue.publish(news(type_="other"), TOPIC)
        [delivery] = await letters.receive()
        assert delivery.message.data["failures"] == 3
        assert refused.applied == 2
        tasks.cancel_scope.cancel()


@pytest.mark.anyio
@pytest.mark.promise("P6")
async def test_a_lost_queue_ends_the_consumer_loudly(queue: FaultyMessageQueue) -> None:
    consumer = CallableMessageConsumer(message_type="news", handler=lambda _: None)
    ended = False

    async def consume() -> None:
        nonlocal ended
        with pytest.raises(QueueUnavailable):
            await start_consuming(queue, consumer, TOPIC)
        ended = True

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(consume)
        await anyio.wait_all_tasks_blocked()
        await queue.disconnect()
    assert ended


@pytest.mark.promise("P12")
def test_pauses_are_bounded() -> None:
    policy = RetryPolicy(first_pause=0.5, longest_pause=4)
    assert [policy.pause(failures) for failures in (1, 2, 3, 4, 5, 10_000)] == [0.5, 1, 2, 4, 4, 4]


def test_a_dead_letter_of_what_cannot_be_parsed() -> None:
    assert dead_letter(b"\xff{", "t", "no JSON").data == {
        "topic": "t",
        "reason": "no JSON",
        "failures": 0,
        "raw": "\ufffd{",
    }
    assert len(dead_letter("x" * 1_000_000, "t", "long").data["raw"]) == 100_000


# Remote


Answer = Callable[[httpx.Request], httpx.Response]


def remote(answer: Any, **options: Any) -> RemoteMessageConsumer:
    return RemoteMessageConsumer(
        "r", "http://service/process_message", "news", transport=httpx.MockTransport(answer), **options
    )


@pytest.mark.anyio
async def test_a_message_is_posted_whole_with_the_token() -> None:
    requests: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        requests.append(request)
        return httpx.Response(200, json={"ok": True})

    consumer = remote(answer, token="hunter2")
    message = news()
    assert await consumer.process_message(message) == {"ok": True}
    async with consumer.opened():
        await consumer.process_message(message)
    for request in requests:
        assert QueueMessage.model_validate(json.loads(request.content)) == message
        assert request.headers["Authorization"] == "Bearer hunter2"
        assert request.headers["Content-Type"] == "application/json"
    assert "hunter2" not in f"{consumer!r} {vars(consumer)}"


@pytest.mark.anyio
@pytest.mark.promise("P2")
@pytest.mark.parametrize(
    ("status", "error"),
    [
        *((status, None) for status in (200, 202, 204)),
        *((status, BadInput) for status in (400, 413, 422)),
        *((status, Unavailable) for status in (302, 401, 404, 408, 429, 500, 503)),
    ],
)
async def test_the_answer_is_checked(status: int, error: type[Exception] | None) -> None:
    consumer = remote(lambda _: httpx.Response(status))
    if error is None:
        assert await consumer.process_message(news()) is None
    else:
        with pytest.raises(error) as caught:
            await consumer.process_message(news())
        assert caught.value.fields["status_code"] == status


@pytest.mark.anyio
async def test_an_answer_that_is_no_json_is_an_answer() -> None:
    assert await remote(lambda _: httpx.Response(200, text="thanks")).process_message(news()) == "thanks"


@pytest.mark.anyio
@pytest.mark.promise("P9")
async def test_a_server_that_is_away_or_hangs_is_unavailable() -> None:
    def refuse(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused")

    async def hang(request: httpx.Request) -> httpx.Response:
        await anyio.sleep_forever()
        raise AssertionError

    for answer, timeout in ((refuse, 30), (hang, 0.01)):
        with pytest.raises(Unavailable, match="did not answer"):
            await remote(answer, timeout=timeout).process_message(news())


@pytest.mark.anyio
@pytest.mark.promise("P9")
async def test_a_message_of_another_type_is_refused() -> None:
    with pytest.raises(BadInput, match="other"):
        await remote(lambda _: httpx.Response(200)).process_message(news(type_="other"))
