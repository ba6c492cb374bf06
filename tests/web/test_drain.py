"""A stop with everything open at once: streams, long polls, runs, and clients that do not read. Then a restart."""

from __future__ import annotations

import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
import trio
import trio.testing
from workflows import Context, Workflow, step
from workflows.events import Event, HumanResponseEvent, StartEvent, StopEvent

from llama_corral.deploy import Deployment, DeployOptions, deploy_all
from llama_corral.settings import ServerSettings

from .conftest import Client

pytestmark = [pytest.mark.trio, pytest.mark.promise("P3", "P7"), pytest.mark.timeout(40)]

ANSWER = {
    "agent_id": "talks",
    "event_obj_str": json.dumps(
        {
            "__is_pydantic": True,
            "value": {"_data": {"response": "yes"}},
            "qualified_name": "workflows.events.HumanResponseEvent",
        }
    ),
}
DETACHED = {"detach": "true", "task_id": "t", "session_id": "s"}


class Said(Event):
    n: int
    text: str = ""


class Talks(Workflow):
    """Says `count` things, waits for a person, and says as many again."""

    @step
    async def talk(self, ev: StartEvent, ctx: Context) -> StopEvent:
        count = ev.get("count", 3)
        if not await ctx.store.get("asked", default=False):
            for n in range(count):
                ctx.write_event_to_stream(Said(n=n, text="x" * ev.get("size", 0)))
            await ctx.store.set("asked", True)
        answer = await ctx.wait_for_event(HumanResponseEvent)
        for n in range(count):
            ctx.write_event_to_stream(Said(n=count + n))
        return StopEvent(result=answer.response)


class Works(Workflow):
    """Works until the test lets it end."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.started, self.release = anyio.Event(), anyio.Event()

    @step
    async def work(self, ev: StartEvent) -> StopEvent:
        self.started.set()
        await self.release.wait()
        return StopEvent(result="done")


class Served:
    """A deployment that a test stops."""

    def __init__(self, works: Works) -> None:
        self.works = works
        self.stop, self.ended = trio.Event(), trio.Event()
        self.url = ""

    async def run(self, options: DeployOptions, task_status: trio.TaskStatus[Deployment]) -> None:
        flows = {"talks": Talks(timeout=None), "works": self.works}
        await deploy_all(flows, options, stop=self.stop, task_status=task_status)
        self.ended.set()

    def client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=self.url, timeout=20)

    async def begin_to_stop(self) -> None:
        """Return when the services drain; one of them has to work on something."""
        self.stop.set()
        await trio.testing.wait_all_tasks_blocked(0.01)

    @asynccontextmanager
    async def reading(self, path: str, **headers: str) -> AsyncIterator[Reading]:
        async with await trio.open_tcp_stream("127.0.0.1", int(self.url.rpartition(":")[2])) as stream:
            client = Client(stream)
            await client.request("GET", path, **headers)
            assert (await client.head()).status == 200
            yield Reading(client)


class Reading:
    """A stream that is read line by line."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.buffer = b""

    async def line(self) -> str | None:
        while b"\n" not in self.buffer:
            chunk = await self.client.chunk()
            if not chunk:
                assert self.buffer == b""
                return None
            self.buffer += chunk
        line, _, self.buffer = self.buffer.partition(b"\n")
        return line.decode()

    async def until(self, wanted: str) -> list[str]:
        found: list[str] = []
        while (line := await self.line()) is not None:
            found.append(line)
            if line == wanted:
                return found
        raise AssertionError(f"no {wanted!r} in {found}")

    async def rest(self, *, complete: bool = True) -> list[str]:
        """All there is, to the end of the body, or to where it breaks off."""
        found: list[str] = []
        try:
            while (line := await self.line()) is not None:
                found.append(line)
        except EOFError:
            assert not complete
        else:
            assert complete
        return found


@asynccontextmanager
async def deployed(folder: Path, works: Works, **settings: Any) -> AsyncIterator[Served]:
    """Leaving the block stops it and waits for its end."""
    options = DeployOptions(
        store_url=f"sqlite:///{folder}/corral.db",
        settings=ServerSettings(port=0, **settings),
        step_flavour="anyio",
        drain_timeout=20,
    )
    served = Served(works)
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            deployment: Deployment = await nursery.start(served.run, options)
            served.url = deployment.url
            yield served
            served.stop.set()


