"""`corral serve` killed, stopped and stuck in the middle of its work, and started again on the same file."""

from __future__ import annotations

import re
import signal
from collections import Counter
from functools import partial
from pathlib import Path

import anyio
import pytest

from llama_corral.client import Client, TaskEvent

from .support import answer, check_endings, count_open, each, flows_stack, read_marks, start_named, wait_event

pytestmark = [pytest.mark.process, pytest.mark.trio]


@pytest.mark.promise("P1", "P2", "P3", "P5")
@pytest.mark.timeout(120)
@pytest.mark.parametrize("idle", ["60", "0.05"])  # those who wait are in memory, or not any more
async def test_killed_with_200_tasks_of_which_50_wait_for_a_person(tmp_path: Path, idle: str) -> None:
    options = ("--max-concurrent-tasks", "16", "--idle-timeout", idle)
    async with flows_stack(tmp_path, "steps", "person", options=options) as stack, Client(stack.url) as client:
        people = await start_named(client, "person", 50)
        await each(wait_event, people)
        gate = tmp_path / "gate"
        await check_endings([await client.start("steps", name=f"done-{n}") for n in range(5)])
        first = await client.start("steps", name="first", gate=str(gate))
        await wait_event(first, 2)
        workers = [first, *await start_named(client, "steps", 149, gate=str(gate))]
        assert await count_open(client) == 200
        stack.main.kill()
        await stack.main.wait_exit()

        gate.touch()
        await stack.main.restart()
        await check_endings(workers)
        assert await count_open(client) == 50
        await each(answer, people)
        records = await check_endings(people)
        assert {record.result for record in records.values()} == {f"person-{n}: yes" for n in range(50)}
        # They went on where they waited.
        assert Counter(mark.step for mark in read_marks(tmp_path))["prepare"] == 50
        assert await count_open(client) == 0
        stack.main.terminate()
        assert await stack.main.wait_exit() == 0


@pytest.mark.promise("P1", "P3", "P7")
@pytest.mark.timeout(120)
async def test_stopped_under_load(tmp_path: Path) -> None:
    options = ("--max-concurrent-tasks", "8", "--drain-timeout", "0.3")
    async with flows_stack(tmp_path, "steps", "person", options=options) as stack, Client(stack.url) as client:
        people = await start_named(client, "person", 20)
        await each(wait_event, people)
        quick = await start_named(client, "steps", 60, pause=0.02)
        slow = [await client.start("steps", name=f"slow-{n}", pause=5, task_id=f"slow-{n}") for n in range(2)]
        await quick[10].wait()
        stack.main.terminate()
        assert await stack.main.wait_exit() == 0
        # What worked when the signal came was let finish where that took less than the grace period.
        assert "Traceback" not in stack.main.output

        await stack.main.restart()
        await each(answer, people)
        await check_endings([*quick, *people])
        for task in slow:
            await task.cancel()
            assert (await task.wait()).status == "cancelled"
        assert await count_open(client) == 0


@pytest.mark.promise("P7")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
async def test_a_second_signal_ends_at_once(tmp_path: Path, number: signal.Signals, code: int) -> None:
    async with flows_stack(tmp_path, "steps") as stack, Client(stack.url) as client:
        task = await client.start("steps", name="long", pause=0.5)
        await wait_event(task)
        stack.main.send_signal(number)
        await stack.main.wait_output(f"{number.name}: stopping")
        stack.main.send_signal(number)
        assert await stack.main.wait_exit() == code
        await stack.main.restart()
        await check_endings([task])


@pytest.mark.promise("P1", "P7")
@pytest.mark.parametrize("service", ["blocked", "deaf"])
@pytest.mark.parametrize("flavour", ["asyncio", "anyio"])
async def test_what_cannot_be_cancelled_ends_with_the_process(tmp_path: Path, service: str, flavour: str) -> None:
    options = ("--drain-timeout", "0.2", "--stuck-after", "0.5", "--step-flavour", flavour)
    async with flows_stack(tmp_path, service, options=options) as stack, Client(stack.url) as client:
        task = await client.start(service, name="stuck")
        await wait_event(task)
        stack.main.terminate()
        # A thread that is blocked holds nobody up; a step that goes on and on does.
        assert await stack.main.wait_exit() == (70 if service == "deaf" else 0)
        await stack.main.restart()
        await check_endings([task])
        assert [mark.step for mark in read_marks(tmp_path)] == ["begin", "begin"]


@pytest.mark.promise("P1", "P7")
@pytest.mark.parametrize("again", [False, True])
async def test_a_step_that_blocks_the_event_loop_ends_with_the_process(tmp_path: Path, again: bool) -> None:
    options = ("--drain-timeout", "0.2", "--stuck-after", "0.5" if not again else "60")
    async with flows_stack(tmp_path, "frozen", options=options) as stack:
        async with Client(stack.url) as client, anyio.create_task_group() as tasks:
            tasks.start_soon(partial(client.start, "frozen", name="frozen", task_id="frozen"))
            await stack.main.wait_output(re.compile("^frozen$", re.MULTILINE))
            tasks.cancel_scope.cancel()  # nobody answers any more
        stack.main.terminate()
        if again:
            await stack.main.wait_output("SIGTERM: a step blocks the event loop")
            stack.main.terminate()
        assert await stack.main.wait_exit() == (143 if again else 70)
        assert "in freeze" in stack.main.output  # its stack
        await stack.main.restart()
        async with Client(stack.url) as client:
            await check_endings([client.task("frozen")])


@pytest.mark.promise("P3")
async def test_a_client_reads_on_over_restarts(tmp_path: Path) -> None:
    async with flows_stack(tmp_path, "ticking", options=("--drain-timeout", "0.1")) as stack:
        async with Client(stack.url) as client:
            task = await client.start("ticking", events=200)
            seen: list[TaskEvent] = []
            reached = {50: anyio.Event(), 250: anyio.Event()}

            async def read() -> None:
                async for event in task.events():
                    seen.append(event)
                    if event.index in reached:
                        reached[event.index].set()

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(read)
                await reached[50].wait()
                stack.main.kill()
                await stack.main.restart()
                await reached[250].wait()
                stack.main.terminate()
                assert await stack.main.wait_exit() == 0
                await stack.main.restart()
            await check_endings([task])
    assert [event.index for event in seen] == list(range(len(seen)))
    assert [event.type for event in seen].count("StopEvent") == 1
