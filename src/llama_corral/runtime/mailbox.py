"""Events from outside of a run: who can take one now, and keeping those that nobody can take yet.

Upstream drops an event that comes before its waiter, and lets a second event overwrite the first where two come before
the step has looked at its waiter. Whoever answers a run from outside cannot know when it asks, so here an event waits
until somebody can take it, and a waiter gets one event.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from .upstream import (
    AddWaiter,
    BrokerState,
    CommandRunWorker,
    Event,
    StepId,
    StepWorkerFailed,
    StepWorkerWaiter,
    TickAddEvent,
    TickStepResult,
    UnhandledEvent,
    WorkflowCommand,
    event_matches,
    step_accepts_event,
)


@dataclass(frozen=True, slots=True)
class FromOutside:
    """An event from outside of the run, on its way to the reducer."""

    tick: TickAddEvent


def can_take(state: BrokerState, tick: TickAddEvent) -> bool:
    """Whether a step accepts the event, or a waiter that has no event yet matches it."""
    for step_id, config in state.config.steps.items():
        subclasses = config.accept_event_subclasses
        if (tick.step_id is None or tick.step_id == step_id) and step_accepts_event(
            tick.event, config.accepted_events, allow_subclasses=subclasses
        ):
            return True
        if _waits_for(state, step_id, tick.event, subclasses):
            return True
    return False


def _waits_for(state: BrokerState, step_id: StepId, event: Event, subclasses: bool) -> bool:
    for waiter in state.workers[step_id].collected_waiters:
        if takes_nothing(waiter):
            continue
        if event_matches(event, waiter.waiting_for_event, allow_subclasses=subclasses) and all(
            getattr(event, name, None) == value for name, value in waiter.requirements.items()
        ):
            return True
    return False


def takes_nothing(waiter: StepWorkerWaiter[Any]) -> bool:
    """Whether the waiter has its event, or has timed out, or is one of a resumed run that has yet to ask its step what
    it required: snapshots leave that out."""
    if waiter.resolved_event is not None or waiter.timed_out:
        return True
    return bool(waiter.has_requirements and not waiter.requirements)


class _Answered(Event):
    """What a waiter that takes nothing waits for while an event is routed: nothing."""


Hidden = list[tuple[StepId, str, type[Event]]]


def hide_answered(state: BrokerState) -> Hidden:
    """Keep waiters that take nothing (now) from taking the next event.

    Upstream would overwrite an answer and start the step once more, which loses one where a step asks twice, and would
    give a resumed waiter the first event of its type, whatever it required. `show_answered` must follow, in sync code,
    on whatever state the reducer made of this one.
    """
    hidden: Hidden = []
    for step_id, worker in state.workers.items():
        for waiter in worker.collected_waiters:
            if takes_nothing(waiter):
                hidden.append((step_id, waiter.waiter_id, waiter.waiting_for_event))
                waiter.waiting_for_event = _Answered
    return hidden


def show_answered(state: BrokerState, hidden: Hidden) -> None:
    """Undo `hide_answered`."""
    for step_id, waiter_id, waited_for in hidden:
        worker = state.workers[step_id]
        snapshots = (execution.shared_state.collected_waiters for execution in worker.in_progress)
        for waiter in chain(worker.collected_waiters, *snapshots):
            if waiter.waiter_id == waiter_id and waiter.waiting_for_event is _Answered:
                waiter.waiting_for_event = waited_for


def has_failed_for_good(tick: TickStepResult) -> bool:
    """Whether a step's call failed and is not tried again."""
    return any(
        isinstance(result, StepWorkerFailed)
        and result.retry_decision is not None
        and result.retry_decision.delay is None
        for result in tick.result
    )


def has_completed(tick: TickStepResult, commands: Sequence[WorkflowCommand]) -> bool:
    """Whether a step's call is over with this: it does not wait for an event, and is not tried or started again."""
    if any(isinstance(result, AddWaiter) for result in tick.result):
        return False
    if any(isinstance(result, StepWorkerFailed) for result in tick.result) and not has_failed_for_good(tick):
        return False
    # A call that looked at a buffer of collected events which has changed meanwhile is started again, in its place.
    return not any(
        isinstance(command, CommandRunWorker)
        and command.step_id == tick.step_id
        and command.id == tick.worker_id
        and command.event is tick.event
        for command in commands
    )


def forget_waiter(state: BrokerState, step_id: StepId, waiter_id: str) -> None:
    """Take a waiter out of the state whose step has had its answer, or given up.

    Upstream keeps it where the step failed, for a retry. Without one it would stay, and in a resumed run, which does not
    know that it had timed out, take an answer and start the step again beside its error handler.
    """
    waiters = state.workers[step_id].collected_waiters
    waiters[:] = [waiter for waiter in waiters if waiter.waiter_id != waiter_id]


class Held:
    """Outside events that nothing can take yet, in the order in which they came."""

    __slots__ = ("_items", "look_again")

    def __init__(self) -> None:
        self._items: deque[FromOutside] = deque()
        self.look_again = False
        """Set where a waiter was added: one of the events may be for it."""

    def __len__(self) -> int:
        return len(self._items)

    def add(self, item: FromOutside) -> None:
        self._items.append(item)

    def events(self) -> list[Event]:
        return [item.tick.event for item in self._items]

    def take(self, state: BrokerState) -> FromOutside | None:
        """Remove and return the first event that can be taken now. None, until `look_again`, if there is none."""
        if self.look_again:
            for index, item in enumerate(self._items):
                if can_take(state, item.tick):
                    del self._items[index]
                    return item
            self.look_again = False
        return None

    def take_all(self) -> list[FromOutside]:
        """Remove and return what is left: the run has ended."""
        items = list(self._items)
        self._items.clear()
        return items


def unhandled(tick: TickAddEvent, *, idle: bool) -> UnhandledEvent:
    """What upstream's broker publishes about an event that nothing took."""
    cls = type(tick.event)
    return UnhandledEvent(
        event_type=cls.__name__,
        qualified_name=f"{cls.__module__}.{cls.__name__}",
        step_name=str(tick.step_id) if tick.step_id else None,
        idle=idle,
    )
