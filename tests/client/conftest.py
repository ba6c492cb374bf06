"""A whole corral behind real HTTP, in a Trio thread of its own so that clients on both backends meet the same one; and a
proxy in front of it that drops connections where a test wants it.
"""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import anyio
import pytest
import trio
from anyio.from_thread import BlockingPortal, start_blocking_portal
from pydantic import SecretStr
from workflows import Context, Workflow, step
from workflows.events import Event, HumanResponseEvent, InputRequiredEvent, StartEvent, StopEvent

from llama_corral.deploy import Deployment, DeployOptions, deploy_all
from llama_corral.examples.counter import counter
from llama_corral.examples.form import form
from llama_corral.examples.hello import hello
from llama_corral.settings import ServerSettings


class Tick(Event):
    number: int


class Ticking(Workflow):
    """Publishes `events` ticks; with `hold` it then waits for a person, and ends in the way of `ending`."""

    @step
    async def work(self, ctx: Context, ev: StartEvent) -> StopEvent:
        answer = None
        for number in range(ev.get("events", 0)):
            ctx.write_event_to_stream(Tick(number=number))
        if ev.get("hold", False):
            question = InputRequiredEvent(prefix="Go on?")
            answer = (await ctx.wait_for_event(HumanResponseEvent, waiter_event=question, timeout=None)).response
        if ev.get("fail", False):
            raise ValueError("as you wish")
        return StopEvent(result={"events": ev.get("events", 0), "answer": answer})


class Flaky(Workflow):
    """Fails at its first `failures` attempts. The attempts of a task are counted in its process, by `name`."""

    attempts: ClassVar[dict[str, int]] = {}

    @step
    async def work(self, ctx: Context, ev: StartEvent) -> StopEvent:
        number = self.attempts[ev.name] = self.attempts.get(ev.name, 0) + 1
        if number <= ev.failures:
            raise ConnectionResetError(f"attempt {number}")
        return StopEvent(result=number)


class Stuck(Workflow):
    """Works until it is cancelled."""

    @step
    async def work(self, ctx: Context, ev: StartEvent) -> StopEvent:
        ctx.write_event_to_stream(Tick(number=0))
        await anyio.sleep_forever()
        return StopEvent()


WORKFLOWS = {
    "hello": hello,
    "counter": counter,
    "flaky": Flaky(timeout=None),
    "form": form,
    "ticking": Ticking(timeout=None),
    "stuck": Stuck(timeout=None),
}


@asynccontextmanager
async def corral(token: str | None = None) -> AsyncIterator[Deployment]:
    settings = ServerSettings(port=0, token=SecretStr(token) if token else None, graceful_timeout=0.2)
    options = DeployOptions(store_url="sqlite://", settings=settings, step_flavour="anyio", drain_timeout=0.1)
    stop = trio.Event()
    async with trio.open_nursery() as nursery:
        deployment: Deployment = await nursery.start(partial(deploy_all, WORKFLOWS, options, stop=stop))
        yield deployment
        stop.set()


@pytest.fixture(scope="session")
def trio_thread() -> Iterator[BlockingPortal]:
    with start_blocking_portal("trio") as portal:
        yield portal


@pytest.fixture(scope="session")
def url(trio_thread: BlockingPortal) -> Iterator[str]:
    with trio_thread.wrap_async_context_manager(corral()) as deployment:
        yield deployment.url


@pytest.fixture(scope="session")
def locked_url(trio_thread: BlockingPortal) -> Iterator[str]:
    """A corral that wants the token `sesame`."""
    with trio_thread.wrap_async_context_manager(corral("sesame")) as deployment:
        yield deployment.url


@dataclass
class Cutter:
    """A TCP proxy. `after` frames of an event stream, or `answers` of the server, it drops the connection.

    Args:
        after: Frames of server-sent events after which connections are dropped, one connection each; then none is.
        swallow: Answers that are not passed on: the request arrived, and the connection is dropped instead.
    """

    port: int
    after: list[int] = field(default_factory=list)
    swallow: int = 0
    url: str = ""
    cuts: int = 0
    requests: list[bytes] = field(default_factory=list)

    async def serve(self, *, task_status: trio.TaskStatus[None]) -> None:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        self.url = f"http://127.0.0.1:{listener.socket.getsockname()[1]}"
        await trio.serve_listeners(self.handle, [listener], task_status=task_status)

    async def handle(self, client: trio.SocketStream) -> None:
        server = await trio.open_tcp_stream("127.0.0.1", self.port)
        async with client, server, trio.open_nursery() as nursery:
            nursery.start_soon(self.upstream, client, server, nursery.cancel_scope)
            with suppress(trio.BrokenResourceError):
                await self.downstream(server, client)
            nursery.cancel_scope.cancel()

    async def upstream(self, client: trio.SocketStream, server: trio.SocketStream, scope: trio.CancelScope) -> None:
        with suppress(trio.BrokenResourceError):
            async for data in client:
                self.requests.append(data)
                await server.send_all(data)
        scope.cancel()

    async def downstream(self, server: trio.SocketStream, client: trio.SocketStream) -> None:
        seen = b""
        async for data in server:
            if b"text/event-stream" not in seen + data:
                if self.swallow:
                    self.swallow -= 1
                    self.cuts += 1
                    return
                await client.send_all(data)
                continue
            passed = len(seen)
            seen += data
            keep = self.limit(seen)
            await client.send_all(seen[passed:keep])
            if keep is not None:
                self.cuts += 1
                self.after.pop(0)
                return

    def limit(self, seen: bytes) -> int | None:
        """Where to cut what was seen of a stream; None: nowhere yet."""
        if not self.after:
            return None
        at = seen.index(b"\r\n\r\n") + 4
        for _ in range(self.after[0]):
            at = seen.find(b"\n\n", at) + 2
            if at == 1:
                return None
        return at


@pytest.fixture
def cutter(url: str, trio_thread: BlockingPortal) -> Iterator[Cutter]:
    """A proxy in front of the corral."""

    @asynccontextmanager
    async def running() -> AsyncIterator[Cutter]:
        proxy = Cutter(int(url.rpartition(":")[2]))
        async with trio.open_nursery() as nursery:
            await nursery.start(proxy.serve)
            yield proxy
            nursery.cancel_scope.cancel()

    with trio_thread.wrap_async_context_manager(running()) as proxy:
        yield proxy


@pytest.fixture
def free_port() -> Iterator[int]:
    """A port on which nothing listens: it is bound, so that nobody else gets it."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]
