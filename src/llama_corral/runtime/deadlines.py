"""When waiters time out, across snapshots.

Upstream times a waiter once, where it is new, and leaves it out of its snapshots: a resumed run would wait for ever. Ours
carries the time in the `state` of the snapshot. That is the one part of it that upstream takes as it comes, so it also
passes through upstream's own `Context.from_dict`, and upstream's runtime does not mind it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .mailbox import takes_nothing
from .upstream import BrokerState, ContextSerdeError, StepId, StepWorkerWaiter

WaiterKey = tuple[tuple[str, ...], StepId, str]
"""Where the waiter is, its step, its id."""

Deadlines = dict[WaiterKey, float]

_CARRIED = "waiter_deadlines"


def _waiters(state: BrokerState) -> Iterator[tuple[WaiterKey, StepWorkerWaiter[Any]]]:
    # Child brokers are part of no snapshot.
    for step_id, worker in state.workers.items():
        for waiter in worker.collected_waiters:
            yield ((), step_id, waiter.waiter_id), waiter


def carry_deadlines(state: BrokerState, deadlines: Deadlines, into: dict[str, Any]) -> None:
    """Note in a serialized `state` when its waiters time out."""
    carried = [[str(key[1]), key[2], deadlines[key]] for key, _ in _waiters(state) if key in deadlines]
    if carried:
        into[_CARRIED] = carried


def carried_deadlines(serialized_state: dict[str, Any] | None) -> Deadlines:
    """What `carry_deadlines` noted.

    Raises:
        ContextSerdeError: it is something else.
    """
    if not serialized_state:
        return {}
    try:
        return {
            ((), StepId.from_str(step), str(waiter_id)): float(at)
            for step, waiter_id, at in serialized_state.get(_CARRIED, ())
        }
    except (TypeError, ValueError) as exc:
        raise ContextSerdeError(f"the context's {_CARRIED!r} are not what a run has written: {exc}") from exc


def timed_at_once(state: BrokerState, deadlines: Deadlines) -> Deadlines:
    """Of the waiters in a resumed run's state, those that nobody asks again: neither what they required has to be asked
    for, nor is their step's call at work or queued. The others are timed when they have been asked."""
    return {
        key: deadlines[key]
        for key, waiter in _waiters(state)
        if key in deadlines and not takes_nothing(waiter) and not _is_under_way(state, key[1], waiter)
    }


def _is_under_way(state: BrokerState, step_id: StepId, waiter: StepWorkerWaiter[Any]) -> bool:
    worker = state.workers[step_id]
    known = {call.work_item_id for call in worker.in_progress} | {call.work_item_id for call in worker.queue}
    return waiter.work_item_id in known
