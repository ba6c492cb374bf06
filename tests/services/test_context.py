"""The context of (session, service): versions, failures, conflicts, and state that is not JSON."""

from __future__ import annotations

import pytest
from workflows import Context, Workflow, step
from workflows.events import HumanResponseEvent, InputRequiredEvent, StartEvent, StopEvent

from llama_corral.protocol.records import ContextUpdate, Report, Terminal

from .flows import Counter, Fails
from .rig import until

pytestmark = [pytest.mark.anyio, pytest.mark.promise("P4")]


async def stored(rig, session, service="svc"):
    """The stored context, seen through a claim."""
    return await rig.store._read(_read_context, session, service)


def _read_context(tx, session, service):
    from llama_corral.stores.rows import stored_context

    return stored_context(tx, session, service)[0]


async def test_runs_of_a_session_share_a_context_and_others_do_not(rig):
    await rig.serve(Counter())
    for session in ("a", "b"):
        await rig.plane.sessions.create(session)
    assert [(await rig.run(session="a")).result for _ in range(3)] == ["1", "2", "3"]
    assert (await rig.run(session="b")).result == "1"
    assert (await rig.run()).result == "1"
    assert (await rig.run()).result == "1"


async def test_concurrent_tasks_of_a_session_run_in_order(rig):
    await rig.serve(Counter(), cap=4)
    await rig.plane.sessions.create("s")
    tasks = [await rig.submit(session="s") for _ in range(20)]
    assert [(await rig.result(task_id)).result for task_id in tasks] == [str(n + 1) for n in range(20)]


async def test_two_services_in_one_session_do_not_see_each_others_context(rig):
    await rig.serve(Counter(), "one")
    await rig.serve(Counter(), "two")
    await rig.plane.sessions.create("s")
    results = [(await rig.run(name, session="s")).result for name in ("one", "one", "two", "one", "two")]
    assert results == ["1", "2", "1", "3", "2"]


async def test_a_failed_run_never_replaces_the_last_good_context(rig):
    await rig.serve(Counter())
    await rig.serve(Fails(), "fails")
    await rig.plane.sessions.create("s")
    assert (await rig.run(session="s")).context_saved is True
    failed = await rig.run(session="s", fail=True)
    assert (failed.status, failed.context_saved) == ("failed", None)
    assert (await rig.run(session="s")).result == "2"
    assert (await rig.run("fails", session="s")).status == "failed"
    assert (await rig.run("fails", session="s", fail=False)).result == '"fine"'


async def test_state_that_is_not_json_never_refuses_the_ending(rig):
    await rig.serve(Counter())
    await rig.plane.sessions.create("s")
    await rig.run(session="s")
    record = await rig.run(session="s", odd=True)
    assert (record.status, record.result, record.context_saved) == ("completed", "2", False)
    assert "object" in record.context_error
    assert (await rig.run(session="s")).result == "2"  # the last good context stands


async def test_a_version_conflict_never_refuses_the_ending(rig):
    class Meddling:
        def __init__(self, plane):
            self.plane = plane

        def __getattr__(self, name):
            return getattr(self.plane, name)

        async def report(self, report: Report):
            if report.terminal is not None and report.context is not None:
                behind = ContextUpdate(report.context.based_on + 7, report.context.payload)
                report = Report(
                    report.task_id,
                    report.epoch,
                    report.seq,
                    report.now,
                    report.events,
                    terminal=Terminal(report.terminal.status, report.terminal.result, report.terminal.result_text),
                    context=behind,
                )
            return await self.plane.report(report)

    await rig.serve(Counter(), coordinator=Meddling(rig.plane))
    await rig.plane.sessions.create("s")
    record = await rig.run(session="s")
    assert (record.status, record.context_saved) == ("completed", False)
    assert "version" in record.context_error


class Remembers(Workflow):
    """Keeps names. The slow ones ask first."""

    @step
    async def begin(self, ev: StartEvent, ctx: Context) -> InputRequiredEvent | StopEvent:
        names = [*await ctx.store.get("names", default=[]), ev.name]
        await ctx.store.set("names", names)
        if ev.get("slow", False):
            return InputRequiredEvent(prefix="?")
        return StopEvent(result=names)

    @step
    async def answered(self, ev: HumanResponseEvent, ctx: Context) -> StopEvent:
        return StopEvent(result=await ctx.store.get("names"))


async def test_a_run_that_was_resumed_does_not_overwrite_what_others_saved_meanwhile(rig):
    await rig.serve(Remembers(), idle_timeout=0.01)
    await rig.plane.sessions.create("s", policy="concurrent")
    await rig.run(session="s", name="first")
    slow = await rig.submit(session="s", name="slow", slow=True)
    for _ in range(2):  # it goes in and out of memory

        async def has_left() -> bool:
            record = await rig.plane.get_task(slow)
            return record.status == "waiting" and record.owner is None

        await until(has_left)
        await rig.plane.send_event(slow, '{"type": "InputRequiredEvent", "value": {}}')  # which nothing takes
    assert (await rig.run(session="s", name="quick")).context_saved
    await rig.answer(slow)
    record = await rig.result(slow)
    assert (record.result, record.context_saved) == ('["first","slow"]', False)
    assert "started from version 1" in record.context_error
    assert (await rig.run(session="s", name="last")).result == '["first","quick","last"]'


async def test_a_context_that_does_not_fit_fails_the_task_and_is_kept(rig):
    await rig.serve(Counter())
    await rig.plane.sessions.create("s")
    await rig.run(session="s")
    good = await stored(rig, "s")

    class Broken:
        def __getattr__(self, name):
            return getattr(rig.plane, name)

        async def claim(self, ticket, instance_id, nonce):
            from dataclasses import replace

            claim = await rig.plane.claim(ticket, instance_id, nonce)
            return replace(claim, context=replace(claim.context, payload='["no context"]'))

    other = await rig.serve(Counter(), coordinator=Broken())
    other.reserve = lambda: None
    for service in list(rig.plane._registry._locals["svc"].values()):
        if service is not other:
            await rig.stop(service)
    record = await rig.run(session="s")
    assert record.status == "failed"
    assert await stored(rig, "s") == good
