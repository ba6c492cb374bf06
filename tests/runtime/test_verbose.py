"""`verbose=True` says what upstream says, where upstream says it."""

from __future__ import annotations

import logging
import re

import anyio
import pytest
from workflows import Context, Workflow, step
from workflows.events import Event, HumanResponseEvent, InputRequiredEvent, StartEvent, StopEvent

from llama_corral.runtime import open_run, run_workflow

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("nothing_left")]


class Item(Event):
    n: int


class Talks(Workflow):
    @step
    async def start(self, ctx: Context, ev: StartEvent) -> Item | None:
        for n in range(3):
            ctx.send_event(Item(n=n))

    @step(num_workers=1)
    async def work(self, ctx: Context, ev: Item) -> StopEvent | None:
        if ev.n == 2:
            await ctx.wait_for_event(HumanResponseEvent, waiter_event=InputRequiredEvent(prefix="?"))
            return StopEvent(result="done")
        return None


TALK = [
    "[tick] add: StartEvent()",
    "[start:0] started from StartEvent",
    "[work:0] started from Item",
    "[work] enqueued (waiting for capacity)",
    "[work:0] complete with no result",
    "[tick] add: HumanResponseEvent(response='yes')",
    "[result] StopEvent(result='done')",
    "[work:0] complete with StopEvent",
]


async def ours(flavour, **kwargs):
    async with open_run(Talks(verbose=True, **kwargs), flavour=flavour) as run:
        async for event in run.events():
            if isinstance(event, InputRequiredEvent):
                run.send_event(HumanResponseEvent(response="yes"))
        return await run.result()


async def test_it_prints(flavour, capsys):
    assert await ours(flavour) == "done"
    lines = capsys.readouterr().out.splitlines()
    for line in TALK:
        assert line in lines


async def test_it_prints_what_upstream_prints(configuration, flavour, capsys):
    if configuration != "asyncio":
        pytest.skip("upstream's own runtime needs asyncio")
    handler = Talks(verbose=True).run()
    async for event in handler.stream_events():
        if isinstance(event, InputRequiredEvent):
            await handler.send_event(HumanResponseEvent(response="yes"))
    assert await handler == "done"
    theirs = capsys.readouterr().out.splitlines()
    assert await ours(flavour) == "done"
    # Whether an event has to be enqueued depends on how fast the sender is: ours waits for no loop.
    enqueued = "[work] enqueued (waiting for capacity)"
    assert {*capsys.readouterr().out.splitlines(), enqueued} == {*theirs, enqueued}


async def test_it_logs_where_its_logger_listens(flavour, caplog, capsys):
    with caplog.at_level(logging.INFO, logger="workflows.verbose"):
        assert await ours(flavour) == "done"
    assert capsys.readouterr().out == ""
    assert set(TALK) <= set(caplog.messages)


async def test_timeouts_and_cancellations_are_told(flavour, capsys):
    class Slow(Workflow):
        @step
        async def slow(self, ev: StartEvent) -> StopEvent:
            await anyio.sleep_forever()
            return StopEvent()

    with pytest.raises(Exception, match="timed out"):
        await run_workflow(Slow(timeout=0.01, verbose=True), flavour=flavour)
    assert "[tick] timeout: 0.01s" in capsys.readouterr().out
    async with open_run(Slow(verbose=True), flavour=flavour) as run:
        await anyio.wait_all_tasks_blocked()
        run.cancel()
    assert "[tick] cancelled" in capsys.readouterr().out


async def test_silent_by_default(flavour, capsys):
    class Quiet(Workflow):
        @step
        async def start(self, ev: StartEvent) -> StopEvent:
            return StopEvent()

    await run_workflow(Quiet(), flavour=flavour)
    assert not re.search(r"\[", capsys.readouterr().out)
