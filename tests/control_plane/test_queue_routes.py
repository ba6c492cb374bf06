"""The queue over HTTP at its routes: the original's, and what ours do when time is up, the server stops or a client goes."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
import trio
import trio.testing

from llama_corral.protocol import queue_calls as calls
from llama_corral.protocol.messages import QueueMessage
from llama_corral.testing.queues import numbered

from .server import Web, open_web

pytestmark = pytest.mark.trio


async def post(web: Web, path: str, body: Any, **options: Any) -> httpx.Response:
    return await web.client.post(path, json=body, **options)


async def open_consumer(web: Web, topic: str = "t", **options: Any) -> str:
    answer = await post(web, calls.CONSUME, {"topic": topic, **options})
    assert answer.status_code == 200, answer.text
    return str(answer.json()["lease_id"])


async def receive(web: Web, lease: str, seq: int = 1, **options: Any) -> dict[str, Any]:
    answer = await post(web, calls.RECEIVE, {"lease_id": lease, "seq": seq, **options}, timeout=20)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def settle(cushion: float = 0.05) -> None:
    """Return when the requests that were sent wait in their handlers."""
    await trio.testing.wait_all_tasks_blocked(cushion)


# The original's


async def test_the_routes_of_the_original() -> None:
    async with open_web() as web:
        message = QueueMessage(data={"n": 1}, type="news").model_dump(mode="json")
        for answer in (await post(web, "/messages/t", message), await web.client.get("/messages/t")):
            assert answer.status_code == 404
            assert answer.json()["detail"] == "topic t not found"
        for _ in range(2):
            answer = await web.client.post("/topics/t")
            assert (answer.status_code, answer.json()) == (200, None)
        assert (await web.client.get("/messages/t")).json() is None
        for number in range(2):
            answer = await post(web, "/messages/t", message | {"id_": str(number)})
            assert (answer.status_code, answer.json()) == (200, None)
        for number in range(2):
            assert (await web.client.get("/messages/t")).json() == message | {"id_": str(number)}
        assert (await web.client.get("/messages/t")).json() is None
        assert web.queue.waiting("t") == 0


async def test_what_others_use_is_a_topic_too() -> None:
    """The original's services publish their results to the control plane, and take tickets that it has published."""
    async with open_web() as web:
        assert (await web.client.get("/messages/test.control_plane")).json() is None
        await web.queue.publish(numbered(1), "test.svc")
        assert (await web.client.get("/messages/test.svc")).json()["data"] == {"number": 1}


async def test_a_message_is_waited_for() -> None:
    async with open_web() as web, trio.open_nursery() as nursery:
        await web.client.post("/topics/t")

        async def take() -> None:
            answer = await web.client.get("/messages/t", params={"wait": 20}, timeout=20)
            assert answer.json()["data"] == {"number": 1}

        nursery.start_soon(take)
        await settle()
        await web.queue.publish(numbered(1), "t")


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("core:8000", ("core", 8000)),
        ("core", ("core", 80)),
        ("[::1]:8000", ("[::1]", 8000)),
        ("core:nonsense", ("127.0.0.1", None)),
        ("core:99999999", ("127.0.0.1", None)),
        ("user:hunter2@core:8000", ("core", 8000)),
    ],
)
async def test_the_original_finds_the_queue(host: str, expected: tuple[str, int | None]) -> None:
    async with open_web() as web:
        answer = await web.client.get("/queue_config", headers={"host": host})
        assert answer.status_code == 200
        config = answer.json()["SimpleMessageQueueConfig"]
        assert config == {
            "type": "simple",
            "host": expected[0],
            "port": expected[1] or web.client.base_url.port,
            "client_kwargs": {},
            "raise_exceptions": False,
            "use_ssl": False,
        }


# Ours


@pytest.mark.promise("P10")
async def test_a_long_poll_waits_for_a_message() -> None:
    async with open_web() as web, trio.open_nursery() as nursery:
        lease = await open_consumer(web, group="g")
        assert await receive(web, lease) == {"messages": [], "known": True, "draining": False}

        async def take() -> None:
            answer = await receive(web, lease, wait=20.0)
            assert [item["message"]["data"] for item in answer["messages"]] == [{"number": 1}]
            assert await receive(web, lease) == answer

        nursery.start_soon(take)
        await settle()
        await post(web, calls.PUBLISH, {"topic": "t", "message": numbered(1).model_dump(mode="json")})


@pytest.mark.promise("P2")
async def test_a_client_that_leaves_a_long_poll_loses_nothing() -> None:
    async with open_web() as web:
        lease = await open_consumer(web)
        for number in range(10):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(receive, web, lease, number + 1)
                await settle(0.005 * (number % 4))
                await web.queue.publish(numbered(number), "t")
                nursery.cancel_scope.cancel()
            answer = await receive(web, lease, number + 1, wait=5.0)
            (item,) = answer["messages"]
            assert item["message"]["data"] == {"number": number}
            assert (await post(web, calls.SETTLE, {"lease_id": lease, "ack": [item["number"]]})).json()["known"]
        assert web.queue.statistics()["topics"]["t"] == 0


