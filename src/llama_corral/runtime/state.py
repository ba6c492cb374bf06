"""The state store of a run: upstream's in-memory store with a lock that both step flavours can share."""

from __future__ import annotations

import functools
from typing import Any

from ..aio import FlavourLock
from .registry import register
from .serializer import as_context_serializer
from .upstream import (
    BaseSerializer,
    Context,
    DictState,
    InMemoryStateStore,
    PreContext,
    Workflow,
    WorkflowRuntimeError,
    context_with_face,
    infer_state_type,
    is_durable_serialized_state,
    workflow_serializer,
)


class RunStateStore(InMemoryStateStore[Any]):
    """`ctx.store` of a run. Reads are lockless and committed; writers wait for each other, whatever their library."""

    @functools.cached_property
    def _lock(self) -> FlavourLock:  # type: ignore[override]
        return FlavourLock()


class OwnPreContext(PreContext[Any]):
    """Upstream's Context before its run, with a store that works on Trio too."""

    @property
    def store(self) -> RunStateStore:
        if self._store is None:
            state = self._init_snapshot.state
            if state and not is_durable_serialized_state(state):
                store = RunStateStore.from_dict(state, self._serializer)
            else:
                store = RunStateStore(infer_state_type(self._workflow)())
            self._store = store
        assert isinstance(self._store, RunStateStore)
        return self._store


def new_context(
    workflow: Workflow, previous: dict[str, Any] | None = None, serializer: BaseSerializer | None = None
) -> Context[Any]:
    """A Context to start a run with: `Context(workflow)` or `Context.from_dict(workflow, previous)`, except that its
    store can be used before the run in either library. Upstream's own needs an asyncio loop for that.

    Raises:
        ContextSerdeError: `previous` is not what `to_dict()` gave, or does not fit the workflow.
    """
    serializer = as_context_serializer(serializer or workflow_serializer(workflow))
    return context_with_face(OwnPreContext(workflow, previous, serializer))


def fresh_store(state_type: type[Any]) -> RunStateStore:
    """A store with the defaults of the state type."""
    return RunStateStore(state_type())


def open_state(
    workflow: Workflow, serialized: dict[str, Any] | None, serializer: BaseSerializer | None
) -> RunStateStore | None:
    """The store that a run starts with: what a context carries, or the defaults of the workflow's state type. None for
    upstream's own untyped state, which can be made later without a surprise."""
    if not serialized:
        state_type = register(workflow).state_type
        return None if state_type is DictState else fresh_store(state_type)
    if is_durable_serialized_state(serialized):
        kind = serialized.get("store_type")
        raise WorkflowRuntimeError(
            f"the context's state lives in a {kind!r} store; only in-memory state can be resumed"
        )
    store = RunStateStore.from_dict(serialized, serializer or workflow_serializer(workflow))
    assert isinstance(store, RunStateStore)
    return store
