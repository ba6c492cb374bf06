"""The state store of a run: upstream's in-memory store with a lock that both step flavours can share."""

from __future__ import annotations

import functools
from typing import Any

from ..aio import FlavourLock
from .upstream import (
    InMemoryStateStore,
    PreContext,
    Workflow,
    WorkflowRuntimeError,
    is_durable_serialized_state,
    workflow_serializer,
)


class RunStateStore(InMemoryStateStore[Any]):
    """`ctx.store` of a run. Reads are lockless and committed; writers wait for each other, whatever their library."""

    @functools.cached_property
    def _lock(self) -> FlavourLock:  # type: ignore[override]
        return FlavourLock()


def open_state(workflow: Workflow, state_type: type[Any], pre: PreContext[Any] | None) -> RunStateStore:
    """The store that a run starts with: what the context carries, or the defaults of the workflow's state type."""
    serialized = pre.serialized_state if pre is not None else None
    if not serialized:
        return RunStateStore(state_type())
    if is_durable_serialized_state(serialized):
        kind = serialized.get("store_type")
        raise WorkflowRuntimeError(
            f"the context's state lives in a {kind!r} store; only in-memory state can be resumed"
        )
    serializer = pre.serializer if pre is not None else workflow_serializer(workflow)
    store = RunStateStore.from_dict(serialized, serializer)
    assert isinstance(store, RunStateStore)
    return store