@pytest.mark.promise("P7")
async def test_a_drain_ends_long_polls_with_an_empty_answer() -> None:
    async with open_web() as web:
        lease = await open_consumer(web)
        subscription = (await post(web, calls.SUBSCRIBE, {"topic": "b"})).json()["lease_id"]

        async def poll(which: str) -> None:
            answer = await receive(web, which, wait=30.0)
            assert answer == {"messages": [], "known": True, "draining": True}

        async with trio.open_nursery() as nursery:
            nursery.start_soon(poll, lease)
            nursery.start_soon(poll, subscription)
            await settle()
            web.app.drain.set()
        await web.queue.publish(numbered(1), "t")
        assert (await receive(web, lease))["draining"]  # nothing more is handed out
        assert (await post(web, calls.SETTLE, {"lease_id": lease})).status_code == 200


async def test_unknown_leases() -> None:
    async with open_web() as web:
        assert await receive(web, "nobody") == {"messages": [], "known": False, "draining": False}
        assert (await post(web, calls.SETTLE, {"lease_id": "nobody", "ack": [1]})).json() == {"known": False}
        assert (await post(web, calls.CLOSE, {"leases": [{"lease_id": "nobody"}]})).status_code == 200
        lease = await open_consumer(web)
        assert (await post(web, calls.RECEIVE, {"lease_id": lease, "seq": 7})).status_code == 409
        await post(web, calls.CLOSE, {"leases": [{"lease_id": lease}]})
        assert not (await receive(web, lease))["known"]


async def test_closing_settles_what_is_named_and_gives_back_the_rest() -> None:
    async with open_web() as web:
        for number in range(4):
            await web.queue.publish(numbered(number), "t")
        lease = await open_consumer(web)
        answer = await receive(web, lease, max_messages=4)
        assert [item["number"] for item in answer["messages"]] == [1, 2, 3, 4]
        await post(web, calls.CLOSE, {"leases": [{"lease_id": lease, "ack": [1, 3, 99], "nack": [2]}]})
        assert web.queue.waiting("t") == 2


@pytest.mark.promise("P9")
async def test_a_queue_that_is_away_is_503() -> None:
    async with open_web() as web:
        lease = await open_consumer(web)
        await web.client.post("/topics/t")
        message = numbered(1).model_dump(mode="json")
        await web.queue.__aexit__()
        for path, body in (
            (calls.PUBLISH, {"topic": "t", "message": message}),
            (calls.BROADCAST, {"topic": "t", "message": message}),
            (calls.CONSUME, {"topic": "t"}),
            (calls.SUBSCRIBE, {"topic": "t"}),
            (calls.RECEIVE, {"lease_id": lease, "seq": 1}),
            ("/messages/t", message),
        ):
            answer = await post(web, path, body)
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "queue_unavailable"), path
        assert (await web.client.get("/messages/t")).status_code == 503


HUGE = 10**30


@pytest.mark.promise("P9")
@pytest.mark.parametrize(
    ("path", "body"),
    [
        (calls.PUBLISH, {"topic": "", "message": {}}),
        (calls.PUBLISH, {"topic": "x" * 300, "message": {}}),
        (calls.PUBLISH, {"topic": "a\nb", "message": {}}),
        (calls.PUBLISH, {"topic": "t", "message": []}),
        (calls.PUBLISH, {"topic": "t", "message": {"action": "dance"}}),
        (calls.PUBLISH, []),
        (calls.CONSUME, {"topic": "t", "group": ""}),
        (calls.CONSUME, {"topic": "t", "lease": "long"}),
        (calls.RECEIVE, {"lease_id": "x"}),
        (calls.RECEIVE, {"lease_id": "x", "seq": "one"}),
        (calls.SETTLE, {"lease_id": "x", "ack": 1}),
        (calls.CLOSE, {"leases": [1]}),
        ("/messages/t", {"data": 1}),
        ("/messages/t", None),
    ],
)
async def test_content_that_makes_no_sense(path: str, body: Any) -> None:
    async with open_web() as web:
        await web.client.post("/topics/t")
        content = json.dumps(body).encode()
        answer = await web.client.post(path, content=content, headers={"content-type": "application/json"})
        assert answer.status_code in (400, 422), answer.text


@pytest.mark.promise("P9", "P12")
async def test_numbers_beyond_every_limit() -> None:
    async with open_web() as web:
        lease = await open_consumer(web, lease=1e300)
        await web.queue.publish(numbered(1), "t")
        for seq, options in ((HUGE, {}), (-1, {}), (1, {"max_messages": HUGE, "wait": -5}), (1, {"max_messages": -1})):
            answer = await post(web, calls.RECEIVE, {"lease_id": lease, "seq": seq, **options})
            assert answer.status_code == (200 if seq == 1 else 409)
        for settle in ({"ack": [HUGE, -1, 1, 1]}, {"nack": [HUGE]}, {"abandoned": HUGE}, {"abandoned": -HUGE}):
            assert (await post(web, calls.SETTLE, {"lease_id": lease, **settle})).status_code == 200
        assert web.queue.statistics()["open"]["t"] == 0


@pytest.mark.promise("P12")
async def test_topics_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llama_corral.control_plane.http.queue.MAX_TOPICS", 2)
    async with open_web() as web:
        for name, status in (("a", 200), ("b", 200), ("a", 200), ("c", 503), ("x" * 300, 422)):
            assert (await web.client.post(f"/topics/{name}")).status_code == status
