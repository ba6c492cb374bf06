"""The broker's state, reduced in place.

Upstream's reducer copies the whole state at every tick, because upstream may look at the state before the tick again. With
a queue of n events a run costs n copies of n events. A run of ours looks at nothing but its latest state, so what the
reducer takes for copies are the same lists and dictionaries here. What it hands to a step is still a copy: that is a
snapshot by meaning.

Nobody else may keep a state that was handed to the reducer.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from .upstream import BrokerState, InternalStepWorkerState, Workflow, broker_config


class LiveBrokerState(BrokerState):
    """A broker state whose copies share their parts with it."""

    def __post_init__(self) -> None:
        """Nothing to normalize: this state is made from one that was."""

    def deepcopy(self) -> LiveBrokerState:
        # A new object, and not self: for the same object the reducer would make one, at twice the price.
        new = object.__new__(LiveBrokerState)
        new.__dict__.update(self.__dict__)
        return new


class LiveStepState(InternalStepWorkerState):
    """A step's part of the state. Its copy is what a step call gets to see of it: what was collected, and who waits."""

    def _deepcopy(self) -> InternalStepWorkerState:
        return InternalStepWorkerState(
            queue=[],
            config=self.config,
            in_progress=[],
            collected_events={key: list(events) for key, events in self.collected_events.items()},
            collected_waiters=[replace(waiter) for waiter in self.collected_waiters],
        )


def fresh_state(workflow: Workflow) -> LiveBrokerState:
    """The state in which a run without a past starts."""
    config = broker_config(workflow)
    workers: dict[Any, InternalStepWorkerState] = {
        step_id: LiveStepState(queue=[], config=step_config, in_progress=[], collected_events={}, collected_waiters=[])
        for step_id, step_config in config.steps.items()
    }
    return LiveBrokerState(is_running=False, config=config, workers=workers)


def still(state: BrokerState) -> BrokerState:
    """A copy of the state as it is now, for who keeps it."""
    copied = BrokerState.deepcopy(state)
    copied.workers = {step_id: InternalStepWorkerState._deepcopy(worker) for step_id, worker in state.workers.items()}
    return copied


def live(state: BrokerState) -> LiveBrokerState:
    """The state, to be reduced in place from now on. The given object is not to be used any more."""
    if isinstance(state, LiveBrokerState):
        return state
    parts = {field.name: getattr(state, field.name) for field in fields(state)}
    parts["workers"] = {
        step_id: LiveStepState(**{field.name: getattr(worker, field.name) for field in fields(worker)})
        for step_id, worker in state.workers.items()
    }
    parts["children"] = {key: live(child) for key, child in state.children.items()}
    return LiveBrokerState(**parts)
