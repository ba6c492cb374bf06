"""Everybody alive works off what is due: in the end every accepted task has its ending, and nothing else is left."""

from __future__ import annotations

from typing import Final

from llama_corral.protocol.lifecycle import TaskStatus

from .holding import check_everything, rows
from .world import Run, World

ROUNDS: Final = 60


async def settle(world: World) -> None:
    """No faults any more: calls are answered, the dead are missed, clocks go on."""
    for _ in range(ROUNDS):
        if not any(life.is_open for life in world.promised.lives.values()):
            break
        await one_round(world)
        await check_everything(world)
    left = {task_id: life for task_id, life in world.promised.lives.items() if life.is_open}
    assert not left, f"without an ending: {left}"


async def one_round(world: World) -> None:
    while world.unheard_accepts:
        await world.repeat_accept(0)
    while world.unheard_claims:
        await world.repeat_claim(0)
    world.tickets.clear()  # those that come do no harm, those that do not come are due
    worker = (world.alive() or [await world.start_instance()])[0]
    alive = {instance.instance_id for instance in world.alive()}
    await world.reap(sorted(await world.missed_when_silent() - alive))
    for instance in world.alive():
        await world.heartbeat(instance)
    for run in world.working():
        await finish(world, run)
    await pass_time(world)
    for ticket in await world.store.due_tickets(now=world.now):
        await world.claim(ticket, worker)
    for life in list(world.promised.lives.values()):
        if life.place == "idle" and life.wake_at is None:  # its person answers at last
            await world.send(life.task.task_id)


async def finish(world: World, run: Run) -> None:
    if run.pending is not None:
        await world.repeat(run)
    if not run.is_over:
        await world.pull(run)
    if not run.is_over:
        await world.say(run, world.ending(run, TaskStatus.COMPLETED))


async def pass_time(world: World) -> None:
    """Sleep until the next timer, as a control plane does."""
    due = await world.store.next_due(world.now)
    world.now = world.now + 1 if due is None else due
    await world.wake()
    await world.expire()


async def clear(world: World) -> None:
    """Sessions are deleted, the rest is purged: nothing is left of any task."""
    for session_id in tuple(world.promised.policies):
        await world.delete_session(session_id)
    await check_everything(world)
    world.now = max(life.finished_at or 0 for life in world.promised.lives.values()) if world.promised.lives else 0
    while world.promised.lives:
        await world.purge(-1.0, limit=3)
    await check_everything(world)
    for table in ("tasks", "task_events", "task_inbox", "checkpoints", "contexts", "sessions"):
        assert rows(world.store, f"SELECT count(*) FROM corral_{table}") == [(0,)], table
