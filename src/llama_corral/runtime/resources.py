"""Resources that steps ask for by annotation, safe for runs that resolve them at the same time.

Upstream's manager keeps the chain of resources being resolved in one list for all runs, so that concurrent runs of a
workflow with an async resource accuse each other of a circular dependency. Here the chain belongs to one resolution,
and a cached resource is made once: whoever comes second waits for the first. Waiting while holding what others wait for
follows the declared dependencies, so it cannot deadlock once those are known to have no circle.
"""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import Any

from ..aio import FlavourLock, kept_tasks
from .upstream import StepConfig, WeakIdentityKeyDictionary, Workflow, workflow_resources

_locks: WeakIdentityKeyDictionary[Workflow, dict[str, FlavourLock]] = WeakIdentityKeyDictionary()


class ResourceScope:
    """One resolution: what upstream's descriptors call `manager`. Uncached resources are made once a scope."""

    def __init__(self, workflow: Workflow, chain: tuple[str, ...] = (), made: dict[str, Any] | None = None) -> None:
        self._workflow = workflow
        self._chain = chain
        self._made: dict[str, Any] = {} if made is None else made

    async def get(self, resource: Any) -> Any:
        """The resource's value.

        Raises:
            ValueError: the resources depend on each other in a circle.
        """
        name = resource.name
        shared = workflow_resources(self._workflow)
        if not self._chain and name not in shared:
            _refuse_circles(resource, shared, ())
        if name in self._chain:  # not declared: a descriptor of an own class asked for it
            raise _circle((*self._chain, name))
        async with AsyncExitStack() as stack:
            if resource.cache:
                if name in shared:
                    return shared[name]
                await stack.enter_async_context(self._lock(name).acquire_write())
                if name in shared:
                    return shared[name]
                # What is shared outlives the step that happens to make it, with the tasks that it lives by.
                stack.enter_context(kept_tasks())
            elif name in self._made:
                return self._made[name]
            value = await resource.resolve(ResourceScope(self._workflow, (*self._chain, name), self._made))
            if resource.cache:
                shared[name] = value
            self._made[name] = value
            return value

    def _lock(self, name: str) -> FlavourLock:
        locks = _locks.get(self._workflow)
        if locks is None:
            locks = _locks[self._workflow] = {}
        return locks.setdefault(name, FlavourLock())


def _refuse_circles(resource: Any, shared: dict[str, Any], chain: tuple[str, ...]) -> None:
    name = resource.name
    if name in chain:
        raise _circle((*chain, name))
    if name in shared:
        return
    for _, dependency, _ in resource.get_dependencies():
        _refuse_circles(dependency, shared, (*chain, name))


def _circle(chain: tuple[str, ...]) -> ValueError:
    return ValueError(f"Circular resource dependency detected: {' -> '.join(chain)}")


async def resolve_resources(workflow: Workflow, config: StepConfig) -> dict[str, Any]:
    """The resource arguments of a step, by parameter name."""
    scope = ResourceScope(workflow)
    resolved: dict[str, Any] = {}
    for wanted in config.resources:
        wanted.resource.set_type_annotation(wanted.type_annotation)
        resolved[wanted.name] = await scope.get(wanted.resource)
    return resolved
