"""What a service must know of a workflow besides running it."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from .registry import register
from .upstream import Workflow, step_functions


def workflow_state_type(workflow: Workflow) -> type[Any]:
    """The pydantic type of `ctx.store`."""
    return register(workflow).state_type


def workflow_step_functions(workflow: Workflow) -> dict[str, Any]:
    """The step functions by name."""
    return step_functions(workflow)


def workflow_fingerprint(workflow: Workflow) -> str:
    """A short text that changes when a stored context or checkpoint may no longer fit: with the names of the steps, the
    events that they accept, or the state type."""
    registered = register(workflow)
    shape = {
        "steps": {
            name: sorted(f"{event.__module__}.{event.__qualname__}" for event in spec.config.accepted_events)
            for name, spec in sorted(registered.steps.items())
        },
        "state": f"{registered.state_type.__module__}.{registered.state_type.__qualname__}",
    }
    return hashlib.sha256(json.dumps(shape, sort_keys=True).encode()).hexdigest()[:16]
