"""Steps that do not end though they were cancelled: their tasks end, or are handed back, without them."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from pathlib import Path

import anyio
import anyio.to_thread
import pytest
from workflows import Context, Workflow, step
from workflows.events import Event, StartEvent, StopEvent

from llama_corral.services import execution
from llama_corral.supervision import EXIT_STUCK

from .flows import Progress
from .rig import Gate, Probe, until

pytestmark = [pytest.mark.promise("P1", "P6", "P7")]


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(execution, "UNWINDING_TIME", 0.02)
    monkeypatch.setattr(execution, "HAND_BACK_TIME", 0.02)


async def stubbornly(probe):
    """Wait for the test, whoever cancels it and how."""
    with anyio.CancelScope(shield=True):
        while "work" not in probe.opened:
            try:
                await probe.wait_open("work")
            except anyio.get_cancelled_exc_class():  # noqa: ASYNC103 -- asyncio's own passes the shield
                continue  # noqa: ASYNC104


class Ignores(Workflow):
    """Its step does not heed its cancellation until the test lets it."""

    def __init__(self, probe, **options):
        super().__init__(**{"timeout": None, **options})
        self.probe = probe

    @step
    async def work(self, ev: StartEvent, ctx: Context) -> StopEvent:
        with self.probe.inside("work"):
            if "at once" in self.probe.opened:
                return StopEvent(result="done elsewhere")
            await stubbornly(self.probe)
            ctx.write_event_to_stream(Progress(n=99))
        return StopEvent(result="too late")


class Member(Event):
    n: int


class EndsBeside(Workflow):
    """One step ends the run, the other does not end."""

    def __init__(self, probe):
        super().__init__(timeout=None)
        self.probe = probe

    @step
    async def split(self, ev: StartEvent, ctx: Context) -> Member | None:
        ctx.send_event(Member(n=1))
        ctx.send_event(Member(n=2))
        return None

    @step
    async def work(self, ev: Member) -> StopEvent:
        with self.probe.inside(ev.n):
            if ev.n == 1:
                await self.probe.gate.until(lambda: 2 in self.probe.entered)
                return StopEvent(result="ended")
            await stubbornly(self.probe)
        return StopEvent(result="too late")


async def let_end(service, probe):
    """The step ends at last, for nobody; its slot is free only then."""
    assert service.statistics().working == 1
    probe.open("work")
    await until(lambda: not service.statistics().working)


@pytest.mark.anyio
async def test_a_task_is_cancelled_without_its_step(rig, caplog):
    probe = Probe()
    service = await rig.serve(Ignores(probe))
    task_id = await rig.submit()
    await probe.wait_entered(1)
    with caplog.at_level(logging.WARNING):
        await rig.plane.cancel(task_id)
        record = await rig.result(task_id)
    assert record.status == "cancelled"
    assert any("without its steps" in message for message in caplog.messages)
    await until(lambda: not service.executions)
    await let_end(service, probe)
    assert await rig.plane.get_task(task_id) == record
    assert "Progress" not in [event.type for event in await rig.events(task_id)]


@pytest.mark.anyio
async def test_a_task_times_out_without_its_step(rig):
    probe = Probe()
    service = await rig.serve(Ignores(probe))
    task_id = (await rig.plane.submit("svc", {}, timeout=0.5)).task_id
    record = await rig.result(task_id)
    assert (record.status, record.error.type) == ("timed_out", "TimeoutError")
    await let_end(service, probe)
    assert await rig.plane.get_task(task_id) == record


@pytest.mark.anyio
async def test_a_workflow_times_out_without_its_step(rig):
    probe = Probe()
    service = await rig.serve(Ignores(probe, timeout=0.5))
    record = await rig.run()
    assert (record.status, record.error.type) == ("timed_out", "WorkflowTimeoutError")
    await let_end(service, probe)


@pytest.mark.anyio
async def test_a_task_completes_without_another_step(rig):
    probe = Probe()
    service = await rig.serve(EndsBeside(probe))
    record = await rig.run()
    assert (record.status, record.result) == ("completed", '"ended"')
    await let_end(service, probe)
    assert [event.type for event in await rig.events(record.task_id)] == ["StopEvent"]


@pytest.mark.anyio
@pytest.mark.promise("P2")
async def test_a_task_is_handed_back_before_its_step_ends(rig):
    probe = Probe()
    async with anyio.create_task_group() as tasks:
        service = await rig.serve(Ignores(probe), tasks=tasks, drain_timeout=0)
        task_id = await rig.submit()
        await probe.wait_entered(1)
        service.stop()
        record = await rig.wait_status(task_id, "queued")
        assert (record.owner, record.attempts) == (None, 0)
        assert not rig.ended[service.instance_id].is_set()
        # Another instance does it meanwhile, and the step that goes on here is heard by nobody.
        probe.open("at once")
        await rig.serve(Ignores(probe))
        record = await rig.result(task_id)
        assert (record.result, record.epoch) == ('"done elsewhere"', 2)
        probe.open("work")
        await rig.wait_ended(service)
    assert await rig.plane.get_task(task_id) == record


@pytest.mark.anyio
@pytest.mark.promise("P2")
async def test_a_lost_task_leaves_the_service_though_its_step_goes_on(rig):
    probe = Probe()
    service = await rig.serve(Ignores(probe))
    task_id = await rig.submit()
    await probe.wait_entered(1)
    lost = service.executions[task_id]
    lost.lose()
    await until(lambda: lost.finished.is_set())
    assert task_id not in service.executions
    await let_end(service, probe)
    assert (await rig.plane.get_task(task_id)).event_count == 0


@pytest.mark.anyio
@pytest.mark.parametrize("how", ["drain", "cancel"])
async def test_a_sync_step_that_blocks_is_left_behind(rig, how):
    class Blocks(Workflow):
        @step
        def work(self, ev: StartEvent) -> StopEvent:
            if not entered:
                entered.append(1)
                release.wait(30)
            return StopEvent(result="again")

    entered: list[int] = []
    release = threading.Event()
    service = await rig.serve(Blocks(timeout=None), drain_timeout=0)
    task_id = await rig.submit()
    await until(lambda: entered)
    try:
        if how == "cancel":
            await rig.plane.cancel(task_id)
            assert (await rig.result(task_id)).status == "cancelled"
            return
        await rig.stop(service)
        assert (await rig.plane.get_task(task_id)).status == "queued"
        await rig.serve(Blocks(timeout=None))
        assert (await rig.result(task_id)).result == '"again"'
    finally:
        release.set()


@pytest.mark.anyio
async def test_steps_that_take_a_moment_to_end_are_waited_for(rig, monkeypatch):
    monkeypatch.setattr(execution, "HAND_BACK_TIME", 4.0)
    gate = Gate()

    class Tidies(Workflow):
        @step
        async def work(self, ev: StartEvent) -> StopEvent:
            try:
                gate.entered = True
                gate.changed()
                await anyio.sleep_forever()
            finally:
                with anyio.CancelScope(shield=True):
                    await anyio.lowlevel.checkpoint()
                    gate.tidied = True
            return StopEvent()

    gate.entered = gate.tidied = False
    service = await rig.serve(Tidies(timeout=None), drain_timeout=0)
    task_id = await rig.submit()
    await until(lambda: gate.entered)
    await rig.stop(service)
    assert gate.tidied
    assert (await rig.plane.get_task(task_id)).status == "queued"


@pytest.mark.anyio
async def test_a_cancelled_task_ends_when_its_clean_up_has(rig, monkeypatch):
    # Longer than a hand-back waits: nobody waits for a stop here.
    monkeypatch.setattr(execution, "UNWINDING_TIME", 60.0)
    monkeypatch.setattr(execution, "HAND_BACK_TIME", 0.0)
    probe = Probe()
    await rig.plane.sessions.create("s")
    service = await rig.serve(Ignores(probe))
    task_id = await rig.submit(session="s")
    next_id = await rig.submit(session="s")
    await probe.wait_entered(1)
    cancelled = service.executions[task_id]
    await rig.plane.cancel(task_id)
    await until(lambda: cancelled._ending == "cancel")
    await anyio.wait_all_tasks_blocked()
    assert not cancelled.finished.is_set()
    assert (await rig.plane.get_task(next_id)).status == "held"  # two of a session never work side by side
    probe.open("work", "at once")
    assert (await rig.result(task_id)).status == "cancelled"
    assert (await rig.result(next_id)).status == "completed"


@pytest.mark.anyio
async def test_a_stop_does_not_wait_so_long_for_a_cancelled_task(rig, monkeypatch):
    monkeypatch.setattr(execution, "UNWINDING_TIME", 60.0)
    probe = Probe()
    service = await rig.serve(Ignores(probe), drain_timeout=0.02)
    task_id = await rig.submit()
    await probe.wait_entered(1)
    cancelled = service.executions[task_id]
    await rig.plane.cancel(task_id)
    await until(lambda: cancelled._ending == "cancel")
    service.stop()
    assert (await rig.result(task_id)).status == "cancelled"
    probe.open("work")
    await rig.wait_ended(service)


class Leaves(Workflow):
    """Ends while a run that it has started does not."""

    def __init__(self, probe):
        super().__init__(timeout=None)
        self.probe = probe

    @step
    async def work(self, ev: StartEvent) -> StopEvent:
        Ignores(self.probe).run()
        await self.probe.gate.until(lambda: self.probe.entered)
        return StopEvent(result="ended")


@pytest.mark.anyio
async def test_a_task_completes_without_a_run_that_it_has_started(rig, configuration):
    if configuration == "trio-anyio":
        pytest.skip("there a run is started with run_workflow, and its step waits for it")
    probe = Probe()
    service = await rig.serve(Leaves(probe))
    record = await rig.run()
    assert (record.status, record.result) == ("completed", '"ended"')
    await let_end(service, probe)


@pytest.mark.anyio
async def test_events_that_a_run_takes_no_more_are_not_asked_for_again_and_again(rig, monkeypatch):
    class Counting:
        pulls = 0

        def __getattr__(self, name):
            return getattr(rig.plane, name)

        async def pull(self, *args):
            self.pulls += 1
            return await rig.plane.pull(*args)

    monkeypatch.setattr(execution, "UNWINDING_TIME", 60.0)
    probe, coordinator = Probe(), Counting()
    service = await rig.serve(Ignores(probe), coordinator=coordinator)
    task_id = await rig.submit()
    await probe.wait_entered(1)
    cancelled = service.executions[task_id]
    await rig.plane.cancel(task_id)
    await until(lambda: cancelled._ending == "cancel")
    await rig.answer(task_id)
    await until(lambda: coordinator.pulls > 1)
    for _ in range(20):
        await anyio.wait_all_tasks_blocked()
    assert coordinator.pulls < 5
    probe.open("work")
    assert (await rig.result(task_id)).status == "cancelled"


class Raises(Workflow):
    """Its clean-up fails."""

    def __init__(self, probe):
        super().__init__(timeout=None)
        self.probe = probe

    @step
    async def work(self, ev: StartEvent) -> StopEvent:
        with self.probe.inside("work"):
            try:
                await self.probe.wait_open("work")
            finally:
                if "work" not in self.probe.opened:
                    raise ValueError("no tidy llama")
        return StopEvent(result="done")


@pytest.mark.anyio
@pytest.mark.promise("P2")
async def test_a_clean_up_that_fails_does_not_fail_a_task_that_is_handed_back(rig):
    probe = Probe()
    service = await rig.serve(Raises(probe), drain_timeout=0)
    task_id = await rig.submit()
    await probe.wait_entered(1)
    await rig.stop(service)
    record = await rig.plane.get_task(task_id)
    assert (record.status, record.attempts, record.event_count) == ("queued", 0, 0)
    probe.open("work")
    await rig.serve(Raises(probe))
    assert (await rig.result(task_id)).result == '"done"'


@pytest.mark.anyio
async def test_a_clean_up_that_fails_after_the_deadline(rig):
    probe = Probe()
    await rig.serve(Raises(probe))
    task_id = (await rig.plane.submit("svc", {}, timeout=0.5)).task_id
    record = await rig.result(task_id)
    assert (record.status, record.error.type) == ("timed_out", "TimeoutError")


# The process

PROGRAM = """
import sys, threading, time
import anyio
from workflows import Workflow, step
from workflows.events import StartEvent, StopEvent
from llama_corral.control_plane import ControlPlane, ControlPlaneConfig
from llama_corral.queues.memory import MemoryMessageQueue
from llama_corral.services import WorkflowService, WorkflowServiceConfig
from llama_corral.services import execution
from llama_corral.stores import SqlStore
from llama_corral.supervision import drain_deadline

