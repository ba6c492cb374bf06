"""Workers and the core they work for, killed, stopped and stuck at every stage of a task."""

from __future__ import annotations

import json
import signal
import sys
from collections import Counter
from pathlib import Path

import anyio
import pytest

from llama_corral.client import Client
from llama_corral.exceptions import TaskFailed
from llama_corral.testing import Program

from .support import (
    answer,
    check_endings,
    count_open,
    each,
    flows_stack,
    read_marks,
    start_named,
    wait_event,
    wait_type,
)

pytestmark = [pytest.mark.process, pytest.mark.trio]

DYING = Path(__file__).with_name("dying.py")
SHORT_LEASE = ("--heartbeat", "0.3", "--lease", "1.5")
LONG_LEASE = ("--heartbeat", "0.2", "--lease", "20")
EVERY_STEP = ("--checkpoints", "every_step")

STAGES = {
    # Where the first worker dies: how often each of the three steps runs until the task has ended.
    "claim unanswered": (1, 1, 1),
    "claimed": (1, 1, 1),
    "step 1": (2, 1, 1),
    "between steps": (1, None, 1),
    "step 2": (1, 2, 1),
    "step 3": (1, 1, 2),
    "ending unsent": (1, 1, 2),
    "ending unanswered": (1, 1, 1),
}


def name_of(stage: str) -> str:
    return stage.replace(" ", "-")


@pytest.mark.promise("P1", "P2", "P3", "P5")
@pytest.mark.timeout(180)
async def test_a_worker_killed_at_every_stage_of_a_task(tmp_path: Path) -> None:
    targets = {stage: f"{name_of(stage)}={DYING}:steps" for stage in STAGES} | {"waiting": f"waiting={DYING}:person"}
    async with (
        flows_stack(tmp_path, workers=0, options=SHORT_LEASE, worker_options=EVERY_STEP) as stack,
        Client(stack.url) as client,
    ):
        dying: dict[str, Program] = {}
        for stage, target in targets.items():
            dying[stage] = stack.make_worker(targets=[target], environment={"CORRAL_TEST_DIE": stage})
            await dying[stage].launch()
        for worker in dying.values():
            await worker.wait_ready()
        tasks = {
            stage: await client.start(name_of(stage), name=name_of(stage), task_id=name_of(stage)) for stage in targets
        }
        await wait_type(tasks["waiting"], "InputRequiredEvent")
        dying["waiting"].kill()
        for worker in dying.values():
            assert await worker.wait_exit() == -signal.SIGKILL

        await stack.add_worker(targets=list(targets.values()))
        await answer(tasks["waiting"])
        await check_endings(list(tasks.values()))
        runs = Counter((mark.name, mark.step) for mark in read_marks(tmp_path))
        for stage, expected in STAGES.items():
            seen = tuple(runs[name_of(stage), step] for step in "123")
            assert [each for each, wanted in zip(seen, expected, strict=True) if wanted is not None] == [
                wanted for wanted in expected if wanted is not None
            ], (stage, seen)
        assert runs["waiting", "prepare"] == 1
        assert await count_open(client) == 0


@pytest.mark.promise("P1", "P2", "P3")
@pytest.mark.timeout(120)
async def test_the_core_is_killed_and_its_workers_go_on(tmp_path: Path) -> None:
    async with (
        flows_stack(tmp_path, "steps", "person", workers=2, options=LONG_LEASE) as stack,
        Client(stack.url) as client,
    ):
        people = await start_named(client, "person", 5)
        await each(wait_event, people)
        tasks = await start_named(client, "steps", 24, pause=0.3)
        await wait_event(tasks[0], 1)
        stack.main.kill()
        await stack.main.wait_exit()
        await stack.main.restart()
        await check_endings(tasks)
        await each(answer, people)
        await check_endings(people)
        assert [worker.running for worker in stack.workers] == [True, True]
        runs = Counter((mark.name, mark.step) for mark in read_marks(tmp_path) if mark.step in "123")
        assert set(runs.values()) == {1}
        assert len(runs) == 3 * len(tasks)
        stack.main.terminate()  # and it ends although they listen
        assert await stack.main.wait_exit() == 0
        for worker in stack.workers:
            worker.terminate()
            assert await worker.wait_exit() == 0


@pytest.mark.promise("P1", "P2", "P3")
@pytest.mark.timeout(120)
async def test_late_reports_of_an_old_epoch(tmp_path: Path) -> None:
    async with flows_stack(tmp_path, "steps", workers=1, options=SHORT_LEASE) as stack, Client(stack.url) as client:
        (late,) = stack.workers
        (task,) = await start_named(client, "steps", 1, pause=0.5)
        await wait_event(task)
        late.send_signal(signal.SIGSTOP)
        other = await stack.add_worker()
        before = await check_endings([task])
        late.send_signal(signal.SIGCONT)
        await late.wait_output("steps-0")  # it says what it lost
        other.kill()
        await other.wait_exit()
        # It works on, under the same name, and what it said late changed nothing.
        assert await client.run("steps", name="next") == "next"
        assert await check_endings([task]) == before
        assert {mark.pid for mark in read_marks(tmp_path) if mark.name == "next"} == {late.pid}


