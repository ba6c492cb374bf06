"""Whether a stored run fits a workflow whose code has changed since."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from .mailbox import can_take
from .registry import register
from .upstream import BrokerState, Event, InputRequiredEvent, TickAddEvent, broker_config, step_accepts_event

if TYPE_CHECKING:
    from .run import Run

_WORK = ("queue", "in_progress", "collected_events", "collected_waiters", "static_collect_events")


def misfits(run: Run, serialized: dict[str, Any]) -> list[str]:
    """Why a run that was made from a serialized Context cannot go on where that one was left; empty if it can.

    Upstream drops work of steps that are gone without a word, and calls steps with events that they no longer take.
    """
    config = broker_config(run.workflow)
    steps = {str(step_id) for step_id in config.steps}
    found = [
        f"step {name!r}, which had work to do, is gone"
        for name, worker in serialized["workers"].items()
        if name not in steps and any(worker.get(part) for part in _WORK)
    ]
    found += [
        f"step {delivery['step_id']!r}, to which an event was sent, is gone"
        for delivery in serialized.get("deliveries", ())
        if delivery.get("step_id") is not None and delivery["step_id"] not in steps
    ]
    found += [
        f"step {stream['source_step']!r}, whose events are being collected, is gone"
        for stream in serialized.get("streams", {}).values()
        if stream["source_step"] not in steps
    ]
    found += [
        f"nothing collects {release['binding_id']} any more"
        for release in serialized.get("collection_release_states", {}).values()
        if not release["released"] and release["binding_id"] not in config.collection_bindings
    ]
    return [*found, *_untaken(run.broker_state), *_other_state(run, serialized)]


def _untaken(state: BrokerState) -> Iterator[str]:
    for step_id, worker in state.workers.items():
        calls: list[Any] = [*worker.queue, *worker.in_progress]
        for call in calls:
            if _is_plain(call) and not step_accepts_event(
                call.event, worker.config.accepted_events, allow_subclasses=worker.config.accept_event_subclasses
            ):
                yield f"step {str(step_id)!r} does not take {_name(call.event)} any more"
    for delivery in state.deliveries.values():
        wanted = isinstance(delivery.event, InputRequiredEvent) or can_take(
            state, TickAddEvent(event=delivery.event, step_id=delivery.step_id)
        )
        # Members of a list may be collected as they are; that is looked at above.
        if not wanted and not delivery.scope_path:
            yield f"no step takes {_name(delivery.event)} any more"


def _is_plain(call: Any) -> bool:
    """Whether the call's event is what the step's signature takes."""
    shared = getattr(call, "shared_state", call)
    return call.bound_events is None and shared.collection_release_payload is None


def _other_state(run: Run, serialized: dict[str, Any]) -> Iterator[str]:
    state = serialized.get("state") or {}
    stored = f"{state.get('state_module')}.{state.get('state_type')}"
    expected = register(run.workflow).state_type
    if state and stored != f"{expected.__module__}.{expected.__name__}":
        yield f"its state is a {stored}, and the workflow's is a {expected.__module__}.{expected.__name__}"


def _name(event: Event) -> str:
    return type(event).__name__
