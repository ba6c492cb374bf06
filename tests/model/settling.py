"""Everybody alive works off what is due: in the end every accepted task has its ending, and nothing else is left."""

from __future__ import annotations

from typing import Final

from llama_corral.protocol.lifecycle import TaskStatus

from .holding import check_everything, rows
from .world import COMPLETE, Instance, World

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
    await world.reap([each.instance_id for each in world.instances if not each.alive])
    for instance in world.alive():
        await world.heartbeat(instance)
        if not COMPLETE:
            await lose_strays(world, instance)
    for run in world.working():
        await finish(world, run)
    await pass_time(world)
    for ticket in await world.store.due_tickets(now=world.now):
        await world.claim(ticket, worker)
    for life in list(world.promised.lives.values()):
        if life.place == "idle" and life.wake_at is None:  # its person answers at last
            await world.send(life.task.task_id)


async def finish(world: World, run: object) -> None:
    from .world import Run

    assert isinstance(run, Run)
    if run.pending is not None:
        await world.repeat(run)
    if not run.is_over:
        await world.pull(run)
    if not run.is_over:
        await world.say(run, world.ending(run, TaskStatus.COMPLETED))


async def pass_time(world: World) -> None:
    """Sleep until the next timer, as a control plane does."""
    due = await world.store.next_due(world.now) if COMPLETE else world.promised.next_due(world.now)
    world.now = world.now + 1 if due is None else due
    if COMPLETE:
        await world.wake()
    await world.expire()


async def lose_strays(world: World, instance: Instance) -> None:
    held = {(run.task_id, run.claim.epoch) for run in world.working()}
    owned = world.promised.owned_by(instance.instance_id)
    if any((life.task.task_id, life.epoch) not in held for life in owned):
        await world.reap([instance.instance_id])
        await world.register(instance)


async def clear(world: World) -> None:
    """Sessions are deleted, the rest is purged: nothing is left of any task."""
    for session_id in tuple(world.promised.policies):
        await world.delete_session(session_id)
    await check_everything(world)
    if COMPLETE:
        while await world.store.purge(world.now + 1e9, limit=3) == 3:
            pass
        world.promised.lives.clear()
        await check_everything(world)
        for table in ("tasks", "task_events", "task_inbox", "checkpoints", "contexts", "sessions"):
            assert rows(world.store, f"SELECT count(*) FROM corral_{table}") == [(0,)], table
