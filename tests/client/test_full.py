"""A server that is full: what is asked again, how often, and what the caller hears."""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx
import pytest

from llama_corral.client import Client
from llama_corral.client import http as client_http
from llama_corral.exceptions import CorralError, TooManyTasks, Unavailable

pytestmark = pytest.mark.anyio
FULL = {"error": {"code": "too_many_tasks", "message": "'svc' is full", "hint": "later"}, "detail": "'svc' is full"}


class Door:
    """Answers 429 `refusals` times, then accepts."""

    def __init__(self, refusals: int) -> None:
        self.refusals = refusals
        self.requests: list[httpx.Request] = []

    async def handle(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        if len(self.requests) <= self.refusals:
            return httpx.Response(429, json=FULL, headers={"Retry-After": "0"})
        task_id = request.url.params.get("task_id", "session")
        return httpx.Response(202, json={"task_id": task_id, "session_id": "s", "status": "queued"})


@pytest.fixture
async def client(anyio_backend: str) -> AsyncIterator[Client]:
    async with Client("http://full.test") as client:
        yield client


async def use(client: Client, door: Door) -> None:
    await client.http._clients[client.url].aclose()
    client.http._clients[client.url] = httpx.AsyncClient(
        base_url=client.url, transport=httpx.MockTransport(door.handle)
    )


@pytest.mark.promise("P9")
async def test_a_start_is_asked_again_a_few_times_under_one_id(client: Client) -> None:
    door = Door(client_http.FULL_ATTEMPTS - 1)
    await use(client, door)
    task = await client.start("svc")
    assert {request.url.params["task_id"] for request in door.requests} == {task.id}
    assert len(door.requests) == client_http.FULL_ATTEMPTS


async def test_then_the_caller_hears_it(client: Client) -> None:
    door = Door(100)
    await use(client, door)
    with pytest.raises(TooManyTasks, match="'svc' is full") as full:
        await client.run("svc")
    assert full.value.hint == "later"
    # Nothing was stored: there is nothing to cancel either.
    assert len(door.requests) == client_http.FULL_ATTEMPTS


async def test_what_may_not_be_repeated_is_asked_once(client: Client) -> None:
    door = Door(100)
    await use(client, door)
    with pytest.raises(TooManyTasks):
        await client.http.request("POST", "/sessions/create")
    assert len(door.requests) == 1


@pytest.mark.promise("P2")
async def test_a_known_server_that_answers_as_none_of_ours_is_being_ended(client: Client) -> None:
    """The same as the first answer of all is a wrong URL, and nothing to wait for."""
    answers = [
        httpx.Response(500, text="Internal Server Error"),
        httpx.Response(200, json={"services": {}}),
        httpx.Response(500, text="Internal Server Error"),
        httpx.Response(200, json={"services": {}}),
    ]
    await client.http._clients[client.url].aclose()
    transport = httpx.MockTransport(lambda _: answers.pop(0))
    client.http._clients[client.url] = httpx.AsyncClient(base_url=client.url, transport=transport)
    with pytest.raises(CorralError) as refused:
        await client.status()
    assert not isinstance(refused.value, Unavailable)
    for _ in range(2):
        assert await client.status() == {"services": {}}
    assert answers == []
