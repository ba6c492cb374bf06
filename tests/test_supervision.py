"""Support groups, drain deadline, signals and restarts, on both backends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap

import anyio
import pytest
from anyio.abc import TaskStatus

from llama_corral.supervision import (
    EXIT_STUCK,
    Backoff,
    drain_deadline,
    open_support_group,
    restart,
    stop_on_signal,
    task_stacks,
)

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(10)]


class Helper:
    """Runs until it is cancelled and records when."""

    def __init__(self, log: list[str], name: str = "helper") -> None:
        self.log = log
        self.name = name

    async def __call__(self, *, task_status: TaskStatus[str] = anyio.TASK_STATUS_IGNORED) -> None:
        task_status.started(self.name)
        try:
            await anyio.sleep_forever()
        finally:
            self.log.append(f"{self.name} ended")


@pytest.mark.promise("P6", "P7")
async def test_a_helper_outlives_the_cancelled_body():
    log: list[str] = []
    with anyio.CancelScope() as scope:
        async with open_support_group() as support:
            assert await support.start(Helper(log), name="helper") == "helper"
            scope.cancel()
            try:
                await anyio.sleep_forever()
            finally:
                with anyio.CancelScope(shield=True):
                    await anyio.wait_all_tasks_blocked()
                log.append("body left")
    assert scope.cancelled_caught
    assert log == ["body left", "helper ended"]


async def test_a_helper_crash_cancels_the_body_and_the_error_is_in_a_group():
    async def crash() -> None:
        raise ValueError("publisher broke")

    log: list[str] = []

    async def service() -> None:
        async with open_support_group() as support:
            support.start_soon(Helper(log, "other"), name="other")
            support.start_soon(crash, name="publisher")
            try:
                await anyio.sleep_forever()
            finally:
                log.append("body left")

    with pytest.RaisesGroup(pytest.RaisesExc(ValueError, match="publisher broke")):
        await service()
    assert log == ["body left", "other ended"]


async def test_an_error_of_the_body_is_not_wrapped():
    log: list[str] = []

    async def service() -> None:
        async with open_support_group() as support:
            await support.start(Helper(log), name="helper")
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        await service()
    assert log == ["helper ended"]


async def test_errors_of_body_and_helper_are_reported_together():
    async def fail_at_the_end() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            raise ValueError("helper")

    async def service() -> None:
        async with open_support_group() as support:
            support.start_soon(fail_at_the_end, name="helper")
            await anyio.wait_all_tasks_blocked()
            raise KeyError("body")

    with pytest.RaisesGroup(ValueError, KeyError):
        await service()


@pytest.mark.promise("P1")
async def test_a_helper_with_grace_ends_because_its_channel_was_closed():
    flushed = []
    send, receive = anyio.create_memory_object_stream[int](10)

    async def publisher() -> None:
        async with receive:
            async for item in receive:
                await anyio.lowlevel.checkpoint()
                flushed.append(item)

    with anyio.CancelScope() as scope:
        async with open_support_group() as support, send:
            support.start_soon(publisher, name="publisher", grace=5)
            for item in range(3):
                send.send_nowait(item)
            scope.cancel()
            await anyio.sleep_forever()
    assert flushed == [0, 1, 2]


async def test_grace_is_a_bound():
    log: list[str] = []
    async with open_support_group() as support:
        support.start_soon(Helper(log), name="helper", grace=0.01)
    assert log == ["helper ended"]


async def test_a_start_can_still_be_cancelled():
    async def never_starts(*, task_status: TaskStatus[None]) -> None:
        await anyio.sleep_forever()

    with anyio.move_on_after(0.01) as scope:
        async with open_support_group() as support:
            await support.start(never_starts, name="never")
    assert scope.cancelled_caught


async def test_a_start_that_is_cancelled_in_the_moment_it_succeeds():
    async def helper(*, task_status: TaskStatus[None]) -> None:
        scope.cancel()
        task_status.started()
        await anyio.sleep_forever()

    with anyio.CancelScope() as scope:
        async with open_support_group() as support:
            await support.start(helper, name="helper")
            await anyio.sleep_forever()
    assert scope.cancelled_caught


async def test_an_ended_helper_is_forgotten():
    async def short() -> None:
        await anyio.lowlevel.checkpoint()

    async with open_support_group() as support:
        for _ in range(5):
            support.start_soon(short, name="short")
        await anyio.wait_all_tasks_blocked()
        assert not support._helpers


@pytest.mark.promise("P7")
async def test_drain_cancels_after_the_grace_period():
    stop = anyio.Event()
    stop.set()
    async with drain_deadline(stop, 0.01, exit_process=pytest.fail) as scope:
        await anyio.sleep_forever()
    assert scope.cancelled_caught


async def test_drain_leaves_a_body_alone_that_ends_in_time():
    stop = anyio.Event()
    async with drain_deadline(stop, 5, exit_process=pytest.fail) as scope:
        stop.set()
        await anyio.wait_all_tasks_blocked()
    assert not scope.cancelled_caught


@pytest.mark.promise("P7")
async def test_what_is_stuck_is_logged_with_its_stack_and_the_process_ends(caplog):
    stop, ended = anyio.Event(), anyio.Event()
    codes = []

    def exit_process(code: int) -> None:
        codes.append(code)
        ended.set()

    async def stuck_step() -> None:
        with anyio.CancelScope(shield=True):
            await ended.wait()

    async with drain_deadline(stop, 0.01, margin=0.01, exit_process=exit_process):
        stop.set()
        await stuck_step()
    assert codes == [EXIT_STUCK]
    assert "stuck_step" in caplog.text
    assert "await ended.wait()" in caplog.text


@pytest.mark.promise("P7")
@pytest.mark.process
def test_a_blocked_event_loop_does_not_keep_the_process_alive():
    program = """
        import threading, anyio
        from llama_corral import supervision
        supervision._BLOCKED_MARGIN = 0.05
        async def main():
            stop = anyio.Event()
            async with supervision.drain_deadline(stop, 0.5, margin=0.05):
                stop.set()
                await anyio.wait_all_tasks_blocked()
                threading.Event().wait()
        anyio.run(main, backend="trio")
    """
    ended = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, timeout=40, text=True)
    assert ended.returncode == EXIT_STUCK
    assert "in main" in ended.stderr


async def test_stacks_name_every_task():
    async def waits_here() -> None:
        await anyio.sleep_forever()

    async with anyio.create_task_group() as group:
        group.start_soon(waits_here, name="the waiting one")
        await anyio.wait_all_tasks_blocked()
        text = task_stacks()
        group.cancel_scope.cancel()
    assert "the waiting one" in text
    assert "in waits_here" in text
    assert "wait_task_rescheduled" not in text.partition("the waiting one")[2].partition("\ntask ")[0]


@pytest.mark.promise("P7")
async def test_the_first_signal_stops_and_the_second_ends():
    stop = anyio.Event()
    codes: list[int] = []
    exited = anyio.Event()

    def exit_process(code: int) -> None:
        codes.append(code)
        exited.set()

    async with open_support_group() as support:

        async def watch(*, task_status: TaskStatus[None]) -> None:
            await stop_on_signal(stop, exit_process=exit_process, task_status=task_status)

        await support.start(watch, name="signals")
        os.kill(os.getpid(), signal.SIGTERM)
        await stop.wait()
        assert not codes
        os.kill(os.getpid(), signal.SIGINT)
        await exited.wait()
    assert codes == [130]


def test_delays_double_up_to_the_maximum():
    backoff = Backoff(initial=0.1, maximum=1.0, jitter=lambda: 1.0)
    assert [backoff.delay(n) for n in (1, 2, 3, 4, 5, 500)] == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.0, 1.0])
    assert Backoff(initial=0.1, jitter=lambda: 0.0).delay(1) == pytest.approx(0.05)


async def test_restart_waits_longer_each_time(caplog):
    failures = [OSError("one"), ExceptionGroup("group", [OSError("two")])]
    delays = iter([0.001, 0.002])
    calls = 0

    async def adapter() -> None:
        nonlocal calls
        calls += 1
        if failures:
            raise failures.pop(0)

    await restart(
        adapter, retry_on=OSError, what="the broker", backoff=Backoff(initial=0.001, jitter=lambda: next(delays))
    )
    assert calls == 3
    assert "the broker failed (2 in a row)" in caplog.text


async def test_a_healthy_time_forgives_earlier_failures(caplog):
    outcomes = [OSError(), OSError(), None]

    async def adapter() -> None:
        if (outcome := outcomes.pop(0)) is not None:
            raise outcome

    backoff = Backoff(initial=0.001, healthy_after=0.0, jitter=lambda: 0.0)
    await restart(adapter, retry_on=OSError, what="it", backoff=backoff)
    assert "2 in a row" not in caplog.text


async def test_restart_lets_other_errors_out():
    async def adapter() -> None:
        raise ExceptionGroup("mixed", [OSError(), KeyError("bug")])

    with pytest.RaisesGroup(OSError, KeyError):
        await restart(adapter, retry_on=OSError, what="it")