@pytest.mark.promise("P1", "P2")
@pytest.mark.timeout(120)
async def test_a_task_that_kills_its_worker_every_time(tmp_path: Path) -> None:
    async with (
        flows_stack(tmp_path, "poison", module=DYING, workers=1, options=SHORT_LEASE) as stack,
        Client(stack.url) as client,
    ):
        (worker,) = stack.workers
        task = await client.start("poison", name="bad", deaths=3, task_id="bad")
        for _ in range(3):
            assert await worker.wait_exit() == -signal.SIGKILL
            await worker.restart()
        with pytest.raises(TaskFailed) as caught:
            await task.result()
        assert caught.value.fields["error"].type == "worker_lost"
        assert len(read_marks(tmp_path)) == 3

        listed = json.loads(await corral("tasks", "--status", "failed", "--json", url=stack.url))
        assert [each["task_id"] for each in listed] == ["bad"]
        replayed = json.loads(await corral("retry", "bad", "--json", url=stack.url))
        assert replayed["task_id"] != "bad"
        await check_endings([client.task(replayed["task_id"])])
        assert (await task.status()).status == "failed"


async def corral(*arguments: str, url: str) -> str:
    done = await anyio.run_process([sys.executable, "-m", "llama_corral.cli", *arguments, "--url", url])
    return done.stdout.decode()


@pytest.mark.promise("P1", "P3", "P7")
@pytest.mark.timeout(120)
async def test_a_worker_that_is_stopped_hands_its_tasks_to_the_others(tmp_path: Path) -> None:
    options = ("--drain-timeout", "0.3")
    async with (
        flows_stack(tmp_path, "steps", "person", workers=1, options=LONG_LEASE, worker_options=options) as stack,
        Client(stack.url) as client,
    ):
        (first,) = stack.workers
        people = await start_named(client, "person", 10)
        await each(wait_event, people)
        tasks = await start_named(client, "steps", 30, pause=0.3)
        await wait_event(tasks[0], 1)
        await stack.add_worker()
        first.terminate()
        assert await first.wait_exit() == 0
        assert "Traceback" not in first.output
        # Long before the lease is over: they were handed over.
        await each(answer, people)
        await check_endings([*tasks, *people])
        assert {info.attempts for info in await client.tasks()} == {0}


async def test_a_worker_waits_for_its_core(tmp_path: Path) -> None:
    async with flows_stack(tmp_path, "steps", workers=0) as stack:
        stack.main.terminate()
        await stack.main.wait_exit()
        worker, stopped = stack.make_worker(), stack.make_worker()
        for each_one in (worker, stopped):
            await each_one.launch()
            await each_one.wait_output("waiting for the control plane")
        stopped.terminate()
        assert await stopped.wait_exit() == 0
        await stack.main.restart()
        await worker.wait_ready()
        assert worker.output.count("waiting for the control plane") == 1
        assert f"corral worker ready: steps at {stack.url}" in worker.output
        async with Client(stack.url) as client:
            assert await client.run("steps", name="Ada") == "Ada"


@pytest.mark.promise("P9")
async def test_a_worker_that_is_refused(tmp_path: Path) -> None:
    async with flows_stack(tmp_path, "steps", workers=0, options=("--token", "sesame-open")) as stack:
        for options in (("--token", "wrong"), ()):
            worker = stack.make_worker(*options)
            await worker.launch()
            assert await worker.wait_exit() == 78
            lines = [line for line in worker.output.splitlines() if line.startswith("corral: ")]
            assert len(lines) == 1
            assert "token" in lines[0]
            assert "Traceback" not in worker.output
        right = stack.make_worker(environment={"CORRAL_TOKEN": "sesame-open"})
        await right.start()
        async with Client(stack.url, token="sesame-open") as client:
            assert await client.run("steps", name="Ada") == "Ada"
        assert "sesame-open" not in right.output + stack.main.output


@pytest.mark.promise("P1", "P2")
@pytest.mark.timeout(120)
async def test_workers_join_corral_serve(tmp_path: Path) -> None:
    options = ("--max-concurrent-tasks", "1", *SHORT_LEASE)
    async with flows_stack(tmp_path, "steps", options=options) as stack, Client(stack.url) as client:
        worker = await stack.add_worker()
        tasks = await start_named(client, "steps", 20, pause=0.1)
        await check_endings(tasks)
        assert {mark.pid for mark in read_marks(tmp_path)} == {stack.main.pid, worker.pid}
        tasks = [await client.start("steps", name=f"again-{n}", task_id=f"again-{n}", pause=0.3) for n in range(6)]
        await each(wait_event, tasks[:4])
        worker.kill()
        stack.main.kill()
        await stack.main.restart()
        await check_endings(tasks)
        assert await count_open(client) == 0