execution.HAND_BACK_TIME = 0.05
entered = threading.Event()

class Stuck(Workflow):
    @step
    async def ignores(self, ev: StartEvent) -> StopEvent:
        entered.set()
        with anyio.CancelScope(shield=True):
            while True:
                try:
                    await anyio.sleep_forever()
                except anyio.get_cancelled_exc_class():  # asyncio's own passes the shield
                    pass
        return StopEvent()

class Blocked(Workflow):
    @step
    def blocks(self, ev: StartEvent) -> StopEvent:
        entered.set()
        time.sleep(3600)
        return StopEvent()

async def main(kind, url):
    async with SqlStore(url) as store, MemoryMessageQueue() as queue:
        async with ControlPlane(store, queue, config=ControlPlaneConfig(), alone=True) as plane:
            stop = anyio.Event()
            async with drain_deadline(stop, 0.2, margin=0.8):
                workflow = {"ignores": Stuck, "blocks": Blocked}[kind](timeout=None)
                service = WorkflowService(workflow, queue, WorkflowServiceConfig(service_name="svc"), coordinator=plane,
                                          drain_timeout=0.2)
                async with anyio.create_task_group() as tasks:
                    await tasks.start(service.processing_loop)
                    await plane.submit("svc", {}, task_id="t")
                    await anyio.to_thread.run_sync(entered.wait)
                    stop.set()
                    service.stop()
    print("ended")

anyio.run(main, sys.argv[1], sys.argv[2], backend=sys.argv[3])
"""


@pytest.mark.process
@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("kind", "backend"),
    # A blocked thread keeps a process whose loop is asyncio's, as it would without us.
    [("ignores", "trio"), ("ignores", "asyncio"), ("blocks", "trio")],
)
def test_the_process_ends_and_its_task_is_handed_back(tmp_path, kind, backend):
    url = f"sqlite:///{tmp_path}/corral.db"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2] / "src"), *sys.path])}
    command = [sys.executable, "-c", PROGRAM, kind, url, backend]
    done = subprocess.run(command, capture_output=True, text=True, timeout=40, env=env, check=False)
    assert done.returncode == (EXIT_STUCK if kind == "ignores" else 0), done.stderr
    if kind == "ignores":
        assert "in ignores" in done.stderr

    async def look():
        from llama_corral.stores import SqlStore

        async with SqlStore(url) as store:
            return await store.get_task("t")

    record = anyio.run(look)
    assert (record.status, record.owner, record.attempts, record.epoch) == ("queued", None, 0, 1)