def ids(lines: list[str]) -> list[int]:
    return [int(line.removeprefix("id: ")) for line in lines if line.startswith("id: ")]


async def test_everything_open_ends_well_and_goes_on_after_a_restart(tmp_path: Path) -> None:
    works = Works()
    async with deployed(tmp_path, works) as served, served.client() as client:
        answers: dict[str, httpx.Response] = {}

        async def ask(name: str, method: str, path: str, **options: Any) -> None:
            answers[name] = await client.request(method, path, **options)

        (await client.put("/sessions/s")).raise_for_status()
        (await client.post("/services/talks/run", params=DETACHED, json={})).raise_for_status()
        async with (
            served.reading("/tasks/t/events") as events,
            served.reading("/sessions/s/tasks/t/result_stream") as lines,
            trio.open_nursery() as nursery,
        ):
            seen = await events.until("id: 2")
            said = [await lines.line() for _ in range(3)]
            nursery.start_soon(lambda: ask("run", "POST", "/services/works/run", json={}))
            nursery.start_soon(lambda: ask("poll", "GET", "/tasks/t/result", params={"wait": 60}))
            await works.started.wait()
            await served.begin_to_stop()

            # It listens as long as something works, says that it is no place for new work, and takes none.
            async with served.client() as other:
                assert (await other.get("/ready")).status_code == 503
                assert (await other.get("/health")).status_code == 200
                refused = await other.post("/services/talks/run", json={})
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
            assert "run" not in answers

            works.release.set()
            seen += await events.rest()
            said += await lines.rest(complete=False)  # lines are events only: a whole body would mean the task's end
        assert (answers["run"].status_code, answers["run"].json()["result"]) == (200, "done")
        assert (answers["poll"].status_code, answers["poll"].json()) == (200, None)
        assert ids(seen) == list(range(len(said)))
        assert seen[-3:] == ["event: drain", f'data: {{"from": {len(said)}}}', ""]

    async with deployed(tmp_path, works) as served, served.client() as client:
        (await client.post("/tasks/t/send_event", json=ANSWER)).raise_for_status()
        async with served.reading("/tasks/t/events", Last_Event_ID=str(ids(seen)[-1])) as events:
            seen += await events.rest()
        assert "event: end" in seen
        count = (await client.get("/tasks/t")).json()["event_count"]
        assert ids(seen) == list(range(count))
        assert (await client.get("/tasks/t/result")).json()["value"] == "yes"


@pytest.mark.parametrize("path", ["/tasks/t/events", "/sessions/s/tasks/t/result_stream", "/tasks/t"])
async def test_a_client_that_does_not_read_is_left_behind(tmp_path: Path, path: str) -> None:
    """The answer is larger than what the sockets hold: the server is in the middle of a write when it stops."""
    async with deployed(tmp_path, Works(), graceful_timeout=0.2) as served:
        async with served.client() as client:
            (await client.put("/sessions/s")).raise_for_status()
            big = {"count": 40, "size": 250_000, "text": "y" * 9_000_000}
            (await client.post("/services/talks/run", params=DETACHED, json=big)).raise_for_status()
            async with served.reading("/tasks/t/events") as events:
                await events.until("id: 39")
        with trio.socket.socket() as reader:
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            await reader.connect(("127.0.0.1", int(served.url.rpartition(":")[2])))
            await reader.send(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            assert await reader.recv(12) == b"HTTP/1.1 200"
            await trio.testing.wait_all_tasks_blocked(0.05)
            served.stop.set()
            await served.ended.wait()  # while the client is still there


async def test_a_client_that_comes_back_too_early_is_told_to_go_on_elsewhere(tmp_path: Path) -> None:
    """While the server drains, a stream can still be opened: it brings what is there and says goodbye."""
    works = Works()
    async with deployed(tmp_path, works) as served, served.client() as client:
        (await client.put("/sessions/s")).raise_for_status()
        (await client.post("/services/talks/run", params=DETACHED, json={})).raise_for_status()
        async with served.reading("/tasks/t/events") as events:
            await events.until("id: 2")
        (await client.post("/services/works/run", params={"detach": "true"}, json={})).raise_for_status()
        await works.started.wait()
        await served.begin_to_stop()
        async with served.reading("/tasks/t/events", Last_Event_ID="0") as events:
            seen = await events.until("id: 2")
            works.release.set()
            seen += await events.rest()
        assert "event: drain" in seen
        found = ids(seen)
        assert found == list(range(1, len(found) + 1))
